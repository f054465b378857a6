"""The data of a run, put together as its settings say: which pictures, in which order, read how."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..canvas import Size
from ..data.bucket_report import bucket_sets
from ..data.bucketing import REASONS, TAKEN, TOO_FEW, bucket_pictures
from ..data.captions import CaptionSettings
from ..data.dataset import Load, PictureDataset, load_picture
from ..data.epoch_plan import EpochPlan
from ..data.latent_cache import LatentCache, load_latents
from ..data.pictures import PictureError, open_picture, parse_color
from ..data.quarantine import Quarantine, allowed_unusable
from ..data.sources import PictureIndex, Source, build_index, split
from ..data.tag_weights import PictureWeights, count_tags, frequency_weights, picture_weights, read_tags
from ..errors import UserError
from ..world import World
from .config import DataSettings
from .networks import Tokenize

DECODED = 1000  # pictures that a dry run decodes; of larger sets it reads the headers alone


@dataclass(frozen=True)
class TrainingData:
    """The data of a run.

    Attributes:
        index: all pictures.
        refused: table (key, path, reason) of the pictures that cannot be used.
        left_out: reason -> number of training pictures without a bucket.
        plan: plan of the epochs.
        held_out: (M,) numbers of the pictures that are held out.
        held_out_buckets: (M,) their buckets.
        load: reads a picture, as pixels or as latents.
        cache: source of the latents; None if pixels are read.
        weights: loss weights of the pictures; None if all are 1.
        fingerprint: hash of all that the order of pictures depends on, except the number of processes.
    """

    index: PictureIndex
    refused: pa.Table
    left_out: dict[str, int]
    plan: EpochPlan
    held_out: np.ndarray
    held_out_buckets: np.ndarray
    load: Load
    cache: LatentCache | None
    weights: PictureWeights | None
    fingerprint: str

    def dataset(self, quarantine: Quarantine, captions: CaptionSettings, tokenize: Tokenize) -> PictureDataset:
        """The samples of training."""
        return PictureDataset(
            self.plan,
            self.index,
            self.load,
            quarantine,
            caption_settings=captions,
            weights=self.weights.weights if self.weights else None,
            tokenize=tokenize,
        )


def open_data(settings: DataSettings, seed: int, world: World, index_path: Path) -> TrainingData:
    """Find the pictures, choose their buckets, hold some out, and plan the epochs.

    Args:
        settings: settings of the data.
        seed: seed of the run.
        world: the processes of the run.
        index_path: file in which the first process gives the index to the others and to the workers.

    Raises:
        UserError: there are no pictures, none has a bucket, the batch size is not a multiple of the processes, the
            cache is one of other pictures, ...
    """
    if settings.batch_size % world.size:
        raise UserError(
            f"data.batch_size = {settings.batch_size} is not a multiple of the {world.size} processes: change it"
        )

    def read_headers() -> pa.Table:
        sources = [Source(**vars(source)) for source in settings.sources]
        index, refused = build_index(sources, allow_missing_captions=settings.allow_missing_captions)
        index.save(index_path)
        return refused

    refused = world.by_first(read_headers)
    index = PictureIndex.load(index_path)

    cache = LatentCache(settings.latents) if settings.latents else None
    training, held_out = split(index, settings.validation_share, salt=str(seed))
    if cache is not None:
        cache.check(index)
        assignment, buckets, left_out = _cached_buckets(cache, training, settings.batch_size)
    else:
        assignment, buckets, left_out = _nearest_buckets(settings, index, training, held_out)
    held_out = held_out[assignment[held_out] >= 0]
    for_training = assignment.copy()
    for_training[held_out] = -1
    if not (for_training >= 0).any():
        reasons = "; ".join(f"{count} are {reason}" for reason, count in left_out.items())
        raise UserError(f"none of the {len(index)} pictures can be trained with: {reasons or 'all are held out'}")
    repeats = index.repeats if (index.repeats != 1).any() else None
    plan = EpochPlan(
        for_training,
        buckets,
        batch_size=settings.batch_size,
        world_size=world.size,
        rank=world.rank,
        seed=seed,
        repeats=repeats,
    )
    if cache is not None:
        load = partial(load_latents, cache=cache)
    else:
        load = partial(
            load_picture,
            index=index,
            flip=settings.flip,
            background=parse_color(settings.background, "data.background"),
        )
    return TrainingData(
        index=index,
        refused=refused,
        left_out=left_out,
        plan=plan,
        held_out=held_out,
        held_out_buckets=assignment[held_out],
        load=load,
        cache=cache,
        weights=_weights(settings, index),
        fingerprint=_fingerprint(index, plan),
    )


def say_undecodable(data: TrainingData, settings: DataSettings, world: World, say: Callable[[str], None]) -> None:
    """Decode every picture of a small set, so that a dry run names those whose headers alone are sound.

    Raises:
        UserError: more of them than ``data.max_unusable`` allows, which would end the run.
    """
    pictures = np.union1d(np.flatnonzero(data.plan.assignment >= 0), data.held_out).tolist()
    if data.cache is not None or not world.first:
        return
    if len(pictures) > DECODED:
        say(f"only the headers of the {len(pictures)} pictures were read; up to {DECODED} would be decoded here")
        return

    def trouble(i: int) -> str | None:
        try:
            open_picture(data.index.read(i))
        except PictureError as error:
            return f"{data.index.key(i)} cannot be used: {error}"

    with ThreadPoolExecutor() as pool:
        found = [line for line in pool.map(trouble, pictures) if line]
    say(f"decoded all {len(pictures)} pictures; {len(found)} of them cannot be used")
    for line in found:
        say(line)
    if len(found) > allowed_unusable(settings.max_unusable, len(pictures)):
        raise UserError(
            f"{len(found)} of the {len(pictures)} pictures cannot be used, more than data.max_unusable = "
            f"{settings.max_unusable:g} allows: mend or remove them, or raise data.max_unusable"
        )


def _nearest_buckets(
    settings: DataSettings, index: PictureIndex, training: np.ndarray, held_out: np.ndarray
) -> tuple[np.ndarray, list[Size], dict[str, int]]:
    """(N,) bucket of each picture, the buckets, and how many training pictures are left out, by reason."""
    limits = {
        "max_aspect_error": settings.max_aspect_error,
        "minimum_size": settings.min_size,
        "no_upscale": settings.no_upscale,
    }
    assignment = np.full(len(index), -1)
    found = bucket_pictures(
        index.sizes[training],
        bucket_sets(settings.buckets, settings.areas, settings.step, settings.limit),
        batch_size=settings.batch_size,
        repeats=index.repeats[training],
        **limits,
    )
    assignment[training] = found.assignment
    used = np.unique(found.assignment[found.assignment >= 0])
    if len(held_out) and len(used):  # they take only buckets that training has
        near = bucket_pictures(index.sizes[held_out], [[found.buckets[i] for i in used]], **limits)
        place = np.array([found.buckets.index(bucket) for bucket in near.buckets])
        assignment[held_out] = np.where(near.assignment >= 0, place[near.assignment], -1)
    counts = np.bincount(found.reason, minlength=len(REASONS)).tolist()
    left_out = {reason: count for reason, count in zip(REASONS, counts, strict=True) if count}
    left_out.pop(REASONS[TAKEN], None)
    return assignment, found.buckets, left_out


def _cached_buckets(
    cache: LatentCache, training: np.ndarray, batch_size: int
) -> tuple[np.ndarray, list[Size], dict[str, int]]:
    """The same from a cache.  Pictures of buckets that do not fill a step are left out: cached latents cannot move."""
    assignment, buckets = cache.bucketing
    assignment = assignment.copy()
    missing = int((assignment[training] < 0).sum())
    counts = np.bincount(assignment[training][assignment[training] >= 0], minlength=len(buckets))
    small = (assignment >= 0) & (counts[assignment] < batch_size)
    assignment[small] = -1
    left_out = {"not in the cache": missing, REASONS[TOO_FEW]: int(small[training].sum())}
    return assignment, buckets, {reason: count for reason, count in left_out.items() if count}


def _weights(settings: DataSettings, index: PictureIndex) -> PictureWeights | None:
    if settings.tag_weights is None:
        return None
    chosen, separator = settings.tag_weights, settings.captions.separator
    captions = index.table["captions"].to_pylist()
    if chosen.table is not None:
        tags = read_tags(chosen.table)
    else:
        tags = frequency_weights(count_tags(captions, separator), chosen.power)
    return picture_weights(captions, tags, low=chosen.low, high=chosen.high, separator=separator, repeats=index.repeats)


def _fingerprint(index: PictureIndex, plan: EpochPlan) -> str:
    digest = hashlib.sha256()
    for key in index.table["key"].to_pylist():
        digest.update(key.encode(errors="surrogatepass") + b"\n")
    digest.update(plan.assignment.astype("<i8").tobytes())
    digest.update(repr((plan.buckets, plan.batch_size, plan.seed)).encode())
    if plan.repeats is not None:
        digest.update(plan.repeats.astype("<f8").tobytes())
    return digest.hexdigest()
