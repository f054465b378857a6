"""The classes that a diffusers folder may be made of, checked before diffusers reads it.

model_index.json names a library and a class for each part, and diffusers imports what it names.  It comes from
strangers, so only names that are known here get so far, whatever the version of diffusers checks by itself.
"""

import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..errors import UserError
from ..samplers.diffusers_scheduler import ZTSNRScheduler
from .header import shorten
from .settings import check_sizes, read_settings

NETWORKS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def _library(kind: type) -> str:
    return kind.__module__.split(".")[0]


_TOKENIZERS = [("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")]
_CLASSES = {
    **{part: [(_library(kind), kind.__name__)] for part, kind in NETWORKS.items()},
    "tokenizer": _TOKENIZERS,
    "tokenizer_2": _TOKENIZERS,
}


def check_classes(folder: Path, index: dict[str, Any], left_out: Collection[str]) -> None:
    """Refuse a model_index.json that names an unknown class for a part.

    Args:
        left_out: parts that are never loaded, whose names do not matter.

    Raises:
        UserError: the class of a part is not allowed; the message says which classes are.
    """
    for part, named in index.items():
        # the index also holds switches, and those of the pipeline itself begin with an underscore
        if part.startswith("_") or part in left_out or not isinstance(named, list | dict):
            continue
        if named != [None, None] and not _is_known(part, named):
            said = " ".join(map(str, named)) if isinstance(named, list) else str(named)
            raise UserError(f"{folder} names {shorten(said)} for its part {shorten(part)}: {_allowed(part)}")


def _is_known(part: str, named: Any) -> bool:
    match named:
        case [str(library), str(name)] if part == "scheduler":
            ours = (_library(ZTSNRScheduler), ZTSNRScheduler.__name__)
            return (library.split(".")[0], name) == ours or (library == "diffusers" and _is_scheduler(name))
        case [str(library), str(name)]:
            return (library, name) in _CLASSES.get(part, ())
    return False


def _allowed(part: str) -> str:
    if part == "scheduler":
        return "a scheduler must be one of diffusers' own or ZTSNRScheduler"
    if part in _CLASSES:
        return f"only {' or '.join(name for _, name in _CLASSES[part])} is allowed there"
    return "a Stable Diffusion 1.x, 2.x or SDXL pipeline has no such part"


def _is_scheduler(name: str) -> bool:
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    return isinstance(kind, type) and issubclass(kind, SchedulerMixin)


def check_networks(folder: Path) -> None:
    """Refuse a folder whose networks' settings, or its scheduler's, ask for sizes that no model has.

    Raises:
        UserError: see ``check_sizes``; or settings that cannot be read.
    """
    for part in NETWORKS:
        check_network(folder / part, NETWORKS[part])
    path = folder / "scheduler" / "scheduler_config.json"
    check_sizes(path, read_settings(path, "a scheduler's"))


def check_network(folder: Path, kind: type[torch.nn.Module]) -> None:
    """The same check for the folder of one network."""
    path = folder / "config.json"
    config = read_settings(path, "a network's")
    # transformers' models are told by an object; a config of text and pictures keeps that of the text inside
    names = inspect.signature(getattr(kind, "config_class", None) or kind).parameters
    for settings in (config, config.get("text_config")):
        if isinstance(settings, dict):
            check_sizes(path, settings, names)
