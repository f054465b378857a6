"""The state of a decoder's training on disk, and what must be the same in a resumed run."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ...checkpoints.header import read_header
from ...data.picture_index import PictureIndex
from ...errors import UserError
from ..run_state import RunStates
from .settings import VaeDecoderSettings
from .step import DecoderTraining

# Version 0.1.0 wrote one file, which is read once more and then left alone.
OLD_STATE, OLD_ABOUT = "state.safetensors", "ztsnr.vae_decoder"
# Settings that may change in a resumed run.
FREE = {
    *("out", "steps", "held_out_pictures", "device", "workers", "log_every", "save_every", "resume"),
    *("model", "config", "sources", "lpips_backbone"),  # places; what they hold is compared
}


def recorded(settings: VaeDecoderSettings, index: PictureIndex, encoder: str) -> dict[str, Any]:
    """The values that must be equal in a resumed run, as read back from JSON."""
    keys = hashlib.sha256("\n".join(index.table["key"].to_pylist()).encode()).hexdigest()
    fixed = {key: value for key, value in dataclasses.asdict(settings).items() if key not in FREE}
    return json.loads(json.dumps(fixed | {"set of pictures": keys, "encoder": encoder}))


def restore_state(training: DecoderTraining, states: RunStates, step: int, path: Path, fixed: dict[str, Any]) -> None:
    """Bring a training to where it was when it wrote a state.

    Raises:
        UserError: the state is damaged, or one of another run.
    """
    state = states.read_json(path)
    _compare(path, state.get("settings"), fixed)
    tensors = training.state()
    states.read_into(path, tensors)
    training.load_state(tensors, step)


def has_old_state(out: Path) -> bool:
    """True if version 0.1.0 has left a state in this folder."""
    return (out / OLD_STATE).exists()


def refuse_old_state(out: Path) -> None:
    """Refuse to begin a run in a folder that holds one of version 0.1.0."""
    if has_old_state(out):
        raise UserError(f"{out} holds a run: continue it with --resume auto, or choose another folder")


def restore_old_state(training: DecoderTraining, out: Path, fixed: dict[str, Any]) -> None:
    """The same as ``restore_state`` for a state of version 0.1.0."""
    path = out / OLD_STATE
    try:
        said = json.loads(read_header(path).metadata[OLD_ABOUT])
        step, settings = int(said["steps"]), said["settings"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not the state of such a run: choose another folder, or remove it") from None
    _compare(path, settings, fixed)
    training.load_state(load_file(path), step)


def _compare(path: Path, settings: Any, fixed: dict[str, Any]) -> None:
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not the state of such a run: choose another folder, or remove it")
    if others := [key for key in fixed if settings.get(key) != fixed[key]]:
        raise UserError(
            f"{path} was written with another {others[0]}: resume with the one that it had, or choose another folder"
        )
