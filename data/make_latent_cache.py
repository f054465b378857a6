"""Writing the cache that ``latent_cache`` reads.

Pictures are assigned to shards in the order of the index, so a shard's content does not depend on which process writes
it.  A shard is built in memory and then written atomically, together with all that the index needs to know of it.  So a
killed run resumes with the missing shards; any number of processes each write their own shards without talking to each
other; and the process that finds all shards written, which is the last one to end or a later run, writes the index.

Latents are stored as float16.  Those of Stable Diffusion and SDXL stay below 100, far within its range, and float16
keeps 11 bits of each number where bfloat16 keeps 8; float32 would double the disk space.  A latent that float16 cannot
hold, or that is not finite because the VAE overflowed, ends the run.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..canvas import Size
from ..checkpoints.header import HASH, Header, read_header
from ..checkpoints.stream import DTYPE_NAMES, made, write_tensors
from ..checkpoints.vae import hash_encoder, load_vae
from ..errors import UserError
from ..files import atomic_write, lock_folder
from .bucketing import REASONS, TAKEN, bucket_pictures
from .dataset import leave_signals
from .latent_cache import ABOUT, DTYPE, INDEX, PLACES, LatentCache, margins_cut
from .latent_recipe import PICTURES, Recipe, add_buckets, picture_rows, recipe_difference, row_difference, stale
from .latent_stats import ChannelStatistics, merge
from .pictures import WHITE, Color, PictureError, cover_size, open_picture, resize_picture
from .sources import PictureIndex, Source, build_index

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

MARGIN = 64  # pixels
SHARD_BYTES = 10**9
LEAST_SHARDS = 32  # so that processes can share them, and a kill loses little; fewer if there are fewer pictures
MOST_PICTURES = 8192  # per shard, so that its header stays small


def cache_latents(
    folder: str | Path,
    index: PictureIndex,
    assignment: np.ndarray,
    buckets: Sequence[Size],
    vae: "AutoencoderKL",
    *,
    margin: int = MARGIN,
    background: Color = WHITE,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> LatentCache | None:
    """Encode the pictures of an index, except those that the folder has already.

    A picture is resized to cover its bucket plus ``margin`` in width and height, or as much of the margin as it can
    without being enlarged.  All of it is encoded, except for less than one latent at its edges.

    Args:
        folder: folder of the cache; created if needed.
        index: N pictures.
        assignment: (N,) bucket of each picture, -1 to leave it out (see ``EpochPlan``).
        buckets: (width, height) of each, in pixels.
        vae: VAE on the device and in the dtype to run in.
        margin: margin in pixels.
        background: sRGB colour behind transparent pixels.
        workers: number of processes that open pictures; 0 opens them in this one.
        rank, world_size: number of this process, and number of processes; each writes its own shards.

    Returns:
        The cache; None if other processes still have shards to write.

    Raises:
        UserError: there is nothing to encode; the folder is in use, or holds a cache of other pictures, another VAE or
            other settings; a bucket is off the VAE's grid; float16 cannot hold the latents; or no picture can be used.
    """
    folder = Path(folder)
    recipe = recipe_of(vae, margin, background)
    rows, shards = plan(index, assignment, buckets, recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror or error}") from None
    # Writes of the same shard by several processes do no harm, so the others follow the first one without a lock.
    with lock_folder(folder) if rank == 0 else nullcontext():
        return _write_cache(folder, index, recipe, rows, shards, vae, workers, rank, world_size)


def _write_cache(
    folder: Path,
    index: PictureIndex,
    recipe: Recipe,
    rows: pa.Table,
    shards: list[np.ndarray],
    vae: "AutoencoderKL",
    workers: int,
    rank: int,
    world_size: int,
) -> LatentCache | None:
    """Write this process's shards that are missing, and the index once all are there."""
    paths = [folder / f"latents-{shard:05d}.safetensors" for shard in range(len(shards))]
    if others := sorted(set(folder.glob("latents-*.safetensors")) - set(paths)):
        raise UserError(stale(folder, f"{others[0].name} is not among the {len(paths)} shards of these pictures"))

    todo = []
    for shard, (path, pictures) in enumerate(zip(paths, shards, strict=True)):
        if path.exists():
            _read_shard(path, rows.take(pictures), recipe)
        elif shard % world_size == rank:
            todo.append(shard)
    numbers = [i for shard in todo for i in shards[shard].tolist()]
    scaled = np.stack([rows["scaled_width"].to_numpy(), rows["scaled_height"].to_numpy()], axis=1)
    opened = DataLoader(
        _Pictures(index, scaled, recipe.factor, recipe.background),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        worker_init_fn=leave_signals,
    )
    progress = iter(tqdm(opened, "encoding", unit=" pictures", disable=rank > 0 or None))
    for shard in todo:
        _write_shard(paths[shard], rows.take(shards[shard]), recipe, vae, islice(progress, len(shards[shard])))
    if not all(path.exists() for path in paths):
        return None
    _write_index(folder, rows, dict(zip(paths, shards, strict=True)), recipe)
    return LatentCache(folder)


def recipe_of(vae: "AutoencoderKL", margin: int = MARGIN, background: Color = WHITE) -> Recipe:
    """The recipe of ``cache_latents`` with the same arguments."""
    return Recipe(
        dtype=str(vae.dtype).removeprefix("torch."),
        vae=hash_encoder(vae),
        factor=2 ** (len(vae.config["block_out_channels"]) - 1),
        channels=vae.config["latent_channels"],
        margin=margin,
        background=background,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Assigning pictures to shards


def plan(
    index: PictureIndex, assignment: np.ndarray, buckets: Sequence[Size], recipe: Recipe
) -> tuple[pa.Table, list[np.ndarray]]:
    """Which pictures go into which shard, at which size; depends on the arguments alone.

    Returns:
        A table of PICTURES, and the numbers of the pictures of each shard.
    """
    taken = np.flatnonzero(np.asarray(assignment) >= 0)
    if not len(taken):
        raise UserError(
            "there is nothing to cache: no picture has a bucket; choose other buckets, or a smaller minimum size"
        )
    if off := [bucket for bucket in buckets if any(side % recipe.factor for side in bucket)]:
        raise UserError(
            f"a bucket of {off[0][0]} x {off[0][1]} is off the grid of this VAE: sides must be multiples of "
            f"{recipe.factor}"
        )
    if recipe.margin < 0:
        raise UserError(f"margin must be at least 0 pixels, not {recipe.margin}")
    rows = add_buckets(picture_rows(index), assignment, buckets)
    scaled = np.zeros((len(index), 2), np.int32)
    for i in taken:
        scaled[i] = scaled_size(tuple(index.sizes[i].tolist()), buckets[assignment[i]], recipe.margin)
    for side, values in zip(("width", "height"), scaled.T, strict=True):
        rows = rows.append_column(f"scaled_{side}", pa.array(values))

    nbytes = 2 * recipe.channels * DTYPE.itemsize * (scaled[taken] // recipe.factor).prod(axis=1, dtype=np.int64)
    share = np.maximum(nbytes / min(SHARD_BYTES, nbytes.sum() / LEAST_SHARDS), 1 / MOST_PICTURES).clip(max=1)
    begins = np.flatnonzero(np.diff(np.floor(np.cumsum(share) - share))) + 1
    return rows.cast(PICTURES), np.split(taken, begins)


def scaled_size(size: Size, bucket: Size, margin: int) -> Size:
    """(width, height) that a picture is resized to: covers bucket and margin, but does not enlarge for the margin.

    Args:
        size, bucket: (width, height) in pixels.
    """
    margin = max(0, min(margin, size[0] - bucket[0], size[1] - bucket[1]))
    return cover_size(size, (bucket[0] + margin, bucket[1] + margin))


# ----------------------------------------------------------------------------------------------------------------------
# From pictures to latents


class _Pictures(Dataset):
    """Pixels (3, h, w) uint8 of each picture, resized and cut to the grid; or a text that says why it is unusable."""

    def __init__(self, index: PictureIndex, scaled: np.ndarray, factor: int, background: Color):
        self.index, self.scaled, self.factor, self.background = index, scaled, factor, background

    def __getitem__(self, i: int) -> torch.Tensor | str:
        size, scaled = (tuple(sizes[i].tolist()) for sizes in (self.index.sizes, self.scaled))
        try:
            image = open_picture(self.index.read(i), self.background, at_least=scaled)
            pixels = np.asarray(resize_picture(image, scaled, size))
        except PictureError as error:
            return str(error)
        left, top = margins_cut(scaled, self.factor)
        width, height = (side // self.factor * self.factor for side in scaled)
        return torch.from_numpy(pixels[top : top + height, left : left + width].transpose(2, 0, 1).copy())


@torch.inference_mode()
def encode(vae: "AutoencoderKL", pixels: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of the VAE's posterior for one picture.

    Args:
        pixels: (3, h, w) uint8, sides multiples of the VAE's factor.

    Returns:
        (2, C, h / factor, w / factor) float16 on the CPU.
    """
    inputs = pixels.to(vae.device).to(vae.dtype).div_(127.5).sub_(1)
    posterior = cast("AutoencoderKLOutput", vae.encode(inputs[None])).latent_dist
    return torch.cat([posterior.mean, posterior.std]).to(DTYPE).cpu()


# ----------------------------------------------------------------------------------------------------------------------
# Shards


def _write_shard(
    path: Path, rows: pa.Table, recipe: Recipe, vae: "AutoencoderKL", opened: Iterator[torch.Tensor | str]
) -> None:
    """Encode the pictures of a shard and write it, with all that the index needs to know in its metadata."""
    latents, refused = {}, {}
    for key, pixels in zip(rows["key"].to_pylist(), opened, strict=True):
        if isinstance(pixels, str):
            refused[key] = pixels
        else:
            latents[key] = encode(vae, pixels)
            if not latents[key].isfinite().all():
                raise UserError(
                    f"the VAE's latents of {key} are not finite, or too large for {DTYPE}; the VAE ran in {vae.dtype}: "
                    "if that is float16, in which SDXL's VAE overflows, set --dtype float32"
                )
    parts = [ChannelStatistics.of(*tensor.float()) for tensor in latents.values()]
    about = {
        "recipe": recipe.to_json(),
        "pictures": rows.to_pydict(),
        "refused": refused,
        "statistics": merge(parts).to_json() if parts else None,
    }
    tensors = {key: made(tensor, DTYPE_NAMES[DTYPE]) for key, tensor in latents.items()}
    with atomic_write(path) as file:
        write_tensors(file, tensors, {ABOUT: json.dumps(about, ensure_ascii=False)})


def _read_shard(path: Path, rows: pa.Table, recipe: Recipe) -> tuple[Header, dict]:
    """The header of a shard, and its metadata; refuses a shard of other pictures or another recipe."""
    header = read_header(path)
    try:
        about = json.loads(header.metadata[ABOUT])
        old_recipe, old_rows = Recipe.from_json(about["recipe"]), pa.table(about["pictures"], PICTURES)
    except (KeyError, TypeError, ValueError, pa.ArrowException):
        raise UserError(f"{path} is not a shard of cached latents: choose another folder, or remove it") from None
    if difference := recipe_difference(old_recipe, recipe) or row_difference(old_rows, rows):
        raise UserError(stale(path.parent, difference))
    return header, about


def _write_index(folder: Path, rows: pa.Table, shards: dict[Path, np.ndarray], recipe: Recipe) -> None:
    """Write the index from the metadata of all shards."""
    shard_of, offsets = np.full(len(rows), -1, np.int32), np.full(len(rows), -1, np.int64)
    reasons = np.full(len(rows), None, object)
    statistics, files = [], {}
    for number, (path, pictures) in enumerate(shards.items()):
        taken = rows.take(pictures)
        header, about = _read_shard(path, taken, recipe)
        shard_of[pictures] = number
        for i, key in zip(pictures, taken["key"].to_pylist(), strict=True):
            if key in about["refused"]:
                reasons[i] = about["refused"][key]
            else:
                offsets[i] = header.data_start + header.tensors[key].begin
        if about["statistics"]:
            statistics.append(ChannelStatistics.from_json(about["statistics"]))
        files[path.name] = {"bytes": path.stat().st_size, "sha256": header.metadata[HASH]}
    if not statistics:
        i = next(i for i, reason in enumerate(reasons) if reason)
        raise UserError(f"none of the pictures can be used; {rows['key'][i]}, for example: {reasons[i]}")
    for field, values in zip(PLACES, (shard_of, offsets, reasons), strict=True):
        rows = rows.append_column(field, pa.array(values, field.type))
    about = {"recipe": recipe.to_json(), "statistics": merge(statistics).to_json(), "shards": files}
    rows = rows.combine_chunks().replace_schema_metadata({ABOUT: json.dumps(about)})
    with atomic_write(folder / INDEX) as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def run_cache(
    sources: Sequence[str | Path | Source],
    out: str | Path,
    bucket_sets: Sequence[Sequence[Size]],
    *,
    vae: str | Path,
    config: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    margin: int = MARGIN,
    background: Color = WHITE,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    verify: bool = False,
    say: Callable[[str], None] = print,
    **bucketing,
) -> None:
    """Cache the latents of all pictures of some sources, and report which cannot be used.

    Args:
        sources: ``Source`` objects or paths; captions are ignored.
        out: folder of the cache.
        bucket_sets, bucketing: see ``bucket_pictures``.
        vae, config, device, dtype: see ``load_vae``.
        margin, background, workers, rank, world_size: see ``cache_latents``.
        verify: read all shards again at the end, and compare their checksums.
        say: called with each line of the report.

    Raises:
        UserError: see ``build_index``, ``bucket_pictures``, ``load_vae`` and ``cache_latents``.
    """
    encoder = load_vae(vae, config=config, device=device, dtype=dtype)  # first: reports a wrong name at once
    listed = [source if isinstance(source, Source) else Source(source) for source in sources]
    index, unusable = build_index(listed, allow_missing_captions=True)
    found = bucket_pictures(index.sizes, bucket_sets, **bucketing)
    if rank == 0:
        _say_refused(unusable, say)
        counts = np.bincount(found.reason, minlength=len(REASONS))
        for reason, count in zip(REASONS, counts.tolist(), strict=True):
            if count and reason != REASONS[TAKEN]:
                say(f"Left out ({reason}): {count} pictures; `ztsnr buckets` lists them.")
    cache = cache_latents(
        out,
        index,
        found.assignment,
        found.buckets,
        encoder,
        margin=margin,
        background=background,
        workers=workers,
        rank=rank,
        world_size=world_size,
    )
    if cache is None:
        say(f"Process {rank} of {world_size} has written its shards; the last to end, or a new run, adds the index.")
        return
    if verify:
        cache.verify()
    _say_refused(cache.refused, say)
    say(f"Cached {cache.has.sum()} pictures in {cache.folder}. Statistics of each latent channel:")
    for name in ("mean", "std"):
        say(f"{name:4}  " + "  ".join(f"{number:9.5f}" for number in getattr(cache.statistics, name)))


def _say_refused(pictures: pa.Table, say: Callable[[str], None]) -> None:
    for key, reason in zip(pictures["key"].to_pylist(), pictures["reason"].to_pylist(), strict=True):
        say(f"{key} cannot be used: {reason}")
