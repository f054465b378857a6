"""The comparison of diffusers pipelines passes where ours is DDIM, and fails where it is not."""

import math
import sys
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch

from ztsnr.samplers import ZTSNRScheduler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import diffusers_pipelines as bench

FLOAT, HALF = torch.float32, torch.bfloat16
ALL = [(scheduler, dtype) for scheduler in bench.SCHEDULERS for dtype in bench.DTYPES]


@pytest.mark.parametrize("name", ["StableDiffusionXLImg2Img", "StableDiffusionPanorama", "AnimateDiffVideoToVideo"])
def test_euler_on_trailing_steps_is_ddim(name):
    found = bench.examine(bench.ENTRIES[name])
    assert found.failures == {}
    assert all(found.runs(scheduler) for scheduler in bench.SCHEDULERS)
    assert found.from_ddim("euler") < 1e-4
    assert found.from_ddim("default") > 0.1
    for scheduler in bench.SCHEDULERS:
        assert 1e-3 < found.rounding(scheduler) < 0.3
    assert bench.remarks(found) == ""


@pytest.mark.parametrize(
    "other",
    [{"solver": "dpmpp_2m"}, {"spacing": "karras"}, {"rescale_betas_zero_snr": False}, {"beta_end": 0.0121}],
    ids=str,
)
def test_another_sampler_is_told_apart(other):
    changed = partial(bench.SCHEDULERS["euler"], **other)
    found = bench.examine(bench.ENTRIES["StableDiffusion"], {"DDIM": bench.SCHEDULERS["DDIM"], "euler": changed})
    assert found.runs("euler")
    assert found.from_ddim("euler") > 1e-3


def test_a_pipeline_that_refuses_says_so_in_the_table():
    found = bench.examine(bench.ENTRIES["StableDiffusionSAG"])
    assert found.runs("DDIM")
    assert not found.runs("euler")
    assert math.isnan(found.from_ddim("euler"))
    (row,) = bench.table([found]).splitlines()[3:]
    assert row.split()[0] == "StableDiffusionSAG"
    assert row.split()[-2:] == ["yes", "no"]
    told = bench.remarks(found)
    assert "does not support using a scheduler of type ZTSNRScheduler" in told
    assert "euler, default: `ValueError" in told
    assert "DDIM: " not in told


def test_a_pipeline_that_takes_another_scheduler_does_not_count():
    entry = bench.ENTRIES["LEditsPPStableDiffusion"]
    with pytest.raises(TypeError, match="replaces the scheduler by DPMSolverMultistepScheduler"):
        bench.make_pipeline(entry, ZTSNRScheduler(), FLOAT)
    taken = diffusers.DPMSolverMultistepScheduler(steps_offset=1)
    assert bench.make_pipeline(entry, taken, FLOAT).scheduler is taken


def test_pictures_that_are_not_finite_fail(monkeypatch):
    pictures = {key: torch.zeros(4) for key in ALL} | {("default", HALF): torch.tensor([0, math.nan, 0, 0])}
    answers = iter(pictures.values())
    monkeypatch.setattr(bench, "run_pipeline", lambda *_: next(answers))
    found = bench.examine(bench.ENTRIES["StableDiffusion"])
    assert list(found.failures) == [("default", HALF)]
    assert found.runs("euler")
    assert not found.runs("default")


def test_differences_are_shares_of_the_spread():
    base = torch.tensor([1.0, 3.0, 1.0, 3.0])  # spread 1 about 2
    moved = {"euler": 0.1, "default": 0.5, "DDIM": 0.0}
    pictures = {(name, dtype): base + moved[name] + (0.03 if dtype is HALF else 0) for name, dtype in ALL}
    found = bench.Found(bench.ENTRIES["StableDiffusion"], pictures, {})
    assert found.from_ddim("euler") == pytest.approx(0.1, rel=1e-5)
    assert found.from_ddim("default") == pytest.approx(0.5, rel=1e-5)
    assert found.rounding("DDIM") == pytest.approx(0.03, rel=1e-5)


def test_noise_in_half_precision_is_the_same_noise():
    with bench.RoundedNoise():
        single, half = (torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=d) for d in (FLOAT, HALF))
    assert torch.equal(half, single.to(HALF))
    assert torch.equal(single, torch.randn(64, generator=torch.Generator().manual_seed(0)))
