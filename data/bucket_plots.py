"""A figure of a bucketing: the number of pictures in each bucket, and pictures and buckets by width and height."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, PercentFormatter

from ..canvas import Size
from ..figures.palette import ALARM, COLORS, FAINT, INK
from .bucketing import NO_WEIGHT, REASONS, TOO_FEW, TOO_LONG, TOO_SMALL, WOULD_GROW, Bucketing

MOST_POINTS = 3000  # left-out pictures drawn for each reason
HEXAGONS = 18  # per doubling of the width
PICTURES = LinearSegmentedColormap.from_list("pictures", ["#cccccc", "#888888", "#111111"])
SETS = (COLORS[0], COLORS[1], COLORS[3], COLORS[5])  # of buckets
LEFT_OUT = {NO_WEIGHT: FAINT, TOO_SMALL: ALARM, TOO_LONG: COLORS[4], WOULD_GROW: COLORS[2], TOO_FEW: INK}


def plot_buckets(bucketing: Bucketing, bucket_sets: Sequence[Sequence[Size]]) -> Figure:
    """Draw bars of the buckets from the tallest to the widest, above a plane of widths and heights.

    Args:
        bucketing: bucketing in which at least one picture has a bucket.
        bucket_sets: the sets it was made with; each gets its own colour.
    """
    figure = Figure(figsize=(11, 13), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 2))
    taken = bucketing.assignment >= 0
    above.set_title(
        f"{taken.sum()} pictures in {len(bucketing.buckets)} buckets, {(~taken).sum()} left out",
        fontsize=14, weight="bold", color=INK, loc="left", pad=28,
    )  # fmt: skip
    error, loss, scale = (of_all[taken] for of_all in (bucketing.aspect_error, bucketing.crop_loss, bucketing.scale))
    above.annotate(
        f"mean aspect error {error.mean():.3f}; {loss.mean():.1%} of a picture is cut off; {np.mean(scale > 1):.1%} of "
        "the pictures are enlarged",
        (0, 1), (0, 12), xycoords="axes fraction", textcoords="offset points", color=FAINT, fontsize=10,
    )  # fmt: skip
    colors = [
        SETS[next(i for i, bucket_set in enumerate(bucket_sets) if bucket in bucket_set) % len(SETS)]
        for bucket in bucketing.buckets
    ]
    draw_bars(above, bucketing, colors)
    draw_plane(below, bucketing, colors)
    return figure


def draw_bars(axes: Axes, bucketing: Bucketing, colors: Sequence[str]) -> None:
    """Draw the share of the pictures in each bucket; of buckets with one aspect ratio, smaller ones come first."""
    counts = np.bincount(bucketing.assignment[bucketing.assignment >= 0], minlength=len(bucketing.buckets))
    order = sorted(range(len(counts)), key=lambda b: (bucketing.buckets[b][0] / bucketing.buckets[b][1], b))
    shares = counts[order] / counts.sum()
    axes.bar(range(len(order)), shares, color=[colors[b] for b in order], width=0.8)
    for place, (number, share) in enumerate(zip(order, shares, strict=True)):
        axes.annotate(f"{counts[number]}", (place, share), (0, 3), textcoords="offset points", ha="center", va="bottom",
                      rotation=90, fontsize=7.5, color=INK if counts[number] else "#aaaaaa")  # fmt: skip
    labels = [f"{width} x {height}" for width, height in (bucketing.buckets[b] for b in order)]
    axes.set_xticks(range(len(order)), labels, rotation=90, fontsize=7.5)
    axes.set_xlim(-0.7, len(order) - 0.3)
    axes.set_ylim(0, shares.max() * 1.22)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("share of the pictures")
    axes.set_xlabel("bucket, from the tallest to the widest")
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_plane(axes: Axes, bucketing: Bucketing, colors: Sequence[str]) -> None:
    """Draw pictures and buckets on logarithmic axes of equal scale: one aspect ratio is a diagonal."""
    logs, buckets = np.log2(bucketing.sizes), np.log2(bucketing.buckets)
    everything = np.concatenate([logs, buckets])
    low, high = everything.min(axis=0) - 0.15, everything.max(axis=0) + 0.15
    cells = np.ceil(HEXAGONS * (high - low) / (1, math.sqrt(3))).astype(int)  # hexagons of equal sides
    box = (low[0], high[0], low[1], high[1])
    hexagons = axes.hexbin(*logs[bucketing.assignment >= 0].T, gridsize=tuple(cells), extent=box, mincnt=1,
                           norm=LogNorm(), cmap=PICTURES, linewidths=0.1)  # fmt: skip
    counts = hexagons.get_array()
    assert counts is not None  # hexbin has set them
    hexagons.set_clim(1, max(10, counts.max()))
    scale = axes.figure.colorbar(hexagons, ax=axes, label="pictures with a bucket", shrink=0.5, pad=0.01)
    scale.ax.yaxis.set(major_formatter="{x:g}", minor_formatter=NullFormatter())
    for reason, color in LEFT_OUT.items():
        pictures = np.flatnonzero(bucketing.reason == reason)
        drawn = np.random.default_rng(0).permutation(pictures)[:MOST_POINTS]
        if len(drawn):
            some = f", {len(drawn)} of them drawn" if len(drawn) < len(pictures) else ""
            label = f"{len(pictures)} left out: {REASONS[reason]}{some}"
            axes.plot(*logs[drawn].T, "x", color=color, ms=4, mew=0.8, label=label)
    for i, color in enumerate(dict.fromkeys(colors)):
        members = [bucket for bucket, its_color in zip(buckets, colors, strict=True) if its_color == color]
        axes.plot(*np.array(members).T, "s", mfc="none", mec="white", ms=6.5, mew=3)
        axes.plot(*np.array(members).T, "s", mfc="none", mec=color, ms=6.5, mew=1.5, label=None if i else "buckets")

    for ratio, name in ((0.25, "1:4"), (0.5, "1:2"), (2 / 3, "2:3"), (1, "1:1"), (1.5, "3:2"), (2, "2:1"), (4, "4:1")):
        axes.axline((0, -math.log2(ratio)), slope=1, color="#bdbdbd", lw=0.8, ls=(0, (4, 3)), zorder=0)
        end = min(high[0], high[1] + math.log2(ratio))
        if end > low[0] and end - math.log2(ratio) > low[1]:
            axes.annotate(name, (end, end - math.log2(ratio)), (2, 2), textcoords="offset points", fontsize=8,
                          color=FAINT, annotation_clip=False)  # fmt: skip
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal", xlabel="width", ylabel="height")
    for axis, start, end in zip((axes.xaxis, axes.yaxis), low, high, strict=True):
        powers = range(math.ceil(start), math.floor(end) + 1)
        axis.set_major_locator(FixedLocator(list(powers)))
        axis.set_minor_locator(NullLocator())
        axis.set_ticklabels([str(2**power) for power in powers])
    axes.figure.legend(loc="outside lower center", fontsize=9, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
