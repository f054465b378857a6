"""Whether two layouts of a checkpoint give the same numbers; in ComfyUI see tests/comfyui/test_forward.py."""

import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints import forward, to_single_file
from ztsnr.checkpoints.forward import compare_forwards, find_comfyui
from ztsnr.samplers import NoiseSchedule

from ..tiny_pipelines import make_tiny_sdxl


@pytest.fixture(autouse=True)
def no_comfyui(monkeypatch, tmp_path):
    """Whatever there is on this machine."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny SDXL, its folder and its single file."""
    place = tmp_path_factory.mktemp("pair")
    folder = make_tiny_sdxl(place / "folder")
    to_single_file(folder, place / "file.safetensors")
    return folder, place / "file.safetensors"


def differing(agreements):
    return {agreement.what for agreement in agreements if not agreement.holds}


def test_both_layouts_agree(pair):
    folder, file = pair
    for path, other in ((folder, file), (file, folder)):
        agreements, problems = compare_forwards(path, other)
        assert problems == []
        assert [agreement.what for agreement in agreements] == ["text", "pooled", "prediction", "picture"]
        assert all(agreement.program == f"diffusers, {other.name}" for agreement in agreements)
        assert not differing(agreements)


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("model.diffusion_model.middle_block.0.in_layers.2.weight", {"prediction"}),
        ("model.diffusion_model.label_emb.0.0.weight", {"prediction"}),
        ("first_stage_model.decoder.conv_in.weight", {"picture"}),
        ("conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight", {"text"}),
        ("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight", {"text", "pooled"}),
        ("conditioner.embedders.1.model.text_projection", {"pooled"}),
    ],
)
def test_a_change_is_found_where_it_is(pair, tmp_path, name, outputs):
    folder, file = pair
    tensors = load_file(file)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, tmp_path / "changed.safetensors", {"modelspec.prediction_type": "v"})
    agreements, problems = compare_forwards(folder, tmp_path / "changed.safetensors")
    assert differing(agreements) == outputs
    assert len(problems) == len(outputs)
    for problem in problems:
        assert problem.startswith("diffusers, changed.safetensors: ")


def test_one_that_is_alone(pair):
    folder, file = pair
    with pytest.raises(ValueError, match=r"nothing to compare .*: give its single file"):
        compare_forwards(folder)
    with pytest.raises(ValueError, match="give its diffusers folder, or a ComfyUI"):
        compare_forwards(file)
    with pytest.raises(ValueError, match="have the same layout"):
        compare_forwards(file, file)


# ----------------------------------------------------------------------------------------------------------------------
# ComfyUI


def make_comfyui(folder):
    folder.mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


def test_where_comfyui_is(tmp_path, monkeypatch):
    assert find_comfyui() is None
    by_cli = make_comfyui(tmp_path / "comfy" / "ComfyUI")
    assert find_comfyui() == by_cli
    around = make_comfyui(tmp_path / "mine")
    monkeypatch.setattr(forward, "__file__", str(around / "custom_nodes" / "comfyui-ztsnr" / "checkpoints" / "x.py"))
    assert find_comfyui() == around
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no ComfyUI in .*nowhere"):
        find_comfyui()
    monkeypatch.setenv("COMFYUI_PATH", str(by_cli))
    assert find_comfyui() == by_cli


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (
            "import sys; sys.exit('ValueError: it is broken')",
            "could not run file.safetensors: ValueError: it is broken.",
        ),
        ("import os; os.kill(os.getpid(), 9)", "signal 9 ended it, as when memory runs out."),
        (None, "ComfyUI does not start with "),
    ],
)
def test_a_comfyui_that_fails_is_a_problem(pair, tmp_path, monkeypatch, program, sentence):
    """The tiny model passes for a KOALA here, and programs that fail for ComfyUI."""
    folder, file = pair
    monkeypatch.setattr(forward, "SUPPORTED", {"unknown"})
    if program is None:
        monkeypatch.setenv("COMFYUI_PYTHON", str(tmp_path / "nothing"))
    else:
        monkeypatch.setattr(forward, "INSIDE_COMFYUI", tmp_path / "fails.py")
        (tmp_path / "fails.py").write_text(program)
        monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    agreements, problems = compare_forwards(folder, file, comfyui=make_comfyui(tmp_path / "ComfyUI"))
    assert not differing(agreements)
    assert len(agreements) == 4
    (problem,) = problems
    assert sentence in problem


def test_tables(monkeypatch):
    """ComfyUI's tables are float32, and end with 4518.76 for infinity."""
    plain, zero = NoiseSchedule.sdxl(zero_terminal_snr=False), NoiseSchedule.sdxl()
    timesteps = torch.arange(1000)
    table = plain.sigma(timesteps).float()
    assert forward._table_difference(table, plain) < 1e-6
    assert forward._table_difference(table * 1.01, plain) == pytest.approx(0.01, rel=1e-4)
    assert forward._table_difference(table, zero) == math.inf
    assert forward._table_difference(table[:-1], plain) == math.inf
    rescaled = zero.sigma(timesteps).float()
    rescaled[-1] = 4518.76
    assert forward._table_difference(rescaled, zero) < 1e-6
    assert forward._table_difference(rescaled, plain) > 0.1
