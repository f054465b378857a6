"""Checkpoint files: what they are and what they say about themselves, read without loading them."""

from .architecture import SUPPORTED
from .inspect import CheckpointReport, inspect_checkpoint

__all__ = ["SUPPORTED", "CheckpointReport", "inspect_checkpoint"]
