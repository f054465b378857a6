"""The header of a safetensors file: names, types, shapes and places of its tensors, and its metadata.

A safetensors file is the header's length (8 bytes, little-endian), the header (JSON) and the tensors' bytes, without a
gap (https://github.com/huggingface/safetensors#format).  Headers come from strangers, so they are parsed here and
checked against the rest of the file: a bad one raises UserError, quickly and in bounded memory.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import UserError

LONGEST_HEADER = 10_000_000  # bytes.  SDXL's takes 0.3 million; this bounds the memory and the time of parsing
MOST_DIMENSIONS = 64  # PyTorch's own limit
HASH = "modelspec.hash_sha256"  # in the metadata: of everything behind the header (ModelSpec 1.0.1)
HASH_BUFFER = 1 << 20  # bytes

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
SUFFIXES = (".safetensors", ".sft")
PICKLES = (".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.  Its bytes are [begin, end) of the data, which starts at ``Header.data_start``."""

    dtype: str  # a key of BITS
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int  # bytes from the start of the file


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, and nothing behind it.

    Raises:
        UserError: no such file, a pickle, or not a valid safetensors file.
    """
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path} is a pickle, which may run any program when it is opened, and is never opened here: use the "
            ".safetensors file of the same model, or convert it with a program that you trust"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is not a checkpoint file: those end in {' or '.join(SUFFIXES)}")
    try:
        if not path.is_file():  # pipes and devices would keep us waiting
            raise UserError(f"there is no file {path}")
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if file_size < 8 + length:
                raise UserError(
                    f"{path} names a header of {length:,} bytes in a file of {file_size:,}: it is not a safetensors "
                    "file, or its download is incomplete"
                )
            if length > LONGEST_HEADER:
                raise UserError(f"{path} has a header of {length:,} bytes, more than any checkpoint needs")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return parse_header(text, file_size - 8 - length)
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def parse_header(text: bytes, data_size: int) -> Header:
    """Parse a header and check it against the size in bytes of the data that follow it.

    Raises:
        UserError: it does not follow the format.
    """
    content = _parse_json(text)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError("the header's metadata are not all text")
    tensors = {name: _entry(name, fields) for name, fields in content.items()}

    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise UserError(f"the data of tensor {shorten(name)} do not begin where the previous tensor's end")
        end = tensor.end
    if end > data_size:
        raise UserError(
            f"its tensors take {end:,} bytes but only {data_size:,} follow: the download is incomplete; get it again"
        )
    if end < data_size:
        raise UserError(f"{data_size - end:,} bytes after the last tensor belong to no tensor")
    return Header(tensors, metadata, 8 + len(text))


def open_data(path: Path, header: Header) -> FileIO:
    """Open the file, unbuffered, at the beginning of its data."""
    file = path.open("rb", buffering=0)
    file.seek(header.data_start)
    return file


def hash_data(data: FileIO) -> str:
    """The SHA-256 of the rest of a file, as ModelSpec writes it."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(HASH_BUFFER))
    while count := data.readinto(buffer):
        digest.update(buffer[:count])
    return f"0x{digest.hexdigest()}"


def shorten(text: str, longest: int = 60) -> str:
    """Quote, escape and shorten a text from a file, so that it is safe to show in a message."""
    return repr(text if len(text) <= longest else text[: longest - 3] + "...")


def _parse_json(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise UserError("the header is not a JSON object")
    try:
        decoded = text.decode("utf-8")
        content = json.loads(
            decoded,
            object_pairs_hook=_without_duplicates,
            parse_int=_whole_number,
            parse_float=_whole_number,
            parse_constant=_whole_number,
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise UserError("the header is not JSON") from None
    if "\\u" in decoded:
        _check_surrogates(content)
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise UserError(f"the header has {shorten(name)} twice")
    return fields


def _whole_number(digits: str) -> int:
    """A size, the only kind of number in a header; int() of a very long one would take very long."""
    if not digits.isdecimal() or len(digits) > 19:
        raise UserError(f"the header has {shorten(digits)} as a size")
    return int(digits)


def _check_surrogates(content: dict[str, Any]) -> None:
    """Refuse lone surrogates, halves of a character, which JSON can write but no text can hold."""
    metadata = content.get("__metadata__")
    texts = [*content, *(text for pair in (metadata.items() if isinstance(metadata, dict) else ()) for text in pair)]
    try:
        "".join(text for text in texts if isinstance(text, str)).encode()
    except UnicodeEncodeError:
        raise UserError("the header has text that is not Unicode") from None


def _entry(name: str, fields: Any) -> TensorEntry:
    """Parse a tensor's entry and check that its type, shape and size agree."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"tensor {shorten(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UserError(f"tensor {shorten(name)} has an unknown type")
    if not _whole_numbers(shape) or len(shape) > MOST_DIMENSIONS:
        raise UserError(f"tensor {shorten(name)} has an invalid shape")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"tensor {shorten(name)} has invalid data_offsets")
    size = math.prod(shape) * BITS[dtype]
    if size != 8 * (offsets[1] - offsets[0]):
        raise UserError(
            f"tensor {shorten(name)} of shape {shorten(str(shape))} and type {dtype} does not fit its "
            f"{offsets[1] - offsets[0]:,} bytes"
        )
    return TensorEntry(dtype, tuple(shape), *offsets)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)
