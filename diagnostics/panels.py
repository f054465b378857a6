"""Panels that the figures of the mean-leak test and of a run share: channels over sigma, pictures on noise."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..figures.numbers import finite, number, set_ylim
from ..figures.palette import MARKERS
from ..figures.rows import TEXT, Row, panel_title
from ..figures.sigma_axis import sigma_label
from ..figures.themes import Theme
from .estimates import Estimate
from .expected import expected_denoised_mean
from .sampler_verdict import PULL_LATENT

CHANNELS = 4  # drawn at most
CANVAS = "expected, Gaussian canvas"


def sign_styles(look: Theme) -> dict[int, dict[str, Any]]:
    """Styles of measured lines, by the sign of their noise mean."""
    return {
        1: {"color": look.lines[0], "marker": MARKERS[0], "ms": 5, "lw": 1.6},
        -1: {"color": look.lines[1], "marker": MARKERS[1], "ms": 4.5, "lw": 1.6, "ls": (0, (5, 1.5))},
    }


def expected_style(look: Theme) -> dict[str, Any]:
    """Style of expected lines."""
    return {"color": look.ink, "lw": 1.3, "ls": (0, (1.5, 1.5))}


def band_style(look: Theme) -> dict[str, Any]:
    """Style of the band around expected lines."""
    return {"color": look.faint, "alpha": 0.3, "lw": 0}


def shown_channels(sizes: Sequence[float]) -> list[int]:
    """The channels to draw: those with the largest sizes, in order."""
    return sorted(np.argsort(-np.abs(np.nan_to_num(sizes)), kind="stable")[:CHANNELS].tolist())


def which_channels(sizes: Sequence[float], how: str = "follow the noise most") -> str:
    """Which channels are drawn, for a sentence; empty if all are."""
    return f", the {CHANNELS} of {len(sizes)} channels that {how}" if len(sizes) > CHANNELS else ""


def panel_rows(channels: Sequence[int], draw: Callable[..., None]) -> list[Row]:
    """One panel per channel, two in a row; an odd one has the last row to itself."""

    def pair(*axes: Axes, channels: Sequence[int]) -> None:
        for panel, channel in zip(axes, channels, strict=True):
            draw(panel, channel, wide=len(axes) == 1)

    pairs = [channels[i : i + 2] for i in range(0, len(channels), 2)]
    return [Row(1.55, partial(pair, channels=pair_of), columns=len(pair_of)) for pair_of in pairs]


def channel_title(axes: Axes, channel: int, paths: Sequence[tuple[np.ndarray, np.ndarray]], look: Theme) -> None:
    """Set a panel's title: the channel, and the first sigma at which a value is NaN or infinite."""
    broken = [sigmas[~np.isfinite(values)] for sigmas, values in paths]
    first = max((sigmas[0] for sigmas in broken if len(sigmas)), default=None)
    text = f"channel {channel + 1}"
    if first is None:
        panel_title(axes, text, look.ink)
    else:
        panel_title(axes, f"{text}: not finite from {sigma_label(first)}", look.alarm)


def draw_expected(
    axes: Axes,
    position: Callable[[Iterable[float]], np.ndarray],
    levels: np.ndarray,
    mean: Estimate,
    slope: Estimate,
    noise_means: Sequence[float],
    look: Theme,
) -> list[np.ndarray]:
    """Draw the exact flow that carries a noise mean n to mean + slope n.

    A line for each noise mean, and a band of all that lie within the intervals of mean and slope.  Returns the lines.
    """

    def flow(mean: float, slope: float, noise_mean: float) -> np.ndarray:
        toward = math.copysign(1.0, slope) * noise_mean
        return np.array([expected_denoised_mean(sigma, mean, abs(slope), toward) for sigma in levels])

    lines = [flow(mean.value, slope.value, noise_mean) for noise_mean in noise_means]
    # the flow's mean grows with either, so the corners bound it
    corners = [flow(m, k, n) for m in (mean.low, mean.high) for k in (slope.low, slope.high) for n in noise_means]
    axes.fill_between(position(levels), np.min(corners, 0), np.max(corners, 0), zorder=1, **band_style(look))
    for line in lines:
        axes.plot(position(levels), line, zorder=5, **expected_style(look))
    return lines


def draw_scatter(
    axes: Axes, noise: np.ndarray, picture: np.ndarray, lines: Mapping[str, tuple[float, float]], look: Theme
) -> list[Line2D]:
    """Draw the pictures' means over the noises', and up to two lines {label: (intercept, slope)}, which it returns."""
    for sign, style in sign_styles(look).items():
        chosen = noise * sign > 0
        axes.plot(noise[chosen], finite(picture[chosen]), zorder=6, **{**style, "ls": "none"})
    ends = np.array([np.nanmin(noise), np.nanmax(noise)])
    styles = {"color": look.ink, "lw": 1.6}, expected_style(look)
    drawn = [
        axes.plot(ends, intercept + slope * ends, label=label, zorder=4, **style)[0]
        for (label, (intercept, slope)), style in zip(lines.items(), styles, strict=False)
    ]
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.set_xlabel("mean of the noise", fontsize=TEXT, color=look.ink, labelpad=1)
    set_ylim(axes, [picture, *(line.get_ydata() for line in drawn)], 10 * PULL_LATENT)
    return drawn
