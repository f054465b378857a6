"""How far guidance moves brightness, on models where that is known in closed form."""

import json
import math

import numpy as np
import pytest
import torch

from ztsnr.diagnostics import GaussianCanvas, LatentMeanRecorder
from ztsnr.diagnostics.estimates import CONFIDENCE, Estimate
from ztsnr.diagnostics.guidance_shift import EXPOSURE_TRUE, judge_guidance, moved_most
from ztsnr.diagnostics.leak import exact_flow, mean_leak
from ztsnr.diagnostics.leak_probes import LUMA, noise_pair, probe_sampler
from ztsnr.samplers import NoiseSchedule, exposure_true_guidance, guide

ZERO = NoiseSchedule.sdxl()
SIDE, SHAPE = 16, (3, 16, 16)
LEVELS = 10.0  # of 255 in a latent unit; small, so that nothing is clipped
WITH, WITHOUT = torch.tensor([-0.5, 0.1, 0.3]), torch.tensor([0.2, 0.5, 0.4])  # means of the two canvases


def to_rgb(latents):
    return 0.5 + latents * LEVELS / 255


def luma(means):
    """Of a change of the channels' means."""
    return float(LEVELS * np.asarray(means, dtype=float) @ LUMA)


def flow(scale, guidance=guide, tau=(0.3, 0.3), steps=60, means=(WITH, WITHOUT)):
    """The exact flow of two canvases that differ in their means, and perhaps in the spread of their averages."""
    with_prompt, without = (GaussianCanvas(m, t, 0.6) for m, t in zip(means, tau, strict=True))

    def denoise(x, sigma):
        return guidance(with_prompt(x, sigma), without(x, sigma), scale)

    return exact_flow(denoise, ZERO, (SIDE, SIDE), steps)


def probes_of(run, seeds=6, rgb=to_rgb, shape=SHAPE):
    return [probe_sampler(run, noise_pair(seed, i, shape), rgb, None, seed) for i, seed in enumerate(range(seeds))]


def painted(tones, seed=0):
    """A probe whose two pictures are grey, of given luma less 127.5."""

    def run(noise):
        latents = torch.tensor(tones, dtype=torch.float32).view(2, 1, 1, 1).expand(2, 3, 4, 4) / LEVELS
        recorder = LatentMeanRecorder()
        recorder(0, math.inf, noise, latents)
        return latents, recorder.read()

    return probe_sampler(run, noise_pair(seed, 0, (3, 4, 4)), to_rgb, None, seed)


# ----------------------------------------------------------------------------------------------------------------------
# Closed forms


@pytest.mark.parametrize("scale", [2.0, 5.0, 7.5])
def test_guidance_extrapolates_the_mean_of_a_gaussian_canvas(scale):
    """mu_u + w (mu_c - mu_u): every picture moves by (w - 1) (mu_c - mu_u), whatever its noise."""
    answer = judge_guidance(probes_of(flow(1.0)), {f"CFG {scale:g}": probes_of(flow(scale))})
    moved = luma((scale - 1) * (WITH - WITHOUT))
    (shift,) = answer.shifts
    assert abs(moved) > 1
    np.testing.assert_allclose(shift.changes, moved, rtol=2e-4)
    assert shift.mean.value == pytest.approx(moved, rel=2e-4)
    assert shift.rms.value == pytest.approx(abs(moved), rel=2e-4)
    assert shift.clipped == answer.unguided_clipped == 0
    # both spread by tau alone: the pair's noise means are +-1, and the channels' signs a Hadamard matrix's
    tones = np.concatenate([probe.tone for probe in probes_of(flow(1.0))])
    assert answer.unguided_spread == pytest.approx(tones.std(ddof=1), rel=1e-6)
    assert answer.unguided_brightness.value == pytest.approx(127.5 + luma(WITH), rel=1e-4)


@pytest.mark.parametrize(("exposure", "left"), [(0.9, 0.1), (1.0, 0.0), (0.0, 1.0)])
def test_exposure_true_guidance_leaves_its_share(exposure, left):
    def guidance(cond, uncond, scale):
        return exposure_true_guidance(cond, uncond, scale, exposure=exposure, contrast=0.0)

    answer = judge_guidance(
        probes_of(flow(1.0)), {"CFG 5": probes_of(flow(5.0)), EXPOSURE_TRUE: probes_of(flow(5.0, guidance))}
    )
    cfg, ours = answer.shifts
    assert ours.mean.value == pytest.approx(left * cfg.mean.value, abs=2e-3)
    assert ours.rms.value == pytest.approx(left * cfg.rms.value, abs=2e-3)


def test_spreads_that_differ_make_a_change_of_every_noise():
    """Against scipy on the average of each channel, which follows an equation of its own: with x = cos(phi) x0 +
    sin(phi) eps, the velocity dx/dphi is v."""
    from scipy.integrate import solve_ivp

    taus, scale = (0.2, 0.4), 3.0
    answer = judge_guidance(
        probes_of(flow(1.0, tau=taus, steps=100)), {"CFG 3": probes_of(flow(scale, tau=taus, steps=100))}
    )

    def picture(noise_mean, channel, weights):
        def x0(m, angle):
            alpha, s = math.cos(angle), math.sin(angle)
            total = 0.0
            for weight, mean, tau in zip(weights, (WITH[channel], WITHOUT[channel]), taus, strict=True):
                variance = tau**2 * SIDE**2
                gain = alpha * variance / (alpha**2 * variance + s**2)
                total += weight * (float(mean) + gain * (m - alpha * float(mean)))
            return total

        def velocity(angle, m):  # v = dx / dphi = (alpha x - x0) / s
            return (math.cos(angle) * m - x0(m[0], angle)) / math.sin(angle)

        end = solve_ivp(velocity, (math.pi / 2, 1e-5), [noise_mean], rtol=1e-9, atol=1e-11)
        return end.y[0, -1]

    for index, changes in enumerate(answer.shifts[0].changes):
        noise = noise_pair(index, index, SHAPE).mean((2, 3))
        for change, means in zip(changes, noise.tolist(), strict=True):
            moved = [picture(n, c, (scale, 1 - scale)) - picture(n, c, (1, 0)) for c, n in enumerate(means)]
            assert change == pytest.approx(luma(moved), abs=0.02)
    assert answer.shifts[0].rms.value > abs(answer.shifts[0].mean.value) + 0.05


def test_without_a_way_to_rgb_the_first_channel_is_compared():
    answer = judge_guidance(probes_of(flow(1.0), rgb=None), {"CFG 5": probes_of(flow(5.0), rgb=None)})
    assert answer.unit == "latent units"
    assert answer.shifts[0].mean.value == pytest.approx(4 * float(WITH[0] - WITHOUT[0]), rel=1e-3)
    assert answer.shifts[0].clipped is None
    assert answer.unguided_brightness is None
    assert "latent units rms" in answer.sentence


# ----------------------------------------------------------------------------------------------------------------------
# Numbers and words


def test_numbers_by_hand():
    alone = [painted([0.0, 2.0], 0), painted([4.0, 6.0], 1)]
    guided = [painted([3.0, 3.0], 0), painted([4.0, 11.0], 1)]
    answer = judge_guidance(alone, {"CFG 5": guided, EXPOSURE_TRUE: alone})
    cfg, ours = answer.shifts
    np.testing.assert_allclose(cfg.changes, [[3, 1], [0, 5]], atol=1e-4)
    assert cfg.mean.value == pytest.approx(9 / 4, abs=1e-4)
    assert cfg.rms.value == pytest.approx(math.sqrt((9 + 1 + 0 + 25) / 4), abs=1e-4)
    assert answer.unguided_spread == pytest.approx(np.std([0, 2, 4, 6], ddof=1), abs=1e-4)
    assert (ours.mean.value, ours.rms.value, ours.rms.error) == (0, 0, 0)
    assert answer.sentence.startswith("CFG 5 moves brightness by ")
    assert "levels rms from what the same noise gives without it (exposure-true guidance: 0.00" in answer.sentence
    assert answer.sentence.endswith("pictures without it spread by 2.58")


@pytest.mark.parametrize(("seeds", "least"), [(4, 0.97), (8, 0.965), (16, 0.965)])
@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0])
def test_the_interval_of_an_rms_holds_it_about_as_often_as_it_says(seeds, least, mean):
    rng = np.random.default_rng(seeds)
    truth = math.hypot(mean, 1)
    held = 0
    for _ in range(2000):
        estimate = Estimate.rms_over_seeds((mean + rng.normal(size=seeds)) ** 2)
        held += estimate.low <= truth <= estimate.high
    assert least <= held / 2000 <= CONFIDENCE + 0.01


def test_the_prompt_that_is_moved_most():
    alone = [painted([0.0, 2.0], seed) for seed in (0, 1)]
    answers = [
        judge_guidance(alone, {"CFG 5": [painted([by, 2.0 + by], seed) for seed in (0, 1)]}) for by in (1.0, -7.0, 3.0)
    ]
    assert moved_most(answers) == 1


def test_seeds_that_differ_are_refused():
    alone, guided = ([painted([0.0, 1.0], seed) for seed in seeds] for seeds in ((0, 1), (1, 2)))
    with pytest.raises(ValueError, match="need the same seeds"):
        judge_guidance(alone, {"CFG 5": guided})
    with pytest.raises(ValueError, match="at least 2 seeds, not 1"):
        judge_guidance(alone[:1], {"CFG 5": alone[:1]})


# ----------------------------------------------------------------------------------------------------------------------
# As part of the test


def report_of(**runs):
    ticks = []
    asked = {"schedule": None, "seeds": range(3), "to_rgb": to_rgb, "progress": lambda: ticks.append(1)}
    report = mean_leak(None, flow(5.0, steps=10), SHAPE, **asked, **runs)
    return report, len(ticks)


def test_the_question_is_one_of_the_report():
    runs = {"reference": flow(5.0), "unguided": flow(1.0), "guidance_name": "CFG 5"}
    report, ticks = report_of(**runs)
    assert ticks == 3 * 3
    moved = luma(4 * (WITH - WITHOUT))
    assert [shift.guidance for shift in report.guidance.shifts] == ["CFG 5"]
    assert report.guidance.shifts[0].mean.value == pytest.approx(moved, rel=1e-3)
    report, ticks = report_of(**runs, exposure_true=flow(5.0, exposure_true_guidance))
    assert ticks == 3 * 4
    text = str(report)
    assert f"Guidance: {report.guidance.sentence}." in text
    assert "The prompt alone: brightness " in text
    assert "Exposure-true guidance: brightness moves by " in text
    assert report.guidance.sentence not in report.verdict
    entry = json.loads(json.dumps(report.to_dict(), allow_nan=False))["guidance"]
    assert np.shape(entry["shifts"][1]["changes"]) == (3, 2)
    assert entry["shifts"][0]["rms"]["value"] == report.guidance.shifts[0].rms.value


def test_not_asked_it_is_left_out():
    report, ticks = report_of(reference=flow(5.0))
    assert ticks == 3 * 2
    assert report.guidance is None
    assert report.to_dict()["guidance"] is None
    assert "Guidance" not in str(report)


def test_it_needs_a_reference():
    with pytest.raises(ValueError, match="unguided needs run and reference"):
        report_of(unguided=flow(1.0))
