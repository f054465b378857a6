"""Seeds that were measured on other days are judged together with today's."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ztsnr.demo.claims import judge_claims
from ztsnr.demo.objectives import OBJECTIVES
from ztsnr.demo.trainings import Recipe, Trainings

from .synthetic import as_claimed, as_denied

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import reproduction as bench

RECIPE = Recipe(60, True, 8, 120, 4, 1e-3, 8e-4, 0.1, "float32")


def trainings_of(folder, recipe=RECIPE):
    """With metrics of two minutes for each training of seeds 0 to 3: twice 60 steps of 4 pictures, 4 a second."""
    trainings = Trainings(folder, recipe=recipe, say=lambda line: None)
    for seed in range(4):
        for name in OBJECTIVES:
            trainings.folder(name, seed).mkdir(parents=True)
            lines = [json.dumps({"step": step, "pictures a second": 4}) for step in (60, 120)]
            (trainings.folder(name, seed) / "metrics.jsonl").write_text("\n".join(lines))
    return trainings


def test_seeds_add_up(tmp_path):
    trainings, folder = trainings_of(tmp_path / "out"), tmp_path / "kept"
    runs = {2: as_claimed(), 0: as_denied(), 1: as_claimed()}
    for seed, run in runs.items():
        bench.keep(folder, seed, trainings, run)
    found = bench.kept(folder, trainings)
    assert list(found) == [0, 1, 2]
    for seed, (run, minutes) in found.items():
        assert minutes == pytest.approx([2.0] * len(OBJECTIVES))
        for claim, again in zip(judge_claims([runs[seed]]), judge_claims([run]), strict=True):
            for one, other in zip(claim.evidence, again.evidence, strict=True):
                assert other.answer == one.answer
                assert other.difference.value == pytest.approx(one.difference.value, rel=1e-5, abs=1e-4)
                assert other.difference.error == pytest.approx(one.difference.error, rel=1e-3, abs=1e-4)


def test_pictures_are_not_kept(tmp_path):
    run = as_claimed()
    name = next(iter(run))
    run[name] = run[name] | {"solids/14.6/1/pictures/black": np.zeros((32, 32, 32, 3), np.uint8)}
    bench.keep(tmp_path / "kept", 0, trainings := trainings_of(tmp_path / "out"), run)
    (kept, _) = bench.kept(tmp_path / "kept", trainings)[0]
    assert set(kept[name]) == set(run[name]) - {key for key in run[name] if "/pictures" in key}


def test_seeds_of_another_recipe_are_not_judged_together(tmp_path):
    bench.keep(tmp_path / "kept", 0, trainings_of(tmp_path / "one"), as_claimed())
    other = trainings_of(tmp_path / "other", Recipe(60, True, 8, 240, 4, 1e-3, 8e-4, 0.1, "float32"))
    assert bench.kept(tmp_path / "kept", other) == {}
