"""Latents of a data set on disk, so that the VAE runs once and not in every epoch.  ``make_latent_cache`` makes them.

A cache is a folder of safetensors shards and an index.  Each picture is one tensor, named by its key: (2, C, h, w)
float16, the mean and the standard deviation of what the VAE's encoder says, not scaled by its scaling_factor.

A picture is cached larger than its bucket, so that each epoch takes another crop of it; crops lie on the grid of the
VAE's latents, which for Stable Diffusion and SDXL is one of 8 pixels.  A crop of the latents differs from the latents
of the crop near its edges, where the VAE saw what is beyond.

Pictures are not mirrored: the mirrored latents of a picture are not the latents of the mirrored picture.
"""

import copy
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from ..canvas import Size
from ..checkpoints.header import HASH, hash_data, open_data, read_header
from ..checkpoints.vae import hash_encoder
from ..errors import UserError
from .arrow_file import open_arrow
from .keyed_random import CROP, POSTERIOR
from .latent_stats import ChannelStatistics
from .pictures import Color, MicroConditioning, PictureError
from .sources import PictureIndex

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

INDEX = "index.arrow"
ABOUT = "ztsnr.latents"  # in the metadata of the index and of the shards
DTYPE = torch.float16  # why, says make_latent_cache

# what a cached picture was made from; where the size of a bucket is 0 x 0, it was left out
PICTURES = pa.schema(
    {
        "key": pa.string(),
        "file_size": pa.int64(),  # bytes of the file that the picture is in
        "modified": pa.int64(),  # nanoseconds, when that file was last written
        "width": pa.int32(),  # upright
        "height": pa.int32(),
        "bucket_width": pa.int32(),
        "bucket_height": pa.int32(),
        "scaled_width": pa.int32(),  # to which it was resized
        "scaled_height": pa.int32(),
    }
)
# and where it is
PLACES = pa.schema(
    {
        "shard": pa.int32(),  # -1 if it was left out
        "offset": pa.int64(),  # bytes from the beginning of the shard, -1 if the picture cannot be used
        "reason": pa.string(),  # why not
    }
)


@dataclass(frozen=True)
class Recipe:
    """What latents are made by.

    Attributes:
        dtype: in which the VAE ran.
        vae: hash of the encoder's weights in that dtype.
        factor: pixels of a latent's side.
        channels: of the latents.
        margin: pixels by which a picture is cached larger than its bucket, if it is so large.
        background: sRGB colour behind transparent pixels.
        method: number of the way that pictures are resized and encoded here; another one gives other latents.
    """

    dtype: str
    vae: str
    factor: int
    channels: int
    margin: int
    background: Color
    method: int = 1

    @classmethod
    def from_json(cls, content: dict) -> "Recipe":
        return cls(**content | {"background": tuple(content["background"])})

    def to_json(self) -> dict:
        return asdict(self)

    def latent_size(self, scaled: Size) -> Size:
        """(width, height) of the latents of a picture that was resized to this; less than ``factor`` is cut off."""
        return scaled[0] // self.factor, scaled[1] // self.factor


class CachedPicture(NamedTuple):
    """A picture as it is in the cache, of which nothing is read before it is used.

    Attributes:
        mean: (C, h, w) float16.
        std: (C, h, w) float16.
        scaled_size: (width, height) in pixels that the picture was resized to.  The latents are of its middle, where
            they do not reach its edges.
        original_size: (width, height) in pixels of the upright picture.
    """

    mean: torch.Tensor
    std: torch.Tensor
    scaled_size: Size
    original_size: Size


class LatentCache:
    """The cached latents of an index of pictures, under the same numbers.

    Opening reads the index and looks whether all shards are there; what they hold stays on disk, mapped into memory.

    Args:
        folder: which ``cache_latents`` has written.

    Attributes:
        recipe: what the latents are made by.
        statistics: of each channel, over all pictures that are in the cache.
        pictures: table of PICTURES and PLACES, a row for each picture of the index.

    Raises:
        UserError: no cache, one that is not finished, or one of which a shard is missing or of another size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.pictures = _read_index(self.folder / INDEX)
        about = json.loads(self.pictures.schema.metadata[ABOUT.encode()])
        self.recipe = Recipe.from_json(about["recipe"])
        self.statistics = ChannelStatistics.from_json(about["statistics"])
        self._shards = about["shards"]
        for name, shard in self._shards.items():
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"{path} is missing: make the cache again, which keeps the shards that are there")
            if path.stat().st_size != shard["bytes"]:
                raise _damaged(path, "is not of the size that the index says")
        self._paths = [self.folder / name for name in self._shards]
        self._maps: dict[int, torch.Tensor] = {}
        numbers = [name for name in self.pictures.column_names if name not in ("key", "reason")]
        self._columns = {name: self.pictures[name].to_numpy() for name in numbers}

    def __reduce__(self):
        """A worker process maps the files itself."""
        return LatentCache, (self.folder,)

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def has(self) -> np.ndarray:
        """(N,) bool: which pictures are in the cache."""
        return self._columns["offset"] >= 0

    @cached_property
    def refused(self) -> pa.Table:
        """The pictures that had a bucket and could not be used: key, reason."""
        return self.pictures.filter(pc.is_valid(self.pictures["reason"])).select(["key", "reason"])

    @cached_property
    def bucketing(self) -> tuple[np.ndarray, list[Size]]:
        """For an ``EpochPlan``: (N,) int64 bucket of each picture, -1 for those that are not here; and the buckets."""
        sides = np.stack([self._columns[f"bucket_{side}"] for side in ("width", "height")], axis=1).astype(np.int64)
        codes, which = np.unique(sides[self.has] @ [2**32, 1], return_inverse=True)
        assignment = np.full(len(self), -1)
        assignment[self.has] = which
        return assignment, [(int(code >> 32), int(code & 0xFFFFFFFF)) for code in codes]

    def __getitem__(self, i: int) -> CachedPicture:
        """A picture by its number in the index.

        Raises:
            PictureError: it could not be used, or had no bucket.
        """
        shard, offset = int(self._columns["shard"][i]), int(self._columns["offset"][i])
        if offset < 0:
            raise PictureError(self.pictures["reason"][i].as_py() or "it had no bucket when the cache was made")
        original, scaled = (
            tuple(int(self._columns[name + side][i]) for side in ("width", "height")) for name in ("", "scaled_")
        )
        width, height = self.recipe.latent_size(scaled)
        shape = (2, self.recipe.channels, height, width)
        end = offset + DTYPE.itemsize * int(np.prod(shape))
        mean, std = self._map(shard)[offset:end].view(DTYPE).view(shape)
        return CachedPicture(mean, std, scaled, original)

    # ------------------------------------------------------------------------------------------------------------------

    def check(
        self,
        index: PictureIndex,
        assignment: np.ndarray | None = None,
        buckets: Sequence[Size] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """Refuse a cache that is not of these pictures, whose files are asked for their size and date.

        A picture whose file is gone cannot have changed, and is taken for the one that was cached.

        Args:
            index: the pictures that the cache is to be used for.
            assignment, buckets: also their buckets (see ``EpochPlan``).
            recipe: also the VAE and the settings.

        Raises:
            UserError: what differs.
        """
        rows = picture_rows(index)
        if assignment is not None:
            rows = add_buckets(rows, assignment, buckets)
        if difference := (recipe and recipe_difference(self.recipe, recipe)) or row_difference(self.pictures, rows):
            raise UserError(stale(self.folder, difference))

    def check_vae(self, vae: "AutoencoderKL") -> None:
        """Refuse a cache of another VAE than that of the model that is trained.

        Args:
            vae: in the dtype that its file has, or float32; it is compared in the one that the cache was made in.

        Raises:
            UserError: another one.
        """
        found = hash_encoder(copy.deepcopy(vae).to(getattr(torch, self.recipe.dtype)))
        if difference := recipe_difference(self.recipe, replace(self.recipe, vae=found)):
            raise UserError(stale(self.folder, difference))

    def verify(self) -> None:
        """Read all shards and compare their checksums.

        Raises:
            UserError: which shard is damaged.
        """
        for path in tqdm(self._paths, "verifying", unit=" shards", disable=None):
            header = read_header(path)
            with open_data(path, header) as data:
                found = hash_data(data)
            if not found == header.metadata.get(HASH) == self._shards[path.name]["sha256"]:
                raise _damaged(path, "does not have the checksum that the index says")

    def _map(self, shard: int) -> torch.Tensor:
        """The bytes of a shard.  Unlike numpy's maps, these keep no file open, of which a process may have few."""
        if shard not in self._maps:
            path = self._paths[shard]
            size = self._shards[path.name]["bytes"]
            self._maps[shard] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return self._maps[shard]


def load_latents(
    picture: int,
    bucket: Size,
    numbers: Callable[[int], np.random.Generator],
    *,
    cache: LatentCache,
    sample: bool = True,
) -> tuple[torch.Tensor, MicroConditioning]:
    """A random part of a cached picture as the latents of a bucket; given ``cache`` by ``partial``, it is a ``Load``.

    Args:
        picture: its number in the index.
        bucket: (width, height) in pixels.
        numbers: of the place, each on the grid of the latents as likely as any other, and of the posterior's sample.
        cache: where the latents are.
        sample: give a sample of the VAE's posterior, or else its mean.

    Returns:
        (C, height / factor, width / factor) float32, not scaled by the VAE's scaling_factor, and what SDXL is told
        about it.

    Raises:
        PictureError: the picture is not in the cache.
        UserError: it is not large enough for the bucket, or the bucket is off the grid.
    """
    mean, std, scaled, original = cache[picture]
    factor = cache.recipe.factor
    width, height = (side // factor for side in bucket)
    room = mean.shape[2] - width, mean.shape[1] - height
    if any(side % factor for side in bucket) or min(room) < 0:
        raise UserError(
            f"a bucket of {bucket[0]} x {bucket[1]} cannot be cut out of {cache.pictures['key'][picture]}, which is "
            f"cached with {factor * mean.shape[2]} x {factor * mean.shape[1]} pixels on a grid of {factor}"
        )
    place = numbers(CROP)
    left, top = (int(place.integers(most, endpoint=True)) for most in room)
    window = np.s_[:, top : top + height, left : left + width]
    latents = mean[window].float()
    if sample:
        noise = numbers(POSTERIOR).standard_normal(tuple(latents.shape), dtype=np.float32)
        latents.addcmul_(std[window].float(), torch.from_numpy(noise))
    cut_left, cut_top = margins_cut(scaled, factor)
    return latents, MicroConditioning(original[::-1], (cut_top + factor * top, cut_left + factor * left), bucket[::-1])


def margins_cut(scaled: Size, factor: int) -> tuple[int, int]:
    """Pixels (left, top) that are cut off a resized picture so that its middle fits the grid."""
    return (scaled[0] % factor) // 2, (scaled[1] % factor) // 2


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path} {how}: it is damaged; remove it and make the cache again, which keeps the other shards")


def _read_index(path: Path) -> pa.Table:
    if not path.is_file():
        raise UserError(f"{path.parent} is no cache of latents, or one that is not finished: it has no {INDEX}")
    try:
        table = open_arrow(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if table.schema.names != [*PICTURES.names, *PLACES.names] or ABOUT.encode() not in (table.schema.metadata or {}):
        raise UserError(f"{path} is no index of cached latents")
    return table


# ----------------------------------------------------------------------------------------------------------------------
# What a cache is made from


def picture_rows(index: PictureIndex) -> pa.Table:
    """The first columns of PICTURES for an index of pictures."""
    paths = index.table["path"].combine_chunks().dictionary_encode()
    stamps = np.array(_stamps(paths.dictionary.to_pylist()), np.int64).reshape(-1, 2)[paths.indices.to_numpy()]
    columns = {"key": index.table["key"], "file_size": stamps[:, 0], "modified": stamps[:, 1]}
    columns |= {side: index.table[side] for side in ("width", "height")}
    return pa.table(columns)


def add_buckets(rows: pa.Table, assignment: np.ndarray, buckets: Sequence[Size]) -> pa.Table:
    """And those of their buckets."""
    if len(assignment) != len(rows):
        raise UserError(f"there are {len(rows)} pictures, and buckets for {len(assignment)}")
    sizes = np.array([*buckets, (0, 0)], np.int32)[assignment]  # -1 takes the last
    for side, values in zip(("width", "height"), sizes.T, strict=True):
        rows = rows.append_column(f"bucket_{side}", pa.array(values))
    return rows


def _stamps(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Size and date of files, -1 where there is none; many are asked at once, because some disks are far away."""
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
    """What differs, in words."""
    for field in fields(Recipe):
        was, shall = getattr(old, field.name), getattr(new, field.name)
        if was != shall:
            if field.name == "vae":
                return f"it was made with another VAE ({was[:12]}, not {shall[:12]})"
            return f"it was made with {field.name} = {was}, not {shall}"
    return None


def row_difference(old: pa.Table, new: pa.Table) -> str | None:
    """What differs, in words, in the columns of the new one."""
    if len(old) != len(new):
        return f"it was made from {len(old)} pictures, not {len(new)}"
    if (i := _first_difference(old, new, ["key"])) is not None:
        return f"where it has {old['key'][i]}, there is now {new['key'][i]}"
    if (i := _first_difference(old, new, ["file_size", "modified"])) is not None:
        return f"the file of {old['key'][i]} has changed since, in size or date"
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
    return f"the cache in {folder} is stale: {difference}; remove it and make it again, or choose another folder"
