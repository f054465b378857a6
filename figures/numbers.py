"""Numbers as a figure shows them: in words, without what is not finite, and within limits."""

import math
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike


def set_ylim(axes: Axes, values: Iterable[ArrayLike], least: float) -> None:
    """Set the limits of y as ``limits`` gives them."""
    axes.set_ylim(*limits(values, least))


def limits(values: Iterable[ArrayLike], least: float) -> tuple[float | None, float | None]:
    """Limits around the finite values that show a span of at least ``least``, so that rounding does not look like a
    finding.
    """
    flat = np.concatenate([np.ravel(value) for value in values])
    flat = flat[np.isfinite(flat)]
    if len(flat) == 0:
        return None, None
    middle, half = (flat.max() + flat.min()) / 2, max(np.ptp(flat), least) / 2
    return middle - 1.1 * half, middle + 1.1 * half


def finite(values: ArrayLike) -> np.ndarray:
    """Values with NaN for infinity; matplotlib leaves NaN out."""
    array = np.asarray(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def number(value: float) -> str:
    """A number with four digits, infinity as a word."""
    return "infinity" if math.isinf(value) else f"{value + 0.0:.4g}"
