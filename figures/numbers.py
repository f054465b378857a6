"""Numbers as a figure shows them: in words, without what is not finite, and within limits."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes


def set_ylim(axes: Axes, values: Iterable[np.ndarray], least: float) -> None:
    """Set the limits of y as ``limits`` gives them."""
    axes.set_ylim(limits(values, least))


def limits(values: Iterable[np.ndarray], least: float) -> tuple[float | None, float | None]:
    """Limits around the finite values that show a span of at least ``least``, so that rounding does not look like a
    finding.
    """
    values = np.concatenate([np.ravel(value) for value in values])
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None, None
    middle, half = (values.max() + values.min()) / 2, max(np.ptp(values), least) / 2
    return middle - 1.1 * half, middle + 1.1 * half


def finite(values: Sequence[float]) -> np.ndarray:
    """Values with NaN for infinity; matplotlib leaves NaN out."""
    values = np.asarray(values, dtype=float)
    return np.where(np.isfinite(values), values, np.nan)


def number(value: float) -> str:
    """A number with four digits, infinity as a word."""
    return "infinity" if math.isinf(value) else f"{value + 0.0:.4g}"
