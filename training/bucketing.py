"""Which bucket each picture of a dataset trains in, and which pictures are left out and why."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..canvas import Size, assign_buckets

TAKEN, TOO_SMALL, WOULD_GROW, TOO_LONG, TOO_FEW = range(5)
_ROUNDING = 1e-12  # of logarithms
REASONS = (
    "taken",
    "smaller than the minimum size",
    "would be enlarged",
    "of an aspect ratio too far from every bucket's",
    "of a shape with too few pictures for a step",
)


@dataclass(frozen=True)
class Bucketing:
    """What becomes of N pictures.

    Attributes:
        buckets: (width, height) of each.
        assignment: (N,) int64, the bucket of each picture, -1 for those left out.
        reason: (N,) int8, an index into REASONS.
        aspect_error: (N,) |log(w / h) - log(W / H)|, nan for those left out.
        scale: (N,) by which the sides of a picture are multiplied so that it covers its bucket; above 1 it is enlarged.
        moved: how many pictures went to another bucket than their nearest, which had too few for a step.
    """

    buckets: list[Size]
    assignment: np.ndarray
    reason: np.ndarray
    aspect_error: np.ndarray
    scale: np.ndarray
    moved: int

    @property
    def crop_loss(self) -> np.ndarray:
        """(N,) share of each picture's area that is cut off."""
        return 1 - np.exp(-self.aspect_error)


def bucket_pictures(
    sizes: np.ndarray,
    bucket_sets: Sequence[Sequence[Size]],
    *,
    max_aspect_error: float = math.log(2),
    minimum_size: int = 0,
    no_upscale: bool = False,
    batch_size: int = 1,
) -> Bucketing:
    """Choose the bucket of each picture.

    A picture goes to the set whose bucket is the largest that it covers without being enlarged, or to the smallest if
    it covers none; within a set to the bucket of the nearest aspect ratio (``assign_buckets``).  Buckets that do not
    fill one step are closed, the emptiest first, and their pictures go to the nearest that are left.

    Args:
        sizes: (N, 2) width and height of the pictures.
        bucket_sets: one set of buckets for each resolution that is trained.
        max_aspect_error: pictures further from their bucket are left out; at log(2) half a picture would be cut off.
        minimum_size: pictures of which a side is shorter are left out.
        no_upscale: leave out pictures that would be enlarged.
        batch_size: pictures of a step.

    Raises:
        ValueError: see ``assign_buckets``.
    """
    sizes = np.asarray(sizes).reshape(-1, 2)
    open_sets = [list(bucket_set) for bucket_set in bucket_sets]
    buckets = [bucket for bucket_set in open_sets for bucket in bucket_set]
    reason = np.where(np.minimum(*sizes.T) < minimum_size, np.int8(TOO_SMALL), np.int8(TAKEN))
    assignment = np.full(len(sizes), -1)

    error, scale = np.full(len(sizes), np.nan), np.full(len(sizes), np.nan)

    asked, why_not = np.flatnonzero(reason == TAKEN), (TOO_LONG, WOULD_GROW)
    moved = set()
    while True:
        choice = _choose(sizes[asked], open_sets, buckets)
        assignment[asked] = choice
        error[asked], scale[asked] = _fit(sizes[asked], buckets, choice)
        reason[asked] = TAKEN
        if no_upscale:
            reason[asked[scale[asked] > 1]] = why_not[1]
        reason[asked[error[asked] > max_aspect_error + _ROUNDING]] = why_not[0]
        counts = np.bincount(assignment[reason == TAKEN], minlength=len(buckets))
        too_few = np.flatnonzero((counts > 0) & (counts < batch_size))
        if not len(too_few):
            break
        closed = too_few[counts[too_few].argmin()]
        for bucket_set in open_sets:
            if buckets[closed] in bucket_set:
                bucket_set.remove(buckets[closed])
        asked, why_not = np.flatnonzero((assignment == closed) & (reason == TAKEN)), (TOO_FEW, TOO_FEW)
        if not any(open_sets):
            reason[asked] = TOO_FEW
            break
        moved.update(asked)
    left_out = np.flatnonzero(reason)
    assignment[left_out] = -1
    error[left_out] = scale[left_out] = np.nan
    return Bucketing(buckets, assignment, reason, error, scale, len(moved - set(left_out)))


def _choose(sizes: np.ndarray, bucket_sets: list[list[Size]], buckets: list[Size]) -> np.ndarray:
    """(N,) the bucket of each picture, an index into ``buckets``."""
    index_of = {bucket: index for index, bucket in enumerate(buckets)}
    chosen = None
    for bucket_set in sorted(filter(None, bucket_sets), key=lambda found: max(w * h for w, h in found)):
        candidates = np.array([index_of[bucket] for bucket in bucket_set])[assign_buckets(sizes, bucket_set)]
        if chosen is None:
            chosen = candidates
        else:
            covered = _fit(sizes, buckets, candidates)[1] <= 1
            chosen[covered] = candidates[covered]
    return chosen


def _fit(sizes: np.ndarray, buckets: list[Size], assignment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Aspect error and scale of pictures in their buckets, each (N,)."""
    across, down = (
        np.array(sides, np.float64)[assignment] / sizes[:, i] for i, sides in enumerate(zip(*buckets, strict=True))
    )
    return np.abs(np.log(across / down)), np.maximum(across, down)
