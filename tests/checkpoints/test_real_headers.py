"""Headers as trainers and programs write them: what is said of each, and what each program takes it for.

The files in headers/ were written by hand after the sources that each names: all metadata, and of the tensors those by
which a file is told.  Titles, dates and hashes are made up.
"""

import json
from pathlib import Path

import pytest

from ztsnr.checkpoints import inspect_checkpoint, mark_checkpoint

V, EPSILON = "v_prediction", "epsilon"
V_ZERO, V_NOT_ZERO, EPS = (V, True), (V, False), (EPSILON, False)
NOT_SAID = (None, None)  # the program does not load it, or looks into the weights
FIXTURES = {path.stem: json.loads(path.read_text("utf-8")) for path in (Path(__file__).parent / "headers").iterdir()}
PROGRAMS = (
    "ComfyUI",
    "Forge, reForge",
    "AUTOMATIC1111 (dev)",
    "SD.Next",
    "InvokeAI",
    "SwarmUI",
    "diffusers, single file",
    "diffusers, folder",
)

# (format, prediction type, zero SNR), types of the tensors, (text encoders, VAE), what the programs take it for
CHECKPOINTS = {
    "kohya_checkpoint": (
        ("single file", V, None),
        ["F16"],
        (True, True),
        (EPS, EPS, EPS, EPS, EPS, V_NOT_ZERO, EPS, NOT_SAID),
    ),
    "onetrainer_checkpoint": (
        ("single file", V, None),
        ["BF16"],
        (True, True),
        (V_NOT_ZERO, V_NOT_ZERO, NOT_SAID, V_NOT_ZERO, EPS, V_NOT_ZERO, EPS, NOT_SAID),
    ),
    "noobai_checkpoint": (
        ("single file", V, True),
        ["F16", "F32"],
        (True, True),
        (V_ZERO, V_ZERO, V_ZERO, V_ZERO, EPS, V_ZERO, EPS, NOT_SAID),
    ),
    "comfyui_checkpoint": (
        ("single file", V, True),
        ["F16", "F32"],
        (True, True),
        (V_ZERO, V_ZERO, V_ZERO, V_ZERO, EPS, V_ZERO, EPS, NOT_SAID),
    ),
    "diffusers_folder": (
        ("diffusers folder", V, True),
        ["F16"],
        (False, False),
        (EPS, NOT_SAID, NOT_SAID, V_ZERO, V_ZERO, NOT_SAID, NOT_SAID, V_ZERO),
    ),
    "simpletuner_folder": (
        ("diffusers folder", V, True),
        ["F16"],
        (False, False),
        (EPS, NOT_SAID, NOT_SAID, V_ZERO, V_ZERO, NOT_SAID, NOT_SAID, V_ZERO),
    ),
}
EVIDENCE = {
    "kohya_checkpoint": ["modelspec.prediction_type = 'v'"],
    "onetrainer_checkpoint": ["tensor v_pred", "modelspec.prediction_type = 'v'"],
    "noobai_checkpoint": ["tensor v_pred", "tensor ztsnr"],
    "comfyui_checkpoint": ["tensor v_pred", "tensor ztsnr", "modelspec.predict_key = 'v'"],
    "diffusers_folder": ["prediction_type = 'v_prediction'", "rescale_betas_zero_snr = true"],
    "simpletuner_folder": [
        "tensor v_pred",
        "tensor ztsnr",
        "prediction_type = 'v_prediction'",
        "rescale_betas_zero_snr = true",
    ],
    "kohya_lora": ["modelspec.prediction_type = 'v'", "ss_zero_terminal_snr = 'True'"],
    "onetrainer_lora": [
        "modelspec.prediction_type = 'v'",
        "OneTrainer's settings in the metadata turn on rescale_noise_scheduler_to_zero_terminal_snr",
    ],
    "diffusers_lora": [],
}
# (prediction type, zero SNR), types of the tensors
LORAS = {
    "kohya_lora": ((V, True), ["BF16"]),
    "onetrainer_lora": ((V, True), ["BF16"]),
    "diffusers_lora": (NOT_SAID, ["F32"]),
}


@pytest.fixture
def write(tmp_path, write_checkpoint):
    """Name of a fixture -> the file, or the folder, that such a program writes."""

    def write(name: str) -> Path:
        fixture = FIXTURES[name]
        shapes = {tensor: tuple(shape) for tensor, shape in fixture["tensors"].items()}
        path = write_checkpoint(tmp_path / fixture["file_name"], shapes, fixture["metadata"])
        if "scheduler_config" not in fixture:
            return path
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(fixture["scheduler_config"]))
        return tmp_path

    return write


def test_every_fixture_is_tested_and_says_what_it_follows():
    assert FIXTURES.keys() == CHECKPOINTS.keys() | LORAS.keys() == EVIDENCE.keys()
    for fixture in FIXTURES.values():
        assert len(fixture["follows"].splitlines()) == 1


def taken(report) -> dict:
    return {row.program: (row.taken.prediction_type, row.taken.zero_terminal_snr) for row in report.programs}


def assert_evidence(report, name):
    assert len(report.evidence) == len(EVIDENCE[name])
    for sentence, piece in zip(report.evidence, EVIDENCE[name], strict=True):
        assert piece in sentence


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(write, name):
    said, types, parts, programs = CHECKPOINTS[name]
    path = write(name)
    if name == "onetrainer_checkpoint":  # which writes the model's configuration beside it
        path.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}\n")
    report = inspect_checkpoint(path)
    assert (report.format, report.prediction_type, report.zero_terminal_snr) == said
    assert report.architecture == "SDXL base"
    assert list(report.precision) == types
    assert (report.has_text_encoders, report.has_vae) == parts
    assert report.metadata == FIXTURES[name]["metadata"]
    assert_evidence(report, name)
    assert taken(report) == dict(zip(PROGRAMS, programs, strict=True))
    for row in report.programs:
        v_prediction = None if report.zero_terminal_snr is None else True  # is it right?
        assert row.right is {V: v_prediction, EPSILON: False, None: None}[row.taken.prediction_type], row
        assert bool(row.change) == (row.right is False), row


@pytest.mark.parametrize("name", LORAS)
def test_loras(write, name):
    said, types = LORAS[name]
    report = inspect_checkpoint(write(name))
    assert (report.format, report.architecture) == ("LoRA", "SDXL base")
    assert (report.prediction_type, report.zero_terminal_snr) == said
    assert list(report.precision) == types
    assert (report.has_text_encoders, report.has_vae) == (False, False)
    assert_evidence(report, name)
    assert (report.warnings, report.programs) == ((), ())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_trainers_that_do_not_say_zero_snr_are_warned_about(write, name):
    silent = name in ("kohya_checkpoint", "onetrainer_checkpoint")  # though both were trained with it
    warnings = inspect_checkpoint(write(name)).warnings
    assert len(warnings) == silent
    if silent:
        assert "ztsnr mark --v-pred --ztsnr" in warnings[0]


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "scheduler_config" not in FIXTURES[name]])
@pytest.mark.parametrize("swarm", [False, True])
def test_marked_they_are_read_right(write, tmp_path, name, swarm):
    marked = mark_checkpoint(write(name), v_pred=True, ztsnr=True, swarm=swarm, out=tmp_path / "marked.safetensors")
    report = inspect_checkpoint(marked)
    assert (report.prediction_type, report.zero_terminal_snr, report.warnings) == (V, True, ())
    found = taken(report)
    for program in ("ComfyUI", "Forge, reForge", "AUTOMATIC1111 (dev)", "SD.Next"):
        assert found[program] == V_ZERO
    assert found["SwarmUI"] == (V_ZERO if swarm else V_NOT_ZERO)
    assert found["InvokeAI"] == EPS
    kept = {key: value for key, value in FIXTURES[name]["metadata"].items() if "predict" not in key}
    kept.pop("modelspec.hash_sha256", None)  # computed again
    assert kept.items() <= report.metadata.items()
