"""What marks say, alone and against each other."""

import itertools
import json

import pytest

from ztsnr.checkpoints.header import Header, TensorEntry
from ztsnr.checkpoints.markers import find_marks, read_scheduler_config, settle

EMPTY = TensorEntry("F32", (0,), 0, 0)

# (tensors, metadata, scheduler_config) -> (prediction type, zero terminal SNR), as programs write them
SAYINGS = {
    "nothing": ((), {}, {}, None, None),
    "NoobAI-XL": (("v_pred", "ztsnr"), {}, {}, "v_prediction", True),
    "OneTrainer": (("v_pred",), {"modelspec.prediction_type": "v"}, {}, "v_prediction", None),
    "ztsnr alone": (("ztsnr",), {}, {}, None, True),
    "ModelSpec v": ((), {"modelspec.prediction_type": "v"}, {}, "v_prediction", None),
    "ModelSpec epsilon": ((), {"modelspec.prediction_type": "epsilon"}, {}, "epsilon", None),
    "ModelSpec other": ((), {"modelspec.prediction_type": "sd3"}, {}, None, None),
    "SwarmUI": ((), {"modelspec.prediction_type": "v-zsnr"}, {}, "v_prediction", True),
    "ComfyUI": ((), {"modelspec.predict_key": "v"}, {}, "v_prediction", None),
    "kohya LoRA": (
        (),
        {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"},
        {},
        "v_prediction",
        True,
    ),
    "kohya LoRA, epsilon": (
        (),
        {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "False"},
        {},
        "epsilon",
        False,
    ),
    "v_parameterization": ((), {"ss_v_parameterization": "true"}, {}, "v_prediction", None),
    "no v_parameterization": ((), {"ss_v_parameterization": "False"}, {}, "epsilon", None),
    "not set": ((), {"ss_v_parameterization": "None", "ss_zero_terminal_snr": ""}, {}, None, None),
    "OneTrainer LoRA, settings included": (
        (),
        {"ot_config": '{"rescale_noise_scheduler_to_zero_terminal_snr": true, "force_v_prediction": false}'},
        {},
        "v_prediction",
        True,
    ),
    "OneTrainer, v": ((), {"ot_config": '{"force_v_prediction": true}'}, {}, "v_prediction", None),
    "OneTrainer, both off": (
        (),
        {"ot_config": '{"rescale_noise_scheduler_to_zero_terminal_snr": false, "force_v_prediction": false}'},
        {},
        None,
        None,
    ),
    "OneTrainer, wrong types": ((), {"ot_config": '{"force_v_prediction": "True"}'}, {}, None, None),
    "OneTrainer, a list": ((), {"ot_config": "[1]"}, {}, None, None),
    "OneTrainer, no JSON": ((), {"ot_config": "[" * 100_000}, {}, None, None),
    "diffusers": (
        (),
        {},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        "v_prediction",
        True,
    ),
    "diffusers, SDXL's": (
        (),
        {},
        {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
        "epsilon",
        False,
    ),
    "diffusers, old": ((), {}, {"prediction_type": "epsilon"}, "epsilon", None),
    "diffusers, other": ((), {}, {"prediction_type": "sample", "rescale_betas_zero_snr": None}, None, None),
    "diffusers, wrong types": ((), {}, {"prediction_type": ["v_prediction"], "rescale_betas_zero_snr": 1}, None, None),
}


def marks_of(tensors=(), metadata=None, config=None):
    return find_marks(Header(dict.fromkeys(tensors, EMPTY), metadata or {}, 0), config or {})


@pytest.mark.parametrize(
    ("tensors", "metadata", "config", "prediction_type", "zero_terminal_snr"), SAYINGS.values(), ids=SAYINGS
)
def test_what_each_program_writes(tensors, metadata, config, prediction_type, zero_terminal_snr):
    marks = marks_of(tensors, metadata, config)
    assert settle(marks)[:2] == (prediction_type, zero_terminal_snr)
    for mark in marks:
        assert mark.sentence.endswith(".")


def test_no_warning_where_all_agree():
    for name, (tensors, metadata, config, *_) in SAYINGS.items():
        assert bool(settle(marks_of(tensors, metadata, config))[2]) == (name == "ztsnr alone")


# in the order of precedence; no tensor says epsilon, nor do OneTrainer's settings
SAYING_V = [
    {"tensors": ("v_pred",)},
    {"metadata": {"modelspec.prediction_type": "v"}},
    {"metadata": {"modelspec.predict_key": "v"}},
    {"metadata": {"ss_v_parameterization": "True"}},
    {"metadata": {"ot_config": '{"force_v_prediction": true}'}},
    {"config": {"prediction_type": "v_prediction"}},
]
SAYING_EPSILON = [
    None,
    {"metadata": {"modelspec.prediction_type": "epsilon"}},
    {"metadata": {"modelspec.predict_key": "epsilon"}},
    {"metadata": {"ss_v_parameterization": "False"}},
    None,
    {"config": {"prediction_type": "epsilon"}},
]
PAIRS = [
    (values[0][first], values[1][second], expected)
    for first, second in itertools.combinations(range(6), 2)
    for values, expected in (
        ((SAYING_V, SAYING_EPSILON), "v_prediction"),
        ((SAYING_EPSILON, SAYING_V), "epsilon"),
    )
    if values[0][first] and values[1][second]
]


@pytest.mark.parametrize(("one", "other", "expected"), PAIRS)
def test_the_first_mark_is_believed_and_the_other_is_told(one, other, expected):
    both = {key: {**one.get(key, {}), **other.get(key, {})} for key in ("metadata", "config")}
    marks = marks_of(one.get("tensors", ()), **both)
    prediction_type, _, warnings = settle(marks)
    assert prediction_type == expected
    assert len(warnings) == 1
    assert warnings[0].index(marks[0].sentence) < warnings[0].index(marks[1].sentence)


def test_zero_terminal_snr_has_its_own_precedence():
    prediction_type, zero_terminal_snr, warnings = settle(
        marks_of(("v_pred", "ztsnr"), {"ss_zero_terminal_snr": "False"}, {"rescale_betas_zero_snr": False})
    )
    assert (prediction_type, zero_terminal_snr) == ("v_prediction", True)
    assert len(warnings) == 2
    # what the first mark leaves open, a later one may say
    assert settle(marks_of(("v_pred",), {"modelspec.prediction_type": "v-zsnr"}))[:2] == ("v_prediction", True)


def test_what_cannot_be_is_told():
    assert "epsilon exclude each other" in settle(marks_of(("ztsnr",), {"modelspec.prediction_type": "epsilon"}))[2][0]
    assert "v-prediction is not" in settle(marks_of(("ztsnr",)))[2][0]


def test_metadata_cannot_write_on_the_terminal():
    (mark,) = marks_of(metadata={"modelspec.prediction_type": "\x1b[2J\nv" + "x" * 1000})
    assert "\x1b" not in mark.sentence
    assert "\n" not in mark.sentence
    assert len(mark.sentence) < 150


# ----------------------------------------------------------------------------------------------------------------------


def test_scheduler_config(tmp_path):
    path = tmp_path / "scheduler_config.json"
    assert read_scheduler_config(path) == {}
    path.write_text(json.dumps({"prediction_type": "v_prediction"}))
    assert read_scheduler_config(path) == {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b"[" * 500_000, b'{"a":"' + b"x" * 2_000_000 + b'"}'], ids=range(6)
)
def test_a_bad_scheduler_config_is_a_sentence(tmp_path, content):
    path = tmp_path / "scheduler_config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a scheduler's settings"):
        read_scheduler_config(path)
