"""What a cache of latents was made from, and whether that is still what it should be made from."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..canvas import Size
from ..errors import UserError
from .arrow_file import pc
from .picture_index import PictureIndex
from .pictures import Color

# What a cached picture was made from.  A picture whose bucket is 0 x 0 was left out.
PICTURES = pa.schema(
    {
        "key": pa.string(),  # see ``PictureIndex.key``
        "file_size": pa.int64(),  # bytes of the file that holds the picture
        "modified": pa.int64(),  # time of that file's last change, in nanoseconds
        "width": pa.int32(),  # upright
        "height": pa.int32(),
        "bucket_width": pa.int32(),
        "bucket_height": pa.int32(),
        "scaled_width": pa.int32(),  # the size that the picture was resized to
        "scaled_height": pa.int32(),
    }
)


@dataclass(frozen=True)
class Recipe:
    """Everything that latents depend on besides the picture itself.

    Attributes:
        dtype: dtype that the VAE ran in.
        vae: hash of the encoder's weights in that dtype.
        factor: pixels per latent along each side.
        channels: number of latent channels.
        margin: pixels by which a picture is cached larger than its bucket, if the picture is large enough.
        background: sRGB colour behind transparent pixels.
        method: version of the code that resizes and encodes; another version gives other latents.
    """

    dtype: str
    vae: str
    factor: int
    channels: int
    margin: int
    background: Color
    method: int = 1

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Recipe":
        """The recipe that ``to_json`` wrote."""
        values: dict[str, Any] = {**content, "background": tuple(content["background"])}
        return cls(**values)

    def to_json(self) -> dict:
        """The recipe as plain values for JSON."""
        return asdict(self)

    def latent_size(self, scaled: Size) -> Size:
        """(width, height) of the latents of a picture of this size; a remainder below ``factor`` pixels is cut off."""
        return scaled[0] // self.factor, scaled[1] // self.factor


def picture_rows(index: PictureIndex) -> pa.Table:
    """The first columns of PICTURES for an index of pictures."""
    paths = index.table["path"].combine_chunks().dictionary_encode()
    stamps = np.array(_stamps(paths.dictionary.to_pylist()), np.int64).reshape(-1, 2)[paths.indices.to_numpy()]
    columns = {"key": index.table["key"], "file_size": stamps[:, 0], "modified": stamps[:, 1]}
    columns |= {side: index.table[side] for side in ("width", "height")}
    return pa.table(columns)


def add_buckets(rows: pa.Table, assignment: np.ndarray, buckets: Sequence[Size]) -> pa.Table:
    """Add the columns with the size of each picture's bucket."""
    if len(assignment) != len(rows):
        raise UserError(f"assignment has {len(assignment)} buckets for {len(rows)} pictures: give one for each")
    sizes = np.array([*buckets, (0, 0)], np.int32)[assignment]  # -1 takes the last
    for side, values in zip(("width", "height"), sizes.T, strict=True):
        rows = rows.append_column(f"bucket_{side}", pa.array(values))
    return rows


def _stamps(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Size and modification time of each file, (-1, -1) if it is gone; many at once, for disks with a long latency."""
    with ThreadPoolExecutor() as pool:
        return [
            stamp for begin in range(0, len(paths), 4096) for stamp in pool.map(_stamp, paths[begin : begin + 4096])
        ]


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def recipe_difference(old: Recipe, new: Recipe) -> str | None:
    """The first difference in words; None if there is none."""
    for field in fields(Recipe):
        was, shall = getattr(old, field.name), getattr(new, field.name)
        if was != shall:
            if field.name == "vae":
                return f"it was made with another VAE ({was[:12]}, not {shall[:12]})"
            return f"it was made with {field.name} = {was}, not {shall}"
    return None


def row_difference(old: pa.Table, new: pa.Table) -> str | None:
    """The first difference in the columns that ``new`` has, in words; None if there is none."""
    if len(old) != len(new):
        return f"it was made from {len(old)} pictures, not {len(new)}"
    if (i := _first_difference(old, new, ["key"])) is not None:
        return f"it has {old['key'][i]} where there is now {new['key'][i]}"
    if (i := _first_difference(old, new, ["file_size", "modified"])) is not None:
        return f"the file of {old['key'][i]} has changed since then, in size or date"
    for what, prefix in (("as a picture of", ""), ("for a bucket of", "bucket_"), ("resized to", "scaled_")):
        names = [f"{prefix}{side}" for side in ("width", "height")]
        if names[0] in new.column_names and (i := _first_difference(old, new, names)) is not None:
            was, shall = (" x ".join(str(table[name][i]) for name in names) for table in (old, new))
            return f"{old['key'][i]} was cached {what} {was}, not {shall}"
    return None


def _first_difference(old: pa.Table, new: pa.Table, names: Iterable[str]) -> int | None:
    for name in names:
        differs = pc.not_equal(old[name], new[name])
        if name in ("file_size", "modified"):
            differs = pc.and_(differs, pc.greater_equal(new[name], 0))  # a file that is gone has not changed
        i = pc.index(differs, True).as_py()
        if i >= 0:
            return i
    return None


def stale(folder: Path, difference: str) -> str:
    """The sentence for a cache that does not fit."""
    return f"the cache in {folder} is stale: {difference}; remove it and make it again, or choose another folder"
