"""Sound and unsound checkpoints, and what changed between two."""

import hashlib
import json
import math
import struct

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from ztsnr.checkpoints.verify import verify_checkpoint
from ztsnr.cli import main

from ..tiny_pipelines import make_tiny_sdxl


def tensors(**changes):
    generator = torch.Generator().manual_seed(0)
    made = {
        "a.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(4, generator=generator).half(),
        "b.weight": torch.randn(2, 2, generator=generator).bfloat16(),
        "scale": torch.tensor(1.0),
        "position_ids": torch.arange(5),
    }
    return made | changes


def save(path, metadata=None, **changes):
    save_file({name: tensor for name, tensor in tensors(**changes).items() if tensor is not None}, path, metadata)
    return path


def test_a_sound_file(tmp_path):
    report = verify_checkpoint(save(tmp_path / "a.safetensors"))
    assert report.sound
    assert report.tensors == 5
    assert report.remarks == ()
    assert report.changes is None
    assert "No problem" in str(report)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_values_that_are_not_finite(tmp_path, bad, dtype):
    weight = torch.ones(4, 3).cumsum(0)
    weight[2, 1] = bad
    weight = weight.to(dtype)
    if weight.float().isfinite().all():
        pytest.skip(f"{dtype} has no {bad}")
    report = verify_checkpoint(save(tmp_path / "a.safetensors", **{"a.weight": weight}))
    assert not report.sound
    assert "'a.weight' holds NaN or infinite values" in report.problems[0]


def test_constant_tensors_are_noted(tmp_path):
    report = verify_checkpoint(
        save(tmp_path / "a.safetensors", **{"a.weight": torch.zeros(4, 3), "a.bias": torch.ones(4)})
    )
    assert report.sound  # fresh norms and biases are like that
    assert any("all zero: 'a.weight'" in remark for remark in report.remarks)
    assert any("one value throughout: 'a.bias'" in remark for remark in report.remarks)


def test_the_hash(tmp_path):
    plain = save(tmp_path / "plain.safetensors")
    content = plain.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    digest = hashlib.sha256(content[8 + length :]).hexdigest()
    right = save(tmp_path / "right.safetensors", {"modelspec.hash_sha256": f"0x{digest}"})
    assert verify_checkpoint(right).sound
    wrong = save(tmp_path / "wrong.safetensors", {"modelspec.hash_sha256": f"0x{digest[::-1]}"})
    (problem,) = verify_checkpoint(wrong).problems
    assert digest in problem


def test_changes_against_another(tmp_path):
    before = save(tmp_path / "before.safetensors")
    weight = tensors()["a.weight"].clone()
    weight[0, 0] += 0.5
    after = save(
        tmp_path / "after.safetensors",
        **{"a.weight": weight, "b.weight": None, "c": torch.ones(2), "a.bias": tensors()["a.bias"].float()},
    )
    report = verify_checkpoint(after, before)
    (change,) = report.changes  # the bias only changed its type
    assert change.name == "a.weight"
    assert change.largest == pytest.approx(0.5)
    assert change.relative == pytest.approx(0.5 / tensors()["a.weight"].norm().item())
    assert report.only_here == ("c",)
    assert report.only_there == ("b.weight",)
    assert verify_checkpoint(before, before).changes == ()


def test_another_shape_is_a_change_beyond_measure(tmp_path):
    before = save(tmp_path / "before.safetensors")
    after = save(tmp_path / "after.safetensors", **{"a.bias": torch.randn(5)})
    assert verify_checkpoint(after, before).changes[0].relative == math.inf


def test_a_folder(tmp_path):
    folder = make_tiny_sdxl(tmp_path / "tiny")
    report = verify_checkpoint(folder, folder)
    assert report.sound
    assert report.changes == ()
    assert report.only_here == report.only_there == ()


def test_the_command(tmp_path):
    good = save(tmp_path / "good.safetensors")
    bad = save(tmp_path / "bad.safetensors", **{"a.weight": torch.full((4, 3), math.nan)})
    result = CliRunner().invoke(main, ["verify", str(good), str(good)])
    assert result.exit_code == 0
    assert "0 tensors differ" in result.stdout
    result = CliRunner().invoke(main, ["verify", str(bad)])
    assert result.exit_code == 1
    assert "Problem" in result.stdout
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-4])
    result = CliRunner().invoke(main, ["verify", str(cut)])
    assert result.exit_code == 2
    assert "incomplete" in result.stderr
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode()
    cut.write_bytes(struct.pack("<Q", len(header)) + header)
    assert CliRunner().invoke(main, ["verify", str(cut)]).exit_code == 2
