"""Picture sizes: the aspect-ratio buckets that a model is trained in, and the bucket that a picture belongs to.

A bucket is a size (width, height) in pixels.  Aspect ratios are compared by their logarithm, so that twice too wide and
twice too tall are the same error.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral
from typing import Any

import numpy as np

from .errors import UserError

Size = tuple[int, int]

LONGEST_RATIO = 4  # NovelAI's buckets of 2022 end at 256 x 1024, SDXL's at 512 x 2048
_TIE = 1e-12  # logarithms closer than this differ by rounding


# ----------------------------------------------------------------------------------------------------------------------
# Buckets


def novelai_buckets() -> list[Size]:
    """The 19 buckets of NovelAI's models of 2022 (github.com/NovelAI/novelai-aspect-ratio-bucketing).

    The largest rectangles within an area of 512 x 768 pixels and a length of 1024, in steps of 64; and 512 x 512, the
    size of the Stable Diffusion they began with.

    Returns:
        (width, height) of each, from the narrowest to the widest, in the order of the original code.
    """
    return _narrowest_first(_largest_rectangles(512 * 768, step=64, limit=1024) | {(512, 512)})


def area_buckets(size: Size, step: int = 64, limit: int = 2048) -> list[Size]:
    """Buckets of any area by the method of ``novelai_buckets``: ``area_buckets((1024, 1024))`` is for SDXL.

    For each width the largest height, and for each height the largest width, that stays within the area of ``size`` and
    within ``limit``; with them the largest such square.  No bucket is longer than 4:1, where NovelAI's set and SDXL's
    both end; hence the sides of (1024, 1024) run from 512 to 2048.  Its 33 buckets are all among the 40 that SDXL was
    trained in (arXiv 2307.01952, appendix I); each of the other 7 leaves room for one more step on one side.

    Args:
        size: (width, height) in pixels whose product is the area, each a multiple of step; itself a bucket, unless it
            is longer than 4:1.
        step: every side is a multiple of this.
        limit: the longest side allowed, at least the longer side of ``size``.

    Returns:
        (width, height) of each, from the narrowest to the widest; with each bucket also the one with its sides swapped.

    Raises:
        UserError: a number that is not whole or not positive, a size off the step or beyond the limit.
    """
    width, height = _whole_sides(size, "size")
    if not _is_whole(step) or step < 1:
        raise UserError(f"step must be a whole number of at least 1, not {step!r}")
    if width % step or height % step:
        raise UserError(f"size must be a multiple of step = {step} on both sides, not {width} x {height}")
    if not _is_whole(limit) or limit < max(width, height):
        raise UserError(f"limit must be a whole number, at least the longer side of {width} x {height}, not {limit!r}")
    square = math.isqrt(width * height) // step * step
    return _narrowest_first(_largest_rectangles(width * height, step, limit) | {(square, square)})


def _largest_rectangles(area: int, step: int, limit: int) -> set[Size]:
    """All (width, height) where one side is the longest that step, area, limit and the other side allow."""
    rectangles = set()
    for side in range(step, min(limit, math.isqrt(LONGEST_RATIO * area)) + 1, step):
        other = min(limit, area // side) // step * step
        if max(side, other) <= LONGEST_RATIO * min(side, other):
            rectangles |= {(side, other), (other, side)}
    return rectangles


def _narrowest_first(buckets: set[Size]) -> list[Size]:
    return sorted(buckets, key=lambda bucket: (bucket[0], -bucket[1]))


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def assign_buckets(
    sizes: np.ndarray | Sequence[tuple[float, float]],
    buckets: Sequence[Size],
    *,
    max_aspect_error: float = math.inf,
) -> np.ndarray:
    """The bucket of each picture: the one with the smallest aspect error |log(w / h) - log(W / H)|.

    Among buckets of one aspect ratio it is the one nearest in area, by logarithm too.  Halfway between two aspect
    ratios a picture goes to the one nearer to the square, or to the tall one if both are equally near; halfway between
    two areas to the smaller.  So a picture and its buckets laid on their sides give the same answer, except for a
    square picture between a tall and a wide bucket.

    Args:
        sizes: (N, 2) width and height of the pictures, positive numbers.
        buckets: (width, height) of each bucket, in any order.
        max_aspect_error: pictures with a larger error are left out.  Cropped to the shape of its bucket, a picture
            loses the share 1 - exp(-error) of its area: half of it at log(2).

    Returns:
        (N,) int64 indices into buckets; -1 for a picture that is left out.

    Raises:
        UserError: no buckets, a bucket listed twice, sizes that are not positive, a negative max_aspect_error.
    """
    buckets = _checked_buckets(buckets)
    if not max_aspect_error >= 0:
        raise UserError(f"max_aspect_error must be at least 0, not {max_aspect_error!r}")
    log_widths, log_heights = np.log(_positive_sides(sizes).T, dtype=np.float64)

    same_ratio: dict[Fraction, list[int]] = {}
    for index, (width, height) in sorted(enumerate(buckets), key=lambda item: math.prod(item[1])):
        same_ratio.setdefault(Fraction(width, height), []).append(index)
    groups = [same_ratio[ratio] for ratio in sorted(same_ratio)]  # by ratio, in each by area

    # log w - log h, not log(w / h): it changes only its sign when the picture is laid on its side
    ratios = np.array([math.log(buckets[group[0]][0]) - math.log(buckets[group[0]][1]) for group in groups])
    middles = (ratios[1:] + ratios[:-1]) / 2
    middles += np.where(middles > -_TIE, _TIE, -_TIE)  # so that the side nearer to the square gets the tie
    picture_ratios = log_widths - log_heights
    nearest = np.searchsorted(middles, picture_ratios)
    assignment = np.array([group[0] for group in groups], dtype=np.int64)[nearest]

    for index, group in enumerate(groups):
        if len(group) > 1:
            log_areas = np.log([math.prod(buckets[member]) for member in group])
            pictures = np.flatnonzero(nearest == index)
            middles = (log_areas[1:] + log_areas[:-1]) / 2 + _TIE
            by_area = np.searchsorted(middles, log_widths[pictures] + log_heights[pictures])
            assignment[pictures] = np.array(group)[by_area]

    if max_aspect_error < math.inf:
        assignment[np.abs(picture_ratios - ratios[nearest]) > max_aspect_error + _TIE] = -1
    return assignment


def nearest_bucket(width: float, height: float, buckets: Sequence[Size]) -> Size:
    """The bucket of one picture, as ``assign_buckets`` chooses it; width : height may also be a mere ratio.

    Returns:
        (width, height) of the bucket.

    Raises:
        UserError: a width or height that is not positive, no buckets, a bucket listed twice.
    """
    bucket_width, bucket_height = buckets[assign_buckets([(width, height)], buckets)[0]]
    return int(bucket_width), int(bucket_height)


def length_ratio(width: float, height: float, trained: tuple[float, float] = (1024, 1024)) -> float:
    """How many times longer a canvas is than the trained one: the square root of the ratio of their areas.

    Noise hides the mean of a canvas up to a level that grows with its length, so a canvas of twice the length needs
    twice the sigma_max (NovelAI Diffusion V3, arXiv 2409.15997): this number is the factor.

    Raises:
        UserError: a side that is not a positive number.
    """
    for size in ((width, height), trained):
        _positive_sides([size])
    return math.sqrt(width * height / math.prod(trained))


# ----------------------------------------------------------------------------------------------------------------------
# Checks of the input


def _is_whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _whole_sides(size: Any, name: str) -> Size:
    """(width, height) as two whole numbers of at least 1."""
    try:
        width, height = size
    except (TypeError, ValueError):
        width = height = 0
    if not (_is_whole(width) and _is_whole(height) and width >= 1 and height >= 1):
        raise UserError(f"{name} must be (width, height) in whole pixels, at least 1 x 1, not {size!r}")
    return int(width), int(height)


def _checked_buckets(buckets: Sequence[Size]) -> list[Size]:
    checked = [_whole_sides(bucket, "a bucket") for bucket in buckets]
    if not checked:
        raise UserError("there are no buckets to choose from; give at least one (width, height)")
    if len(set(checked)) < len(checked):
        width, height = max(checked, key=checked.count)
        raise UserError(f"bucket {width} x {height} is listed twice; give each bucket once")
    return checked


def _positive_sides(sizes: np.ndarray | Sequence[tuple[float, float]]) -> np.ndarray:
    """(N, 2) positive finite numbers."""
    sizes = np.asarray(sizes)
    if sizes.size == 0:
        return np.empty((0, 2))
    if sizes.ndim != 2 or sizes.shape[1] != 2 or sizes.dtype.kind not in "iuf":
        raise UserError(f"sizes must be numbers of shape (N, 2), not {sizes.dtype} of shape {sizes.shape}")
    good = (sizes > 0) & np.isfinite(sizes)
    if not good.all():
        index = good.all(axis=1).argmin()
        which = f" (picture {index})" if len(sizes) > 1 else ""
        raise UserError(f"width and height must be positive numbers, not {sizes[index, 0]} x {sizes[index, 1]}{which}")
    return sizes
