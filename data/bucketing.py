"""Which bucket each picture of a dataset trains in, and which pictures are left out and why."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..canvas import Size, assign_buckets
from ..errors import UserError

TAKEN, NO_WEIGHT, TOO_SMALL, TOO_LONG, WOULD_GROW, TOO_FEW = range(6)
REASONS = (
    "taken",
    "of weight 0",
    "smaller than the minimum size",
    "of an aspect ratio too far from every bucket's",
    "would be enlarged",
    "of a shape with too few pictures for a step",
)


@dataclass(frozen=True, eq=False)
class Bucketing:
    """The buckets of N pictures, and the reasons why some have none.

    Attributes:
        sizes: (N, 2) width and height of the pictures.
        buckets: (width, height) of each bucket, set by set.
        assignment: (N,) int64, the bucket of each picture, -1 for those left out.
        reason: (N,) int8, an index into REASONS.
        moved: number of pictures that were moved because their nearest bucket had too few for a step.
    """

    sizes: np.ndarray
    buckets: list[Size]
    assignment: np.ndarray
    reason: np.ndarray
    moved: int

    @property
    def aspect_error(self) -> np.ndarray:
        """(N,) |log(w / h) - log(W / H)|, nan for pictures left out."""
        across, down = self._stretches()
        return np.abs(np.log(across / down))

    @property
    def scale(self) -> np.ndarray:
        """(N,) factor by which each picture is resized to cover its bucket, above 1 if enlarged; nan if left out."""
        return np.maximum(*self._stretches())

    @property
    def crop_loss(self) -> np.ndarray:
        """(N,) share of a picture's area that is cut off, nan if it is left out."""
        across, down = self._stretches()
        return 1 - np.minimum(across, down) / np.maximum(across, down)

    def _stretches(self) -> list[np.ndarray]:
        """W / w and H / h of each picture, each (N,)."""
        return [
            side / picture for side, picture in zip(_sides(self.buckets, self.assignment), self.sizes.T, strict=True)
        ]


def bucket_pictures(
    sizes: np.ndarray,
    bucket_sets: Sequence[Sequence[Size]],
    *,
    max_aspect_error: float = math.log(2),
    minimum_size: int = 0,
    no_upscale: bool = False,
    batch_size: int = 1,
    repeats: np.ndarray | None = None,
) -> Bucketing:
    """Choose the bucket of each picture.

    Within a set of buckets, a picture goes to the nearest aspect ratio (``assign_buckets``).  With several sets, it
    goes to the largest bucket that it covers without being enlarged, or to the smallest if it covers none.  Buckets
    with too few pictures for a step are closed, the emptiest first, and their pictures move to the nearest that remain.

    Args:
        sizes: (N, 2) width and height of the pictures.
        bucket_sets: one set of buckets for each training resolution.
        max_aspect_error: pictures further from their bucket are left out; at log(2) half a picture would be cut off.
        minimum_size: pictures with a shorter side are left out.
        no_upscale: leave out pictures that would be enlarged.
        batch_size: pictures per step over all ranks.
        repeats: (N,) number of times that an epoch has each picture, by default 1; pictures with 0 are left out.

    Raises:
        UserError: there are no buckets, ``assign_buckets`` refuses the buckets, the sizes or max_aspect_error, or
            repeats does not have one number for each picture.
    """
    open_sets = sorted(  # the smallest first
        map(list, bucket_sets), key=lambda bucket_set: max(map(math.prod, bucket_set), default=0)
    )
    if not open_sets:
        raise UserError("there are no buckets to choose from; give at least one set of them")
    # each bucket once, even if several sets have it
    buckets = list(dict.fromkeys(bucket for bucket_set in open_sets for bucket in bucket_set))

    assignment = _nearest(sizes, open_sets, buckets, max_aspect_error)  # also checks the sizes
    sizes = np.asarray(sizes).reshape(len(assignment), 2)
    reason = np.where(assignment < 0, np.int8(TOO_LONG), np.int8(TAKEN))
    if no_upscale:
        reason[(assignment >= 0) & ~_covers(sizes, buckets, assignment)] = WOULD_GROW
    reason[np.minimum(*sizes.T) < minimum_size] = TOO_SMALL
    if repeats is not None:
        if np.shape(repeats) != reason.shape:
            raise UserError(f"repeats must have one number for each of the {len(reason)} pictures")
        reason[np.asarray(repeats) == 0] = NO_WEIGHT
    assignment[reason != TAKEN] = -1

    moved = np.zeros(len(sizes), dtype=bool)
    counts = _counts(assignment, buckets)
    while len(too_few := np.flatnonzero((counts > 0) & (counts < batch_size))):
        closed = too_few[counts[too_few].argmin()]
        open_sets = [[bucket for bucket in bucket_set if bucket != buckets[closed]] for bucket_set in open_sets]
        pictures = np.flatnonzero(assignment == closed)
        nearest = _nearest(sizes[pictures], list(filter(None, open_sets)), buckets, max_aspect_error)
        if no_upscale:
            nearest[~_covers(sizes[pictures], buckets, nearest)] = -1
        assignment[pictures] = nearest
        reason[pictures[nearest < 0]] = TOO_FEW
        moved[pictures] = nearest >= 0
        counts[closed] = 0
        counts += _counts(nearest, buckets)
    return Bucketing(sizes, buckets, assignment, reason, int(moved.sum()))


def _nearest(
    sizes: np.ndarray, bucket_sets: list[list[Size]], buckets: list[Size], max_aspect_error: float
) -> np.ndarray:
    """(N,) the bucket of each picture, an index into ``buckets``; -1 if none is near enough to its shape."""
    chosen = np.full(len(sizes), -1)
    for bucket_set in bucket_sets:  # from the smallest to the largest
        numbers = np.array([*map(buckets.index, bucket_set), -1])
        candidates = numbers.take(assign_buckets(sizes, bucket_set, max_aspect_error=max_aspect_error))
        better = chosen < 0
        if bucket_set is not bucket_sets[0]:
            better |= _covers(sizes, buckets, candidates)
        chosen = np.where(better, candidates, chosen)
    return chosen


def _covers(sizes: np.ndarray, buckets: list[Size], assignment: np.ndarray) -> np.ndarray:
    """(N,) True where a picture has a bucket and fills it without being enlarged."""
    across, down = _sides(buckets, assignment)
    return (across <= sizes[:, 0]) & (down <= sizes[:, 1])


def _sides(buckets: list[Size], assignment: np.ndarray) -> list[np.ndarray]:
    """Width and height of each picture's bucket, each (N,); nan for pictures without one."""
    return [np.array([*sides, math.nan]).take(assignment) for sides in zip(*buckets, strict=True)]


def _counts(assignment: np.ndarray, buckets: list[Size]) -> np.ndarray:
    return np.bincount(assignment[assignment >= 0], minlength=len(buckets))
