"""Is a checkpoint whole and sound, and how does it differ from another?

Each file is read once, in the order of its bytes and a few megabytes at a time.
"""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from .architecture import LORA
from .complete import MARKS, find_missing
from .header import BITS, HASH, Header, read_header, shorten
from .inspect import CheckpointReport, inspect_checkpoint
from .latent_scaling import LatentScaling
from .layouts import list_names
from .single_file import single_file_tensors
from .stream import CHUNK, TensorStream, stored

if TYPE_CHECKING:
    from .forward import Agreement

MOST_CHANGES = 10  # in the text for people
AT_ONCE = 1 << 18  # numbers that are looked at together

_NUMBERS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.uint8,
}  # fmt: skip
_WIDENED = {"F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "U64", "U32", "U16"}  # PyTorch cannot compare them

_NOT_FINITE = "hold NaN or infinite values"
_THROUGHOUT = _ZERO, _CONSTANT = "are zero throughout", "hold one value throughout"
_UNREAD = "have types whose numbers are not checked"
_FORMATS = {"pt", "tf", "flax", "mlx"}  # that transformers knows


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
    """The result of ``verify_checkpoint``; ``str()`` gives it as text.

    Attributes:
        report: what the checkpoint is.
        tensors: number of tensors read.
        problems: a sentence for each thing that is wrong.
        remarks: a sentence for each thing that may be intended.
        changes: tensors that differ from the other checkpoint's, the largest change first; None without one.
        only_here, only_there: names that only this checkpoint has, and those that only the other has.
        agreements: how the other runs of it compare with diffusers' first one; empty if it was not run.
    """

    report: CheckpointReport
    tensors: int
    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    changes: tuple[Change, ...] | None = None
    only_here: tuple[str, ...] = ()
    only_there: tuple[str, ...] = ()
    agreements: tuple["Agreement", ...] = ()

    @property
    def sound(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [str(self.report), f"{self.tensors} tensors read."]
        lines += [f"Problem: {problem}" for problem in self.problems] or ["No problems found."]
        lines += [f"Note: {remark}" for remark in self.remarks]
        if self.changes is not None:
            lines.append(f"{len(self.changes)} tensors differ from the other checkpoint's.")
            lines += [
                f"  {shorten(change.name, 100)}: {change.relative:.2%} of its norm, at most {change.largest:.3g}"
                for change in self.changes[:MOST_CHANGES]
            ]
            for where, names in (("this", self.only_here), ("the other", self.only_there)):
                if names:
                    lines.append(f"Only in {where} checkpoint: {list_names(list(names))}.")
        lines += [f"Run in {agreement}." for agreement in self.agreements]
        return "\n".join(lines)


def verify_checkpoint(
    path: str | Path,
    other: str | Path | None = None,
    *,
    run: bool = False,
    config: str | Path | None = None,
    comfyui: str | Path | None = None,
) -> VerifyReport:
    """Read every tensor of a checkpoint and report what is wrong with it.

    Problems are values that are not finite, matrices and convolutions of one value throughout, tensors that are missing
    or have another shape than in the published model of the same architecture, a hash in the metadata that is not that
    of the data, and with ``run`` a program whose outputs differ.

    Args:
        path: a .safetensors file or a diffusers folder.
        other: a checkpoint to compare with; a file and a folder are compared by the names in a single file.
        run: run its networks once in diffusers, from ``path`` and from ``other`` if that is the other layout of the
            same checkpoint, and in ComfyUI (``compare_forwards``).
        config, comfyui: see ``compare_forwards``.

    Raises:
        UserError: it cannot be read at all: no such file, a pickle, a header that does not fit its file; with ``run``
            also what ``compare_forwards`` raises.
    """
    path, other = Path(path), None if other is None else Path(other)
    report = inspect_checkpoint(path)
    problems, remarks = find_missing(report)
    agreements = []
    if run:
        from .forward import compare_forwards  # which takes diffusers

        agreements, differences = compare_forwards(path, other, config=config, comfyui=comfyui)
        problems += differences
    found, count = defaultdict(list), 0
    for file, prefix, header in _read_headers(path):
        remarks += _stumbling_blocks(file, prefix, header)
        digest = hashlib.sha256() if HASH in header.metadata else None
        for name, tensor in _tensors([(file, prefix, header)]):
            count += 1
            if what := _look_at(tensor, digest):
                found[what, len(tensor.shape) > 1].append(name)
        if digest:
            problems += _wrong_hash(file, header, digest.hexdigest())
    for (what, of_weights), those in found.items():
        # Freshly initialised norms and biases are constant, and so is an untrained layer of a LoRA.  A constant matrix
        # anywhere else was lost or overwritten.
        wrong = what == _NOT_FINITE or (what in _THROUGHOUT and of_weights and report.format != LORA)
        (problems if wrong else remarks).append(
            f"{'Weights' if of_weights else 'Vectors'} {what}: {list_names(those)}."
        )
    changes, only_here, only_there = None, (), ()
    if other is not None:
        try:
            changes, only_here, only_there = _compare(path, other)
        except UserError as error:
            problems.append(f"It cannot be compared with {other}: {error}.")
        else:
            remarks += _other_scaling(report, other)
    return VerifyReport(
        report,
        count,
        tuple(problems),
        tuple(remarks),
        changes,
        tuple(sorted(only_here)),
        tuple(sorted(only_there)),
        tuple(agreements),
    )


def _other_scaling(report: CheckpointReport, other: Path) -> list[str]:
    """A remark if the two checkpoints scale latents differently, which no tensor shows."""
    try:
        theirs = inspect_checkpoint(other)
    except UserError:  # a VAE alone, ...
        return []
    said = [one.latent_scaling for one in (report, theirs)]
    if not (report.has_vae and theirs.has_vae) or _same_scaling(*said):
        return []
    here, there = ("as published" if one is None else _describe(one) for one in said)
    return [f"Latents are scaled differently: here {here}, in the other checkpoint {there}."]


def _describe(scaling: LatentScaling) -> str:
    mean, std = (", ".join(f"{number:.4g}" for number in numbers) for numbers in (scaling.mean, scaling.std))
    return f"by mean {mean}, std {std}"


def _same_scaling(one: LatentScaling | None, other: LatentScaling | None) -> bool:
    """True if equal up to the last bits, which the config of a folder loses."""
    if one is None or other is None:
        return one is other
    numbers = [(*scaling.mean, *scaling.std) for scaling in (one, other)]
    return len(numbers[0]) == len(numbers[1]) and all(map(partial(math.isclose, rel_tol=1e-9), *numbers))


def _read_headers(path: Path) -> list[tuple[Path, str, Header]]:
    """Each file of a checkpoint, a prefix for the names of its tensors, and its header.

    In a folder the prefix is the network's name, for another variant of the same network with the file's name.
    """
    if not os.path.isdir(path):
        return [(path, "", read_header(path))]
    found, names = [], set()
    # the shortest name first: the plain file before its versions (.fp16)
    for file in sorted(path.glob("*/*.safetensors"), key=lambda file: (file.parent.name, len(file.name), file.name)):
        header, prefix = read_header(file), f"{file.parent.name}."
        if any(prefix + name in names for name in header.tensors):
            prefix = f"{file.parent.name}/{file.name}: "
        names |= {prefix + name for name in header.tensors}
        found.append((file, prefix, header))
    if not found:
        raise UserError(f"{path} has no .safetensors files in its subfolders")
    return found


def _tensors(files: list[tuple[Path, str, Header]]) -> Iterator[tuple[str, TensorStream]]:
    """All tensors by name, in the order of their bytes."""
    for file, prefix, header in files:
        for name, _ in sorted(header.tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            yield prefix + name, stored(file, header, name)


def _numbers(tensor: TensorStream, digest=None) -> Iterator[torch.Tensor]:
    """The numbers of a tensor, some at a time, while a digest is updated with their bytes."""
    for piece in tensor.read():
        if digest:
            digest.update(piece)
        if tensor.dtype in _NUMBERS:
            for numbers in torch.frombuffer(piece, dtype=_NUMBERS[tensor.dtype]).split(AT_ONCE):
                yield numbers.double() if tensor.dtype in _WIDENED else numbers


def _look_at(tensor: TensorStream, digest) -> str | None:
    """What is remarkable about a tensor's numbers, or None."""
    # aminmax gives NaN for both ends if there is one, and an infinity is an end itself.  So the two ends tell all that
    # is asked, NaN, infinity and constant values, in one pass that is many times as fast as isfinite.
    ends = [end.item() for numbers in _numbers(tensor, digest) for end in numbers.aminmax()]
    if tensor.dtype not in _NUMBERS:
        return _UNREAD
    if not all(map(math.isfinite, ends)):
        return _NOT_FINITE
    if math.prod(tensor.shape) > 1 and min(ends) == max(ends):
        return _CONSTANT if ends[0] else _ZERO
    return None


def _wrong_hash(file: Path, header: Header, found: str) -> list[str]:
    # ModelSpec hashes the data as they lie in the file, OneTrainer tensor by tensor in the order of their names.  The
    # second takes another pass over the file, and only where the first does not match.
    said = header.metadata[HASH].lower().removeprefix("0x")
    if said == found or said == _hash_by_name(file, header):
        return []
    return [f"The hash in the metadata, {shorten(header.metadata[HASH])}, is not that of the tensors, 0x{found}."]


def _hash_by_name(file: Path, header: Header) -> str:
    """The hash as OneTrainer computes it, over the tensors in the order of their names instead of their bytes."""
    digest = hashlib.sha256()
    for name in sorted(header.tensors):
        for piece in stored(file, header, name).read():
            digest.update(piece)
    return digest.hexdigest()


def _compare(path: Path, other: Path) -> tuple[tuple[Change, ...], set[str], set[str]]:
    """Changes, and the names that only one of the two has."""
    # Of one layout, they are compared as stored.  Otherwise both in the single file's layout, and without the marks,
    # which no folder has as tensors.
    if os.path.isdir(path) == os.path.isdir(other):
        ours, theirs = (dict(_tensors(_read_headers(place))) for place in (path, other))
    else:
        ours, theirs = (_as_single_file(place) for place in (path, other))
    both = [_change(name, tensor, theirs[name]) for name, tensor in ours.items() if name in theirs]
    changes = sorted(filter(None, both), key=lambda change: -change.relative)
    return tuple(changes), ours.keys() - theirs.keys(), theirs.keys() - ours.keys()


def _as_single_file(path: Path) -> dict[str, TensorStream]:
    """The tensors by their names in a single file, in pieces of one size however they are stored."""
    tensors = single_file_tensors(path) if os.path.isdir(path) else dict(_tensors(_read_headers(path)))
    return {
        name: replace(tensor, read=partial(_regroup, tensor)) for name, tensor in tensors.items() if name not in MARKS
    }


def _regroup(tensor: TensorStream) -> Iterator[bytearray]:
    # A tensor that is stacked from several ends a piece with each of them.  To be compared piece by piece with one that
    # is stored whole, both are cut at the same places.
    pending = bytearray()
    for piece in tensor.read():
        pending += piece
        while len(pending) >= CHUNK:
            yield pending[:CHUNK]
            del pending[:CHUNK]
    if pending:
        yield pending


def _change(name: str, tensor: TensorStream, before: TensorStream) -> Change | None:
    """None for equal values, whatever their types."""
    # Most tensors are equal, and equal bytes are found much faster than equal numbers.  Only the others are read again,
    # as numbers, and their squares are summed in float64, since the sum of a large tensor's has no room in float32.
    pieces = zip(tensor.read(), before.read(), strict=True)
    if (tensor.dtype, tensor.shape) == (before.dtype, before.shape) and all(ours == theirs for ours, theirs in pieces):
        return None
    if tensor.shape != before.shape or not {tensor.dtype, before.dtype} <= _NUMBERS.keys():
        return Change(name, math.inf, math.inf)
    of_difference = of_before = largest = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(_numbers(tensor), _numbers(before), strict=True):  # both in pieces of AT_ONCE
        ours, theirs = ours.double(), theirs.double()
        difference = ours - theirs
        of_difference = of_difference + difference.dot(difference)
        of_before = of_before + theirs.dot(theirs)
        largest = torch.maximum(largest, difference.abs().max())
    if not largest:
        return None
    relative = (of_difference / of_before).sqrt().item()  # x / 0 is inf
    return Change(name, math.inf if math.isnan(relative) else relative, largest.item())


def _stumbling_blocks(file: Path, prefix: str, header: Header) -> list[str]:
    """Remarks on what is valid and still refused by some programs."""
    remarks = []
    odd = [
        name
        for name, entry in header.tensors.items()
        if entry.nbytes and (header.data_start + entry.begin) % max(1, BITS[entry.dtype] // 8)
    ]
    if odd:
        remarks.append(
            f"{shorten(file.name)}: tensors that are not aligned to the size of their numbers, which programs that map "
            f"files into memory must copy, or refuse: {list_names(odd)}."
        )
    if prefix.startswith("text_encoder") and header.metadata and header.metadata.get("format") not in _FORMATS:
        remarks.append(
            f"{file.parent.name}/{shorten(file.name)}: transformers 4 refuses it, because its metadata name no format."
        )
    return remarks
