"""What programs take a checkpoint for, row by row against what their sources do."""

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ztsnr.checkpoints import inspect_checkpoint
from ztsnr.checkpoints.latent_scaling import LatentScaling
from ztsnr.checkpoints.programs import PROGRAMS, rows
from ztsnr.checkpoints.reading import Marked, Program
from ztsnr.cli import main

SINGLE, FOLDER, PREFIXED, BARE = (
    "single file", "diffusers folder", "U-Net only, single-file names", "U-Net only, bare names",
)  # fmt: skip
V, EPSILON = "v_prediction", "epsilon"


def read(form=SINGLE, architecture="SDXL base", names=(), metadata=None, config=None, file_name="model.safetensors",
         has_yaml=False, latent_scaling=None, truth=(V, True)):  # fmt: skip
    """Program -> its row."""
    marked = Marked(file_name, form, architecture, set(names), metadata or {}, config or {}, has_yaml, latent_scaling)
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


def test_ztsnr_alone_is_zero_snr_without_v_prediction_to_some():
    found = read(names=("ztsnr",))
    for program in ("ComfyUI", "SD.Next", "SwarmUI"):
        assert taken(found[program]) == (EPSILON, False), program
    for program in ("Forge, reForge", "AUTOMATIC1111 (dev)"):  # which rescale the noise levels all the same
        assert taken(found[program]) == (EPSILON, True), program
    for program in ("ComfyUI", "SD.Next", "Forge, reForge"):
        assert "ztsnr mark --v-pred --ztsnr" in found[program].change


def test_v_without_zero_snr_is_told_apart():
    assert not read(names=("v_pred",))["ComfyUI"].right
    assert read(names=("v_pred",), truth=(V, False))["ComfyUI"].right
    wrong = read(names=("v_pred", "ztsnr"), truth=(V, False))["ComfyUI"]
    assert "--no-ztsnr" in wrong.change


def test_zero_snr_counts_where_it_is_said():
    for names in (("v_pred",), ("v_pred", "ztsnr")):
        row = read(names=names, truth=(V, None))["ComfyUI"]
        assert (row.right, row.change) == (None, "")
    unmarked = read(truth=(V, None))["ComfyUI"]
    assert unmarked.right is False
    assert unmarked.change == "Run: ztsnr mark --v-pred."
    assert read(truth=(EPSILON, None))["ComfyUI"].right
    rescaled = read(names=("ztsnr",), truth=(EPSILON, None))["Forge, reForge"]
    assert not rescaled.right
    assert "--no-v-pred --no-ztsnr" in rescaled.change


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("v", (V, False)),
        ("v-zsnr", (V, True)),
        ("v_prediction", (V, False)),
        ("epsilon", (EPSILON, False)),
        ("eps", (EPSILON, False)),
        ("lcm", (None, None)),
        ("v-prediction", (None, None)),  # ComfyUI's node knows no such value
        (" ", (V, True)),
        (None, (V, True)),
    ],
)
@pytest.mark.parametrize("key", ["modelspec.prediction_type", "prediction_type"])
def test_swarmui_believes_the_metadata_before_the_tensors(said, expected, key):
    metadata = {} if said is None else {key: said}
    row = read(names=("v_pred", "ztsnr"), metadata=metadata)["SwarmUI"]
    assert taken(row) == expected
    assert ("--swarm" in row.change) == (row.right is False)


def test_what_swarmui_is_told_to_be_marked_with_can_be_marked():
    both = {"modelspec.prediction_type": "epsilon", "prediction_type": "v-zsnr"}
    row = read(names=("v_pred",), metadata=both, truth=(V, False))["SwarmUI"]
    assert taken(row) == (EPSILON, False)  # the first of the two
    assert row.change == "Run: ztsnr mark --v-pred --no-ztsnr."  # which takes no --swarm
    assert "--swarm" in read(metadata=both)["SwarmUI"].change


def test_metadata_cannot_write_on_the_terminal():
    said = "\x1b[2J\n" + "x" * 500
    found = read(FOLDER, config={"prediction_type": said}), read(metadata={"prediction_type": said})
    for row in (found[0]["InvokeAI"], found[0]["diffusers, folder"], found[1]["SwarmUI"]):
        assert taken(row) == (None, None)
        assert str(row).isprintable()
        assert len(str(row)) < 200
    assert taken(read(FOLDER, config={"prediction_type": ["v_prediction"]})["SD.Next"]) == (None, None)


@pytest.mark.parametrize(
    ("file_name", "expected"),
    [
        ("Some-VPred.safetensors", (V, True)),
        ("some_v-pred.safetensors", (V, True)),
        ("some_V_pred.safetensors", (V, True)),
        ("noobai-rf-vpred.safetensors", ("flow_prediction", False)),
        ("bigASPv25.safetensors", ("flow_prediction", False)),
        ("overflow.safetensors", ("flow_prediction", False)),
        ("sunflower-vpred.safetensors", (V, True)),
        ("sunflower.safetensors", (EPSILON, False)),
    ],
)
def test_sdnext_believes_the_name_first(file_name, expected):
    row = read(file_name=file_name)["SD.Next"]
    assert taken(row) == expected
    marks = ("v_pred",) if expected[0] != EPSILON else ()
    assert taken(read(file_name=file_name, names=marks)["SD.Next"]) == expected
    assert row.right is (expected == (V, True))
    if not row.right:
        assert ("Rename it" in row.change) == (expected[0] != EPSILON)


def test_sdnext_reads_the_tensors_of_every_architecture():
    for architecture in ("SDXL base", "SD 1.x", "SD 2.x"):
        assert taken(read(architecture=architecture, names=("v_pred", "ztsnr"))["SD.Next"]) == (V, True)
        assert taken(read(architecture=architecture, names=("v_pred",))["SD.Next"]) == (V, False)
    assert "by hand" in read(architecture="SD 2.x", truth=(EPSILON, False))["SD.Next"].change


def test_sd_2_is_v_prediction_to_those_that_do_not_look():
    found = read(architecture="SD 2.x", truth=(EPSILON, False))
    for program in ("SD.Next", "InvokeAI", "diffusers, single file"):
        assert taken(found[program]) == (V, False), program
        assert not found[program].right
    for program in ("ComfyUI", "Forge, reForge", "AUTOMATIC1111 (dev)", "SwarmUI"):  # by the weights
        assert taken(found[program]) == (None, None), program
    assert taken(read(FOLDER, architecture="SD 2.x")["ComfyUI"]) == (None, None)


def test_web_uis_read_a_yaml_beside_the_file():
    marks = ("v_pred", "ztsnr")
    assert taken(read(has_yaml=True, names=marks)["Forge, reForge"]) == (V, True)  # it cannot take v away there
    assert taken(read(has_yaml=True, names=marks)["AUTOMATIC1111 (dev)"]) == (None, None)
    for program in ("Forge, reForge", "AUTOMATIC1111 (dev)"):
        assert taken(read(has_yaml=True)[program]) == (None, None), program
        assert ".yaml" in str(read(has_yaml=True)[program])
    assert taken(read(has_yaml=True, names=marks)["ComfyUI"]) == (V, True)
    # SD 1.x has no other way to be v-prediction there
    for program in ("Forge, reForge", "AUTOMATIC1111 (dev)"):
        row = read(architecture="SD 1.x", names=marks)[program]
        assert taken(row) == (EPSILON, True), program
        assert "parameterization: v" in row.change
        assert taken(read(architecture="SD 1.x", names=marks, has_yaml=True)[program]) == (None, None), program


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
    for program in ("Forge, reForge", "SwarmUI"):  # which load none
        assert taken(found[program]) == (None, None)
    assert taken(read(FOLDER)["diffusers, folder"]) == (EPSILON, False)
    assert "ztsnr mark" in read(FOLDER)["InvokeAI"].change


def test_scaled_latents_are_wrong_where_nobody_looks():
    """By docs/checkpoints.md: no program but this package reads a file's numbers, and diffusers reads a folder's."""
    channels = LatentScaling((4.0, 0.0, 1.0, -1.0), (9.0, 6.0, 7.0, 5.0))
    one_number = LatentScaling((0.0,) * 4, (5.0,) * 4)
    marks = {"names": ("v_pred", "ztsnr"), "config": {"prediction_type": V, "rescale_betas_zero_snr": True}}
    file = read(**marks, latent_scaling=channels)
    assert read(**marks)["ComfyUI"].right
    assert not file["ComfyUI"].right
    assert "Load Checkpoint (ZTSNR)" in file["ComfyUI"].change
    assert not any(row.right for row in file.values())
    assert file["diffusers, folder"].right is None  # which does not load it
    sdxl, sd = (read(FOLDER, name, **marks, latent_scaling=channels) for name in ("SDXL base", "SD 1.x"))
    assert sdxl["diffusers, folder"].right
    assert sd["diffusers, folder"].right is False
    assert sdxl["InvokeAI"].right is None
    assert "not known whether" in sdxl["InvokeAI"].change
    assert read(FOLDER, "SD 1.x", **marks, latent_scaling=one_number)["diffusers, folder"].right


# ----------------------------------------------------------------------------------------------------------------------
# The table in the docs


@pytest.fixture
def renderer():
    path = Path(__file__).parents[2] / "docs" / "render_programs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_docs_have_the_table_of_the_registry(renderer):
    for name in renderer.PAGES:
        page = (renderer.ROOT / name).read_text("utf-8")
        assert len(renderer.REGION.findall(page)) == 1, name
        assert renderer.render(page) == page, f"{name} is stale: run docs/render_programs.py"


def test_a_new_entry_is_a_new_row_of_the_report_and_of_the_table(renderer, monkeypatch):
    entry = Program("New", read=PROGRAMS["ComfyUI"].read, remedy=PROGRAMS["ComfyUI"].remedy,
                    looks_at="its tensors", what_to_do="`ztsnr mark`")  # fmt: skip
    monkeypatch.setitem(PROGRAMS, "New", entry)
    assert taken(read(names=("v_pred",))["New"]) == (V, False)
    assert renderer.render("<!-- table:programs -->\nold\n<!-- /table -->\n").endswith(
        "\n| New | its tensors | `ztsnr mark` |\n<!-- /table -->\n"
    )


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
