"""The index of a data set's pictures: an Arrow table, so that ten million pictures do not become Python objects."""

import hashlib
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..files import atomic_write
from .arrow_file import open_arrow
from .pictures import picture_size
from .records import CHUNK, reading
from .tables import batches_of, read_row
from .tars import read_bytes

SCHEMA = pa.schema(
    {
        "key": pa.string(),  # the source's name and the place inside it
        "path": pa.string(),  # the file on disk: the picture, or the tar, Parquet or Arrow file it lies in
        "offset": pa.int64(),  # bytes inside a tar, else -1
        "length": pa.int64(),  # the same
        "row": pa.int64(),  # of a Parquet or Arrow file, else -1
        "width": pa.int32(),  # upright
        "height": pa.int32(),
        "captions": pa.list_(pa.string()),
        "repeats": pa.float64(),
    }
)


class PictureIndex:
    """The pictures of a data set, numbered from 0.

    Attributes:
        table: one row per picture, with the columns of SCHEMA.
    """

    def __init__(self, table: pa.Table):
        self.table = table
        self._path: str | None = None  # the file that holds this table

    @classmethod
    def load(cls, path: str | Path) -> "PictureIndex":
        """Open a saved index; see ``open_arrow``.

        Raises:
            UserError: the file cannot be read, or is not a picture index.
        """
        with reading(path):
            table = open_arrow(path)
        if table.schema != SCHEMA:
            raise UserError(f"{path} is not a picture index: build it again")
        index = cls(table)
        index._path = os.path.abspath(path)
        return index

    def save(self, path: str | Path) -> None:
        """Write the index into one file (Arrow IPC), atomically."""
        with atomic_write(path) as file, pa.ipc.new_file(file, SCHEMA) as writer:
            writer.write_table(self.table, max_chunksize=CHUNK)
        self._path = os.path.abspath(path)

    def __reduce__(self):
        """A worker process maps the saved file into its memory instead of receiving a copy of the table."""
        return (PictureIndex.load, (self._path,)) if self._path else (PictureIndex, (self.table,))

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32 width and height of the upright pictures."""
        return np.stack([self.table[side].to_numpy() for side in ("width", "height")], axis=1)

    @cached_property
    def repeats(self) -> np.ndarray:
        """(N,) float64: how often an epoch sees each picture."""
        return self.table["repeats"].to_numpy()

    def key(self, i: int) -> str:
        """The source's name and the place inside it, such as "cats/2021/a.png"."""
        return self.table["key"][i].as_py()

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of a picture: at least one, which may be empty."""
        return tuple(self.table["captions"][i].as_py())

    def read(self, i: int) -> bytes:
        """The bytes of the picture's file.

        Raises:
            PictureError: it is gone or cannot be read.
        """
        path, offset, length, row = (self.table[name][i].as_py() for name in ("path", "offset", "length", "row"))
        return read_row(path, row) if row >= 0 else read_bytes(path, max(offset, 0), length)

    def measure(self, i: int) -> tuple[int, int]:
        """(width, height) of the upright picture, from its file."""
        is_file = self.table["offset"][i].as_py() < 0 and self.table["row"][i].as_py() < 0
        return picture_size(self.table["path"][i].as_py() if is_file else self.read(i))


def split(index: PictureIndex, share: float, salt: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Hold out pictures for validation by a hash of their keys, so that adding pictures moves none of the others.

    Args:
        index: N pictures.
        share: approximate share to hold out, in [0, 1).
        salt: another salt holds out other pictures.

    Returns:
        The numbers of the pictures to train with, and of those held out: ascending int64, together all N.
    """
    if not 0 <= share < 1:
        raise UserError(f"share must be at least 0 and less than 1, not {share}")
    keys = (key for batch in batches_of(index.table.select(["key"])) for key in batch["key"].to_pylist())
    hashes = (hashlib.blake2b(f"{salt}/{key}".encode(), digest_size=8).digest() for key in keys)
    numbers = np.fromiter((int.from_bytes(digest, "big") for digest in hashes), np.uint64, len(index))
    held_out = numbers < np.uint64(share * 2**64)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
