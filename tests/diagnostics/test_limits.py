"""Verdicts on both sides of each limit, from measurements without noise; the limits are written out here."""

import math

import numpy as np
import pytest

from ztsnr.diagnostics.checkpoint_verdict import closest_table, judge_network
from ztsnr.diagnostics.leak_probes import NetworkProbe, SamplerProbe
from ztsnr.diagnostics.sampler_verdict import judge_sampler
from ztsnr.samplers import NoiseSchedule

ZERO = NoiseSchedule.sdxl()
CLOSE = 1e-6


def network(share, peak=10.0):
    """Two seeds of a network of which x0 follows the noise's mean with a slope of ``peak``, and a share of it at T."""
    timesteps = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0]) * ZERO.last_timestep
    sigmas = np.array([ZERO.sigma(float(t)) for t in timesteps])
    slopes = np.array([1, 1, 1, 1, 1, 1, 1, share])[:, None] * np.full(4, peak)
    mean = np.full(4, 1 / 64)
    means = np.stack([slopes * mean, -slopes * mean], 1)
    return [
        NetworkProbe(seed, sigmas, np.stack([mean, -mean]), means, 1 / np.append(sigmas[:-1], 1e9)) for seed in (0, 1)
    ]


def sampler(slope=1.0, *, latents=0.0, levels=None):
    """Two seeds of a sampler: the picture's mean on the noise's, and what is added to it."""
    mean = np.full(4, 0.1)
    noise_mean = np.stack([mean, -mean])
    rgb = None if levels is None else np.full((2, 3), levels, dtype=float)
    tone = None if levels is None else np.zeros(2)
    nothing = np.zeros((0, 2, 4))
    return [
        SamplerProbe(seed, noise_mean, slope * noise_mean + latents, rgb, tone, tone, None, np.zeros(0), nothing)
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(("share", "verdict"), [(0.2 - CLOSE, "zero SNR"), (0.2 + CLOSE, "starved")])
def test_a_fifth_of_the_peak_is_a_leak(share, verdict):
    assert judge_network(network(share), ZERO).verdict == verdict


@pytest.mark.parametrize(("peak", "verdict"), [(1.5 - CLOSE, "cannot tell"), (1.5 + CLOSE, "zero SNR")])
def test_a_prompt_leaves_enough_open_from_a_slope_of_one_and_a_half(peak, verdict):
    assert judge_network(network(0.0, peak), ZERO).verdict == verdict


@pytest.mark.parametrize(("levels", "verdict"), [(1 - CLOSE, "exact"), (1 + CLOSE, "biased")])
def test_a_pull_counts_from_one_level_on(levels, verdict):
    answer = judge_sampler(sampler(levels=levels), sampler(levels=0.0), math.inf)
    assert answer.verdict == verdict
    assert answer.pull.value == pytest.approx(levels)


@pytest.mark.parametrize(("latents", "verdict"), [(0.01 - CLOSE, "exact"), (0.01 + CLOSE, "biased")])
def test_a_pull_without_colours_counts_from_a_fiftieth_on(latents, verdict):
    """The pull is the length of a vector of four channels: 0.01 in each is 0.02."""
    answer = judge_sampler(sampler(latents=1 - latents), sampler(latents=1.0), math.inf)
    assert answer.verdict == verdict


@pytest.mark.parametrize("slope", [1.1, 0.9])
def test_a_slope_departs_by_more_than_a_tenth(slope):
    away = math.copysign(CLOSE, slope - 1)
    assert judge_sampler(sampler(slope - away, levels=0.0), sampler(levels=0.0), math.inf).verdict == "exact"
    assert judge_sampler(sampler(slope + away, levels=0.0), sampler(levels=0.0), math.inf).verdict == "coarse"


@pytest.mark.parametrize(("start", "verdict"), [(math.inf, "coarse"), (14.6, "biased")])
def test_a_bias_beside_a_wrong_slope_is_the_starts_if_that_is_finite(start, verdict):
    answer = judge_sampler(sampler(1.5, levels=3.0), sampler(levels=0.0), start)
    assert answer.verdict == verdict


def test_a_slope_that_moves_no_brightness_is_not_judged():
    """0.1 of offset times a slope of 0.19 in four channels is 0.038, less than the 0.04 that two pulls are."""
    few, enough = sampler(0.19), sampler(0.21)
    assert judge_sampler(few, few, math.inf).slope_ratio is None
    assert judge_sampler(enough, enough, math.inf).slope_ratio.value == pytest.approx(1)


@pytest.mark.parametrize(("nearness", "name"), [(0.6, None), (0.8, "zero SNR")])
def test_a_table_is_told_if_it_fits_four_times_better(nearness, name):
    """Responses between those of two tables: their squared misfits are as (1 - nearness)^2 to nearness^2."""
    tables = {"zero SNR": ZERO, "plain": NoiseSchedule.sdxl(zero_terminal_snr=False)}
    timesteps = [500.0, 600.0, 700.0, 799.0]
    logs = [np.log([1 / table.sigma(t) for t in timesteps]) for table in tables.values()]
    responses = np.exp(nearness * logs[0] + (1 - nearness) * logs[1])
    assert closest_table(timesteps, responses, tables, 800.0)[0] == name


def test_a_slope_that_these_seeds_cannot_place_is_not_called_exact():
    uncertain = [sampler(slope, levels=0.0)[seed] for seed, slope in enumerate((1.0, 1.3))]
    answer = judge_sampler(uncertain, sampler(levels=0.0), math.inf)
    assert answer.verdict == "cannot tell"
    assert answer.seeds_needed > 2
