"""Latents of a data set on disk, so that the VAE runs once and not in every epoch; ``make_latent_cache`` writes them.

A cache is a folder of safetensors shards and an index.  Each picture is one tensor, named by its key: (2, C, h, w)
float16, the mean and the standard deviation of the encoder's posterior, not scaled by scaling_factor.

A picture is cached larger than its bucket, so that each epoch takes another crop of it; crops lie on the grid of the
VAE's latents, 8 pixels for Stable Diffusion and SDXL.  Near its edges a crop of the latents differs from the latents of
the crop, because the VAE saw what is beyond.

Pictures are not mirrored: the mirrored latents of a picture are not the latents of the mirrored picture.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from ..canvas import Size
from ..checkpoints.header import HASH, hash_data, open_data, read_header
from ..checkpoints.vae import hash_encoder
from ..errors import UserError
from .arrow_file import open_arrow, pc
from .keyed_random import CROP, POSTERIOR
from .latent_recipe import PICTURES, Recipe, add_buckets, picture_rows, recipe_difference, row_difference, stale
from .latent_stats import ChannelStatistics
from .picture_index import PictureIndex
from .pictures import MicroConditioning, PictureError, height_first

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

INDEX = "index.arrow"
ABOUT = "ztsnr.latents"  # in the metadata of the index and of the shards
DTYPE = torch.float16  # see make_latent_cache for the reason

# Where a cached picture is; these columns stand behind those of PICTURES.
PLACES = pa.schema(
    {
        "shard": pa.int32(),  # number of its shard, -1 if it was left out
        "offset": pa.int64(),  # bytes from the beginning of the shard, -1 if the picture cannot be used
        "reason": pa.string(),  # why it cannot be used
    }
)


class CachedPicture(NamedTuple):
    """A picture of the cache, mapped: nothing is read from the disk before it is used.

    Attributes:
        mean: (C, h, w) float16.
        std: (C, h, w) float16.
        scaled_size: (width, height) in pixels that the picture was resized to.  The latents cover its middle; less
            than one latent is cut off at each edge.
        original_size: (width, height) in pixels of the upright picture.
    """

    mean: torch.Tensor
    std: torch.Tensor
    scaled_size: Size
    original_size: Size


class LatentCache:
    """The cached latents of an index of pictures, under the same numbers.

    Opening reads the index and checks that all shards exist; the latents stay on disk and are mapped into memory.

    Args:
        folder: folder that ``cache_latents`` has written.

    Attributes:
        recipe: settings that the latents were made with.
        statistics: mean and std of each channel, over all pictures in the cache.
        pictures: table of PICTURES and PLACES, one row per picture of the index.

    Raises:
        UserError: the folder holds no finished cache, or a shard is missing or has another size.
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
                raise UserError(f"{path} is missing: make the cache again; the other shards are kept")
            if path.stat().st_size != shard["bytes"]:
                raise _damaged(path, "does not have the size that the index records")
        self._paths = [self.folder / name for name in self._shards]
        self._maps: dict[int, torch.Tensor] = {}
        numbers = [name for name in self.pictures.column_names if name not in ("key", "reason")]
        self._columns = {name: self.pictures[name].to_numpy() for name in numbers}

    def __reduce__(self):
        """A worker process opens the folder and maps the files itself."""
        return LatentCache, (self.folder,)

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def has(self) -> np.ndarray:
        """(N,) bool: True for pictures that are in the cache."""
        return self._columns["offset"] >= 0

    @cached_property
    def refused(self) -> pa.Table:
        """Table (key, reason) of the pictures that had a bucket but could not be used."""
        return self.pictures.filter(pc.is_valid(self.pictures["reason"])).select(["key", "reason"])

    @cached_property
    def bucketing(self) -> tuple[np.ndarray, list[Size]]:
        """For an ``EpochPlan``: (N,) int64 bucket of each picture, -1 if it is not cached; and the list of buckets."""
        sides = np.stack([self._columns[f"bucket_{side}"] for side in ("width", "height")], axis=1).astype(np.int64)
        codes, which = np.unique(sides[self.has] @ [2**32, 1], return_inverse=True)
        assignment = np.full(len(self), -1)
        assignment[self.has] = which
        return assignment, [(int(code >> 32), int(code & 0xFFFFFFFF)) for code in codes]

    def __getitem__(self, i: int) -> CachedPicture:
        """A picture by its number in the index.

        Raises:
            PictureError: it could not be used, or had no bucket when the cache was made.
        """
        shard, offset = int(self._columns["shard"][i]), int(self._columns["offset"][i])
        if offset < 0:
            raise PictureError(self.pictures["reason"][i].as_py() or "it had no bucket when the cache was made")
        original, scaled = self._size(i), self._size(i, "scaled_")
        width, height = self.recipe.latent_size(scaled)
        shape = (2, self.recipe.channels, height, width)
        end = offset + DTYPE.itemsize * int(np.prod(shape))
        mean, std = self._map(shard)[offset:end].view(DTYPE).view(shape)
        return CachedPicture(mean, std, scaled, original)

    def _size(self, i: int, prefix: str = "") -> Size:
        return int(self._columns[f"{prefix}width"][i]), int(self._columns[f"{prefix}height"][i])

    # ------------------------------------------------------------------------------------------------------------------

    def check(
        self,
        index: PictureIndex,
        assignment: np.ndarray | None = None,
        buckets: Sequence[Size] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """Refuse a cache of other pictures, by their keys, sizes, and the size and date of their files.

        A picture whose file is gone cannot have changed, and counts as the one that was cached.

        Args:
            index: the pictures that the cache is to be used for.
            assignment, buckets: compare their buckets too (see ``EpochPlan``).
            recipe: compare the VAE and the settings too.

        Raises:
            UserError: the cache differs.
        """
        rows = picture_rows(index)
        if assignment is not None:
            assert buckets is not None  # given together
            rows = add_buckets(rows, assignment, buckets)
        if difference := (recipe and recipe_difference(self.recipe, recipe)) or row_difference(self.pictures, rows):
            raise UserError(stale(self.folder, difference))

    def check_vae(self, vae: "AutoencoderKL") -> None:
        """Refuse a cache that another VAE made than the one of the model in training.

        Args:
            vae: VAE in the dtype of its file or in float32; it is compared in the dtype of the cache.

        Raises:
            UserError: it is another VAE.
        """
        found = hash_encoder(copy.deepcopy(vae).to(getattr(torch, self.recipe.dtype)))
        if difference := recipe_difference(self.recipe, replace(self.recipe, vae=found)):
            raise UserError(stale(self.folder, difference))

    def verify(self) -> None:
        """Read all shards and compare their checksums.

        Raises:
            UserError: a shard is damaged.
        """
        for path in tqdm(self._paths, "verifying", unit=" shards", disable=None):
            header = read_header(path)
            with open_data(path, header) as data:
                found = hash_data(data)
            if not found == header.metadata.get(HASH) == self._shards[path.name]["sha256"]:
                raise _damaged(path, "does not have the checksum that the index records")

    def _map(self, shard: int) -> torch.Tensor:
        """The bytes of a shard, mapped.  Unlike numpy's, this map keeps no file open (their number is limited)."""
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
    """A random crop of a cached picture as the latents of a bucket; ``partial`` with ``cache`` makes it a ``Load``.

    Args:
        picture: number of the picture in the index.
        bucket: (width, height) in pixels.
        numbers: random generators for the crop, uniform on the grid of the latents, and for the posterior's sample.
        cache: cache to read.
        sample: True for a sample of the VAE's posterior, False for its mean.

    Returns:
        (C, height / factor, width / factor) float32, not scaled by the VAE's scaling_factor; and SDXL's
        micro-conditioning.

    Raises:
        PictureError: the picture is not in the cache.
        UserError: the cached picture is smaller than the bucket, or the bucket is off the latents' grid.
    """
    mean, std, scaled, original = cache[picture]
    factor = cache.recipe.factor
    width, height = (side // factor for side in bucket)
    room = mean.shape[2] - width, mean.shape[1] - height
    if any(side % factor for side in bucket) or min(room) < 0:
        raise UserError(
            f"a bucket of {bucket[0]} x {bucket[1]} cannot be cropped from {cache.pictures['key'][picture]}, which is "
            f"cached with {factor * mean.shape[2]} x {factor * mean.shape[1]} pixels on a grid of {factor}: make the "
            "cache again for these buckets"
        )
    place = numbers(CROP)
    left, top = (int(place.integers(most, endpoint=True)) for most in room)
    window = np.s_[:, top : top + height, left : left + width]
    latents = mean[window].float()
    if sample:
        noise = numbers(POSTERIOR).standard_normal(tuple(latents.shape), dtype=np.float32)
        latents.addcmul_(std[window].float(), torch.from_numpy(noise))
    cut_left, cut_top = margins_cut(scaled, factor)
    corner = cut_top + factor * top, cut_left + factor * left
    return latents, MicroConditioning(height_first(original), corner, height_first(bucket))


def margins_cut(scaled: Size, factor: int) -> tuple[int, int]:
    """Pixels (left, top) that are cut off a resized picture so that its sides are multiples of ``factor``."""
    return (scaled[0] % factor) // 2, (scaled[1] % factor) // 2


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path} {how}: it is damaged; remove it and make the cache again; the other shards are kept")


def _read_index(path: Path) -> pa.Table:
    if not path.is_file():
        raise UserError(f"{path.parent} is not a finished cache of latents: it has no {INDEX}; run `ztsnr cache`")
    try:
        table = open_arrow(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if table.schema.names != [*PICTURES.names, *PLACES.names] or ABOUT.encode() not in (table.schema.metadata or {}):
        raise UserError(f"{path} is not an index of cached latents: make the cache again")
    return table
