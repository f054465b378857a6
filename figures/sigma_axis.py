"""The axis of sigma that all figures share, from infinity on the left to the finished picture on the right."""

import math
from collections.abc import Callable, Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import ArrayLike

from .themes import Theme


def sigma_axis(axes: Axes, sigmas: np.ndarray) -> Callable[[float], float]:
    """Set up the axis and return the map sigma -> x: decades in between, infinity and 0 one place beyond their ends."""
    finite = sigmas[np.isfinite(sigmas) & (sigmas > 0)]
    high, low = math.log10(finite.max()), math.log10(finite.min())
    gap = max(0.08 * (high - low), 0.25)
    decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    ticks = {-float(d): f"{10.0**d:g}" for d in decades}
    if np.isinf(sigmas).any():
        ticks[-high - gap] = "∞"
        axes.axvline(-high - gap / 2, color="#d0d0d0", lw=1, ls=":")
    if (sigmas == 0).any():
        ticks[-low + gap] = "picture"
        axes.axvline(-low + gap / 2, color="#d0d0d0", lw=1, ls=":")
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(list(ticks.values()))
    axes.set_xlabel("noise level sigma, from pure noise (left) to the finished picture (right)")

    def position(sigma: float) -> float:
        if math.isinf(sigma):
            return -high - gap
        return -low + gap if sigma == 0 else -math.log10(sigma)

    return position


def sigma_levels(sigmas: ArrayLike, picture: bool = True) -> np.ndarray:
    """Noise levels to draw a curve through: infinity if it is among ``sigmas``, their range, and 0 for the picture."""
    levels = np.asarray(sigmas, dtype=float)
    finite = levels[np.isfinite(levels) & (levels > 0)]
    finite = finite if len(finite) else np.ones(1)
    infinity = [math.inf] if np.isinf(levels).any() else []
    return np.array([*infinity, *np.geomspace(finite.max(), finite.min(), 100), *([0.0] if picture else [])])


def over_sigma(axes: Axes, levels: np.ndarray, look: Theme, wide: bool) -> Callable[[Iterable[float]], np.ndarray]:
    """Set up the axis of a small panel, with only as many ticks as can be read; the map from sigmas to places on it."""
    place = sigma_axis(axes, levels)
    for line in axes.lines:
        line.set_color(look.grid)
    axes.set_xlabel("")
    places = axes.get_xticks()
    labels = dict(zip(places, (label.get_text() for label in axes.get_xticklabels()), strict=True))
    width = place(levels[-1]) - place(levels[0]) or 1.0
    axes.set_xlim(place(levels[0]) - 0.05 * width, place(levels[-1]) + 0.05 * width)
    apart = (0.09 if wide else 0.18) * width
    kept = []
    for tick in sorted(places, key=lambda tick: (labels[tick] not in ("∞", "picture"), tick)):  # the ends come first
        if all(abs(tick - other) >= apart for other in kept):
            kept.append(tick)
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.set_xticklabels([labels[tick] for tick in kept])
    return lambda sigmas: np.array([place(sigma) for sigma in sigmas])


def sigma_label(sigma: float) -> str:
    """A noise level as a tick says it."""
    return {math.inf: "∞", 0.0: "picture"}.get(float(sigma), f"{sigma:.3g}")
