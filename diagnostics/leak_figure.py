"""The figure of the mean-leak test, small enough for a node and complete enough for a report."""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..figures.numbers import finite, limits, number, set_ylim
from ..figures.palette import MARKERS
from ..figures.rows import TEXT, Row, heading, headline, legend, panel_title, stack, text_below
from ..figures.sigma_axis import over_sigma, sigma_levels
from ..figures.strip import Strip, strip_rows
from ..figures.themes import Theme, theme_of
from ..samplers import NoiseSchedule
from .checkpoint_verdict import LEAST_PEAK, TABLE_UP_TO, CheckpointAnswer
from .estimates import CONFIDENCE, Estimate
from .expected import expected_slope
from .guidance_shift import GuidanceAnswer
from .leak_probes import SamplerProbe
from .panels import (
    CANVAS,
    channel_title,
    draw_expected,
    draw_scatter,
    expected_style,
    panel_rows,
    shown_channels,
    sign_styles,
    which_channels,
)
from .sampler_verdict import PULL_LATENT, PULL_LEVELS, SamplerAnswer
from .verdict import LeakReport

WIDEST = 1.0  # spread of the pictures' averages in latent units under a prompt that leaves them open


def leak_figure(report: LeakReport, *, theme: str = "light", strip: Strip | None = None) -> Figure:
    """What the mean-leak test measured, beside what was expected.

    From top to bottom: the verdict; how x0 follows the mean of pure noise over the timesteps; the mean of the
    prediction over sigma, channel by channel; the picture's mean on the noise's; brightness with guidance over that
    without; a strip of pictures.  Rows without data in the report are left out.

    Args:
        theme: "light" or "dark".

    Raises:
        UserError: an unknown theme.
    """
    look = theme_of(theme)
    rows = [headline(report.verdict, look)]
    if report.checkpoint is not None:
        rows += _checkpoint_rows(report, report.checkpoint, look)
    if report.sampler is not None:
        rows += _sampler_rows(report, report.sampler, look)
    if report.guidance is not None:
        rows += _guidance_rows(report.guidance, look)
    return stack([*rows, *strip_rows(strip, look)], look)


# ----------------------------------------------------------------------------------------------------------------------
# The checkpoint


def _checkpoint_rows(report: LeakReport, answer: CheckpointAnswer, look: Theme) -> list[Row]:
    timesteps = np.asarray(answer.timesteps)
    slopes = np.stack([probe.slopes for probe in report.network_probes])  # (K, T, C)
    peak = max(slopes.mean(0), key=np.linalg.norm)
    # weighted so that the slope at t = T over the peak's is the share that the verdict speaks of
    measured = [Estimate.over_seeds(level) for level in (slopes @ peak / max(np.abs(peak).sum(), 1e-12)).T]
    values = np.array([estimate.value for estimate in measured])
    canvas = (report.offset / np.abs(report.network_probes[0].noise_mean).max()) ** 2
    grid = np.linspace(timesteps[0], timesteps[-1], 300)
    expected = {}
    for name, table in _stable_diffusion_tables(answer.timesteps, answer.sigmas).items():
        variance = _fitted_variance(timesteps, values, table, WIDEST**2 * canvas)
        expected[name] = np.array([expected_slope(table.sigma(t), variance) for t in grid])

    styles = {
        "zero SNR": {"color": look.lines[2], "ls": "-", "lw": 2.2},
        "plain": {"color": look.lines[1], "ls": (0, (4, 2)), "lw": 2.2},
    }
    points = {"color": look.ink, "marker": MARKERS[0], "ms": 5, "ls": "none"}

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=look.faint, lw=0.8)
        axes.axvline(timesteps[-1], color=look.faint, lw=1, ls=":")
        for name, curve in expected.items():
            axes.plot(grid, curve, **styles[name])
        errors = [estimate.error for estimate in measured]
        axes.errorbar(timesteps, values, finite(errors), capsize=3, elinewidth=1.2, **points)
        set_ylim(axes, [values, *expected.values(), [0.0]], LEAST_PEAK)
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.16 * (high - low), high)
        axes.annotate(
            "must be 0 here", (timesteps[-1], 0), (-5, -5), textcoords="offset points", ha="right", va="top",
            fontsize=TEXT, color=look.ink,
        )  # fmt: skip
        ticks = np.linspace(timesteps[0], timesteps[-1], 6)[:-1].round(-1)
        axes.set_xticks([*ticks, timesteps[-1]], [*(f"{t:.0f}" for t in ticks), "T"])
        axes.set_xlabel("timestep", fontsize=TEXT, color=look.ink, labelpad=1)

    how = " Channels averaged, weighted by their slopes at the peak." if slopes.shape[2] > 1 else ""
    handles = [
        Line2D([], [], label="measured", **points),
        *(Line2D([], [], label=f"expected, {name}", **styles[name]) for name in expected),
    ]
    title = "Checkpoint: slope of x0 on the mean of pure noise"
    return [heading(title, f"{CONFIDENCE:.0%} intervals.{how}", handles, look), Row(2.2, draw)]


def _stable_diffusion_tables(timesteps: Sequence[float], sigmas: Sequence[float]) -> dict[str, NoiseSchedule]:
    """The zero-SNR and the plain table, if the file's levels are those of one of them."""
    tables = {"zero SNR": NoiseSchedule.sdxl(), "plain": NoiseSchedule.sdxl(zero_terminal_snr=False)}
    known = any(
        t.last_timestep == timesteps[-1] and np.allclose([t.sigma(at) for at in timesteps], sigmas, rtol=1e-3)
        for t in tables.values()
    )
    return tables if known else {}


def _fitted_variance(timesteps: np.ndarray, slopes: np.ndarray, table: NoiseSchedule, most: float) -> float:
    """V of the Gaussian canvas that follows the noise like the network does where all tables are alike."""
    from scipy.optimize import OptimizeResult, minimize_scalar

    asked = timesteps <= TABLE_UP_TO * timesteps[-1]
    sigmas = [table.sigma(t) for t in timesteps[asked]]

    def squares(log_variance: float) -> float:
        expected = [expected_slope(sigma, math.exp(log_variance)) for sigma in sigmas]
        return float(((slopes[asked] - expected) ** 2).sum())

    best = minimize_scalar(squares, bounds=(math.log(1e-2), math.log(most)), method="bounded")
    return math.exp(cast(OptimizeResult, best).x)


# ----------------------------------------------------------------------------------------------------------------------
# The sampler


def _sampler_rows(report: LeakReport, answer: SamplerAnswer, look: Theme) -> list[Row]:
    probes, compared = report.sampler_probes, report.reference_probes is not None
    lines = [fit.expected for fit in answer.channels]
    sizes = [slope.value for _, slope in lines]
    levels = sigma_levels(np.concatenate([probe.sigmas for probe in [*probes, *(report.reference_probes or [])]]))
    styles = sign_styles(look)

    def draw(axes: Axes, channel: int, wide: bool) -> None:
        position = over_sigma(axes, levels, look, wide)
        noise = np.concatenate([probe.noise_mean[:, channel] for probe in probes])
        seen, measured = [], []
        for sign, style in styles.items():
            offset = noise[noise * sign > 0].mean()
            seen += draw_expected(axes, position, levels, *lines[channel], [offset], look)
            paths = _paths(probes, channel, sign)
            for sigmas, values in paths:
                axes.plot(position(sigmas), values, zorder=4, **style)
            measured += paths
        channel_title(axes, channel, measured, look)
        set_ylim(axes, [*seen, *(values for _, values in measured)], 10 * PULL_LATENT)

    handles = [
        Line2D([], [], label="noise mean +", **styles[1]),
        Line2D([], [], label="noise mean -", **styles[-1]),
        Line2D([], [], label=CANVAS, **expected_style(look)),
    ]
    source = "the exact flow" if compared else "this sampler itself"
    note = f"Over sigma{which_channels(sizes)}. Expected: slope and mean of {source}, no leak."
    return [
        heading("Sampler: mean of the predicted picture", note, handles, look),
        *panel_rows(shown_channels(sizes), draw),
        _scatter_row(report, answer, int(np.argmax(np.abs(sizes))), look),
    ]


def _paths(probes: Sequence[SamplerProbe], channel: int, sign: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sigmas and means of the predictions from the noises of one sign, up to the picture: averaged over the seeds, or
    each by itself where an adaptive solver took another way with each."""
    paths = [
        (np.append(probe.sigmas, 0.0), np.append(probe.denoised_mean[:, i, channel], probe.picture_mean[i, channel]))
        for probe in probes
        for i in (0, 1)
        if sign * probe.noise_mean[i, channel] > 0
    ]
    first = paths[0][0]
    if all(np.array_equal(sigmas, first) for sigmas, _ in paths):
        return [(first, finite(np.mean([values for _, values in paths], axis=0)))]
    return [(sigmas, finite(values)) for sigmas, values in paths]


def _scatter_row(report: LeakReport, answer: SamplerAnswer, channel: int, look: Theme) -> Row:
    fit = answer.channels[channel]
    noise = np.concatenate([probe.noise_mean[:, channel] for probe in report.sampler_probes])
    picture = np.concatenate([probe.picture_mean[:, channel] for probe in report.sampler_probes])
    lines = {f"this sampler: {fit.slope}": (fit.intercept.value, fit.slope.value)}
    if fit.reference_slope is not None:
        intercept, slope = fit.expected
        lines[f"exact flow: {slope}"] = (intercept.value, slope.value)
    spread = f"spread of brightness:\n{answer.spread:.3g} {answer.unit}"
    if answer.reference_spread is not None:
        spread += f"\n(exact flow {answer.reference_spread:.3g})"
    pull = "" if answer.pull is None else f"pull toward grey:\n{answer.pull} {answer.unit}\n\n"

    def draw(axes: Axes, beside: Axes) -> None:
        drawn = draw_scatter(axes, noise, picture, lines, look)
        panel_title(axes, f"Picture on noise, channel {channel + 1}, R² {fit.r_squared:.2f}", look.ink)
        beside.set_axis_off()
        text_below(beside, "slope", 0, fontsize=TEXT, color=look.ink)
        legend(beside, drawn, look, down=14)
        text_below(beside, pull + spread, 54, fontsize=TEXT, color=look.ink)

    return Row(2.15, draw, columns=2)


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


def _guidance_rows(answer: GuidanceAnswer, look: Theme) -> list[Row]:
    alone = finite(np.ravel(answer.unguided))
    kinds = [
        (shift, alone + finite(np.ravel(shift.changes)), {**style, "ls": "none"})
        for shift, style in zip(answer.shifts, sign_styles(look).values(), strict=False)
    ]
    levels = answer.unit == "levels of 255"
    what, least = ("brightness", 10 * PULL_LEVELS) if levels else ("mean of channel 1", 10 * PULL_LATENT)
    beside_it = [
        _in_words(shift.guidance, shift.clipped, f"moves by {shift.mean}", f"rms {shift.rms}") for shift, *_ in kinds
    ]
    beside_it += [_in_words("the prompt alone", answer.unguided_clipped, f"spread {answer.unguided_spread:.3g}")]

    def draw(axes: Axes, beside: Axes) -> None:
        axes.set_xlim(*limits([alone], least))
        axes.plot(axes.get_xlim(), axes.get_xlim(), zorder=3, **expected_style(look))
        for _, guided, style in kinds:
            axes.vlines(alone, alone, guided, color=style["color"], lw=0.8, alpha=0.5, zorder=2)
            axes.plot(alone, guided, zorder=6, **style)
        axes.set_ylim(*limits([axes.get_xlim(), *(guided for _, guided, _ in kinds)], least))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.set_xlabel(f"{what}, the prompt alone", fontsize=TEXT, color=look.ink, labelpad=1)
        panel_title(axes, f"{what}, with guidance", look.ink)
        beside.set_axis_off()
        text_below(beside, "\n\n".join(beside_it), 0, fontsize=TEXT, color=look.ink)

    handles = [Line2D([], [], label=shift.guidance, **style) for shift, _, style in kinds]
    handles += [Line2D([], [], label="not moved", **expected_style(look))]
    note = (
        f"One point per noise: the exact flow with guidance over that of the prompt alone, in {answer.unit}. "
        f"{CONFIDENCE:.0%} intervals."
    )
    return [heading("Guidance: brightness from the same noise", note, handles, look), Row(2.6, draw, columns=2)]


def _in_words(title: str, clipped: float | None, *values: str) -> str:
    return "\n".join([f"{title}:", *values, *([] if clipped is None else [f"{clipped:.0%} of the pixels clipped"])])
