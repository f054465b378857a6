"""The claims' judgement, on rows whose answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ztsnr.diagnostics.leak import Estimate
from ztsnr.diagnostics.leak_report import COLOURS
from ztsnr.training.reproduction import LARGE_STARTS, OURS, TRAININGS, Measured
from ztsnr.training.reproduction_claims import JUDGED_STEPS, LARGE_STEPS, Evidence, judge_claims
from ztsnr.training.reproduction_measures import BANDS, SHAPES, SOLIDS, STARTS, Row

SIDE, NOISES = 16, 4


def row(prompt, start, steps, level, first, contrast=0.0):
    """Pictures of one grey level, with a little spread over the noises and a coarse step in them."""
    pictures = np.full((NOISES, SIDE, SIDE, 3), 0.0)
    pictures += level + np.arange(NOISES)[:, None, None, None] * 0.5
    pictures[:, :, : SIDE // 2] += contrast
    return Row(prompt, start, steps, 0, 0, 0, 0, 0, first, pictures.round().clip(0, 255).astype(np.uint8))


def band(prompt, start, whole):
    colours = COLOURS[prompt.background], COLOURS[prompt.subject]
    pictures = np.full((NOISES, SIDE, SIDE, 3), colours[0], np.uint8)
    pictures[:, 6:10, : SIDE if whole else SIDE // 2] = colours[1]
    return Row(prompt, start, LARGE_STEPS, 0, 0, 0, 0, 0, 0, pictures)


def measured(
    training, *, black=0, black_finite=0, white=255, contrast=0, first=3.0, error=0.2, whole_from=29.0, learned=True
):
    rows = []
    for start in STARTS:
        far = black_finite if start == 14.6 else black
        rows += [row(prompt, start, JUDGED_STEPS, far if prompt is SOLIDS[0] else white, first, contrast)
                 for prompt in (*SOLIDS, *SHAPES)]  # fmt: skip
    rows += [replace(band(prompt, start, learned), steps=JUDGED_STEPS) for prompt in BANDS for start in STARTS[:5]]
    large = [band(prompt, start, start >= whole_from) for prompt in BANDS for start in LARGE_STARTS]
    return Measured(training, 0, rows, large, None, error)


def answers(runs):
    return [claim.answer for claim in judge_claims(runs)]


def as_claimed():
    epsilon, plain, starved, ours = TRAININGS
    return {
        epsilon: measured(epsilon),
        plain: measured(plain, black_finite=40, contrast=30, white=220),
        starved: measured(starved, black=60, error=1.1),
        ours: measured(ours, black=2, black_finite=20),
    }


def test_all_hold():
    assert answers([as_claimed()]) == ["yes"] * 5
    assert answers([as_claimed(), as_claimed(), as_claimed()]) == ["yes"] * 5


def test_none_hold():
    runs = {name: measured(name, first=60.0, whole_from=99.0) for name in TRAININGS}
    assert answers([runs]) == ["no"] * 5


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({"black": 20, "black_finite": 20}, 1),
        ({"first": 30.0}, 3),
        ({"whole_from": 10.0}, 4),
        ({"error": 1.05}, 5),
        ({"learned": False}, 4),
    ],
)
def test_each_can_fail(change, number):
    runs = as_claimed()
    runs[OURS] = measured(OURS, **{"black": 2, "black_finite": 20} | change)
    assert answers([runs])[number - 1] == ("cannot tell" if "learned" in change else "no")


def test_an_interval_across_the_limit_cannot_tell():
    def evidence(value, error):
        return Evidence("", 0, 0, Estimate(value, error, 4), 1, 1.0).answer

    assert [evidence(3, 1), evidence(3, 2.5), evidence(0.5, 0.2), evidence(-9, 1)] == ["yes", "cannot tell", "no", "no"]
    assert Evidence("", 0, 0, Estimate(-3, 1, 4), -1, 1.0).answer == "yes"
    assert evidence(3, math.inf) == "cannot tell"
