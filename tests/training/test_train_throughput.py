"""The throughput benchmark on the processor: both loops take the steps that are asked for, and train."""

import sys
from itertools import repeat
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import train_throughput as bench

CPU = torch.device("cpu")


@pytest.mark.parametrize("way", bench.WAYS)
def test_each_loop_takes_its_steps_and_changes_all_weights(way):
    torch.manual_seed(0)
    unet = bench.make_unet(bench.SMALL | {"sample_size": 8}, CPU)
    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    seen = []

    def batches():
        for batch in repeat(bench.random_batch(unet, 2, CPU)):
            seen.append(len(batch.latents))
            yield batch

    found = bench.WAYS[way](unet, batches(), 2, CPU)
    assert len(seen) == bench.WARMUP + 2
    assert found.speed > 0
    after = dict(unet.named_parameters())
    same = [name for name, weight in before.items() if torch.equal(weight, after[name].detach().to(weight.dtype))]
    assert all("norm" in name for name in same)  # a weight of 1 that moved by 1e-5 is 1 in bfloat16 still
    assert len(same) < len(before) / 4


def test_without_a_gpu_the_table_says_so(monkeypatch):
    monkeypatch.setattr(bench, "SMALL", bench.SMALL | {"sample_size": 8})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(bench.main, ["--batch", "1", "--steps", "1", "--no-write"], catch_exceptions=False)
    assert "Not measured on a GPU: there is none here." in result.output
    assert "ztsnr finetune" in result.output


def test_goals():
    theirs, eager = bench.Measured(5.0, 1), bench.Measured(9.0, 97, 100)
    near = "memory within 5% of the plan (not compiled, -3.0%) reached"
    assert bench.goals(theirs, eager, bench.Measured(12.0, 60, 100)) == (
        f": 2 x reached, 12 pictures a second reached, 20 missed, {near}"
    )
    theirs, eager = bench.Measured(11.0, 1), bench.Measured(9.0, 106, 100)
    assert bench.goals(theirs, eager, bench.Measured(21.0, 100, 100)) == (
        ": 2 x missed, 12 pictures a second reached, 20 reached, "
        "memory within 5% of the plan (not compiled, +6.0%) missed"
    )
