"""Is a checkpoint sound, and how does it differ from another?

Files are read one tensor at a time, so a check takes no more memory than the largest tensor.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .header import HASH, hash_data, open_data, read_header, shorten
from .inspect import CheckpointReport, inspect_checkpoint

MOST_NAMES = 5  # in a sentence


@dataclass(frozen=True)
class Change:
    """How a tensor differs from the one of the same name in the other checkpoint.

    Attributes:
        relative: norm of the difference over the norm of the other's; inf if that is 0.
        largest: the largest difference of two values.
    """

    name: str
    relative: float
    largest: float


@dataclass(frozen=True)
class VerifyReport:
    """What ``verify_checkpoint`` found.  ``str()`` of it is a text for people.

    Attributes:
        report: what the checkpoint is.
        tensors: how many were read.
        problems: a sentence for each thing that is wrong.
        remarks: a sentence for each thing that may be meant.
        changes: tensors that differ from the other checkpoint's, the largest change first; None without one.
        only_here, only_there: names that the other checkpoint lacks, or has besides.
    """

    report: CheckpointReport
    tensors: int
    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    changes: tuple[Change, ...] | None = None
    only_here: tuple[str, ...] = ()
    only_there: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [str(self.report), f"{self.tensors} tensors read."]
        lines += [f"Problem: {problem}" for problem in self.problems] or ["No problem was found."]
        lines += [f"Note: {remark}" for remark in self.remarks]
        if self.changes is not None:
            lines.append(f"{len(self.changes)} tensors differ from the other checkpoint's.")
            lines += [
                f"  {change.name}: {change.relative:.2%} of its norm, at most {change.largest:.3g}"
                for change in self.changes[:MOST_NAMES]
            ]
            for where, names in (("here", self.only_here), ("there", self.only_there)):
                if names:
                    lines.append(f"Only {where}: {_list(names)}.")
        return "\n".join(lines)


def verify_checkpoint(path: str | Path, other: str | Path | None = None) -> VerifyReport:
    """Read every tensor of a checkpoint and say what is wrong with it.

    Args:
        path: a .safetensors file or a diffusers folder.
        other: a checkpoint of the same layout to compare with.

    Raises:
        ValueError: what cannot be read at all: no such file, a pickle, a header that does not fit its file.
    """
    path = Path(path)
    report = inspect_checkpoint(path)
    problems, remarks, changes, names = [], [], [], set()
    zero, constant = [], []
    with ExitStack() as opened:
        known = {} if other is None else _places(Path(other), opened)
        for file in _files(path):
            problems += _wrong_hash(file)
        for name, (file, key) in _places(path, opened).items():
            names.add(name)
            tensor = file.get_tensor(key)
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                problems.append(f"{shorten(name)} holds NaN or infinite values.")
            elif tensor.numel() > 1 and (tensor == tensor.flatten()[0]).all():
                (constant if tensor.any() else zero).append(name)
            if name in known:
                before, key = known[name]
                if change := _change(name, tensor, before.get_tensor(key)):
                    changes.append(change)
    if zero:
        remarks.append(f"{len(zero)} tensors are all zero: {_list(zero)}.")
    if constant:
        remarks.append(f"{len(constant)} tensors hold one value throughout: {_list(constant)}.")
    if other is None:
        return VerifyReport(report, len(names), tuple(problems), tuple(remarks))
    return VerifyReport(
        report,
        len(names),
        tuple(problems),
        tuple(remarks),
        tuple(sorted(changes, key=lambda change: -change.relative)),
        tuple(sorted(names - known.keys())),
        tuple(sorted(known.keys() - names)),
    )


def _files(path: Path) -> list[Path]:
    """The weights of a file or a folder."""
    return sorted(path.glob("*/*.safetensors")) if path.is_dir() else [path]


def _places(path: Path, opened: ExitStack) -> dict[str, tuple[Any, str]]:
    """Tensor -> the opened file that holds it and its name there; in a folder names begin with the part's: unet, ..."""
    found = {}
    for file in _files(path):
        names = read_header(file).tensors  # which refuses what safetensors would stumble over
        prefix = f"{file.parent.name}." if path.is_dir() else ""
        tensors = opened.enter_context(safe_open(file, framework="pt"))
        found |= {prefix + name: (tensors, name) for name in names}
    return found


def _change(name: str, tensor: torch.Tensor, before: torch.Tensor) -> Change | None:
    """None for equal values, whatever their types."""
    if before.shape != tensor.shape:
        return Change(name, math.inf, math.inf)
    difference = tensor.double() - before.double()
    if not difference.any():
        return None
    norm = before.double().norm().item()
    return Change(name, difference.norm().item() / norm if norm else math.inf, difference.abs().max().item())


def _wrong_hash(file: Path) -> list[str]:
    header = read_header(file)
    said = header.metadata.get(HASH)
    if said is None:
        return []
    with open_data(file, header) as data:
        found = hash_data(data)
    if found.removeprefix("0x") == said.lower().removeprefix("0x"):
        return []
    return [f"The metadata's hash {shorten(said)} is not that of the tensors, {found}."]


def _list(names) -> str:
    shown = ", ".join(shorten(name) for name in list(names)[:MOST_NAMES])
    return shown + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
