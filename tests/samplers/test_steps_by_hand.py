"""Single steps against formulas written out here: no order of convergence and no spread of samples hides a slip."""

import math
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from scipy.integrate import quad

from ztsnr.samplers import SOLVERS, NoiseSchedule, ZTSNRScheduler, rescale_guidance, sample
from ztsnr.samplers.flow_solvers import _deis_table, angle_weights, multistep_table, unipc_weights
from ztsnr.samplers.multistep import angle, inverse_sigmas, predictor
from ztsnr.samplers.prediction import alpha_s, from_denoised
from ztsnr.samplers.sampling import drive, start_run
from ztsnr.samplers.spectral import finish_table, spectral_table
from ztsnr.samplers.spectral_solver import _coarse

STOCHASTIC = (
    "euler_ancestral", "lcm", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "sa_solver",
)  # fmt: skip
FINITE = (8.0, 5.0, 3.5, 2.0, 1.1, 0.6)


def held(start, end):
    """Weight of an x0 held over a step."""
    (alpha, s), (alpha_end, s_end) = alpha_s(start), alpha_s(end)
    return alpha_end - alpha * s_end / s


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_fresh_noise_keeps_the_variance(solver, eta):
    """With x0 = 0 the state at sigma is noise of variance s^2, whatever the steps; each Gaussian is a unit vector."""
    assert solver in SOLVERS
    size = 16
    fresh = (torch.eye(size, dtype=torch.float64)[i].view(1, size, 1, 1) for i in count(1))
    sigmas = (6.0, 3.0, 1.5, 0.8)
    x = torch.zeros(1, size, 1, 1, dtype=torch.float64)
    x[0, 0] = alpha_s(sigmas[0])[1]
    x = drive(start_run(solver, sigmas, eta), x, lambda x, sigma: torch.zeros_like(x), lambda: next(fresh))
    assert x.square().sum().item() == pytest.approx(alpha_s(sigmas[-1])[1] ** 2, rel=1e-12)
    assert solver == "lcm" or x[0, 0] != 0
    assert x[0, 1:].any()


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_s_noise_scales_the_fresh_noise(solver):
    """In sample and in the scheduler, by its config and by the step's argument."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = [math.inf, 6.0, 2.0, 0.9, 0.4, 0.0]
    schedule = NoiseSchedule.sdxl()

    def denoise(x, sigma):
        return 0.3 * x

    def by_sample(s_noise):
        return sample(denoise, noise, sigmas, solver, generator=torch.Generator().manual_seed(1), s_noise=s_noise)

    def by_scheduler(s_noise, in_step):
        config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "solver": solver}
        scheduler = ZTSNRScheduler(**config, **({} if in_step else {"s_noise": s_noise}))
        scheduler.set_timesteps(sigmas=sigmas)
        x, generator = noise, torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            sigma = schedule.sigma(float(t))
            v = from_denoised(denoise(x, sigma), x, sigma)
            x = scheduler.step(v, t, x, generator, **({"s_noise": s_noise} if in_step else {})).prev_sample
        return x

    without = by_sample(0.0)
    assert (by_sample(1.0) - without).abs().max() > 0.05
    for factor in (1.0, 0.5):
        expected = without + factor * (by_sample(1.0) - without)  # the model is linear
        torch.testing.assert_close(by_sample(factor), expected, rtol=0, atol=1e-5)
        for in_step in (False, True):
            torch.testing.assert_close(by_scheduler(factor, in_step), expected, rtol=0, atol=1e-3)


def test_deis_integrates_polynomials_in_log_sigma():
    """eps = (log sigma)^k, k = 0, 1, 2, over sigma: the antiderivatives are sigma times polynomials in log sigma."""

    def antiderivatives(sigma):
        log = math.log(sigma)
        return sigma * np.array([1, log - 1, log**2 - 2 * log + 2])

    table = _deis_table(FINITE)
    for i, (start, end) in enumerate(pairwise(FINITE)):
        order = min(i + 1, 3)
        nodes = np.log(FINITE[i - order + 1 : i + 1][::-1])
        found = np.vander(nodes, order, increasing=True).T @ np.array(table[i])
        expected = alpha_s(end)[0] * (antiderivatives(end) - antiderivatives(start))[:order]
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_unipc_solves_the_papers_moment_equations():
    """Predictor and corrector of each step, as the fused table has them: a correction comes with the next step."""
    table = multistep_table(unipc_weights, FINITE)
    correction = np.zeros(3)
    for i, (start, end) in enumerate(pairwise(FINITE)):
        ratio, weights = table[i]
        h = math.log(start / end)
        predict = np.array([held(start, end), 0, 0])
        if i:
            slope = h / (2 * math.log(FINITE[i - 1] / start))
            predict = held(start, end) * np.array([1 + slope, -slope, 0])
        expected = predict + ratio * correction
        np.testing.assert_allclose(weights, expected[: len(weights)], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(expected[len(weights) :], 0, atol=1e-12)

        # the corrector of this step in terms of (x0 at its end, at its start, before)
        if i == 0:
            correct = held(start, end) * np.array([0.5, 0.5, 0])
        else:
            b = 1 - math.exp(-h)
            phi_2 = 1 - b / h
            phi_3 = 0.5 - phi_2 / h
            r = -math.log(FINITE[i - 1] / start) / h
            rho_old, rho_new = np.linalg.solve([[1, 1], [r, 1]], np.array([phi_2, 2 * phi_3]) / b)
            old = rho_old / r
            correct = held(start, end) * np.array([rho_new, 1 - rho_new - old, old])
        correction = correct - np.array([0, *predict[:2]])


def test_unipc_across_infinity_is_the_trapezoid_rule():
    (_, first), (ratio, second) = multistep_table(unipc_weights, (math.inf, 4.0, 2.0))
    across, after = held(math.inf, 4.0), held(4.0, 2.0)
    np.testing.assert_allclose(first, [across, 0], rtol=1e-12)
    # corrected: x0 at infinity and at 4.0 by half each, where the predictor had the first one whole
    np.testing.assert_allclose(second, [after + ratio * across / 2, -ratio * across / 2, 0], rtol=1e-12)


def test_unipc_after_infinity_corrects_with_two_points():
    """A difference back to infinity has no length in log sigma: the corrector is the one-step one, B(h) = e^h - 1."""
    *_, (ratio, third) = multistep_table(unipc_weights, (math.inf, 4.0, 2.0, 1.0))
    h = math.log(2)
    b = 1 - math.exp(-h)
    new = (1 - b / h) / b
    correct = held(4.0, 2.0) * np.array([new, 1 - new])
    slope_free = held(4.0, 2.0)  # the predictor of that step is of first order
    slope = h / (2 * h)
    predict = held(2.0, 1.0) * np.array([1 + slope, -slope, 0])
    expected = predict + ratio * np.array([correct[0], correct[1] - slope_free, 0])
    np.testing.assert_allclose(third, expected, rtol=1e-9, atol=1e-12)


def test_ancestral_steps_are_ddpms():
    """At eta = 1 the fresh noise has the standard deviation of the posterior q(x_t-1 | x_t, x0)."""
    start, end = 3.0, 1.2
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    one = torch.ones_like(x)
    for solver in ("euler_ancestral", "dpmpp_2m_sde"):
        fresh = drive(start_run(solver, (start, end), 1.0), x, lambda x, sigma: torch.zeros_like(x), lambda: one)
        posterior = end * math.sqrt(1 - (end / start) ** 2)  # of x / alpha
        assert fresh.item() == pytest.approx(alpha_s(end)[0] * posterior, rel=1e-12), solver


def test_heun_integrates_x0_linear_in_the_angle():
    """x/s grows by x0 du, u = 1/sigma: the weights are integrals of the two hat functions of atan(sigma)."""
    for start, end in ((5.0, 1.5), (math.inf, 2.0)):
        from_angle, to_angle = math.atan(start), math.atan(end)

        def hat(u, a=from_angle, b=to_angle):
            return (a - math.atan2(1, u)) / (a - b)

        s_end = alpha_s(end)[1]
        weight_end = s_end * quad(hat, 1 / start, 1 / end, epsabs=1e-13)[0]
        weight_start = s_end * (1 / end - 1 / start) - weight_end
        answers = iter(torch.tensor([1.0, 10.0], dtype=torch.float64).view(2, 1, 1, 1, 1))
        x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        found = drive(start_run("heun", (start, end), 0.0), x, lambda x, sigma, a=answers: next(a))
        assert found.item() == pytest.approx(weight_start + 10 * weight_end, rel=1e-9)


def test_a_slope_is_carried_no_further_than_it_was_measured():
    angles = [math.pi / 2, 1.45, 1.15, 1.0, 0.5]  # steps of 0.12, 0.3, 0.15, 0.5
    sigmas = (math.inf, *map(math.tan, angles[1:]))
    unlimited = predictor(inverse_sigmas(sigmas), 2, angle)
    lengths = -np.diff(angles)
    for i in (1, 2, 3):
        expected = unlimited[i][1] * min(1, lengths[i - 1] / lengths[i])
        assert angle_weights(sigmas)[i][1] == pytest.approx(expected, rel=1e-9)
        assert angle_weights(sigmas)[i].sum() == pytest.approx(held(sigmas[i], sigmas[i + 1]), rel=1e-9)
    assert angle_weights(sigmas)[2][1] == pytest.approx(unlimited[2][1])


def test_dpmpp_3m_sde_without_noise_is_k_diffusions():
    """Its loop, in the variance-exploding state x / alpha and in lambda = -log sigma."""
    generator = torch.Generator().manual_seed(2)
    answers = torch.randn(len(FINITE) - 1, 1, 2, 3, 3, generator=generator, dtype=torch.float64)
    start = torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64)

    def run(solver):
        given = iter(answers)
        return drive(start_run(solver, FINITE, 0.0), start, lambda x, sigma: next(given))

    x, past, lengths = start / alpha_s(FINITE[0])[0], [], []
    for answer, (sigma, sigma_next) in zip(answers, pairwise(FINITE), strict=True):
        h = math.log(sigma / sigma_next)
        x = math.exp(-h) * x - math.expm1(-h) * answer
        if past:
            phi_2 = math.expm1(-h) / h + 1
            r_0 = lengths[0] / h
            d = d_0 = (answer - past[0]) / r_0
            if len(past) > 1:
                r_1 = lengths[1] / h
                d_1 = (past[0] - past[1]) / r_1
                bend = (d_0 - d_1) / (r_0 + r_1)
                d = d_0 + bend * r_0
                x = x - (phi_2 / h - 0.5) * bend
            x = x + phi_2 * d
        past, lengths = [answer, *past][:2], [h, *lengths][:2]
    torch.testing.assert_close(run("dpmpp_3m_sde"), alpha_s(FINITE[-1])[0] * x, rtol=1e-10, atol=1e-12)


def test_second_looks_lie_at_geometric_means_and_from_infinity_at_half_the_angle():
    for solver, eta in (("dpmpp_sde", 1.0), ("dpmpp_2s_ancestral", 0.0)):
        levels = start_run(solver, (math.inf, 9.0, 4.0, 0.0), eta).levels
        assert levels == pytest.approx((math.inf, 18.0, 9.0, 6.0, 4.0)), solver


def test_both_halves_of_an_sde_step_see_one_brownian_path():
    """With x0 = 0, the part of the fresh noise that the first half has drawn, over all of it."""
    start, end = 4.0, 1.0
    middle = math.sqrt(start * end)
    fresh = iter(torch.eye(3, dtype=torch.float64)[1:].view(2, 1, 3, 1, 1))
    x = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    x = drive(start_run("dpmpp_sde", (start, end), 1.0), x, lambda x, sigma: torch.zeros_like(x), lambda: next(fresh))
    _, first, second = x.flatten().tolist()
    # A Brownian motion over 1 / sigma^2: the increment of the first half has this share of the variance of the whole.
    share = (middle**-2 - start**-2) / (end**-2 - start**-2)
    assert first / math.hypot(first, second) == pytest.approx(math.sqrt(share), rel=1e-12)


def test_a_run_remembers_as_much_as_it_is_asked_to():
    run = start_run("euler", FINITE)
    assert [run.remember(value, 2) for value in (1, 2, 3)] == [[1], [2, 1], [3, 2]]


def test_half_precision_is_rounded_once_when_noise_is_added():
    scheduler = ZTSNRScheduler()
    generator = torch.Generator().manual_seed(0)
    picture, noise = torch.randn(2, 64, 4, 8, 8, generator=generator).half()
    t = torch.linspace(1, 998, 64)
    u = 1 / scheduler.schedule.sigma(t.double())
    s = (1 + u**2).rsqrt().view(-1, 1, 1, 1)
    exact = u.view(-1, 1, 1, 1) * s * picture.double() + s * noise.double()
    found = scheduler.add_noise(picture, noise, t)
    assert found.dtype == torch.float16
    spacing = torch.exp2(exact.abs().log2().floor() - 10)  # of float16 there
    wrong = (found.double() - exact).abs() > 0.51 * spacing
    assert not wrong[exact.abs() > 0.1].any()


def test_the_scheduler_runs_with_the_eta_of_its_config():
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = [math.inf, 4.0, 1.0, 0.0]
    scheduler = ZTSNRScheduler(solver="euler_ancestral", eta=0.4)
    scheduler.set_timesteps(sigmas=sigmas)
    x, generator = noise, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        sigma = scheduler.schedule.sigma(float(t))
        x = scheduler.step(from_denoised(0.3 * x, x, sigma), t, x, generator).prev_sample
    generator = torch.Generator().manual_seed(1)
    expected = sample(lambda x, sigma: 0.3 * x, noise, sigmas, "euler_ancestral", eta=0.4, generator=generator)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-3)


def test_coarse_blocks_of_the_default_solver():
    assert _coarse(torch.ones(2, 1, 128, 128)).shape == (2, 12 * 12)  # of 10 x 10, and 8 rows left over
    assert torch.equal(_coarse(torch.ones(1, 1, 24, 24)), torch.full((1, 144), 4.0))
    assert _coarse(torch.ones(1, 1, 16, 16)).shape == (1, 256)


@pytest.mark.parametrize(("steps", "fitted"), [(9, False), (10, True)])
def test_the_last_step_is_fitted_from_ten_steps_on(steps, fitted):
    sigmas = np.array([math.inf, *np.geomspace(640, 0.03, steps - 1), 0.0])
    predict, correct = spectral_table(sigmas)
    last = finish_table(sigmas, predict, correct)[-1]
    assert (not np.array_equal(last, predict[-1])) == fitted


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0])
def test_rescaling_goes_a_share_of_the_way(phi):
    cond, guided = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = 3 * guided
    ratio = cond.std(correction=0) / guided.std(correction=0)
    torch.testing.assert_close(rescale_guidance(guided, cond, phi), guided * (1 - phi + phi * ratio))


def test_another_schedulers_spacing_does_not_stay_in_the_config():
    """Pipelines read it: it must say what this scheduler does, from infinity on, and not what SDXL's config said."""
    stock = EulerDiscreteScheduler(
        timestep_spacing="leading", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    assert ZTSNRScheduler.from_config(stock.config).config["timestep_spacing"] == "trailing"
