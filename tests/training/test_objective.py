"""Distributions of timesteps, weights and losses against closed forms and the definitions of the papers."""

import csv
import io
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from ztsnr.samplers import NoiseSchedule, ZTSNRWarning
from ztsnr.samplers.prediction import to_denoised
from ztsnr.training.objective import Objective, ObjectiveSettings

T = 999


def objective(**settings):
    return Objective(ObjectiveSettings(**settings))


def plain(**settings):
    """Without what is mixed in beside."""
    return objective(terminal_probability=0.0, high_noise_share=0.0, **settings)


def abar_of_the_paper(zero_terminal_snr=True):
    """alphas_cumprod of SDXL in NumPy, rescaled as arXiv 2305.08891 writes its Algorithm 1."""
    root = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    if zero_terminal_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


def snr_of_the_paper(zero_terminal_snr=True):
    abar = abar_of_the_paper(zero_terminal_snr)
    return abar / (1 - abar)


def pictures(batch=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 4, 8, 8, generator=random).unbind()


# ----------------------------------------------------------------------------------------------------------------------
# Which timesteps are drawn


def test_uniform():
    np.testing.assert_allclose(plain(timesteps="uniform").probability, 1 / 1000, rtol=1e-12)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (0.8, 0.6), (-1.0, 2.0)])
def test_logit_normal_has_the_mass_of_a_logistic_normal_variable(mean, scale):
    found = plain(timesteps="logit_normal", timesteps_mean=mean, timesteps_scale=scale).probability.numpy()

    # u = sigmoid(z), z normal (arXiv 2403.03206, eq. 19); timestep t has the share of u in [t, t + 1) / 1000
    def density(u):
        return stats.norm.pdf(math.log(u / (1 - u)), mean, scale) / (u * (1 - u))

    for t in (1, 100, 500, 731, 998):
        mass, _ = integrate.quad(density, t / 1000, (t + 1) / 1000, epsabs=1e-14)
        assert found[t] == pytest.approx(mass, rel=1e-9)
    edge = stats.norm.cdf(math.log(0.999 / 0.001), mean, scale)
    assert found[T] == pytest.approx(1 - edge, rel=1e-9)
    assert found.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.5), (0.0, 1.0), (-2.0, 3.0)])
def test_laplace_has_the_mass_of_a_laplace_density_in_log_snr(mean, scale):
    made = plain(timesteps="laplace", timesteps_mean=mean, timesteps_scale=scale)
    found = made.probability.numpy()

    # p(lambda) = exp(-|lambda - mean| / b) / 2b, lambda = log SNR (arXiv 2407.03297, table 1)
    def density(log_snr):
        return math.exp(-abs(log_snr - mean) / scale) / (2 * scale)

    def log_snr(t):
        return -2 * math.log(made.schedule.sigma(t))

    for t in (1, 50, 300, 500, 640, 900, 997):
        low, high = log_snr(t + 0.5), log_snr(t - 0.5)
        inside = [mean] if low < mean < high else None  # where the density has a corner
        mass, _ = integrate.quad(density, low, high, points=inside, epsabs=1e-15)
        assert found[t] == pytest.approx(mass, rel=1e-8)
    beyond, _ = integrate.quad(density, -np.inf, log_snr(T - 0.5))
    assert found[T] == pytest.approx(beyond, rel=1e-6)
    assert found.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal", "laplace"])
def test_the_last_timestep_has_a_probability_beside(timesteps):
    without = plain(timesteps=timesteps).probability
    mixed = objective(timesteps=timesteps, high_noise_share=0.0, terminal_probability=0.25).probability
    expected = 0.75 * without
    expected[-1] += 0.25
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=0)


def test_a_stratified_draw_has_one_timestep_in_each_part_of_the_distribution():
    made = objective(timesteps="logit_normal", high_noise_share=0.03)
    batch = 64
    ends = made.probability.cumsum(0)
    starts = ends - made.probability
    seen = set()
    for step in range(20):
        t = made.draw_timesteps(seed=3, epoch=1, step=step, batch_size=batch)
        t = t.sort().values
        # a part is [i, i + 1) / batch of the distribution; the i-th timestep must touch the i-th part
        for i, one in enumerate(t.tolist()):
            assert starts[one] < (i + 1) / batch + 1e-12
            assert ends[one] > i / batch - 1e-12
        seen.add(tuple(t.tolist()))
    assert len(seen) == 20


@pytest.mark.parametrize("stratified", [True, False])
def test_draws_are_unbiased_at_every_place_of_the_batch(stratified):
    made = objective(stratified=stratified, timesteps="laplace", terminal_probability=0.1)
    draws = torch.stack([made.draw_timesteps(0, 0, step, 4) for step in range(5000)])
    bins = torch.tensor([200, 400, 600, 800, 999])
    cumulative = torch.cat([made.probability.new_zeros(1), made.probability.cumsum(0)])
    edges = torch.tensor([0, 200, 400, 600, 800, 999, 1000])
    expected = 5000 * cumulative[edges].diff()
    for place in range(4):  # what a rank gets is a strided part of the batch
        counts = torch.bincount(torch.bucketize(draws[:, place].contiguous(), bins, right=True), minlength=6)
        assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-4


def test_timesteps_and_noise_depend_on_seed_epoch_and_step_alone():
    made = objective()
    t = made.draw_timesteps(5, 2, 11, 16)
    assert torch.equal(t, made.draw_timesteps(5, 2, 11, 16))
    for other in ((6, 2, 11), (5, 3, 11), (5, 2, 12)):
        assert not torch.equal(t, made.draw_timesteps(*other, 16))

    shape = (4, 8, 8)
    whole = made.draw_noise(shape, range(8), 5, 2, 11)
    shares = [made.draw_noise(shape, range(rank, 8, 4), 5, 2, 11) for rank in range(4)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), whole)  # each rank has every fourth picture
    assert not torch.equal(whole, made.draw_noise(shape, range(8), 5, 2, 12))
    assert whole.mean().abs() < 4 / whole.numel() ** 0.5
    assert whole.std() == pytest.approx(1, abs=0.05)


def test_offset_noise_has_a_mean_of_its_own_in_each_channel():
    with pytest.warns(ZTSNRWarning, match="leave noise_offset at 0"):
        made = objective(noise_offset=0.5)
    without = objective()
    shape = (4, 16, 16)
    difference = made.draw_noise(shape, range(400), 0, 0, 0) - without.draw_noise(shape, range(400), 0, 0, 0)
    levels = difference.mean((2, 3))
    torch.testing.assert_close(difference, levels[..., None, None].expand_as(difference), rtol=0, atol=1e-6)
    assert levels.std() == pytest.approx(0.5, rel=0.06)  # of 1600 numbers


def test_offset_noise_with_epsilon_is_no_mistake():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(prediction_type="epsilon", zero_terminal_snr=False, noise_offset=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "epsilon"])
def test_min_snr_weighs_every_prediction_as_x0_is_weighed(prediction_type, gamma):
    zero = prediction_type != "epsilon"
    made = plain(prediction_type=prediction_type, zero_terminal_snr=zero, weighting="min_snr", min_snr_gamma=gamma)
    snr = snr_of_the_paper(zero)
    of_x0 = np.minimum(snr, gamma)  # arXiv 2303.09556, section 3.4
    x0_per_output = {"sample": 1.0, "v_prediction": 1 / (snr + 1), "epsilon": 1 / np.maximum(snr, 1e-300)}
    np.testing.assert_allclose(made.weight, of_x0 * x0_per_output[prediction_type], rtol=1e-9)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "epsilon"])
def test_debiased_weighs_the_error_of_epsilon_by_one_over_the_root_of_snr(prediction_type):
    """The same loss whatever is predicted: one answer, written as epsilon, v or x0, costs the same."""
    zero = prediction_type != "epsilon"
    made = plain(prediction_type=prediction_type, zero_terminal_snr=zero, weighting="debiased")
    x0, noise = (tensor.double() for tensor in pictures())
    guess = torch.randn(x0.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)  # of epsilon
    abar = abar_of_the_paper(zero)
    for t in (1, 300, 700, 950, 998):
        alpha, s = math.sqrt(abar[t]), math.sqrt(1 - abar[t])
        noisy = alpha * x0 + s * noise
        as_x0 = (noisy - s * guess) / alpha
        output = {"epsilon": guess, "sample": as_x0, "v_prediction": alpha * guess - s * as_x0}[prediction_type]
        losses, _ = made.losses(output, x0.float(), noise.float(), torch.full((len(x0),), t))
        expected = (guess - noise).square().flatten(1).mean(1) / math.sqrt(abar[t] / (1 - abar[t]))
        torch.testing.assert_close(losses.double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("weighting", ["constant", "learned"])
def test_no_weights(weighting):
    assert (plain(weighting=weighting).weight == 1).all()


def test_snr_is_taken_after_the_rescale():
    """The other way round v at t = T would have the weight of SNR 1/213, and at t = 900 about four times its own."""
    made, before = plain(), plain(zero_terminal_snr=False)
    assert made.weight[T] == 0
    snr = snr_of_the_paper(zero_terminal_snr=False)[T]
    assert before.weight[T] == pytest.approx(snr / (snr + 1), rel=1e-9)
    assert before.weight[900] / made.weight[900] > 4


def test_without_a_floor_the_noisy_tenth_has_three_hundredths_of_a_percent():
    """The number of published fact, from the formulas alone."""
    snr = snr_of_the_paper()
    weight = np.minimum(snr, 5) / (snr + 1)
    share = weight[900:].sum() / weight.sum()
    assert round(100 * share, 2) == 0.03
    made = plain()
    assert made.floor == 0
    assert made.high_noise_share == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal", "laplace"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_the_share_of_high_noise_is_what_the_settings_say(prediction_type, timesteps, weighting):
    made = objective(prediction_type=prediction_type, timesteps=timesteps, weighting=weighting, high_noise_share=0.02)
    rows = list(csv.DictReader(io.StringIO(made.to_csv())))  # as it is saved
    high = sum(float(row["probability"]) * float(row["weight"]) for row in rows if int(row["t"]) >= 900)
    everything = sum(float(row["probability"]) * float(row["weight"]) for row in rows)
    assert high / everything == pytest.approx(0.02, abs=1e-9)
    assert made.high_noise_share == pytest.approx(0.02, abs=1e-9)
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-12)
    # the floor is under the noisy half alone, and nothing has less
    free = objective(
        prediction_type=prediction_type, timesteps=timesteps, weighting=weighting, high_noise_share=0.0
    ).weight
    noisy = made.schedule.alphas_cumprod < 0.5
    assert torch.equal(made.weight[~noisy], free[~noisy])
    torch.testing.assert_close(made.weight[noisy], free[noisy].clamp(min=made.floor), rtol=0, atol=0)


def test_no_floor_where_there_is_enough_without():
    made = objective(weighting="constant", high_noise_share=0.1)
    assert made.floor == 0
    assert made.high_noise_share == pytest.approx(0.1 * 0.98 + 0.02, abs=1e-12)


def test_a_share_that_cannot_be_reached_is_refused():
    with pytest.raises(ValueError, match=r"high_noise_share = 0\.5 cannot be reached.*raise terminal_probability"):
        objective(high_noise_share=0.5)
    assert objective(high_noise_share=0.5, terminal_probability=0.45).high_noise_share == pytest.approx(0.5, abs=1e-9)


def test_weights_do_not_move_the_minimum():
    """At each timestep the best answer is the mean of the targets, whatever it costs to miss it."""
    x0, _ = pictures(batch=512)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    x0 = 0.5 * x0 + 0.3
    t = torch.full((len(x0),), T)
    for weighting in ("min_snr", "debiased", "constant", "learned"):
        made = objective(weighting=weighting)
        answer = torch.zeros(1, 4, 8, 8, requires_grad=True)
        losses, _ = made.losses(answer.expand_as(x0), x0, noise, t)
        (gradient,) = torch.autograd.grad(losses.mean(), answer)
        # the loss is quadratic in the answer: one step of Newton's leads to its minimum
        minimum = -gradient / (2 * made.weight[T].item() / answer[0].numel())
        torch.testing.assert_close(minimum, -x0.mean(0, keepdim=True), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The schedule


def test_doubling_the_length_doubles_every_sigma():
    t = torch.arange(1000.0)
    plain_sigmas, shifted = (
        objective(zero_terminal_snr=False, schedule_shift=shift).schedule.sigma(t) for shift in (1, 2)
    )
    torch.testing.assert_close(shifted, 2 * plain_sigmas, rtol=1e-11, atol=0)
    abar = abar_of_the_paper()
    expected = 2 * np.sqrt((1 - abar[:-1]) / abar[:-1])
    rescaled = objective(schedule_shift=2.0).schedule
    np.testing.assert_allclose(rescaled.sigma(torch.arange(999.0)), expected, rtol=1e-9)
    assert rescaled.sigma_max == math.inf


def test_another_schedule_than_stable_diffusions():
    betas = torch.linspace(1e-4, 2e-2, 100, dtype=torch.float64)
    made = Objective(ObjectiveSettings(zero_terminal_snr=False), NoiseSchedule.from_betas(betas))
    torch.testing.assert_close(made.schedule.alphas_cumprod, (1 - betas).cumprod(0), rtol=1e-12, atol=0)
    assert len(made.probability) == 100
    assert made.high_noise_share == pytest.approx(made.share[90:].sum().item(), rel=1e-12)


def test_pure_noise_asks_for_the_picture():
    made = objective()
    x0, noise = pictures()
    t = torch.full((len(x0),), T)
    assert torch.equal(made.noisy(x0, noise, t), noise)
    assert torch.equal(made.target(x0, noise, t), -x0)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "epsilon"])
def test_the_target_is_the_answer_that_a_sampler_reads_the_picture_from(prediction_type):
    made = objective(prediction_type=prediction_type, zero_terminal_snr=prediction_type != "epsilon")
    x0, noise = pictures()
    for t in (0, 400, 900):
        steps = torch.full((len(x0),), t)
        noisy, target = made.noisy(x0, noise, steps), made.target(x0, noise, steps)
        assert noisy.var() == pytest.approx(1, abs=0.1)
        denoised = to_denoised(target, noisy, made.schedule.sigma(float(t)), prediction_type)
        torch.testing.assert_close(denoised, x0, rtol=0, atol=2e-5 * (1 + made.schedule.sigma(float(t))))


def test_losses_are_those_of_each_picture_with_its_own_timestep():
    made = objective()
    x0, noise = pictures()
    t = torch.tensor([0, 100, 500, 900, 998, 999])
    output = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
    losses, errors = made.losses(output, x0, noise, t)
    abar = torch.from_numpy(abar_of_the_paper())[t][:, None, None, None]
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x0
    squares = (output.double() - v).square().mean((1, 2, 3))
    torch.testing.assert_close(errors.double(), squares.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.double(), made.weight[t] * squares, rtol=1e-5, atol=0)
    assert losses.requires_grad
    assert not errors.requires_grad

    (gradient,) = torch.autograd.grad(losses.sum(), output)
    expected = made.weight[t][:, None, None, None] * 2 * (output.double() - v) / x0[0].numel()
    torch.testing.assert_close(gradient.double(), expected.detach(), rtol=1e-4, atol=1e-8)


def test_half_precision_outputs_are_compared_in_float32():
    made = objective(weighting="constant")
    x0, noise = pictures()
    t = torch.full((len(x0),), T)
    output = (-x0).bfloat16()
    _, errors = made.losses(output, x0, noise, t)
    assert errors.dtype == torch.float32
    torch.testing.assert_close(errors, (output.float() + x0).square().mean((1, 2, 3)), rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# The learned weight


def test_the_learned_weight_finds_the_level_of_the_loss():
    """arXiv 2312.02696, eq. 21: for a loss of level L(t), u(t) = log L(t) is the minimum of L / exp(u) + u."""
    made = objective(weighting="learned", stratified=True)
    sigma = made.schedule.sigma(torch.arange(1000))
    level = (0.1 + torch.atan(sigma) ** 2).float()  # smooth, from 0.1 to 2.6
    t, zeros = torch.arange(1000), torch.zeros(1000, 1, 1, 1)
    # what a network answers whose error has that level at each timestep
    output = made.target(zeros, zeros, t) + level.sqrt()[:, None, None, None]
    optimizer = torch.optim.Adam(made.learned.parameters(), lr=0.1)
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 ** (step / 200)
        losses, _ = made.losses(output, zeros, zeros, t)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    found = made.learned(t).exp().detach()
    assert (found / level).log().abs().max() < 0.06
    losses, _ = made.losses(output, zeros, zeros, t)
    assert losses.mean().item() == pytest.approx((1 + level.log()).mean().item(), abs=1e-4)  # the least there can be

    before = objective(weighting="learned").learned
    assert (before(t) == 0).all()  # at first all count the same
    assert torch.equal(before.features, made.learned.features)  # on every rank and after a resume


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and saved, and what is refused


def test_the_table():
    made = objective()
    rows = made.rows()
    assert [row[0] for row in rows] == list(range(1000))
    sigma = np.sqrt((1 - abar_of_the_paper()[:-1]) / abar_of_the_paper()[:-1])
    np.testing.assert_allclose([row[1] for row in rows[:-1]], sigma, rtol=1e-9)
    assert rows[T][1] == math.inf
    text = made.table()
    assert "t >= 900 has 10.00% of the loss, t = 999 has 1.78%" in text
    assert f"floor of {made.floor:.4g}" in text
    line = next(line for line in text.splitlines() if line.strip().startswith("999"))
    assert line.split()[1] == "inf"
    saved = list(csv.reader(io.StringIO(made.to_csv())))
    assert saved[0] == ["t", "sigma", "probability", "weight", "share"]
    assert [tuple(map(float, row)) for row in saved[1:]] == [tuple(map(float, row)) for row in rows]  # to the last bit


def test_the_share_of_the_last_timestep_said_in_the_table_is_right():
    made = objective()
    # p w / sum(p w) with p = 0.02 + 0.98 / 1000 and the weight at its floor
    snr = snr_of_the_paper()
    p = np.full(1000, 0.98 / 1000)
    p[-1] += 0.02
    weight = np.minimum(snr, 5) / (snr + 1)
    weight = np.where(snr < 1, np.maximum(weight, made.floor), weight)
    assert made.share[T].item() == pytest.approx(p[T] * weight[T] / (p @ weight), rel=1e-9)
    assert round(100 * made.share[T].item(), 2) == 1.78


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prediction_type": "epsilon", "zero_terminal_snr": True}, "epsilon model cannot start from infinite sigma"),
        ({"prediction_type": "flow"}, "unknown prediction_type"),
        ({"terminal_probability": 1.0}, "terminal_probability must be at least 0 and less than 1, not 1.0"),
        ({"terminal_probability": -0.1}, "terminal_probability must be"),
        ({"high_noise_share": 1.0}, "high_noise_share must be"),
        ({"timesteps_scale": 0.0}, "timesteps_scale must be above 0"),
        ({"min_snr_gamma": 0.5}, "min_snr_gamma at least 1"),
        ({"noise_offset": -0.1}, "noise_offset must be at least 0"),
        ({"schedule_shift": 0.0}, "schedule_shift must be above 0"),
        ({"schedule_shift": math.inf}, "schedule_shift must be above 0"),
    ],
)
def test_mistakes(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        ObjectiveSettings(**settings)
