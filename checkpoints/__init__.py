"""Checkpoint files: inspect, mark, convert, verify and load them, and tell what programs take them for."""

from importlib import import_module
from typing import TYPE_CHECKING

from ..extras import extras_named
from .architecture import SUPPORTED
from .inspect import CheckpointReport, inspect_checkpoint
from .mark import mark_checkpoint

if TYPE_CHECKING:
    from .diffusers_folder import to_folder
    from .lora import export_lora
    from .pipeline import load_pipeline
    from .single_file import to_single_file
    from .verify import verify_checkpoint

__all__ = [
    "SUPPORTED",
    "CheckpointReport",
    "export_lora",
    "inspect_checkpoint",
    "load_pipeline",
    "mark_checkpoint",
    "to_folder",
    "to_single_file",
    "verify_checkpoint",
]

_NEED_MORE = {  # diffusers, torch
    "export_lora": "lora",
    "load_pipeline": "pipeline",
    "to_folder": "diffusers_folder",
    "to_single_file": "single_file",
    "verify_checkpoint": "verify",
}


def __getattr__(name: str):
    # loaded on first use: reading a header needs neither
    if name in _NEED_MORE:
        with extras_named(name):
            module = import_module(f".{_NEED_MORE[name]}", __name__)
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
