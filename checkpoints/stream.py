"""Stream tensors from file to file, a few megabytes at a time, so that no checkpoint is too large for the memory."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, overload

import torch

from ..errors import UserError
from .header import BITS, HASH, Header

CHUNK = 16 * 2**20  # bytes

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATS = {
    **{name: dtype for dtype, name in DTYPE_NAMES.items()},
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorStream:
    """A tensor whose bytes are read only when it is written.

    Attributes:
        dtype: as safetensors names it.
        read: gives its bytes, piece by piece, each piece of whole numbers.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterator[bytearray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@overload
def dtype_name(dtype: torch.dtype) -> str: ...
@overload
def dtype_name(dtype: None) -> None: ...
def dtype_name(dtype: torch.dtype | None) -> str | None:
    """The name that safetensors gives to a type that checkpoints are written in.

    Raises:
        UserError: another type.
    """
    if dtype not in (None, *DTYPE_NAMES):
        raise UserError(f"dtype must be one of {', '.join(map(str, DTYPE_NAMES))}, not {dtype}")
    return None if dtype is None else DTYPE_NAMES[dtype]


def stored(path: Path, header: Header, name: str, rows: range | None = None) -> TensorStream:
    """A tensor of a safetensors file, or some of its rows."""
    entry = header.tensors[name]
    shape, start, stop = entry.shape, header.data_start + entry.begin, header.data_start + entry.end
    if rows is not None:
        row = entry.nbytes // shape[0]
        shape, start, stop = (len(rows), *shape[1:]), start + rows.start * row, start + rows.stop * row

    def read() -> Iterator[bytearray]:
        for begin in range(start, stop, CHUNK):
            piece = bytearray(min(CHUNK, stop - begin))
            try:
                with path.open("rb") as file:
                    file.seek(begin)
                    size = file.readinto(piece)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
            if size != len(piece):
                raise UserError(f"{path} became shorter while it was read")
            yield piece

    return TensorStream(entry.dtype, shape, read)


def made(tensor: torch.Tensor, dtype: str) -> TensorStream:
    """A small tensor that does not come from a file."""
    return TensorStream(dtype, tuple(tensor.shape), lambda: iter([_to_bytes(tensor.flatten())]))


def stacked(tensors: list[TensorStream]) -> TensorStream:
    """Concatenate tensors of one type and width along the first axis."""
    first, *others = tensors
    if any((tensor.dtype, tensor.shape[1:]) != (first.dtype, first.shape[1:]) for tensor in others):
        raise UserError("parts of one tensor differ in type or width")
    rows = sum(tensor.shape[0] for tensor in tensors)
    return TensorStream(first.dtype, (rows, *first.shape[1:]), lambda: (p for t in tensors for p in t.read()))


def transposed(tensor: TensorStream) -> TensorStream:
    """Transpose a matrix, which is held in memory meanwhile."""
    if len(tensor.shape) != 2:
        raise UserError(f"a tensor of shape {tensor.shape} is not a matrix")
    rows, columns = tensor.shape

    def read() -> Iterator[bytearray]:
        bytes_of_each = torch.frombuffer(bytearray().join(tensor.read()), dtype=torch.uint8).view(rows, columns, -1)
        yield _to_bytes(bytes_of_each.transpose(0, 1).flatten())

    return replace(tensor, shape=(columns, rows), read=read)


def cast(tensor: TensorStream, dtype: str) -> TensorStream:
    """Convert to another floating-point type; integers stay as they are.

    ``read`` raises OverflowError where a number is too large for the type.
    """
    if tensor.dtype == dtype or tensor.dtype not in FLOATS:
        return tensor

    def read() -> Iterator[bytearray]:
        for piece in tensor.read():
            numbers = torch.frombuffer(piece, dtype=FLOATS[tensor.dtype])
            numbers = numbers if numbers.dtype == torch.float64 else numbers.float()
            converted = numbers.to(FLOATS[dtype])
            if (converted.isinf() & ~numbers.isinf()).any():
                raise OverflowError
            yield _to_bytes(converted)

    return replace(tensor, dtype=dtype, read=read)


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, TensorStream], metadata: Mapping[str, str], *, hashed: bool = True
) -> None:
    """Write a safetensors file, the types with the widest numbers first so that every number is aligned.

    The same tensors and metadata in the same order give the same bytes.

    Args:
        file: empty and seekable.
        hashed: write ModelSpec's hash of the data into the metadata.

    Raises:
        UserError: a number is too large for the type it is cast to, or a source became shorter.
    """
    order = sorted(tensors.items(), key=lambda item: -BITS[item[1].dtype])
    unknown = f"0x{0:064x}"
    metadata = {key: value for key, value in metadata.items() if key != HASH}
    content: dict[str, Any] = {"__metadata__": {HASH: unknown, **metadata} if hashed else metadata}
    end = 0
    for name, tensor in order:
        begin, end = end, end + tensor.nbytes
        content[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)

    digest = hashlib.sha256()
    for name, tensor in order:
        written = 0
        try:
            for piece in tensor.read():
                file.write(piece)
                if hashed:
                    digest.update(piece)
                written += len(piece)
        except OverflowError:
            raise UserError(f"{name} has numbers that {tensor.dtype} cannot hold: choose a wider dtype") from None
        if written != tensor.nbytes:
            raise RuntimeError(f"{name} took {written} bytes instead of {tensor.nbytes}")
    if hashed:
        file.seek(8 + header.index(unknown.encode()))  # the first of all values
        file.write(f"0x{digest.hexdigest()}".encode())


def _to_bytes(numbers: torch.Tensor) -> bytearray:
    return bytearray(numbers.contiguous().view(torch.uint8).numpy())
