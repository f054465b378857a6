"""Figures: what a sampler's model believed at each noise level, and what came out.

They return matplotlib figures that belong to no window, so they work without a display and leave pyplot alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from .palette import COLORS, FAINT, INK, MARKERS


@dataclass(frozen=True)
class Curve:
    """A quantity over the noise levels of one run.

    Attributes:
        label: curves of one label share a colour and one entry of the legend.
        sigmas: (n,) decreasing; the first may be inf, the last 0, which stands for the finished picture.
        values: (n,)
    """

    label: str
    sigmas: Sequence[float]
    values: Sequence[float]


def plot_over_sigma(
    curves: Sequence[Curve],
    *,
    title: str,
    ylabel: str,
    subtitle: str = "",
    ylim: tuple[float, float] | None = None,
    truths: Sequence[tuple[float, str]] = (),
) -> Figure:
    """Curves over a logarithmic axis of sigma that runs from infinity on the left to the finished picture on the right.

    Args:
        truths: (value, text) of values to compare with, drawn as horizontal lines.
    """
    figure = Figure(figsize=(10, 5.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    position = sigma_axis(axes, np.concatenate([np.asarray(curve.sigmas, dtype=float) for curve in curves]))
    for value, text in truths:
        axes.axhline(value, color=FAINT, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.annotate(text, (1, value), (-6, 5), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", va="bottom", fontsize=9, color=INK)  # fmt: skip
    labels = list(dict.fromkeys(curve.label for curve in curves))
    for curve in curves:
        i = labels.index(curve.label)
        axes.plot(
            [position(sigma) for sigma in curve.sigmas],
            curve.values,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            # earlier curves are larger, so that those which coincide stay visible around later ones
            ms=max(8 - i, 4),
            lw=max(3.5 - 0.6 * i, 1.2),
            label=curve.label if curve is next(c for c in curves if c.label == curve.label) else None,
            zorder=3 + i,
        )
    axes.set_ylabel(ylabel)
    if ylim:
        axes.set_ylim(ylim)
    axes.set_title(title, fontsize=13, weight="bold", color=INK, loc="left", pad=26)
    axes.annotate(
        subtitle, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", color=FAINT, fontsize=9.5
    )
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    return figure


def sigma_axis(axes: Axes, sigmas: np.ndarray):
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
