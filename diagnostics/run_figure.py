"""The figure of one recorded run, beside what the exact flow would do."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..errors import UserError
from ..figures.numbers import finite, number, set_ylim
from ..figures.palette import MARKERS
from ..figures.rows import Row, heading, headline, legend, panel_title, stack
from ..figures.sigma_axis import over_sigma, sigma_levels
from ..figures.strip import Strip, strip_rows
from ..figures.themes import Theme, theme_of
from .expected import expected_denoised_mean
from .latent_stats import LatentStatistics
from .panels import (
    CANVAS,
    CHANNELS,
    band_style,
    channel_title,
    draw_expected,
    draw_scatter,
    expected_style,
    panel_rows,
    shown_channels,
    sign_styles,
    which_channels,
)
from .sampler_verdict import PULL_LATENT, ChannelFit, fit_pictures

SAMPLES = 8  # drawn at most
TAU = (0.1, 1.0)  # spread of the pictures' averages in latent units, from a prompt that fixes it to one that does not


def run_figure(
    statistics: LatentStatistics,
    picture_mean: np.ndarray | None = None,
    *,
    theme: str = "light",
    strip: Strip | None = None,
) -> Figure:
    """What a ``LatentMeanRecorder`` recorded in one run, beside what the exact flow would do.

    Args:
        picture_mean: (B, C) channel means of the finished latents; None if they are not known.
        theme: "light" or "dark".

    Raises:
        UserError: an unknown theme, a run without steps, or picture means of another shape.
    """
    look = theme_of(theme)
    steps, samples, channels = statistics.denoised_mean.shape
    if steps == 0:
        raise UserError("statistics contain no step: record a run before drawing it")
    if picture_mean is not None:
        picture_mean = np.asarray(picture_mean, dtype=float)
        if picture_mean.shape != (samples, channels):
            raise UserError(f"picture_mean must have the run's shape {(samples, channels)}, not {picture_mean.shape}")
    text = f"Mean of the latents over {steps} steps from sigma {number(statistics.sigmas[0])}"
    problem = statistics.nonfinite()
    rows = [headline(text if problem is None else f"{text}: {problem}", look, alarm=problem is not None)]
    return stack([*rows, *_run_rows(statistics, picture_mean, look), *strip_rows(strip, look)], look)


def _run_rows(statistics: LatentStatistics, picture_mean: np.ndarray | None, look: Theme) -> list[Row]:
    sigmas, means, noise = statistics.sigmas, finite(statistics.denoised_mean), statistics.noise_mean
    start = means[0]
    if picture_mean is not None:
        sigmas, means = np.append(sigmas, 0.0), np.concatenate([means, finite(picture_mean)[None]])
    fits, obstacle = _fit_run(statistics, picture_mean)
    sizes = [fit.slope.value for fit in fits] if fits else np.abs(means[-1] - start).mean(0)
    samples = min(means.shape[1], SAMPLES)
    levels = sigma_levels(sigmas, picture=picture_mean is not None)
    signs = sign_styles(look)
    unsigned: dict[str, Any] = {"color": look.lines[0], "marker": MARKERS[0]}

    def draw(axes: Axes, channel: int, wide: bool) -> None:
        position = over_sigma(axes, levels, look, wide)
        lines = means[:, :samples, channel].T
        seen = [lines]
        if fits and noise is not None:
            span = np.nanmin(noise[:, channel]), np.nanmax(noise[:, channel])
            seen += draw_expected(axes, position, levels, fits[channel].intercept, fits[channel].slope, span, look)
        for i, line in enumerate(lines):
            if not fits:
                band = _open_band(levels, sigmas[0], line[0], line[-1], statistics.canvas)
                axes.fill_between(position(levels), *band, zorder=1, **band_style(look))
            style = unsigned if noise is None else signs[1 if noise[i, channel] > 0 else -1]
            axes.plot(position(sigmas), line, zorder=4, **{**style, "lw": 1.2, "ms": 3.5})
        channel_title(axes, channel, [(sigmas, line) for line in lines], look)
        set_ylim(axes, seen, 10 * PULL_LATENT)

    which = "" if samples == means.shape[1] else f", the first {samples} of {means.shape[1]}"
    note = f"One line per sample{which}{which_channels(sizes, 'move most')}."
    if fits:
        note += " Expected: slope and mean of each channel's fit."
        expected = Line2D([], [], label=CANVAS, **expected_style(look))
    else:
        note += f" No slope is fitted, because {obstacle}. "
        note += f"Expected: to the same end, if averages vary by {TAU[0]:g} to {TAU[1]:g}."
        expected = Patch(label=CANVAS, **band_style(look))
    measured: dict[str, dict[str, Any]] = (
        {"one sample": unsigned} if noise is None else {"noise mean +": signs[1], "noise mean -": signs[-1]}
    )
    handles = [*(Line2D([], [], label=label, **style) for label, style in measured.items()), expected]
    draw_std = partial(_draw_std, statistics=statistics, channels=shown_channels(sizes), look=look)

    def draw_both(axes: Axes, beside: Axes) -> None:
        assert noise is not None  # the fits are of both
        assert picture_mean is not None
        channel = int(np.argmax(np.abs(sizes)))
        fit = fits[channel]
        draw_scatter(
            axes, noise[:, channel], picture_mean[:, channel], {"": (fit.intercept.value, fit.slope.value)}, look
        )
        text = f"Picture on noise, channel {channel + 1}:\nslope {fit.slope}, R² {fit.r_squared:.2f}"
        panel_title(axes, text, look.ink)
        draw_std(beside, wide=False)

    return [
        heading("Mean of the predicted picture over sigma", note, handles, look),
        *panel_rows(shown_channels(sizes), draw),
        Row(2.3, draw_both, columns=2) if fits else Row(1.9, partial(draw_std, wide=True)),
    ]


def _draw_std(axes: Axes, statistics: LatentStatistics, channels: Sequence[int], look: Theme, wide: bool) -> None:
    position = over_sigma(axes, sigma_levels(statistics.sigmas, picture=False), look, wide)
    std = finite(statistics.denoised_std).mean(1)[:, channels]
    handles = [
        axes.plot(position(statistics.sigmas), line, color=color, marker=marker, ms=3.5, label=f"{channel + 1}")[0]
        for channel, line, color, marker in zip(channels, std.T, look.lines, MARKERS, strict=False)
    ]
    set_ylim(axes, [std], 10 * PULL_LATENT)
    panel_title(axes, "std of the prediction, by channel", look.ink, pad=18)
    legend(axes, handles, look, down=-14, ncols=CHANNELS)


def _fit_run(statistics: LatentStatistics, picture_mean: np.ndarray | None) -> tuple[list[ChannelFit], str]:
    """Least-squares lines of the pictures' means on the noises', one per channel; or none, and the reason."""
    noise = statistics.noise_mean
    if noise is None:
        return [], "the noise that the run began with is not known"
    if picture_mean is None:
        return [], "the finished picture is not known"
    good = np.isfinite(noise).all(1) & np.isfinite(picture_mean).all(1)
    noise, picture_mean = noise[good].astype(float), picture_mean[good]
    if len(noise) < 3:
        return [], "that needs 3 samples"
    if np.ptp(noise, axis=0).min() * math.sqrt(statistics.canvas) < 1e-3:
        return [], "all samples began with the same mean of the noise"
    return fit_pictures(noise, picture_mean), ""


def _open_band(levels: np.ndarray, start: float, first: float, last: float, canvas: int) -> np.ndarray:
    """Lowest and highest mean of a sample's prediction on the exact flow from its first one to its picture, (2, n), if
    the averages of the prompt's pictures vary by anything within TAU."""

    def way(tau: float) -> np.ndarray:
        slope = tau * math.sqrt(canvas)
        gone = [expected_denoised_mean(sigma, 0.0, slope, 1 / slope) for sigma in [start, *levels]]
        return (np.array(gone[1:]) - gone[0]) / (1 - gone[0])

    ways = np.stack([first + (last - first) * way(tau) for tau in np.geomspace(*TAU, 7)])
    return np.stack([ways.min(0), ways.max(0)])
