"""The state of a run on disk: written whole or not at all, by any number of processes, read by any other number.

A state is a folder of safetensors files, which torch.distributed.checkpoint writes in parallel from all processes, and
one JSON file with the few values that are not tensors.  Random generators have no state: all random numbers follow from
the seed and the place in the plan.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..files import atomic_folder, remove_leftovers
from ..world import World

STATE = "state.json"
REMOVED = ".removed"
# What torch.distributed.checkpoint and safetensors raise for files that are damaged or cannot be written.
DAMAGED = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, SafetensorError)
BEFORE = "remove it to resume from the state before it"
_NAME = re.compile(r"step-(\d{8,})")


class RunStates:
    """The states that a run has written.

    Args:
        folder: folder of the states.
        keep: number of most recent states to keep.
        keep_every: also keep the state of every step divisible by this; 0 for none.
        world: the processes that write.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int, world: World):
        self.folder, self.keep, self.keep_every, self.world = folder, keep, keep_every, world

    def paths(self) -> dict[int, Path]:
        """Step -> folder of its state, in ascending order."""
        if not self.folder.is_dir():
            return {}
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return dict(sorted((int(match[1]), path) for match, path in found if match and (path / STATE).is_file()))

    def last(self) -> tuple[int, Path] | None:
        """Step and folder of the last state, as the first process sees it; all processes call this."""
        return self.world.tell(max(self.paths().items(), default=None) if self.world.first else None)

    def write(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
        """Write the state at a step, then remove old states; if anything fails, the earlier states stay.

        All processes call this.

        Args:
            step: number of steps done.
            tensors: tensors by name; plain ones are equal in all processes, DTensors are written shard by shard.
            state: values that JSON can hold.

        Raises:
            UserError: it cannot be written, for example because the disk is full.
        """
        target = self.folder / f"step-{step:08d}"
        trouble = None
        with ExitStack() as opened:
            if self.world.first:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    if target.exists():  # left without STATE, so not a state
                        shutil.rmtree(target)
                    place = opened.enter_context(atomic_folder(target))
                except (OSError, UserError) as error:
                    place, trouble = None, str(error)
            place, trouble = self.world.tell((place, trouble) if self.world.first else None)
            if trouble is None:
                trouble = self._write_tensors(place, tensors)
            if trouble is None and self.world.first:
                try:
                    (place / STATE).write_text(json.dumps({**state, "step": step}, indent=2), encoding="utf-8")
                    opened.close()  # flushes everything to the disk, and renames
                except (OSError, UserError) as error:
                    trouble = str(error)
            trouble = self.world.tell(trouble)
            if trouble is not None:
                raise UserError(f"the state at step {step} could not be written: {trouble}")
        if self.world.first:
            self._remove_old()
        return target

    def write_or_say(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        say: Callable[[str], None],
        *,
        is_last: bool,
    ) -> None:
        """Write the state at a step; if that fails, report it and let the training continue.

        Raises:
            UserError: the state of the last step cannot be written, so the training would be lost.
        """
        try:
            self.write(step, tensors, state)
        except UserError as error:
            saved = max(self.paths(), default=None)
            say(f"{error}; " + ("no state is saved yet" if saved is None else f"the state of step {saved} is kept"))
            if is_last:
                raise

    def _write_tensors(self, place: Path, tensors: Mapping[str, torch.Tensor]) -> str | None:
        writer = dcp.HuggingFaceStorageWriter(str(place), save_distributed=True)
        try:
            rows = {name: _packed(tensor) for name, tensor in tensors.items()}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.save(rows, storage_writer=writer, process_group=self.world.group, no_dist=self.world.size == 1)
        except CheckpointException as error:
            return _reason(next(iter(error.failures.values()))[0])
        except DAMAGED as error:
            return _reason(error)
        return None

    def read_json(self, path: Path) -> dict[str, Any]:
        """The JSON part of a state.

        Raises:
            UserError: they cannot be read.
        """
        try:
            return json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path / STATE} cannot be read: {error}; {BEFORE}") from None

    def read_into(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load a state into these tensors, however many processes wrote it.

        Raises:
            UserError: its files are damaged, or hold other tensors.
        """
        reader = dcp.HuggingFaceStorageReader(str(path))
        rows = {name: _packed(tensor) for name, tensor in tensors.items()}
        try:
            saved = reader.read_metadata().state_dict_metadata
        except DAMAGED as error:
            raise UserError(f"{path} cannot be read: {_reason(error)}; {BEFORE}") from None
        found = {name: cast(TensorStorageMetadata, entry) for name, entry in saved.items()}
        _compare(path, {name: (tuple(entry.size), entry.properties.dtype) for name, entry in found.items()}, tensors)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(rows, storage_reader=reader, process_group=self.world.group, no_dist=self.world.size == 1)
                for name, tensor in tensors.items():
                    if rows[name] is not tensor:
                        tensor.copy_(rows[name])
        except CheckpointException as error:
            reason = _reason(next(iter(error.failures.values()))[0])
            raise UserError(f"{path} cannot be read: {reason}; {BEFORE}") from None
        except DAMAGED as error:
            raise UserError(f"{path} cannot be read: {_reason(error)}; {BEFORE}") from None

    def _remove_old(self) -> None:
        for leftover in self.folder.glob(".*" + REMOVED):  # a run was killed between renaming and removing
            shutil.rmtree(leftover, ignore_errors=True)
        remove_leftovers(self.folder)
        paths = self.paths()
        kept = set(list(paths)[-self.keep :])
        for step, path in paths.items():
            if step not in kept and not (self.keep_every and step % self.keep_every == 0):
                # rename first, so that whatever has the name of a state is whole
                gone = path.with_name(f".{path.name}{REMOVED}")
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def _compare(path: Path, saved: Mapping[str, tuple], tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a state with other tensors than these."""
    own = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    differing = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    if not differing:
        return
    name = differing[0]
    if name not in saved or name not in own:
        how = f"{'has' if name in saved else 'lacks'} {name}"
    else:
        how = "has {} of shape {} in {} where this run's is {} in {}".format(name, *saved[name], *own[name])
    raise UserError(
        f"{path} {how}, one of {len(differing)} tensors by which it differs from this run: resume with the model, "
        "optimizer, trained parameters and averages that the run had"
    )


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor contiguous, as safetensors requires; a channels_last one is copied to the CPU, which has more room."""
    if isinstance(tensor, DTensor) or tensor.is_contiguous():
        return tensor.contiguous()
    return tensor.detach().to("cpu", memory_format=torch.contiguous_format)


def _reason(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
