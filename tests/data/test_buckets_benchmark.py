"""The benchmark of buckets compares answers that are the same, and would notice if they were not."""

import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import buckets as bench


@pytest.mark.parametrize("batch_size", [1, 16])  # 16: some buckets are closed
def test_all_ways_give_the_same_answer(tmp_path, batch_size):
    sizes = bench.draw_sizes(3000)
    for way, function in bench.WAYS.items():
        seconds, assignment, steps = function(sizes, batch_size)
        assert seconds.keys() == {"buckets", "epoch"}
        buckets, pictures = zip(*steps, strict=True)
        np.savez(tmp_path / f"{way}.npz", assignment=assignment, buckets=buckets, pictures=np.stack(pictures))
    assert bench.check_same(str(tmp_path), batch_size) == len(steps)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("assignment", "the buckets differ"),
        ("twice", "a picture comes twice"),
        ("shape", "a step has two shapes"),
        ("missing", "a step is missing"),
    ],
)
def test_a_difference_is_noticed(tmp_path, fault, sentence):
    sizes = bench.draw_sizes(2000)
    _, assignment, steps = bench.at_once(sizes, 8)
    buckets, pictures = (np.array(part) for part in zip(*steps, strict=True))
    for way in bench.WAYS:
        if way == bench.MENDED:
            if fault == "assignment":
                assignment[0] = (assignment[0] + 1) % 33
            if fault == "twice":
                pictures[0, 0] = pictures[0, 1]
            if fault == "shape":
                other = np.flatnonzero(buckets != buckets[0])[0]
                pictures[0, 0], pictures[other, 0] = pictures[other, 0], pictures[0, 0]
            if fault == "missing":
                buckets, pictures = buckets[1:], pictures[1:]
        np.savez(tmp_path / f"{way}.npz", assignment=assignment, buckets=buckets, pictures=pictures)
    with pytest.raises(AssertionError, match=sentence):
        bench.check_same(str(tmp_path), 8)


def test_drawn_sizes_are_as_those_of_novelai():
    """The median error that they reported, with their buckets and their measure of it; the mean without their tails."""
    sizes = bench.draw_sizes(50_000)
    ratios = np.array([width / height for width, height in bench.novelai_buckets()])
    errors = np.abs(sizes[:, :1] / sizes[:, 1:] - ratios)
    assert np.median(errors.min(axis=1)) == pytest.approx(0.0227, abs=0.002)
    assert errors.min(axis=1).mean() == pytest.approx(0.0329, abs=0.006)
    tall = errors.argmin(axis=1) < 8
    assert tall.mean() == pytest.approx(sum(bench.NOVELAI_COUNTS[:8]) / sum(bench.NOVELAI_COUNTS), abs=0.08)


def test_faults_of_the_public_code():
    sizes = bench.draw_sizes(20_000)
    assert bench.public_epoch(sizes, 8, 1)[0] == 0
    differing, squashed = bench.public_epoch(sizes, 8, 8)
    assert differing == 1  # in 312 of 312 steps
    assert 0.01 < squashed < bench.public_epoch(sizes, 8, 64)[1] < 0.3


def test_whole_command(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "RESULTS.md")
    arguments = ["--pictures", "3000", "--loop-pictures", "2000", "--runs", "2", "--batch", "8"]
    done = CliRunner().invoke(bench.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    written = (tmp_path / "RESULTS.md").read_text()
    assert "## Training: buckets\n\n`python benchmarks/buckets.py --pictures 3000 --loop-pictures 2000" in written
    for way in bench.WAYS:
        assert f"| {way} " in written
    assert "| 8 x 8 " in written
    assert "3000 pictures in at most 10 s reached" in written
