"""Checkpoint files: what they are and what they say about themselves, read without loading them; and loading them."""

from .architecture import SUPPORTED
from .inspect import CheckpointReport, inspect_checkpoint

__all__ = ["SUPPORTED", "CheckpointReport", "inspect_checkpoint", "load_pipeline"]


def __getattr__(name: str):
    # needs diffusers: loaded on first use, so that ComfyUI can do without it
    if name == "load_pipeline":
        from .pipeline import load_pipeline

        return load_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
