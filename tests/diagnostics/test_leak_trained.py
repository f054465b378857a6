"""The mean-leak test on networks trained with the faults it names; minutes, most of them for the training itself.

The weights are kept beside those of ``benchmarks/leak_verdicts.py``, so each network is trained once.
"""

import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ztsnr.diagnostics.latent_stats import LatentMeanRecorder
from ztsnr.diagnostics.leak import exact_flow, mean_leak
from ztsnr.diagnostics.leak_probes import noise_pair
from ztsnr.samplers import NoiseSchedule, sample, step_schedule

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import leak_networks
import leak_verdicts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
ZERO, PLAIN = NoiseSchedule.sdxl(), NoiseSchedule.sdxl(zero_terminal_snr=False)
VERDICTS = {"good": "zero SNR", "starved": "starved", "plain": "not zero SNR"}
SIZE = leak_networks.SHAPE[1:]


@pytest.mark.parametrize(
    ("kind", "stated"),
    [("good", ZERO), ("good", PLAIN), ("starved", ZERO), ("plain", PLAIN), ("plain", ZERO)],
    ids=["good", "good, not marked", "starved", "plain", "plain, marked zero SNR"],
)
def test_the_checkpoints_verdict(kind, stated):
    denoise = leak_networks.denoiser(leak_networks.trained(kind, 0), stated)
    found = Counter()
    for run in range(36):
        seeds = range(8 * run, 8 * run + 8)
        answer = mean_leak(denoise, None, leak_networks.SHAPE, schedule=stated, seeds=seeds).checkpoint
        found[answer.verdict] += 1
        assert answer.table == ("plain" if kind == "plain" else "zero SNR")
        if kind == "plain":
            assert answer.believed_sigma == pytest.approx(14.6, rel=0.5)
    assert found[VERDICTS[kind]] >= 35
    assert set(found) <= {VERDICTS[kind], "cannot tell"}


def test_a_prompt_of_one_colour_cannot_tell():
    denoise = leak_networks.denoiser(leak_networks.trained("good", 0), ZERO, "black")
    answer = mean_leak(denoise, None, leak_networks.SHAPE, schedule=ZERO).checkpoint
    assert answer.sentence.startswith("cannot tell: this prompt fixes the brightness")


@pytest.mark.parametrize(("start", "verdict"), [(math.inf, "exact"), (14.6, "biased")])
def test_the_samplers_verdict_on_black(start, verdict):
    denoise = leak_networks.denoiser(leak_networks.trained("good", 0), ZERO, "black")
    if math.isinf(start):
        sigmas = step_schedule(ZERO, 20, latent_size=SIZE)
    else:
        sigmas = torch.cat([ZERO.sigma(ZERO.timestep(start) * (1 - torch.arange(20) / 20)), torch.zeros(1)])

    def run(noise):
        recorder = LatentMeanRecorder()
        return sample(denoise, noise, sigmas, callback=recorder), recorder.read()

    for first in range(0, 40, 8):
        report = mean_leak(
            None,
            run,
            leak_networks.SHAPE,
            schedule=ZERO,
            reference=exact_flow(denoise, ZERO, SIZE),
            start_sigma=start,
            seeds=range(first, first + 8),
            to_rgb=lambda pictures: (pictures + 1) / 2,
        )
        assert report.sampler.verdict == verdict
        low, high = (-1, 1) if verdict == "exact" else (4, 40)
        assert low < report.sampler.pull.value < high


def test_a_network_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(leak_networks, "train", partial(leak_networks.train, steps=3))
    first = leak_networks.trained("good", 5, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    monkeypatch.setattr(leak_networks, "train", None)
    again = leak_networks.trained("good", 5, tmp_path)
    for name, weights in first.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name])


def test_runs_at_once_are_the_runs_one_by_one():
    denoise = leak_networks.denoiser(leak_networks.trained("good", 0), ZERO)
    run = leak_verdicts.sampler(denoise, ZERO, "spectral", math.inf)
    handed_out = leak_verdicts.at_once(run, [4, 9, 2])
    for index, seed in enumerate([4, 9, 2]):
        latents, statistics = run(noise_pair(seed, index, leak_networks.SHAPE))
        found, seen = handed_out(None)
        torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(seen.denoised_mean, statistics.denoised_mean, rtol=1e-4, atol=1e-4)


def test_whole_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(leak_verdicts, "RESULTS", tmp_path / "RESULTS.md")
    done = CliRunner().invoke(leak_verdicts.main, ["--seeds", "1", "--runs", "2"], catch_exceptions=False)
    assert done.exit_code == 0
    written = (tmp_path / "RESULTS.md").read_text()
    assert "## Leak verdicts" in written
    for row in leak_verdicts.STATED:
        assert f"| ideal {row} " in written
    for name in leak_verdicts.SAMPLERS:
        assert f"| {name} " in written
