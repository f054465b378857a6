"""A figure of curves over sigma, such as what a model predicted at each noise level.

It belongs to no window, so it works without a display and leaves pyplot alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from .palette import COLORS, FAINT, INK, MARKERS
from .sigma_axis import sigma_axis


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
        truths: (value, text) of reference values, drawn as horizontal lines.
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
