"""The mean-leak test on models whose answers are known in closed form, and the verdicts it draws from them."""

import json
import math
import random
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp
from skimage.color import deltaE_ciede2000

from ztsnr.diagnostics import GaussianCanvas, PictureSet
from ztsnr.diagnostics.checkpoint_verdict import closest_table, judge_network
from ztsnr.diagnostics.estimates import CONFIDENCE, MOST_SEEDS, Estimate
from ztsnr.diagnostics.expected import expected_denoised_mean, expected_slope
from ztsnr.diagnostics.latent_stats import LatentMeanRecorder
from ztsnr.diagnostics.leak import check_seeds, exact_flow, mean_leak
from ztsnr.diagnostics.leak_probes import (
    LUMA,
    NetworkProbe,
    colour_error,
    measure_pictures,
    noise_pair,
    probe_network,
    probed_sigmas,
)
from ztsnr.diagnostics.plain import plain
from ztsnr.diagnostics.sampler_verdict import judge_sampler
from ztsnr.samplers import NoiseSchedule, from_denoised, sample, step_schedule, to_denoised
from ztsnr.samplers.prediction import alpha_s

ZERO, PLAIN = NoiseSchedule.sdxl(), NoiseSchedule.sdxl(zero_terminal_snr=False)
LEVELS = 255 / 4.8  # in a latent unit, of ``to_rgb``
# name: schedule that the file states, schedule that the network learned, most noise it believes in, verdict
KINDS = {
    "good": (ZERO, ZERO, math.inf, "zero SNR"),
    "good, not marked": (PLAIN, ZERO, math.inf, "zero SNR"),
    "starved": (ZERO, ZERO, ZERO.sigma(900.0), "starved"),
    "plain": (PLAIN, PLAIN, math.inf, "not zero SNR"),
    "plain, marked zero SNR": (ZERO, PLAIN, math.inf, "not zero SNR"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def believer(model, stated, learned, most=math.inf):
    """A v-network that learned the levels of one schedule up to a most, and is told timesteps of another."""

    @cache
    def belief(sigma):
        return min(learned.sigma(stated.timestep(sigma)), most)

    def denoise(x, sigma):
        believed = belief(sigma)
        return to_denoised(from_denoised(model(x, believed), x, believed), x, sigma)

    return denoise


def network_of(kind, model):
    return believer(model, *KINDS[kind][:3])


def sampler(denoise, sigmas, solver="spectral"):
    def run(noise):
        recorder = LatentMeanRecorder()
        return sample(denoise, noise, sigmas, solver, callback=recorder), recorder.read()

    return run


def even_timesteps(start, steps):
    """From a finite sigma down to 0, even in t."""
    return torch.cat([ZERO.sigma(ZERO.timestep(start) * (1 - torch.arange(steps) / steps)), torch.zeros(1)])


def to_rgb(latents):
    return 0.5 + latents[:, :3] / 4.8


def of_brightness(value):
    """A run that paints one colour, whatever the noise."""

    def run(noise):
        latents = torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1).expand(noise.shape).clone()
        recorder = LatentMeanRecorder()
        recorder(0, math.inf, noise, latents)
        return latents, recorder.read()

    return run


# ----------------------------------------------------------------------------------------------------------------------
# Estimates


def test_estimate_is_the_t_interval_of_scipy():
    values = np.random.default_rng(0).normal(3, 2, 9)
    estimate = Estimate.over_seeds(values)
    interval = stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.seeds == 9


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds):
    rng = np.random.default_rng(seeds)
    held = sum(abs(Estimate.over_seeds(rng.normal(5, 2, seeds)).side(5.0)) == 0 for _ in range(2000))
    assert stats.binomtest(held, 2000, CONFIDENCE).pvalue > 0.001


def test_side_of_a_limit():
    estimate = Estimate(1.0, 0.25, 8)
    assert [estimate.side(limit) for limit in (0.5, 0.75, 1.0, 1.25, 1.5)] == [1, 0, 0, -1, -1]
    assert estimate.seeds_to_tell(1.0) == MOST_SEEDS
    assert estimate.seeds_to_tell(1.1) == math.ceil(1.2 * 8 * 2.5**2)


@pytest.mark.parametrize(
    ("value", "error", "written"),
    [
        (0.4123, 0.0312, "0.412 ± 0.031"),
        (98.456, 0.0, "98.46 ± 0.00"),
        (0.0, 0.0, "0.0000 ± 0.0000"),
        (-0.00001, 0.0, "-0.0000 ± 0.0000"),
        (123.4, 56.7, "123 ± 57"),
        (1.0, 2.5, "1.0 ± 2.5"),
    ],
)
def test_estimates_are_written_with_the_digits_they_have(value, error, written):
    assert str(Estimate(value, error, 8)) == written


# ----------------------------------------------------------------------------------------------------------------------
# Noise


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 12, 20), (16, 8, 8), (4, 3, 8, 10)])
@pytest.mark.parametrize("offset", [0.5, 1.0, 3.0])
def test_means_of_a_pair_are_plus_and_minus_the_offset(shape, offset):
    pair = noise_pair(7, 3, shape, offset)
    axes = tuple(range(2, pair.ndim))
    means = pair.double().mean(axes)
    assert pair.shape == (2, *shape)
    size = torch.full_like(means, offset / math.sqrt(math.prod(shape[1:])))
    torch.testing.assert_close(means.abs(), size, rtol=1e-4, atol=0)
    torch.testing.assert_close(means[0], -means[1], rtol=1e-4, atol=0)
    rest = pair - means.view(2, shape[0], *[1] * (len(shape) - 1))
    torch.testing.assert_close(rest[0], rest[1], rtol=0, atol=1e-5)
    assert rest.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("channels", "seeds"), [(4, 8), (7, 8), (16, 32)])
def test_signs_of_the_channels_are_orthogonal_over_the_seeds(channels, seeds):
    signs = np.stack([noise_pair(0, i, (channels, 2, 2))[0].mean((1, 2)).sign().numpy() for i in range(seeds)])
    np.testing.assert_array_equal(signs.T @ signs, seeds * np.eye(channels))
    np.testing.assert_array_equal(signs.sum(0), 0)


def test_a_seed_is_its_noise():
    assert torch.equal(noise_pair(5, 2, (4, 8, 8)), noise_pair(5, 2, (4, 8, 8)))
    assert not torch.equal(noise_pair(5, 2, (4, 8, 8)), noise_pair(6, 2, (4, 8, 8)))
    first, other = (noise_pair(5, index, (4, 8, 8)) for index in (0, 1))  # other signs, and nothing else
    torch.testing.assert_close(first - first.mean((2, 3), keepdim=True), other - other.mean((2, 3), keepdim=True))


# ----------------------------------------------------------------------------------------------------------------------
# The checkpoint's question, in closed form

CANVASES = {
    "SDXL": (GaussianCanvas(-2.4, 0.3, 0.6), (4, 64, 64)),
    "three channels": (GaussianCanvas(torch.tensor([-1.0, 0.2, 1.0]), 0.6, 0.1), (3, 16, 24)),
    "sixteen channels": (GaussianCanvas(0.5, 1.0, 0.9), (16, 32, 32)),
}


def video(x, sigma):
    """Five dimensions: brightness is one number for all frames."""
    return GaussianCanvas(-2.4, 0.3, 0.6)(x.flatten(2, 3), sigma).view_as(x)


CANVASES["video"] = (video, (4, 5, 16, 16))
VARIANCES = {"SDXL": (0.3 * 64) ** 2, "three channels": 0.36 * 384, "sixteen channels": 1024, "video": 0.09 * 5 * 256}


def probes_of(denoise, stated, shape, seeds=8):
    return [probe_network(denoise, noise_pair(s, s, shape), probed_sigmas(stated), s) for s in range(seeds)]


@each_kind
@pytest.mark.parametrize("name", CANVASES)
def test_slopes_are_those_of_the_levels_the_network_believes_in(kind, name):
    stated, learned, most, _ = KINDS[kind]
    model, shape = CANVASES[name]
    answer = judge_network(probes_of(network_of(kind, model), stated, shape), stated)
    assert len(answer.sigmas) == len(answer.slopes) == 8
    for t, sigma, channels in zip(answer.timesteps, answer.sigmas, answer.slopes, strict=True):
        alpha, s = alpha_s(sigma)
        believed_alpha, believed_s = alpha_s(min(learned.sigma(t), most))
        expected = expected_slope(believed_s / believed_alpha if believed_alpha else math.inf, VARIANCES[name])
        if stated is not learned or sigma > most:  # v as at the level believed, x0 as at the level stated
            expected = alpha - s * (believed_alpha - expected) / believed_s
        assert len(channels) == shape[0]
        for slope in channels:
            assert slope.value == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert answer.slope.value == pytest.approx(expected, rel=1e-3, abs=1e-4)


@each_kind
def test_the_checkpoints_answer(kind):
    stated, _, _, verdict = KINDS[kind]
    model, shape = CANVASES["SDXL"]
    answer = judge_network(probes_of(network_of(kind, model), stated, shape), stated)
    assert answer.verdict == verdict
    assert answer.table == ("plain" if kind.startswith("plain") else "zero SNR")
    assert answer.marked == stated.zero_terminal_snr
    assert answer.seeds_needed is None
    expected = {"plain": PLAIN.sigma_max, "plain, marked zero SNR": PLAIN.sigma_max, "starved": ZERO.sigma(900.0)}
    if kind in expected:
        # of texture T, v follows the noise at sigma as it would at sigma + T / sigma of pictures without any
        assert answer.believed_sigma == pytest.approx(expected[kind] + 0.36 / expected[kind], rel=1e-3)
        assert answer.share.value == pytest.approx(1, abs=0.01)
        # what a starved network believes at t = T is what became of it there, and not worth a sentence
        takes = f"treats its input as one of sigma {expected[kind]:.3g}" in answer.sentence
        assert takes == (kind != "starved")
    else:
        assert answer.believed_sigma is None
        assert answer.share.value == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("texture", [0.0, 0.1, 0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("stated", [ZERO, PLAIN], ids=["marked", "unmarked"])
def test_the_table_is_read_whatever_the_texture(texture, stated):
    for name, learned in (("zero SNR", ZERO), ("plain", PLAIN)):
        denoise = believer(GaussianCanvas(-2.4, 0.3, texture), stated, learned)
        fine = np.mean([probe.fine_response for probe in probes_of(denoise, stated, (4, 32, 32), 4)], 0)
        timesteps = [stated.timestep(sigma) for sigma in probed_sigmas(stated)]
        table, variance = closest_table(timesteps, fine, {"zero SNR": ZERO, "plain": PLAIN}, 799.2)
        assert table == name
        assert variance == pytest.approx(texture**2, abs=1e-3)


def test_texture_like_noise_tells_no_table():
    for texture in (1.0, 1.2):
        denoise = believer(GaussianCanvas(-2.4, 0.3, texture), ZERO, PLAIN)
        answer = judge_network(probes_of(denoise, ZERO, (4, 32, 32)), ZERO)
        assert (answer.table, answer.believed_sigma, answer.verdict) == (None, None, "not zero SNR")


def test_tables_that_fit_alike_are_not_told_apart():
    timesteps = [500.0, 600.0, 700.0]
    responses = [1 / ZERO.sigma(t) for t in timesteps]
    assert closest_table(timesteps, responses, {"zero SNR": ZERO, "the same": ZERO}, 799.2)[0] is None


def test_a_table_of_ones_own_can_be_told():
    cosine = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True})
    denoise = believer(GaussianCanvas(-2.4, 0.3, 0.3), cosine, cosine, cosine.sigma(900.0))
    probes = probes_of(denoise, cosine, (4, 64, 64))
    assert judge_network(probes, cosine).table is None
    answer = judge_network(probes, cosine, {"zero SNR": cosine, "plain": PLAIN})
    assert (answer.table, answer.verdict) == ("zero SNR", "starved")


def test_following_a_neighbour_is_not_following_oneself():
    """Channels that follow each other's noise: every seed has a slope, their mean has none."""
    canvas = GaussianCanvas(-2.4, 0.3, 0.6)
    plain_network = believer(canvas, ZERO, PLAIN)
    answer = judge_network(probes_of(lambda x, sigma: plain_network(x.roll(1, 1), sigma), ZERO, (4, 64, 64)), ZERO)
    for slope in answer.slopes[-1]:
        assert slope.value == pytest.approx(0, abs=1e-3)
        assert slope.error > 1


# ----------------------------------------------------------------------------------------------------------------------
# The sampler's question, in closed form


def euler_line(sigmas, mean, variance):
    """(slope, intercept) of the picture's mean on the noise's: Euler on one Gaussian mode, factor by factor.

    In k-diffusion's scaling y = x / alpha, y - mean shrinks in a step by G + (1 - G) sigma' / sigma with
    G = V / (V + sigma^2); the step from infinity leaves y = mean + sigma' noise.
    """
    sigmas = [float(sigma) for sigma in sigmas]
    if math.isinf(sigmas[0]):
        noise, start, rest = sigmas[1], 0.0, sigmas[1:]
    else:
        noise, start, rest = math.hypot(1, sigmas[0]), -mean, sigmas
    factor = 1.0
    for sigma, following in pairwise(rest):
        gain = variance / (variance + sigma**2)
        factor *= gain + (1 - gain) * following / sigma
    return factor * noise, mean + factor * start


@pytest.mark.parametrize("tau", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("start", [math.inf, 4518.0, 56.0, 14.6])
def test_slope_intercept_and_pull_of_euler(tau, side, steps, start):
    mean = -2.4
    sigmas = step_schedule(ZERO, steps, "trailing") if math.isinf(start) else even_timesteps(start, steps)
    canvas = GaussianCanvas(mean, tau, 0.3)
    report = mean_leak(
        None,
        sampler(canvas, sigmas, "euler"),
        (2, side, side),
        schedule=ZERO,
        reference=exact_flow(canvas, ZERO, (side, side)),
        start_sigma=sigmas[0].item(),
        seeds=range(3),
    )
    slope, intercept = euler_line(sigmas, mean, (tau * side) ** 2)
    assert report.checkpoint is None
    for fit in report.sampler.channels:
        assert fit.slope.value == pytest.approx(slope, rel=1e-3)
        assert fit.intercept.value == pytest.approx(intercept, abs=1e-3)
        assert fit.reference_slope.value == pytest.approx(tau * side, rel=2e-3)
        assert fit.reference_intercept.value == pytest.approx(mean, abs=1e-3)
        assert fit.r_squared == pytest.approx(1, abs=1e-4)
    assert report.sampler.unit == "latent units"
    # both channels alike: the length of their difference
    assert report.sampler.pull.value == pytest.approx(math.sqrt(2) * (intercept - mean), abs=2e-3)
    assert report.sampler.slope_ratio.value == pytest.approx(slope / (tau * side), rel=3e-3)


def test_pull_of_a_finite_start_in_many_steps_is_the_law():
    """In the limit of many steps: |mean| sqrt(N) tau / sigma_0 where that is small."""
    side, tau, start = 64, 0.3, 400.0
    sigmas = even_timesteps(start, 1000)
    canvas = GaussianCanvas(-2.4, tau, 0.3)
    reference = exact_flow(canvas, ZERO, (side, side))
    run = sampler(canvas, sigmas, "euler")
    found = mean_leak(None, run, (3, side, side), schedule=ZERO, reference=reference, seeds=range(2), to_rgb=to_rgb)
    assert found.sampler.unit == "levels of 255"
    assert found.sampler.pull.value == pytest.approx(2.4 * side * tau / start * LEVELS, rel=0.03)


@pytest.fixture(scope="module")
def reports():
    """Every kind on an open prompt, with its sampler, on one canvas."""
    canvas, shape = GaussianCanvas(-2.4, 0.6, 0.6), (4, 32, 32)
    found = {}
    for kind, (stated, *_) in KINDS.items():
        denoise = network_of(kind, canvas)
        samplers = {
            "default": (step_schedule(stated, 20, latent_size=shape[1:]), "spectral"),
            "coarse": (step_schedule(stated, 20, "trailing"), "euler"),
            "4518": (even_timesteps(4518.0, 20), "spectral"),
            "14.6": (even_timesteps(14.6, 20), "spectral"),
        }
        for name, (sigmas, solver) in samplers.items():
            if sigmas[0] > stated.sigma_max:
                continue
            found[kind, name] = mean_leak(
                denoise,
                sampler(denoise, sigmas, solver),
                shape,
                schedule=stated,
                reference=exact_flow(denoise, stated, shape[1:]),
                start_sigma=sigmas[0].item(),
                seeds=range(4),
                to_rgb=to_rgb,
                brightness_through="by the linear factors",
                target=(0, 0, 0),
            )
    return found


def test_an_open_prompt_of_a_good_network_is_no_leak(reports):
    report = reports["good", "default"]
    assert report.verdict == "zero-SNR trained and sampled exactly"
    assert report.sampler.verdict == "exact"
    assert report.sampler.channels[0].slope.value == pytest.approx(0.6 * 32, rel=5e-3)
    assert report.sampler.slope_ratio.value == pytest.approx(1, abs=5e-3)
    assert report.sampler.reference == "the exact flow"
    assert report.sampler.spread == pytest.approx(report.sampler.reference_spread, rel=5e-3)
    pictures = np.concatenate([probe.brightness for probe in report.sampler_probes])
    assert report.sampler.spread == pytest.approx(pictures.std(ddof=1))


def test_a_start_at_sigma_14_6_is_told(reports):
    report = reports["good", "14.6"]
    assert report.verdict.startswith("zero-SNR model, but the sampler starts at sigma 14.6: pull toward grey 10")
    assert report.sampler.verdict == "biased"
    assert report.sampler.pull.low > 90


def test_steps_that_are_too_coarse_are_told(reports):
    report = reports["good", "coarse"]
    assert report.sampler.verdict == "coarse"
    assert "too coarse for the brightness (it starts at infinity)" in report.verdict
    slope, _ = euler_line(step_schedule(ZERO, 20, "trailing"), -2.4, (0.6 * 32) ** 2)
    assert report.sampler.slope_ratio.value == pytest.approx(slope / (0.6 * 32), rel=3e-3)


def test_a_finite_start_that_does_not_show_is_called_that(reports):
    report = reports["good", "4518"]
    assert report.sampler.verdict == "exact"
    assert report.verdict.startswith(
        "zero-SNR trained; the sampler starts at sigma 4517.85, without visible effect: pull"
    )


@each_kind
@pytest.mark.parametrize("name", ["default", "14.6"])
def test_the_network_comes_before_its_sampler(reports, kind, name):
    report = reports[kind, name]
    verdict = KINDS[kind][3]
    assert report.checkpoint.verdict == verdict
    if kind == "good, not marked":
        assert report.verdict == (
            "zero-SNR trained, but sampled on a schedule that ends at sigma 14.6146, because the file is "
            "not marked as zero-SNR"
        )
    elif kind != "good":
        assert report.verdict == report.checkpoint.sentence
    if name == "default":
        assert report.sampler.verdict == "exact"  # of that network, whatever it learned


def test_without_a_reference_nothing_is_said_of_the_sampler():
    canvas = GaussianCanvas(-2.4, 0.3, 0.6)
    report = mean_leak(
        canvas, sampler(canvas, step_schedule(ZERO, 8, "trailing")), (4, 32, 32), schedule=ZERO, seeds=range(2)
    )
    assert report.sampler.verdict == "no reference"
    assert report.sampler.pull is report.sampler.slope_ratio is report.reference_probes is None
    assert report.verdict == "zero-SNR trained; the sampler was not compared with the exact flow"
    assert "Reference" not in str(report)


def test_progress_is_told_after_every_probe():
    canvas, seen = GaussianCanvas(), []
    run = sampler(canvas, step_schedule(ZERO, 4, "trailing"))
    mean_leak(canvas, run, (4, 8, 8), schedule=ZERO, reference=run, seeds=[3, 1], progress=lambda: seen.append(1))
    assert len(seen) == 6


def test_a_prompt_of_several_pictures_is_not_a_line():
    """Black, grey and white pictures: the exact flow picks one by the noise, and no line explains its means."""
    shape = (3, 16, 16)
    pictures = torch.tensor([-1.0, 0.1, 1.0]).view(3, 1, 1, 1).expand(3, *shape)
    model = PictureSet(pictures, std=0.1, brightness_std=0.02)
    report = mean_leak(
        model,
        sampler(model, step_schedule(ZERO, 60, latent_size=shape[1:])),
        shape,
        schedule=ZERO,
        reference=exact_flow(model, ZERO, shape[1:]),
    )
    assert report.verdict == "zero-SNR trained and sampled exactly"
    exact = [model.exact(noise_pair(seed, seed, shape).double()).mean((2, 3)).numpy() for seed in range(8)]
    noise = [noise_pair(seed, seed, shape).double().mean((2, 3)).numpy() for seed in range(8)]
    for channel, fit in enumerate(report.sampler.channels):
        x, y = (np.concatenate([pair[:, channel] for pair in pairs]) for pairs in (noise, exact))
        line = stats.linregress(x, y)
        assert fit.slope.value == pytest.approx(line.slope, rel=0.02)
        assert fit.intercept.value == pytest.approx(line.intercept, abs=0.02)
        assert fit.r_squared == pytest.approx(line.rvalue**2, abs=0.02)
        assert fit.r_squared < 0.95


def test_a_network_of_several_pictures_is_told_once_the_seeds_are_enough():
    """It follows the noise by jumps, in some seeds and not in others."""
    shape = (3, 16, 16)
    pictures = torch.tensor([-1.0, 0.1, 1.0]).view(3, 1, 1, 1).expand(3, *shape)
    model = PictureSet(pictures, std=0.1, brightness_std=0.3)
    for kind, (stated, _, _, verdict) in KINDS.items():
        answer = judge_network(probes_of(network_of(kind, model), stated, shape), stated)
        if not kind.startswith("good"):
            assert answer.verdict == "cannot tell"
            assert answer.sentence.startswith(f"cannot tell: 8 seeds are too few, use {answer.seeds_needed} (x0 at t =")
            probes = probes_of(network_of(kind, model), stated, shape, answer.seeds_needed)
            answer = judge_network(probes, stated)
        assert answer.verdict == verdict


# ----------------------------------------------------------------------------------------------------------------------
# The expected curve


@pytest.mark.parametrize("noise_mean", [-2.0, 0.0, 1.0])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_expected_mean_along_the_exact_flow(noise_mean, tau):
    side, mean = 16, -2.4
    canvas = GaussianCanvas(mean, tau, 0.6)
    slope, start = tau * side, noise_mean / side

    def denoised(average, sigma):
        return canvas(torch.full((1, 1, side, side), float(average), dtype=torch.float64), sigma)[0, 0, 0, 0].item()

    def velocity(angle, average):
        sigma = math.inf if angle == math.pi / 2 else math.tan(angle)
        alpha, s = alpha_s(sigma)
        return [(alpha * average[0] - denoised(average[0], sigma)) / s]

    sigmas = [math.inf, 1000.0, 100.0, 20.0, 5.0, 1.0, 0.1]
    angles = [math.atan(sigma) for sigma in sigmas]
    flow = solve_ivp(velocity, (angles[0], angles[-1]), [start], "DOP853", angles, rtol=1e-10, atol=1e-10)
    for sigma, average in zip(sigmas, flow.y[0], strict=True):
        expected = denoised(average, sigma)
        assert expected_denoised_mean(sigma, mean, slope, start) == pytest.approx(expected, abs=1e-6)
    assert expected_denoised_mean(0.0, mean, slope, start) == pytest.approx(mean + slope * start)
    assert expected_denoised_mean(0.0, mean, 0.0, start) == mean


# ----------------------------------------------------------------------------------------------------------------------
# Pictures

SHARMA = [  # Sharma, Wu and Dalal 2005, table 1: Lab, Lab, CIEDE2000
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
    ((50, 0, 0), (50, -1, 2), 2.3669),
    ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
    ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
    ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ((50, 2.5, 0), (61, -5, 29), 22.8977),
    ((50, 2.5, 0), (56, -27, -3), 31.9030),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
]


def lab_of(colour):
    """CIE Lab (D65, 2 degrees) of an sRGB colour of 0 to 255: IEC 61966-2-1 and CIE 15, by hand."""
    value = np.asarray(colour) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    ratio = np.array(matrix) @ linear / [0.95047, 1.0, 1.08883]
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_ciede2000_is_that_of_the_published_pairs():
    first, second, published = (np.array(column, dtype=float) for column in zip(*SHARMA, strict=True))
    np.testing.assert_allclose(deltaE_ciede2000(first, second), published, atol=5e-5)


def test_colour_error_of_plain_colours():
    colours = [(0, 0, 0), (255, 255, 255), (250, 5, 5), (0, 128, 255), (90, 90, 90)]
    for target in [(0, 0, 0), (255, 0, 0), (128, 128, 128)]:
        pictures = np.stack([np.broadcast_to(np.reshape(c, (3, 1, 1)), (3, 6, 4)) for c in colours]) / 255
        expected = [deltaE_ciede2000(lab_of(c), lab_of(target)) for c in colours]
        np.testing.assert_allclose(colour_error(pictures, target), expected, atol=1e-2)
    black_and_white = np.zeros((1, 3, 600, 8))
    black_and_white[..., 300:, :] = 1
    assert colour_error(black_and_white, (0, 0, 0)) == pytest.approx(50)  # black to white is 100


def test_measures_of_a_picture_by_hand():
    picture = np.empty((1, 3, 2, 2))
    picture[0, 0] = [[-0.5, 0.5], [0.5, 0.5]]  # below black in one pixel
    picture[0, 1] = [[0.5, 1.5], [0.5, 0.5]]  # beyond white in another
    picture[0, 2] = [[0.5, 0.5], [0.5, 0.0]]  # and at the edge in a third
    found = measure_pictures(picture, (127.5, 127.5, 127.5))
    np.testing.assert_allclose(found["rgb_mean"], 255 * np.array([[0.25, 0.75, 0.375]]))
    assert found["clipped"] == pytest.approx(0.75)
    assert found["brightness"] == pytest.approx(255 * (np.array([1.5, 2.5, 1.5]) / 4 @ LUMA))
    assert found["colour_error"] > 0
    primaries = measure_pictures(np.eye(3).reshape(3, 3, 1, 1))["brightness"]
    np.testing.assert_allclose(primaries / 255, [0.2126, 0.7152, 0.0722])  # Rec. 709
    assert measure_pictures(picture)["colour_error"] is None
    assert set(measure_pictures(None).values()) == {None}


@pytest.mark.parametrize(
    ("exact", "painted", "pull"),
    [
        ((0, 0, 0), (10, 10, 10), 10.0),
        ((255, 255, 255), (235, 235, 235), 20.0),
        ((10, 10, 10), (4, 4, 4), -6.0),
        ((255, 0, 0), (245, 10, 10), 10.0),
        ((255, 0, 0), (255, 10, -10), 0.0),
        ((127.5, 127.5, 127.5), (200, 200, 200), 0.0),
    ],
)
def test_pull_is_what_lies_in_the_direction_of_grey(exact, painted, pull):
    report = mean_leak(
        None,
        of_brightness(np.array(painted) / 255),
        (3, 4, 4),
        schedule=ZERO,
        reference=of_brightness(np.array(exact) / 255),
        to_rgb=lambda latents: latents,
        target=exact,
    )
    assert report.sampler.pull.value == pytest.approx(pull, abs=1e-4)
    assert report.sampler.slope_ratio is None
    assert report.sampler.verdict == ("biased" if pull > 1 else "exact")
    expected = deltaE_ciede2000(lab_of(np.clip(painted, 0, 255)), lab_of(exact))
    assert report.sampler.colour_error.value == pytest.approx(expected, abs=1e-2)
    assert report.sampler.reference_colour_error.value == pytest.approx(0, abs=1e-2)
    assert report.sampler.brightness.value == pytest.approx(np.clip(painted, 0, 255) @ LUMA, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be told, and what is refused


def test_a_prompt_that_fixes_the_brightness_cannot_tell():
    for kind, (stated, *_) in KINDS.items():
        denoise = network_of(kind, GaussianCanvas(-2.4, 0.02, 0.6))
        answer = judge_network(probes_of(denoise, stated, (4, 32, 32)), stated)
        assert answer.verdict == "cannot tell"
        assert answer.sentence.startswith("cannot tell: this prompt fixes the brightness (x0 follows the noise mean")
        assert answer.seeds_needed is None


def noisy_probes(share, seeds, rng, noise=6.0):
    """Of a network whose means jitter: slope 10 at its peak, a share of that at t = T, both with noise."""
    sigmas = np.array(probed_sigmas(ZERO))
    mean = np.full(4, 1 / 64)
    probes = []
    for seed in range(seeds):
        slopes = np.array([1, 2, 3, 5, 8, 10, 9, 10 * share])[:, None] + noise * rng.normal(size=(8, 4))
        denoised = np.stack([slopes * mean, -slopes * mean], 1)
        probes.append(NetworkProbe(seed, sigmas, np.stack([mean, -mean]), denoised, 1 / np.append(sigmas[:-1], 1e9)))
    return probes


@pytest.mark.parametrize(("share", "verdict"), [(0.0, "zero SNR"), (0.5, "starved")])
def test_too_few_seeds_say_how_many_would_tell(share, verdict):
    rng = np.random.default_rng(1)
    told, wrong, asked = 0, 0, 0
    for _ in range(100):
        answer = judge_network(noisy_probes(share, 4, rng), ZERO)
        if answer.verdict != "cannot tell":
            wrong += answer.verdict != verdict
            continue
        needed = answer.seeds_needed
        assert answer.sentence.startswith(f"cannot tell: 4 seeds are too few, use {needed} (x0 at t = T follows")
        assert 4 < needed <= MOST_SEEDS
        again = judge_network(noisy_probes(share, needed, rng), ZERO).verdict
        asked, told, wrong = asked + 1, told + (again == verdict), wrong + (again not in (verdict, "cannot tell"))
    assert asked > 25
    assert told / asked > 0.8
    assert wrong <= 2  # 1 % of the answers


def test_a_noisy_sampler_says_how_many_seeds_would_tell():
    """A sampler that adds noise of its own to the brightness, 3 levels beyond the exact flow's in the mean."""
    generator = torch.Generator().manual_seed(0)

    def run(noise):
        latents, statistics = of_brightness([0.1, 0.1, 0.1])(noise)
        return latents + (3 + 8 * torch.randn(1, generator=generator)) / 255, statistics

    def ask(seeds):
        exact = of_brightness([0.1, 0.1, 0.1])
        shared = {"schedule": ZERO, "reference": exact, "seeds": range(seeds), "to_rgb": lambda latents: latents}
        return mean_leak(None, run, (3, 4, 4), **shared).sampler

    few = ask(3)
    assert few.verdict == "cannot tell"
    assert few.sentence.startswith(f"cannot tell about the sampler: 3 seeds are too few, use {few.seeds_needed} (pull")
    assert ask(few.seeds_needed).verdict == "biased"


@pytest.mark.parametrize("seeds", [[], [1], range(1)])
def test_one_seed_is_refused(seeds):
    with pytest.raises(ValueError, match=r"needs at least 2 seeds, not \d"):
        mean_leak(GaussianCanvas(), None, (4, 8, 8), schedule=ZERO, seeds=seeds)


def test_flow_matching_needs_noise_levels():
    with pytest.raises(ValueError, match="sigmas must be given"):
        mean_leak(GaussianCanvas(), None, (4, 8, 8), schedule=None)


def test_guidance_needs_a_sampler():
    exact = exact_flow(GaussianCanvas(), ZERO, (8, 8))
    with pytest.raises(ValueError, match="unguided needs run and reference"):
        mean_leak(GaussianCanvas(), None, (4, 8, 8), schedule=ZERO, reference=exact, unguided=exact)


def test_equal_seeds_are_refused():
    with pytest.raises(ValueError, match="the same seed twice"):
        check_seeds([1, 2, 1])


@pytest.mark.parametrize("offset", [0.0, -1.0, math.nan, math.inf])
def test_constant_noise_is_refused(offset):
    with pytest.raises(ValueError, match="offset must be positive and finite"):
        mean_leak(GaussianCanvas(), None, (4, 8, 8), schedule=ZERO, offset=offset)


def test_latents_without_space_are_refused():
    with pytest.raises(ValueError, match=r"\(C, F, H, W\), not \(4, 8\)"):
        noise_pair(0, 0, (4, 8))


def test_a_network_that_answers_nan_is_told_where():
    def broken(x, sigma):
        answer = GaussianCanvas()(x, sigma)
        if sigma > 30:
            answer[:, 2] = math.nan
        return answer

    with pytest.raises(
        ValueError, match=r"NaN or infinity for pure noise at sigma 40\.39, in channel 3; half precision"
    ):
        mean_leak(broken, None, (4, 8, 8), schedule=ZERO)


def test_a_sampler_that_ends_in_nan_is_told_where():
    def broken(x, sigma):
        answer = GaussianCanvas()(x, sigma)
        if sigma < 3:
            answer[1, 1] = math.nan
        return answer

    sigmas = step_schedule(ZERO, 10, "trailing")
    step = int((sigmas < 3).nonzero()[0, 0]) + 1
    where = rf"step {step} of 10 .* channel 2 of 4 of the prediction .sample 2 of 2"
    with pytest.raises(ValueError, match=f"seed 5: NaN .* {where}"):
        mean_leak(None, sampler(broken, sigmas), (4, 8, 8), schedule=ZERO, seeds=[5, 6])


def test_latents_broken_after_the_last_step_are_told():
    def run(noise):
        latents, statistics = of_brightness([0.0])(noise)
        return latents / 0, statistics

    with pytest.raises(ValueError, match="seed 0: the finished latents contain NaN or infinite values"):
        mean_leak(None, run, (4, 8, 8), schedule=ZERO)


def test_a_reference_of_other_seeds_is_refused(reports):
    report = reports["good", "default"]
    with pytest.raises(ValueError, match="must have the same seeds"):
        judge_sampler(report.sampler_probes, report.reference_probes[::-1], math.inf)
    with pytest.raises(ValueError, match="must have the same seeds"):
        judge_sampler(report.sampler_probes, report.reference_probes[:-1], math.inf)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def test_the_report_as_text(reports):
    text = str(reports["good", "14.6"])
    verdict, checkpoint, answer, *_ = [line for line in text.splitlines() if line]
    assert verdict == "Z" + reports["good", "14.6"].verdict[1:] + "."
    assert checkpoint.startswith("Checkpoint: zero-SNR trained: x0 at t = T does not follow the noise mean (slope 0.0")
    assert answer.startswith("Sampler: the sampler starts at sigma 14.6: ")
    assert "Reference: the exact flow." in text
    assert all(f"Channel {i}: slope " in text for i in (1, 2, 3, 4))
    assert "Spread of brightness between seeds: " in text
    assert "of the pixels are clipped" in text
    assert "CIEDE2000" in text
    assert "4 seeds, each with noise means of plus and minus 1 standard deviation. Intervals: 99% confidence." in text
    assert text.endswith(" Brightness by the linear factors.")


def test_the_report_as_json(reports):
    for report in reports.values():
        content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert content["verdict"] == report.verdict
        assert content["seeds"] == [0, 1, 2, 3]
        assert content["checkpoint"]["share"]["value"] == report.checkpoint.share.value
        assert len(content["sampler"]["channels"]) == 4
    content = reports["good", "default"].to_dict()
    assert content["sampler"]["start_sigma"] == content["checkpoint"]["sigmas"][-1] == "infinity"


def test_what_json_cannot_hold():
    assert plain([math.nan, -math.inf, np.float32(math.inf), np.int64(3), np.array([1.5])]) == [
        None,
        "-infinity",
        "infinity",
        3,
        [1.5],
    ]


# ----------------------------------------------------------------------------------------------------------------------
# How often it errs


def random_model(rng):
    """A canvas or a set of pictures that leaves some brightness open, and the shape of its latents."""
    shape = (rng.choice([3, 4]), rng.choice([12, 16, 20]), rng.choice([12, 16, 20]))
    tau, grain = rng.uniform(0.3, 1.0), rng.uniform(0.05, 0.9)
    if rng.random() < 0.5:
        return GaussianCanvas(rng.uniform(-2.5, 2.5), tau, grain), shape
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    pictures = torch.randn(rng.randint(1, 6), *shape[:1], 1, 1, generator=generator).expand(-1, *shape)
    return PictureSet(pictures, std=grain, brightness_std=tau), shape


@each_kind
def test_at_most_one_verdict_in_a_hundred_is_false(kind):
    stated, _, _, verdict = KINDS[kind]
    rng, found = random.Random(kind), []
    for _ in range(200):
        model, shape = random_model(rng)
        denoise, seeds = network_of(kind, model), rng.sample(range(10**6), 8)
        found.append(mean_leak(denoise, None, shape, schedule=stated, seeds=seeds).checkpoint.verdict)
    assert sum(v not in (verdict, "cannot tell") for v in found) <= 2
    assert found.count("cannot tell") <= 4


@pytest.mark.parametrize(("start", "verdict"), [(math.inf, "exact"), (14.6, "biased")])
@pytest.mark.parametrize("canvases", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_every_verdict_on_samplers_is_true(start, verdict, canvases):
    rng, found = random.Random(1), []
    for _ in range(canvases):
        side = rng.choice([24, 32])
        mean = rng.choice([-1, 1]) * rng.uniform(1.0, 2.5)
        canvas = GaussianCanvas(mean, rng.uniform(0.3, 1), rng.uniform(0.05, 0.9))
        size = (side, side)
        sigmas = step_schedule(ZERO, 20, latent_size=size) if math.isinf(start) else even_timesteps(start, 20)
        report = mean_leak(
            None,
            sampler(canvas, sigmas),
            (3, *size),
            schedule=ZERO,
            reference=exact_flow(canvas, ZERO, size),
            start_sigma=sigmas[0].item(),
            seeds=rng.sample(range(10**6), 3),
        )
        found.append(report.sampler.verdict)
    assert set(found) == {verdict}
