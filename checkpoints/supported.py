"""Refuse all but whole models of the supported kinds, before gigabytes are downloaded or read."""

from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ..errors import UserError
from .architecture import SUPPORTED
from .components import check_classes, check_networks
from .header import PICKLES, read_header
from .inspect import LORA, SINGLE_FILE, UNKNOWN, CheckpointReport, inspect_checkpoint
from .settings import read_settings

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline

_PIPELINES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
_WORDS = ("vocab.json", "tokenizer.json")


def inspect_whole_folder(folder: Path) -> CheckpointReport:
    """Inspect a diffusers folder, and refuse all but a whole model of a supported kind."""
    if not (folder / "unet").is_dir():
        pipeline_class(folder)  # raises, with the name of the other kind of model
    report = inspect_checkpoint(folder)
    _check_architecture(report)
    check_programs(folder)
    check_whole(folder)
    check_networks(folder)
    for part in (part for part in folder.iterdir() if part.is_dir()):
        pickles = [file for file in part.iterdir() if file.suffix in PICKLES]
        if pickles and not any(part.glob("*.safetensors")):
            read_header(pickles[0])  # always raises, and says why
    return report


def inspect_file(path: Path) -> CheckpointReport:
    """Inspect a single file, and refuse all but a whole model of a supported kind."""
    report = inspect_checkpoint(path)
    if report.format == LORA:
        raise UserError(f"{path} is a LoRA, not a whole model: merge it into a checkpoint first")
    _check_architecture(report)
    if report.format == UNKNOWN:
        raise UserError(f"{path} is not a model of Stable Diffusion 1.x, 2.x or SDXL")
    missing = [
        part
        for part, there in (("text encoders", report.has_text_encoders), ("VAE", report.has_vae))
        if not (report.format == SINGLE_FILE and there)
    ]
    if missing:
        raise UserError(f"{path} has a U-Net without {' and '.join(missing)}: give a whole checkpoint")
    return report


def pipeline_class(folder: Path) -> type[Pipeline]:
    """The pipeline class of a diffusers folder; refuses unsupported ones."""
    name = read_index(folder).get("_class_name")
    if not isinstance(name, str) or name not in _PIPELINES:
        raise UserError(f"{folder} is a model for {name}, but only {' and '.join(_PIPELINES)} are supported")
    return _PIPELINES[name]


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a diffusers folder: its class, its settings, and the class of each part."""
    try:
        index = read_settings(folder / "model_index.json", "a pipeline's")
    except UserError:
        index = {}
    if not index:
        raise UserError(f"{folder} is not a diffusers folder of a whole model: it has no readable model_index.json")
    return index


def check_parts(folder: Path) -> tuple[type[Pipeline], dict[str, Any]]:
    """The pipeline's class and its index; refuses a part of an unknown class."""
    kind, index = pipeline_class(folder), read_index(folder)
    check_classes(folder, index, left_out(kind))
    return kind, index


def check_whole(folder: Path) -> None:
    """Refuse a folder that lacks a part that its pipeline needs."""
    kind, index = check_parts(folder)
    parts, _ = kind._get_signature_keys(kind)
    lacking = [
        name
        for name in sorted(set(parts) - left_out(kind).keys())
        if index.get(name) in (None, [None, None])
        # without its files, a tokenizer loads with an empty vocabulary
        or (name.startswith("tokenizer") and not any((folder / name / words).is_file() for words in _WORDS))
    ]
    if lacking:
        raise UserError(f"{folder} has no {' and no '.join(lacking)}: give a whole model")


def check_programs(folder: Path) -> None:
    """Refuse a folder with Python files, which diffusers might run."""
    if programs := [*folder.glob("*.py"), *folder.glob("*/*.py")]:
        raise UserError(
            f"{folder} has a program, {programs[0].name}, and programs of models are never run here: remove it"
        )


def architecture_of(report: CheckpointReport) -> str:
    """The architecture, as a noun."""
    return "unknown architecture" if report.architecture == "unknown" else report.architecture


def _check_architecture(report: CheckpointReport) -> None:
    """Refuse an architecture that is known and not supported; of an unknown one, the settings decide."""
    if report.architecture not in SUPPORTED | {"unknown"}:
        known = ", ".join(sorted(SUPPORTED))
        raise UserError(f"{report.path} is {report.architecture}, but zero-terminal-SNR sampling supports only {known}")


def left_out(kind: type[Pipeline]) -> dict[str, Any]:
    """Arguments that leave out the parts that no measurement needs."""
    names = {"safety_checker", "feature_extractor", "image_encoder"} & set(kind._get_signature_types())
    return dict.fromkeys(names) | ({"requires_safety_checker": False} if "safety_checker" in names else {})
