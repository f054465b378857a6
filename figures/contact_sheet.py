"""A contact sheet: pictures in a grid, with labels and captions."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .palette import ALARM, FAINT, INK


def contact_sheet(
    pictures: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[tuple[str, int]],
    captions: Sequence[Sequence[str]],
    alarms: np.ndarray,
    *,
    title: str,
    subtitle: str = "",
    note: str = "",
    smooth: bool = False,
) -> Figure:
    """A grid of pictures with a label for each row and group of columns.

    Args:
        pictures: (R, C, H, W, 3) uint8.
        rows: R labels, lines separated by newlines; the first line is set bold.
        columns: (label, width) of each group of columns; the widths add up to C.
        captions: R x C short texts, set below the pictures.
        alarms: (R, C) bool, captions to set in red.
        smooth: interpolate small pictures, instead of showing their pixels.
    """
    n_rows, n_columns = pictures.shape[:2]
    tile, caption, gap, group_gap = 1.12, 0.22, 0.06, 0.16
    lines = max(label.count("\n") for label, _ in columns)
    left, top, bottom = 2.75, 1.12 + 0.18 * lines, 0.55
    group_of = [g for g, (_, width) in enumerate(columns) for _ in range(width)]
    x = [left + i * (tile + gap) + group_of[i] * group_gap for i in range(n_columns)]
    width = x[-1] + tile + 0.15
    height = top + n_rows * (tile + caption + gap) + bottom
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")

    def text(x: float, y: float, s: str, **kwargs) -> None:
        figure.text(x / width, 1 - y / height, s, **{"color": INK, "va": "center", **kwargs})

    text(0.15, 0.24, title, fontsize=15, weight="bold")
    text(0.15, 0.54, subtitle, fontsize=9.5, color=FAINT)
    for group, (label, _) in enumerate(columns):
        inside = [x[i] for i in range(n_columns) if group_of[i] == group]
        y = top - 0.16 - 0.09 * label.count("\n")
        text((inside[0] + inside[-1] + tile) / 2, y, label, ha="center", fontsize=10.5, weight="bold")
    for r in range(n_rows):
        y = top + r * (tile + caption + gap)
        first, *more = rows[r].split("\n")
        text(left - 0.15, y + tile / 2 - 0.1 * len(more), first, ha="right", fontsize=10.5, weight="bold")
        for i, line in enumerate(more):
            text(
                left - 0.15, y + tile / 2 - 0.1 * len(more) + 0.2 * (i + 1), line, ha="right", fontsize=8.5, color=FAINT
            )
        for c in range(n_columns):
            axes = figure.add_axes((x[c] / width, 1 - (y + tile) / height, tile / width, tile / height))
            axes.imshow(pictures[r, c], interpolation="lanczos" if smooth else "nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="#bdbdbd", linewidth=0.7)
            style = {"color": ALARM, "weight": "bold"} if alarms[r, c] else {"color": FAINT}
            text(x[c] + tile / 2, y + tile + 0.11, captions[r][c], ha="center", fontsize=8, **style)
    text(0.15, height - 0.3, note, fontsize=9, color=FAINT, linespacing=1.4)
    return figure
