"""Read what a checkpoint says about its prediction type and zero terminal SNR.

There is no single place for it.  All known marks are read; where two disagree, the first of this list is believed,
because more programs act on it:

1. the tensors ``v_pred`` and ``ztsnr`` (ComfyUI, Forge, reForge, AUTOMATIC1111); only their names count
2. ``modelspec.prediction_type`` in the metadata (ModelSpec 1.0.1: "v" or "epsilon"; SwarmUI adds "v-zsnr"), and
   ``modelspec.predict_key``, ComfyUI's name for it when it saves a checkpoint
3. ``ss_v_parameterization`` and ``ss_zero_terminal_snr`` in the metadata, the trainers' options as text.  kohya's
   sd-scripts write the second one into LoRAs; the first one comes from tools that follow its naming
4. ``ot_config`` in the metadata, OneTrainer's settings as JSON, where its user asked for them to be kept
5. ``scheduler_config.json`` of a diffusers model, which lies beside the file and is easily lost or exchanged
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .header import Header, shorten
from .settings import check_sizes, read_settings

_MODELSPEC = {
    "v": ("v_prediction", None),
    "v_prediction": ("v_prediction", None),
    "v-prediction": ("v_prediction", None),
    "v-zsnr": ("v_prediction", True),
    "epsilon": ("epsilon", None),
    "eps": ("epsilon", None),
}
# (architecture, v-prediction) -> ModelSpec's name of the architecture, resolution; it names no others of SUPPORTED
_MODELSPEC_ARCHITECTURES = {
    ("SD 1.x", False): ("stable-diffusion-v1", "512x512"),
    ("SD 1.x", True): ("stable-diffusion-v1", "512x512"),
    ("SD 2.x", False): ("stable-diffusion-v2-512", "512x512"),
    ("SD 2.x", True): ("stable-diffusion-v2-768-v", "768x768"),
    ("SDXL base", False): ("stable-diffusion-xl-v1-base", "1024x1024"),
    ("SDXL base", True): ("stable-diffusion-xl-v1-base", "1024x1024"),
}
_YES_NO = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Mark:
    """One statement of a checkpoint; None where it says nothing."""

    sentence: str
    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None


def find_marks(header: Header, scheduler_config: dict[str, Any]) -> list[Mark]:
    """All marks, the more trustworthy ones first (see above)."""
    return [
        *_tensor_marks(header),
        *_metadata_marks(header.metadata),
        *_onetrainer_marks(header.metadata),
        *_scheduler_marks(scheduler_config),
    ]


def settle(marks: list[Mark]) -> tuple[str | None, bool | None, list[str]]:
    """Combine the marks: prediction type, zero terminal SNR, and a warning for each contradiction."""
    warnings = []
    settled = []
    for name, meaning in (("prediction_type", "what the model predicts"), ("zero_terminal_snr", "zero terminal SNR")):
        saying = [mark for mark in marks if getattr(mark, name) is not None]
        values = [getattr(mark, name) for mark in saying]
        settled.append(values[0] if values else None)
        warnings += [
            f"The marks disagree on {meaning}, and the first is believed: {saying[0].sentence} {mark.sentence}"
            for mark, value in zip(saying, values, strict=True)
            if value != values[0]
        ]
    prediction_type, zero_terminal_snr = settled
    if zero_terminal_snr and prediction_type is None:
        warnings.append(
            "Zero terminal SNR is marked and v-prediction is not: programs load such a file as epsilon, which cannot "
            "be right."
        )
    if zero_terminal_snr and prediction_type == "epsilon":
        warnings.append(
            "Zero terminal SNR and epsilon exclude each other: from pure noise an epsilon model learns nothing."
        )
    return prediction_type, zero_terminal_snr, warnings


def read_scheduler_config(path: Path) -> dict[str, Any]:
    """A diffusers scheduler's settings; empty if there is no such file.

    Raises:
        UserError: the file is not a scheduler's settings, or asks for sizes that no model has.
    """
    config = read_settings(path, "a scheduler's")
    check_sizes(path, config)
    return config


def modelspec_architecture(architecture: str, v_prediction: bool, input_channels: int | None) -> dict[str, str]:
    """ModelSpec's metadata on the architecture of a U-Net, empty if it has no name for it."""
    if input_channels != 4 or (architecture, v_prediction) not in _MODELSPEC_ARCHITECTURES:
        return {}
    name, resolution = _MODELSPEC_ARCHITECTURES[architecture, v_prediction]
    return {
        "modelspec.architecture": name,
        "modelspec.implementation": "sgm",
        "modelspec.resolution": resolution,
    }


def _tensor_marks(header: Header) -> Iterator[Mark]:
    if "v_pred" in header.tensors:
        yield Mark("The file has the tensor v_pred, which marks v-prediction.", prediction_type="v_prediction")
    if "ztsnr" in header.tensors:
        yield Mark("The file has the tensor ztsnr, which marks zero terminal SNR.", zero_terminal_snr=True)


def _metadata_marks(metadata: dict[str, str]) -> Iterator[Mark]:
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if key in metadata:
            prediction_type, zero_terminal_snr = _MODELSPEC.get(metadata[key].strip().lower(), (None, None))
            yield Mark(f"The metadata say {key} = {shorten(metadata[key])}.", prediction_type, zero_terminal_snr)
    if (v_parameterization := _option(metadata, "ss_v_parameterization")) is not None:
        yield Mark(
            f"The metadata say ss_v_parameterization = {shorten(metadata['ss_v_parameterization'])}.",
            prediction_type="v_prediction" if v_parameterization else "epsilon",
        )
    if (zero_terminal_snr := _option(metadata, "ss_zero_terminal_snr")) is not None:
        yield Mark(
            f"The metadata say ss_zero_terminal_snr = {shorten(metadata['ss_zero_terminal_snr'])}.",
            zero_terminal_snr=zero_terminal_snr,
        )


def _onetrainer_marks(metadata: dict[str, str]) -> Iterator[Mark]:
    """A setting that is off says nothing: a model that had been v-prediction before stays so."""
    try:
        settings = json.loads(metadata.get("ot_config", "{}"))
    except (ValueError, RecursionError):
        return
    for setting, zero_terminal_snr in (
        ("rescale_noise_scheduler_to_zero_terminal_snr", True),  # which OneTrainer trains with v-prediction
        ("force_v_prediction", None),
    ):
        if isinstance(settings, dict) and settings.get(setting) is True:
            yield Mark(f"OneTrainer's settings in the metadata turn on {setting}.", "v_prediction", zero_terminal_snr)


def _option(metadata: dict[str, str], key: str) -> bool | None:
    return _YES_NO.get(metadata.get(key, "").strip().lower())


def _scheduler_marks(config: dict[str, Any]) -> Iterator[Mark]:
    prediction_type = config.get("prediction_type")
    if isinstance(prediction_type, str):
        yield Mark(
            f"scheduler_config.json says prediction_type = {shorten(prediction_type)}.",
            prediction_type=prediction_type if prediction_type in ("v_prediction", "epsilon") else None,
        )
    rescaled = config.get("rescale_betas_zero_snr")
    if isinstance(rescaled, bool):
        yield Mark(
            f"scheduler_config.json says rescale_betas_zero_snr = {str(rescaled).lower()}.", zero_terminal_snr=rescaled
        )
