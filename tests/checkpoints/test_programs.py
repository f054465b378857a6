"""What programs take a checkpoint for, row by row against what their sources do."""

import json

import pytest
from click.testing import CliRunner

from ztsnr.checkpoints import inspect_checkpoint
from ztsnr.checkpoints.programs import PROGRAMS, Marked, rows
from ztsnr.cli import main

SINGLE, FOLDER, PREFIXED, BARE = (
    "single file", "diffusers folder", "U-Net only, single-file names", "U-Net only, bare names",
)  # fmt: skip
V, EPSILON = "v_prediction", "epsilon"


def read(form=SINGLE, architecture="SDXL base", names=(), metadata=None, config=None, file_name="model.safetensors",
         truth=(V, True)):  # fmt: skip
    """Program -> its row."""
    marked = Marked(file_name, form, architecture, set(names), metadata or {}, config or {})
    return {row.program: row for row in rows(marked, *truth)}


def taken(row):
    return row.taken.prediction_type, row.taken.zero_terminal_snr


def test_every_program_has_a_row():
    assert list(read()) == list(PROGRAMS)
    assert len(PROGRAMS) == 8


def test_a_file_with_both_tensors():
    found = read(names=("v_pred", "ztsnr"))
    for program in ("ComfyUI", "Forge, reForge", "AUTOMATIC1111 (dev)", "SD.Next", "SwarmUI"):
        assert taken(found[program]) == (V, True), program
        assert found[program].right
        assert found[program].change == ""
    for program in ("InvokeAI", "diffusers, single file"):  # which read no marks in files
        assert taken(found[program]) == (EPSILON, False), program
        assert not found[program].right
        assert found[program].change
    assert found["diffusers, folder"].right is None


def test_a_file_without_marks():
    found = read(truth=(None, None))
    assert {row.taken.prediction_type for row in found.values()} == {EPSILON, None}
    assert all(row.right is None and row.change == "" for row in found.values())


def test_ztsnr_alone_does_nothing():
    found = read(names=("ztsnr",))
    assert taken(found["ComfyUI"]) == (EPSILON, False)
    assert "ztsnr mark --v-pred --ztsnr" in found["ComfyUI"].change


def test_v_without_zero_snr_is_told_apart():
    assert not read(names=("v_pred",))["ComfyUI"].right
    assert read(names=("v_pred",), truth=(V, False))["ComfyUI"].right
    wrong = read(names=("v_pred", "ztsnr"), truth=(V, False))["ComfyUI"]
    assert "--no-ztsnr" in wrong.change


@pytest.mark.parametrize(
    ("said", "expected"),
    [("v", (V, False)), ("v-zsnr", (V, True)), ("epsilon", (EPSILON, False)), (None, (V, True))],
)
def test_swarmui_believes_modelspec_before_the_tensors(said, expected):
    metadata = {} if said is None else {"modelspec.prediction_type": said}
    row = read(names=("v_pred", "ztsnr"), metadata=metadata)["SwarmUI"]
    assert taken(row) == expected
    assert ("--swarm" in row.change) == (expected != (V, True))


def test_sdnext_believes_the_name_first():
    assert taken(read(file_name="Some-VPred.safetensors")["SD.Next"]) == (V, False)
    assert taken(read(file_name="some_v-pred.safetensors", names=("ztsnr",))["SD.Next"]) == (V, True)
    assert taken(read(names=("v_pred",))["SD.Next"]) == (V, False)


def test_comfyui_drops_marks_of_some_unet_files():
    marks = ("v_pred", "ztsnr")
    assert taken(read(PREFIXED, names=marks)["ComfyUI"]) == (EPSILON, False)
    assert "Load Checkpoint (ZTSNR)" in read(PREFIXED, names=marks)["ComfyUI"].change
    assert taken(read(BARE, names=marks)["ComfyUI"]) == (V, True)
    assert taken(read(architecture="SD 1.x", names=marks)["ComfyUI"]) == (EPSILON, False)
    assert taken(read(architecture="SD 2.x", names=marks)["ComfyUI"]) == (None, None)


def test_a_folder_says_it_in_its_scheduler():
    config = {"prediction_type": V, "rescale_betas_zero_snr": True}
    found = read(FOLDER, config=config)
    for program in ("InvokeAI", "SD.Next", "diffusers, folder"):
        assert taken(found[program]) == (V, True), program
    assert taken(found["ComfyUI"]) == (EPSILON, False)
    assert taken(found["Forge, reForge"]) == (None, None)
    assert taken(read(FOLDER)["diffusers, folder"]) == (EPSILON, False)
    assert "ztsnr mark" in read(FOLDER)["InvokeAI"].change


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def file(tmp_path, write_checkpoint):
    """The names of an SDXL file by which it is told."""
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    }
    block = 1
    for level in ((0, 0), (2, 2), (10, 10)):
        for depth in level:
            shapes[f"model.diffusion_model.input_blocks.{block}.0.in_layers.0.weight"] = (320,)
            for i in range(depth):
                name = f"model.diffusion_model.input_blocks.{block}.1.transformer_blocks.{i}.attn2.to_k.weight"
                shapes[name] = (320, 2048)
            block += 1
        block += 1
    return write_checkpoint(tmp_path / "noob.safetensors", shapes | {"v_pred": (0,), "ztsnr": (0,)})


def test_the_report_has_the_rows(file):
    report = inspect_checkpoint(file)
    assert report.architecture == "SDXL base"
    assert [row.program for row in report.programs] == list(PROGRAMS)
    assert report.programs[0].right


def test_the_command(file, tmp_path):
    result = CliRunner().invoke(main, ["inspect", str(file)])
    assert result.exit_code == 0
    assert "SDXL base" in result.stdout
    assert "InvokeAI" in result.stdout
    result = CliRunner().invoke(main, ["inspect", str(file), "--json"])
    content = json.loads(result.stdout)
    assert content["prediction_type"] == V
    assert content["zero_terminal_snr"] is True
    assert content["programs"][0] == {
        "program": "ComfyUI",
        "prediction_type": V,
        "zero_terminal_snr": True,
        "why": "tensors v_pred and ztsnr",
        "right": True,
        "change": "",
    }
    missing = CliRunner().invoke(main, ["inspect", str(tmp_path / "nothing.safetensors")])
    assert missing.exit_code == 2
    assert missing.stderr.startswith("Error: ")
