"""What the base says of itself decides what is trained on it; a LoRA of the wrong kind is refused before loading."""

import csv
import json
import math
import shutil
import tomllib

import pytest
import torch
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints.header import read_header
from ztsnr.errors import UserError
from ztsnr.samplers import NoiseSchedule, make_betas
from ztsnr.training import run as run_module
from ztsnr.training.base import Base, read_base, resolve_objective
from ztsnr.training.config import FinetuneSettings
from ztsnr.training.objective import ObjectiveSettings
from ztsnr.training.settings_file import parse_settings
from ztsnr.training.trainer import run_finetune

from ..tiny_pipelines import make_tiny_sdxl, write_single_file
from .tiny_run import make_content, train

LORA = {"kind": "lora", "rank": 4, "alpha": 4.0}
EPSILON = Base("base", "epsilon", False)
V_PLAIN = Base("base", "v_prediction", False)
V_ZERO = Base("base", "v_prediction", True)
SHIFTED = Base("base", "v_prediction", True, 2.0)
UNKNOWN = Base("base", None, None)
LINEAR = make_betas("linear", 0.0001, 0.02)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Says v-prediction with zero terminal SNR."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def edited(tiny, tmp_path):
    """``edited(**changes)``: a copy whose scheduler says something else; None takes a setting away."""

    def edit(**changes):
        folder = shutil.copytree(tiny, tmp_path / "base")
        path = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
        return folder

    return edit


def resolved(base, *, is_adapter=True, **settings):
    said = []
    chosen = resolve_objective(ObjectiveSettings(**settings), base, is_adapter=is_adapter, say=said.append)
    return (chosen.prediction_type, chosen.zero_terminal_snr, chosen.schedule_shift), said


# ----------------------------------------------------------------------------------------------------------------------
# What the base says


def shifted_betas(zero):
    return NoiseSchedule.sdxl(zero_terminal_snr=zero).shifted(2.0).betas.tolist()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("v_prediction", True, 1.0)),
        ({"rescale_betas_zero_snr": False}, ("v_prediction", False, 1.0)),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": None}, ("epsilon", False, 1.0)),
        ({"prediction_type": None, "rescale_betas_zero_snr": None}, (None, None, 1.0)),
        ({"prediction_type": "sample", "rescale_betas_zero_snr": None}, (None, None, 1.0)),
        ({"trained_betas": shifted_betas(True)}, ("v_prediction", True, 2.0)),
        ({"trained_betas": shifted_betas(True), "rescale_betas_zero_snr": False}, ("v_prediction", True, 2.0)),
        ({"trained_betas": shifted_betas(False), "rescale_betas_zero_snr": False}, ("v_prediction", False, 2.0)),
    ],
)
def test_what_a_folder_says(edited, changes, expected):
    base = read_base(edited(**changes))
    assert (base.prediction_type, base.zero_terminal_snr, base.schedule_shift) == expected
    assert base.schedule is None


@pytest.mark.parametrize("rescaled", [False, True])
def test_a_schedule_of_another_shape(edited, rescaled):
    base = read_base(edited(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, rescale_betas_zero_snr=rescaled))
    assert base.zero_terminal_snr is rescaled
    assert base.schedule_shift == 1
    torch.testing.assert_close(base.schedule.betas, LINEAR)


@pytest.mark.parametrize("betas", [[2.0, 3.0], "many"])
def test_a_schedule_that_is_none(edited, betas):
    with pytest.raises(UserError, match=r"scheduler_config\.json has no usable noise schedule"):
        read_base(edited(trained_betas=betas))


def test_what_a_file_says(tiny, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny)
    path = write_single_file(pipe, tmp_path / "base.safetensors", marks=("v_pred", "ztsnr"))
    assert read_base(path) == Base(path, "v_prediction", True)
    save_file(load_file(path), path, {"ztsnr.schedule_shift": "2"})
    assert read_base(path) == Base(path, "v_prediction", True, 2.0)
    save_file({name: tensor for name, tensor in load_file(path).items() if tensor.numel()}, path)
    assert read_base(path) == Base(path, None, None)


# ----------------------------------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize(
    ("base", "settings", "expected"),
    [
        (EPSILON, {}, ("epsilon", False, 1.0)),
        (V_PLAIN, {}, ("v_prediction", False, 1.0)),
        (V_ZERO, {}, ("v_prediction", True, 1.0)),
        (SHIFTED, {}, ("v_prediction", True, 2.0)),
        (SHIFTED, {"schedule_shift": 2.0}, ("v_prediction", True, 2.0)),
        (V_ZERO, {"prediction_type": "v_prediction", "zero_terminal_snr": True, "schedule_shift": 1},
         ("v_prediction", True, 1.0)),
        (UNKNOWN, {"prediction_type": "epsilon"}, ("epsilon", False, 1.0)),
        (UNKNOWN, {"prediction_type": "v_prediction", "zero_terminal_snr": True}, ("v_prediction", True, 1.0)),
        (Base("base", "v_prediction", None), {"zero_terminal_snr": True}, ("v_prediction", True, 1.0)),
    ],
)  # fmt: skip
def test_an_adapter_is_trained_as_its_base(base, settings, expected):
    assert resolved(base, **settings)[0] == expected


@pytest.mark.parametrize(
    ("base", "settings", "sentence"),
    [
        (
            EPSILON,
            {"prediction_type": "v_prediction"},
            r'objective\.prediction_type = "v_prediction", .* "epsilon"',
        ),
        (EPSILON, {"zero_terminal_snr": True}, r"objective\.zero_terminal_snr = true, but .* has false"),
        (V_ZERO, {"prediction_type": "epsilon"}, r'objective\.prediction_type = "epsilon", but .* "v_prediction"'),
        (V_ZERO, {"zero_terminal_snr": False}, r"objective\.zero_terminal_snr = false, but .* leave"),
        (V_PLAIN, {"zero_terminal_snr": True}, r"objective\.zero_terminal_snr = true, but .* leave"),
        (SHIFTED, {"schedule_shift": 1.0}, r"objective\.schedule_shift = 1\.0, but .* has 2\.0"),
        (V_ZERO, {"schedule_shift": 2.0}, r"objective\.schedule_shift = 2\.0, but .* has 1\.0"),
        (UNKNOWN, {}, r"does not say what it predicts, .*: set objective\.prediction_type"),
        (UNKNOWN, {"prediction_type": "v_prediction"}, r"has zero terminal SNR, .*: set objective\.zero_terminal_snr"),
        (Base("base", "v_prediction", None), {}, r"has zero terminal SNR, .*: set objective\.zero_terminal_snr"),
    ],
)
def test_an_adapter_that_is_not_trained_as_its_base(base, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        resolved(base, **settings)


@pytest.mark.parametrize(
    ("base", "settings", "expected", "line"),
    [
        (EPSILON, {}, ("v_prediction", True, 1.0),
         "base: epsilon, plain -> trained: v-prediction, zero terminal SNR"),
        (V_ZERO, {}, ("v_prediction", True, 1.0),
         "base: v-prediction, zero terminal SNR -> trained: v-prediction, zero terminal SNR"),
        (SHIFTED, {}, ("v_prediction", True, 2.0),
         "base: v-prediction, zero terminal SNR, sigma x 2 -> trained: v-prediction, zero terminal SNR, sigma x 2"),
        (SHIFTED, {"schedule_shift": 1.0}, ("v_prediction", True, 1.0),
         "base: v-prediction, zero terminal SNR, sigma x 2 -> trained: v-prediction, zero terminal SNR"),
        (EPSILON, {"prediction_type": "epsilon"}, ("epsilon", False, 1.0),
         "base: epsilon, plain -> trained: epsilon, plain"),
        (UNKNOWN, {}, ("v_prediction", True, 1.0),
         "base: prediction type not stated, zero terminal SNR or not is not stated -> "
         "trained: v-prediction, zero terminal SNR"),
    ],
)  # fmt: skip
def test_a_whole_network_follows_the_recipe(base, settings, expected, line):
    assert resolved(base, is_adapter=False, **settings) == (expected, [line])


@pytest.mark.parametrize(
    ("base", "settings", "lost"),
    [
        (V_ZERO, {"zero_terminal_snr": False}, ["zero terminal SNR"]),
        (V_PLAIN, {"prediction_type": "epsilon"}, ["v-prediction"]),
        (V_ZERO, {"prediction_type": "epsilon"}, ["v-prediction", "zero terminal SNR"]),
    ],
)
def test_what_is_taken_away_is_warned_of(base, settings, lost):
    _, (_, warning) = resolved(base, is_adapter=False, **settings)
    assert warning.startswith("Warning: the base has ")
    assert [words for words in ("v-prediction", "zero terminal SNR") if words in warning] == lost


def test_betas_that_end_at_zero_cannot_be_taken_back():
    own = NoiseSchedule.from_betas(LINEAR, zero_terminal_snr=True)
    with pytest.raises(UserError, match=r"set objective\.zero_terminal_snr to true"):
        resolved(Base("base", "v_prediction", True, 1.0, own), is_adapter=False, zero_terminal_snr=False)


# ----------------------------------------------------------------------------------------------------------------------
# In a run


def dry(content, say=lambda line: None):
    run_finetune(parse_settings(FinetuneSettings, content), dry_run=True, say=say)


def sigmas(out):
    with (out / "objective.csv").open(newline="") as file:
        return [float(row["sigma"]) for row in csv.DictReader(file)]


def test_a_lora_of_the_wrong_kind_is_refused_before_the_base_is_loaded(place, tmp_path, monkeypatch):
    """The place's base predicts epsilon."""
    monkeypatch.delattr(run_module, "load_networks")
    monkeypatch.delattr(run_module, "open_data")
    said = {"objective__prediction_type": "v_prediction", "objective__zero_terminal_snr": True}
    with pytest.raises(UserError, match=r"objective\.prediction_type = .* leave objective\.prediction_type out"):
        train(make_content(place, tmp_path / "run", model__adapter=LORA, **said))


def test_a_lora_says_what_its_base_is(place, tmp_path):
    out = tmp_path / "run"
    train(make_content(place, out, steps=1, model__adapter=LORA))
    marks = read_header(out / "export" / "run_lora.safetensors").metadata
    assert (marks["ss_v_parameterization"], marks["ss_zero_terminal_snr"]) == ("False", "False")
    written = tomllib.loads((out / "config.toml").read_text())["objective"]
    assert written | {"prediction_type": "epsilon", "zero_terminal_snr": False, "schedule_shift": 1.0} == written


def test_a_shifted_base_is_trained_shifted(place, edited, tmp_path):
    base = edited(trained_betas=shifted_betas(True))
    dry(make_content(place, tmp_path / "run", model__base=str(base), model__adapter=LORA))
    assert sigmas(tmp_path / "run")[500] == pytest.approx(2 * NoiseSchedule.sdxl().sigma(500.0), rel=1e-9)


def test_an_adapter_is_trained_and_exported_on_the_bases_own_schedule(place, edited, tmp_path):
    base = edited(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    content = make_content(place, tmp_path / "run", steps=1, model__base=str(base), model__adapter=LORA)
    content["export"]["single_file"] = True
    said = []
    train(content, say=said.append)
    expected = NoiseSchedule.from_betas(LINEAR, zero_terminal_snr=True)
    found = sigmas(tmp_path / "run")
    assert found[500] == pytest.approx(expected.sigma(500.0), rel=1e-9)
    assert math.isinf(found[-1])
    config = json.loads((tmp_path / "run" / "export" / "run" / "scheduler" / "scheduler_config.json").read_text())
    torch.testing.assert_close(NoiseSchedule.from_config(config).alphas_cumprod, expected.alphas_cumprod)
    assert any("cannot hold the base's own noise schedule" in line for line in said)


def test_a_base_that_does_not_say_what_it_is(place, edited, tmp_path):
    base = edited(prediction_type=None, rescale_betas_zero_snr=None)
    content = make_content(place, tmp_path / "run", model__base=str(base), model__adapter=LORA)
    with pytest.raises(UserError, match=r"set objective\.prediction_type"):
        dry(content)
    content["objective"] = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    said = []
    dry(content, said.append)
    assert any(line.startswith("base: prediction type not stated, ") for line in said)
