"""Figures of the mean-leak test and of a recorded run, small enough for a node and complete enough for a report.

Like those of ``plots`` they belong to no window and leave pyplot alone.  They are 900 pixels wide; at the 400 of a node
their smallest text is still 8 pixels high.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from ..errors import UserError
from ..figures.contact_sheet import contact_sheet
from ..figures.curves import sigma_axis
from ..figures.palette import ALARM, COLORS, INK, MARKERS
from ..samplers import NoiseSchedule
from .estimates import CONFIDENCE, Estimate
from .guidance_shift import GuidanceAnswer
from .latent_stats import LatentStatistics
from .leak import (
    LEAST_PEAK,
    PULL_LATENT,
    PULL_LEVELS,
    TABLE_UP_TO,
    ChannelFit,
    LeakReport,
    expected_denoised_mean,
    expected_slope,
    fit_pictures,
)
from .leak_probes import SamplerProbe

WIDTH, DPI = 6, 150  # inches, and 900 pixels
TEXT, HEADING = 9, 10.5  # points; 9 are 8 pixels where the figure is shown 400 wide
CHANNELS = 4  # drawn at most
SAMPLES = 8  # drawn at most
STRIP = 6  # pictures in a row
CANVAS = "expected, Gaussian canvas"
TAU = (0.1, 1.0)  # spread of the pictures' averages in latent units, from a prompt that fixes it to one that does not


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; the four of lines are Okabe and Ito's that stand out from the paper."""

    paper: str
    ink: str
    faint: str
    grid: str
    alarm: str
    lines: tuple[str, str, str, str]


THEMES = {
    "light": Theme("#ffffff", INK, "#666666", "#e6e6e6", ALARM, (COLORS[0], COLORS[3], COLORS[1], COLORS[4])),
    "dark": Theme("#353535", "#eeeeee", "#bdbdbd", "#505050", "#ffb4ab", (COLORS[5], COLORS[2], COLORS[1], COLORS[4])),
}


@dataclass(frozen=True, eq=False)
class Strip:
    """The denoised prediction on its way, as pictures.

    Attributes:
        pictures: (n, H, W, 3) uint8.
        sigmas: (n,) where they were predicted, inf allowed; 0 stands for the finished picture.
    """

    pictures: np.ndarray
    sigmas: Sequence[float]

    def __post_init__(self):
        shape, kind = np.shape(self.pictures), np.asarray(self.pictures).dtype
        if len(shape) != 4 or shape[-1] != 3 or 0 in shape or kind != np.uint8 or len(self.sigmas) != shape[0]:
            raise UserError(
                f"a strip needs pictures (n, height, width, 3) of type uint8 and n sigmas, not {shape} of type {kind} "
                f"and {len(self.sigmas)} sigmas"
            )


def leak_figure(report: LeakReport, *, theme: str = "light", strip: Strip | None = None) -> Figure:
    """What the mean-leak test measured, beside what was expected.

    From top to bottom: the verdict; how x0 follows the mean of pure noise over the timesteps; the mean of the
    prediction over sigma, channel by channel; the picture's mean on the noise's; brightness with guidance over that
    without; a strip of pictures.  What the report leaves out is left out.

    Args:
        theme: "light" or "dark".

    Raises:
        UserError: an unknown theme.
    """
    look = _theme(theme)
    rows = [_headline(report.verdict, look)]
    if report.checkpoint is not None:
        rows += _checkpoint_rows(report, look)
    if report.sampler is not None:
        rows += _sampler_rows(report, look)
    if report.guidance is not None:
        rows += _guidance_rows(report.guidance, look)
    return _stack([*rows, *_strip_rows(strip, look)], look)


def run_figure(
    statistics: LatentStatistics,
    picture_mean: np.ndarray | None = None,
    *,
    theme: str = "light",
    strip: Strip | None = None,
) -> Figure:
    """What a ``LatentMeanRecorder`` saw in one run, beside what the exact flow would do.

    Args:
        picture_mean: (B, C) channel means of the finished latents; None if they are not known.
        theme: "light" or "dark".

    Raises:
        UserError: an unknown theme, a run without steps, picture means of another batch.
    """
    look = _theme(theme)
    steps, samples, channels = statistics.denoised_mean.shape
    if steps == 0:
        raise UserError("the recorder saw no step, so there is nothing to draw")
    if picture_mean is not None:
        picture_mean = np.asarray(picture_mean, dtype=float)
        if picture_mean.shape != (samples, channels):
            raise UserError(f"picture means of shape {picture_mean.shape} for a run of shape {(samples, channels)}")
    text = f"Mean of the latents over {steps} steps from sigma {_number(statistics.sigmas[0])}"
    problem = statistics.nonfinite()
    rows = [_headline(text if problem is None else f"{text}: {problem}", look, alarm=problem is not None)]
    return _stack([*rows, *_run_rows(statistics, picture_mean, look), *_strip_rows(strip, look)], look)


def start_sheet(
    pictures: np.ndarray, starts: Sequence[str], brightness: np.ndarray, prompt: str, seeds: Sequence[int]
) -> Figure:
    """The same prompt and noise from several starts, one in a row, with the brightness under each picture.

    Args:
        pictures: (S, K, H, W, 3) uint8; the first row is what the others are compared with, exact infinity.
        starts: S labels; lines separated by newlines.
        brightness: (S, K) 0 to 255.
        seeds: K of them.

    Raises:
        UserError: shapes that do not fit together.
    """
    brightness = np.asarray(brightness, dtype=float)
    _check_sheet(pictures, "starts", starts, brightness, seeds)
    captions = [[f"{value:.1f}" for value in row] for row in brightness]
    alarms = ~(np.abs(brightness - brightness[0]) <= PULL_LEVELS)  # NaN is one too
    note = (
        "Below each picture its brightness, 0 to 255; red: more than "
        f"{PULL_LEVELS:g} level from the first row's picture of the same noise."
    )
    return _sheet("Where sampling starts", pictures, starts, captions, alarms, prompt, seeds, note)


def guidance_sheet(
    pictures: np.ndarray, guidances: Sequence[str], brightness: np.ndarray, prompt: str, seeds: Sequence[int]
) -> Figure:
    """The same prompt and noise under several kinds of guidance, with the brightness and its change below.

    Args:
        pictures: (G, K, H, W, 3) uint8; the first row is what the others are compared with, no guidance.
        guidances: G names.
        brightness: (G, K) 0 to 255.
        seeds: K of them.

    Raises:
        UserError: shapes that do not fit together.
    """
    brightness = np.asarray(brightness, dtype=float)
    _check_sheet(pictures, "kinds of guidance", guidances, brightness, seeds)
    alone, *guided = brightness
    captions = [[f"{value:.1f}" for value in alone]]
    captions += [[f"{value:.1f} ({value - was:+.1f})" for value, was in zip(row, alone, strict=True)] for row in guided]
    labels = ["\n".join(textwrap.wrap(name, 22)) for name in guidances]
    note = "Below each picture its brightness, 0 to 255, and how far guidance moved it."
    alarms = np.zeros(brightness.shape, dtype=bool)
    return _sheet("With and without guidance", pictures, labels, captions, alarms, prompt, seeds, note)


def _check_sheet(
    pictures: np.ndarray, what: str, rows: Sequence[str], brightness: np.ndarray, seeds: Sequence[int]
) -> None:
    grid = (len(rows), len(seeds))
    if 0 in grid or pictures.shape[:2] != grid or brightness.shape != grid:
        raise UserError(
            f"{grid[0]} {what} and {grid[1]} seeds, but pictures {pictures.shape} and brightness {brightness.shape}"
        )


def _sheet(
    title: str,
    pictures: np.ndarray,
    rows: Sequence[str],
    captions: Sequence[Sequence[str]],
    alarms: np.ndarray,
    prompt: str,
    seeds: Sequence[int],
    note: str,
) -> Figure:
    """One prompt's pictures, a seed in each column."""
    line = 46 + 17 * (len(seeds) - 1)  # characters that fit beside each other
    prompt = f"prompt: {prompt}" if prompt.strip() else "the empty prompt"
    return contact_sheet(
        pictures,
        rows,
        [(f"seed {seed}", 1) for seed in seeds],
        captions,
        alarms,
        title=title,
        subtitle=textwrap.shorten(prompt, line, placeholder=" …"),
        note=_wrapped(note, line),
    )


def to_image(figure: Figure) -> np.ndarray:
    """(H, W, 3) uint8, drawn without pyplot."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ----------------------------------------------------------------------------------------------------------------------
# Rows, one below the other


@dataclass(frozen=True)
class Row:
    """A row of one or two axes: how high they are, in inches with their labels, and what draws them."""

    height: float
    draw: Callable[..., None]
    columns: int = 1


def _stack(rows: Sequence[Row], look: Theme) -> Figure:
    figure = Figure((WIDTH, sum(row.height for row in rows)), dpi=DPI, facecolor=look.paper, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, hspace=0, wspace=0.02)
    grid = figure.add_gridspec(len(rows), 2, height_ratios=[row.height for row in rows])
    for i, row in enumerate(rows):
        places = [grid[i, :]] if row.columns == 1 else [grid[i, 0], grid[i, 1]]
        row.draw(*(_styled(figure.add_subplot(place), look) for place in places))
    return figure


def _styled(axes: Axes, look: Theme) -> Axes:
    axes.set_facecolor(look.paper)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set(color=look.faint, linewidth=0.8)
    axes.tick_params(colors=look.faint, labelsize=TEXT, labelcolor=look.ink, length=3)
    axes.grid(axis="y", color=look.grid, lw=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    return axes


def _headline(sentence: str, look: Theme, alarm: bool = False) -> Row:
    """What is said in bold, and its evidence, which follows a colon, below."""
    claim, _, evidence = sentence.partition(": ")
    claim, evidence = _wrapped(claim[0].upper() + claim[1:], 54), _wrapped(evidence, 74)
    below = 15 * (1 + claim.count("\n")) + 3
    height = below + (13 * (1 + evidence.count("\n")) if evidence else 0)

    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        _text_below(axes, claim, 0, fontsize=11.5, weight="bold", color=look.ink)
        _text_below(axes, evidence, below, fontsize=9.5, color=look.alarm if alarm else look.ink)

    return Row(height / 72 + 0.1, draw)


def _heading(title: str, note: str, handles: Sequence, look: Theme) -> Row:
    """What the next rows show, in words and with their legend."""
    note = _wrapped(note, 74)
    below = 18 + (11.5 * (note.count("\n") + 1) + 4 if note else 0)

    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        _text_below(axes, title, 0, fontsize=HEADING, weight="bold", color=look.ink)
        _text_below(axes, note, 18, fontsize=TEXT, color=look.faint)
        if handles:
            _legend(axes, handles, look, down=below, ncols=3)

    return Row((below + (14 if handles else 0)) / 72, draw)


def _wrapped(text: str, characters: int) -> str:
    return textwrap.fill(text, characters, break_on_hyphens=False)


def _text_below(axes: Axes, text: str, down: float, **style) -> None:
    """Text that begins at the left, ``down`` points below the top of the axes."""
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "linespacing": 1.2}
    axes.annotate(text, (0, 1), (0, -down), **place, **style)


def _legend(axes: Axes, handles: Sequence, look: Theme, down: float, ncols: int = 1) -> None:
    """A legend that begins at the left, ``down`` points below the top of the axes."""
    place = axes.transAxes + ScaledTranslation(0, -down / 72, axes.get_figure().dpi_scale_trans)
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 1), bbox_transform=place, ncols=ncols, frameon=False,
        fontsize=TEXT, labelcolor=look.ink, borderaxespad=0, borderpad=0, handlelength=2.2, handletextpad=0.5,
        columnspacing=1.3,
    )  # fmt: skip


def _strip_rows(strip: Strip | None, look: Theme) -> list[Row]:
    if strip is None:
        return []
    height, width = strip.pictures.shape[1:3]
    columns = min(len(strip.pictures), STRIP)
    tile = min((WIDTH - 0.6) / columns * height / width, 1.7)

    def draw(axes: Axes, first: int) -> None:
        pictures, sigmas = strip.pictures[first : first + STRIP], strip.sigmas[first : first + STRIP]
        for i, picture in enumerate(pictures):
            axes.imshow(picture, extent=(1.05 * width * i, 1.05 * width * i + width, height, 0))
        axes.set(xlim=(0, 1.05 * width * columns), ylim=(height, 0), anchor="NW", yticks=[])
        axes.set_xticks(width * (0.5 + 1.05 * np.arange(len(pictures))), [_sigma_label(sigma) for sigma in sigmas])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)

    starts = range(0, len(strip.pictures), STRIP)
    heading = _heading("The prediction on its way, with sigma below", "", [], look)
    return [heading, *(Row(tile + 0.3, partial(draw, first=first)) for first in starts)]


# ----------------------------------------------------------------------------------------------------------------------
# The checkpoint


def _checkpoint_rows(report: LeakReport, look: Theme) -> list[Row]:
    answer = report.checkpoint
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
        variance = _fitted_variance(timesteps, values, table, TAU[1] ** 2 * canvas)
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
        axes.errorbar(timesteps, values, _finite(errors), capsize=3, elinewidth=1.2, **points)
        _set_ylim(axes, [values, *expected.values(), [0.0]], LEAST_PEAK)
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
    return [_heading(title, f"{CONFIDENCE:.0%} intervals.{how}", handles, look), Row(2.2, draw)]


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
    from scipy.optimize import minimize_scalar

    asked = timesteps <= TABLE_UP_TO * timesteps[-1]
    sigmas = [table.sigma(t) for t in timesteps[asked]]

    def squares(log_variance: float) -> float:
        expected = [expected_slope(sigma, math.exp(log_variance)) for sigma in sigmas]
        return float(((slopes[asked] - expected) ** 2).sum())

    return math.exp(minimize_scalar(squares, bounds=(math.log(1e-2), math.log(most)), method="bounded").x)


# ----------------------------------------------------------------------------------------------------------------------
# The sampler


def _sampler_rows(report: LeakReport, look: Theme) -> list[Row]:
    probes, answer = report.sampler_probes, report.sampler
    compared = report.reference_probes is not None
    lines = [
        (fit.reference_intercept, fit.reference_slope) if compared else (fit.intercept, fit.slope)
        for fit in answer.channels
    ]
    sizes = [slope.value for _, slope in lines]
    levels = _levels(np.concatenate([probe.sigmas for probe in [*probes, *(report.reference_probes or [])]]))
    styles = _sign_styles(look)

    def draw(axes: Axes, channel: int, wide: bool) -> None:
        position = _over_sigma(axes, levels, look, wide)
        noise = np.concatenate([probe.noise_mean[:, channel] for probe in probes])
        seen, measured = [], []
        for sign, style in styles.items():
            offset = noise[noise * sign > 0].mean()
            seen += _draw_expected(axes, position, levels, *lines[channel], [offset], look)
            paths = _paths(probes, channel, sign)
            for sigmas, values in paths:
                axes.plot(position(sigmas), values, zorder=4, **style)
            measured += paths
        _panel_title(axes, channel, measured, look)
        _set_ylim(axes, [*seen, *(values for _, values in measured)], 10 * PULL_LATENT)

    handles = [
        Line2D([], [], label="noise mean +", **styles[1]),
        Line2D([], [], label="noise mean -", **styles[-1]),
        Line2D([], [], label=CANVAS, **_expected_style(look)),
    ]
    source = "the exact flow" if compared else "this sampler itself"
    note = f"Over sigma{_which(sizes)}. Expected: slope and mean of {source}, no leak."
    return [
        _heading("Sampler: mean of the predicted picture", note, handles, look),
        *_panel_rows(_shown(sizes), draw),
        _scatter_row(report, int(np.argmax(np.abs(sizes))), look),
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
        return [(first, _finite(np.mean([values for _, values in paths], axis=0)))]
    return [(sigmas, _finite(values)) for sigmas, values in paths]


def _scatter_row(report: LeakReport, channel: int, look: Theme) -> Row:
    answer, fit = report.sampler, report.sampler.channels[channel]
    noise = np.concatenate([probe.noise_mean[:, channel] for probe in report.sampler_probes])
    picture = np.concatenate([probe.picture_mean[:, channel] for probe in report.sampler_probes])
    lines = {f"this sampler: {fit.slope}": (fit.intercept.value, fit.slope.value)}
    if fit.reference_slope is not None:
        lines[f"exact flow: {fit.reference_slope}"] = (fit.reference_intercept.value, fit.reference_slope.value)
    spread = f"spread of brightness:\n{answer.spread:.3g} {answer.unit}"
    if answer.reference_spread is not None:
        spread += f"\n(exact flow {answer.reference_spread:.3g})"
    pull = "" if answer.pull is None else f"pull toward grey:\n{answer.pull} {answer.unit}\n\n"

    def draw(axes: Axes, beside: Axes) -> None:
        drawn = _draw_scatter(axes, noise, picture, lines, look)
        _title(axes, f"Picture on noise, channel {channel + 1}, R² {fit.r_squared:.2f}", look.ink)
        beside.set_axis_off()
        _text_below(beside, "slope", 0, fontsize=TEXT, color=look.ink)
        _legend(beside, drawn, look, down=14)
        _text_below(beside, pull + spread, 54, fontsize=TEXT, color=look.ink)

    return Row(2.15, draw, columns=2)


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


def _guidance_rows(answer: GuidanceAnswer, look: Theme) -> list[Row]:
    alone = _finite(np.ravel(answer.unguided))
    kinds = [
        (shift, alone + _finite(np.ravel(shift.changes)), {**style, "ls": "none"})
        for shift, style in zip(answer.shifts, _sign_styles(look).values(), strict=False)
    ]
    levels = answer.unit == "levels of 255"
    what, least = ("brightness", 10 * PULL_LEVELS) if levels else ("mean of channel 1", 10 * PULL_LATENT)
    beside_it = [
        _in_words(shift.guidance, shift.clipped, f"moves by {shift.mean}", f"rms {shift.rms}") for shift, *_ in kinds
    ]
    beside_it += [_in_words("the prompt alone", answer.unguided_clipped, f"spread {answer.unguided_spread:.3g}")]

    def draw(axes: Axes, beside: Axes) -> None:
        axes.set_xlim(_limits([alone], least))
        axes.plot(axes.get_xlim(), axes.get_xlim(), zorder=3, **_expected_style(look))
        for _, guided, style in kinds:
            axes.vlines(alone, alone, guided, color=style["color"], lw=0.8, alpha=0.5, zorder=2)
            axes.plot(alone, guided, zorder=6, **style)
        axes.set_ylim(_limits([axes.get_xlim(), *(guided for _, guided, _ in kinds)], least))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        axes.set_xlabel(f"{what}, the prompt alone", fontsize=TEXT, color=look.ink, labelpad=1)
        _title(axes, f"{what}, with guidance", look.ink)
        beside.set_axis_off()
        _text_below(beside, "\n\n".join(beside_it), 0, fontsize=TEXT, color=look.ink)

    handles = [Line2D([], [], label=shift.guidance, **style) for shift, _, style in kinds]
    handles += [Line2D([], [], label="not moved", **_expected_style(look))]
    note = (
        f"A point a noise: the exact flow with guidance over that of the prompt alone, in {answer.unit}. "
        f"{CONFIDENCE:.0%} intervals."
    )
    return [_heading("Guidance: brightness from the same noise", note, handles, look), Row(2.6, draw, columns=2)]


def _in_words(title: str, clipped: float | None, *values: str) -> str:
    return "\n".join([f"{title}:", *values, *([] if clipped is None else [f"{clipped:.0%} of the pixels clipped"])])


# ----------------------------------------------------------------------------------------------------------------------
# One run


def _run_rows(statistics: LatentStatistics, picture_mean: np.ndarray | None, look: Theme) -> list[Row]:
    sigmas, means, noise = statistics.sigmas, _finite(statistics.denoised_mean), statistics.noise_mean
    start = means[0]
    if picture_mean is not None:
        sigmas, means = np.append(sigmas, 0.0), np.concatenate([means, _finite(picture_mean)[None]])
    fits, obstacle = _fit_run(statistics, picture_mean)
    sizes = [fit.slope.value for fit in fits] if fits else np.abs(means[-1] - start).mean(0)
    samples = min(means.shape[1], SAMPLES)
    levels = _levels(sigmas, picture=picture_mean is not None)
    signs = _sign_styles(look)
    unsigned = {"color": look.lines[0], "marker": MARKERS[0]}

    def draw(axes: Axes, channel: int, wide: bool) -> None:
        position = _over_sigma(axes, levels, look, wide)
        lines = means[:, :samples, channel].T
        seen = [lines]
        if fits:
            span = np.nanmin(noise[:, channel]), np.nanmax(noise[:, channel])
            seen += _draw_expected(axes, position, levels, fits[channel].intercept, fits[channel].slope, span, look)
        for i, line in enumerate(lines):
            if not fits:
                band = _open_band(levels, sigmas[0], line[0], line[-1], statistics.canvas)
                axes.fill_between(position(levels), *band, zorder=1, **_band_style(look))
            style = unsigned if noise is None else signs[1 if noise[i, channel] > 0 else -1]
            axes.plot(position(sigmas), line, zorder=4, **{**style, "lw": 1.2, "ms": 3.5})
        _panel_title(axes, channel, [(sigmas, line) for line in lines], look)
        _set_ylim(axes, seen, 10 * PULL_LATENT)

    which = "" if samples == means.shape[1] else f", the first {samples} of {means.shape[1]}"
    note = f"A line a sample{which}{_which(sizes, 'move most')}."
    if fits:
        note += " Expected: with the slope and the mean of each channel's fit."
        expected = Line2D([], [], label=CANVAS, **_expected_style(look))
    else:
        note += f" No slope is fitted, as {obstacle}. "
        note += f"Expected: to the same end, if averages vary by {TAU[0]:g} to {TAU[1]:g}."
        expected = Patch(label=CANVAS, **_band_style(look))
    measured = {"one sample": unsigned} if noise is None else {"noise mean +": signs[1], "noise mean -": signs[-1]}
    handles = [*(Line2D([], [], label=label, **style) for label, style in measured.items()), expected]
    draw_std = partial(_draw_std, statistics=statistics, channels=_shown(sizes), look=look)

    def draw_both(axes: Axes, beside: Axes) -> None:
        channel = int(np.argmax(np.abs(sizes)))
        fit = fits[channel]
        _draw_scatter(
            axes, noise[:, channel], picture_mean[:, channel], {"": (fit.intercept.value, fit.slope.value)}, look
        )
        _title(axes, f"Picture on noise, channel {channel + 1}:\nslope {fit.slope}, R² {fit.r_squared:.2f}", look.ink)
        draw_std(beside, wide=False)

    return [
        _heading("Mean of the predicted picture over sigma", note, handles, look),
        *_panel_rows(_shown(sizes), draw),
        Row(2.3, draw_both, columns=2) if fits else Row(1.9, partial(draw_std, wide=True)),
    ]


def _draw_std(axes: Axes, statistics: LatentStatistics, channels: Sequence[int], look: Theme, wide: bool) -> None:
    position = _over_sigma(axes, _levels(statistics.sigmas, picture=False), look, wide)
    std = _finite(statistics.denoised_std).mean(1)[:, channels]
    handles = [
        axes.plot(position(statistics.sigmas), line, color=color, marker=marker, ms=3.5, label=f"{channel + 1}")[0]
        for channel, line, color, marker in zip(channels, std.T, look.lines, MARKERS, strict=False)
    ]
    _set_ylim(axes, [std], 10 * PULL_LATENT)
    _title(axes, "std of the prediction, by channel", look.ink, pad=18)
    _legend(axes, handles, look, down=-14, ncols=CHANNELS)


def _fit_run(statistics: LatentStatistics, picture_mean: np.ndarray | None) -> tuple[list[ChannelFit], str]:
    """Least-squares lines of the pictures' means on the noises', a channel each; or none, and why."""
    noise = statistics.noise_mean
    if noise is None:
        return [], "the noise that the run began with is not known"
    if picture_mean is None:
        return [], "the finished picture is not known"
    good = np.isfinite(noise).all(1) & np.isfinite(picture_mean).all(1)
    noise, picture_mean = noise[good].astype(float), picture_mean[good]
    if len(noise) < 3:
        return [], "that takes 3 samples"
    if np.ptp(noise, axis=0).min() * math.sqrt(statistics.canvas) < 1e-3:
        return [], "all samples began with the same mean of the noise"
    return fit_pictures(noise, picture_mean), ""


def _open_band(levels: np.ndarray, start: float, first: float, last: float, canvas: int) -> np.ndarray:
    """(2, n): between which means a sample's prediction moves on the exact flow from its first one to its picture, if
    the averages of the prompt's pictures vary by anything within TAU."""

    def way(tau: float) -> np.ndarray:
        slope = tau * math.sqrt(canvas)
        gone = [expected_denoised_mean(sigma, 0.0, slope, 1 / slope) for sigma in [start, *levels]]
        return (np.array(gone[1:]) - gone[0]) / (1 - gone[0])

    ways = np.stack([first + (last - first) * way(tau) for tau in np.geomspace(*TAU, 7)])
    return np.stack([ways.min(0), ways.max(0)])


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of panels


def _theme(name: str) -> Theme:
    if name not in THEMES:
        raise UserError(f"there is no theme {name!r}; choose from {', '.join(THEMES)}")
    return THEMES[name]


def _sign_styles(look: Theme) -> dict[int, dict]:
    """Of lines whose noise lies above or below 0."""
    return {
        1: {"color": look.lines[0], "marker": MARKERS[0], "ms": 5, "lw": 1.6},
        -1: {"color": look.lines[1], "marker": MARKERS[1], "ms": 4.5, "lw": 1.6, "ls": (0, (5, 1.5))},
    }


def _expected_style(look: Theme) -> dict:
    return {"color": look.ink, "lw": 1.3, "ls": (0, (1.5, 1.5))}


def _band_style(look: Theme) -> dict:
    return {"color": look.faint, "alpha": 0.3, "lw": 0}


def _shown(sizes: Sequence[float]) -> list[int]:
    """The channels to draw: those with the largest sizes, in order."""
    return sorted(np.argsort(-np.abs(np.nan_to_num(sizes)), kind="stable")[:CHANNELS].tolist())


def _which(sizes: Sequence[float], how: str = "follow the noise most") -> str:
    return f", the {CHANNELS} of {len(sizes)} channels that {how}" if len(sizes) > CHANNELS else ""


def _panel_rows(channels: Sequence[int], draw: Callable[..., None]) -> list[Row]:
    """A panel a channel, two in a row; an odd one has the last row to itself."""

    def pair(*axes: Axes, channels: Sequence[int]) -> None:
        for panel, channel in zip(axes, channels, strict=True):
            draw(panel, channel, wide=len(axes) == 1)

    pairs = [channels[i : i + 2] for i in range(0, len(channels), 2)]
    return [Row(1.55, partial(pair, channels=pair_of), columns=len(pair_of)) for pair_of in pairs]


def _title(axes: Axes, text: str, color: str, pad: float = 4) -> None:
    axes.set_title(text, fontsize=TEXT, color=color, loc="left", pad=pad)


def _panel_title(axes: Axes, channel: int, paths: Sequence[tuple[np.ndarray, np.ndarray]], look: Theme) -> None:
    """The channel, and from which sigma on its values are NaN or infinite."""
    broken = [sigmas[~np.isfinite(values)] for sigmas, values in paths]
    first = max((sigmas[0] for sigmas in broken if len(sigmas)), default=None)
    text = f"channel {channel + 1}"
    if first is None:
        _title(axes, text, look.ink)
    else:
        _title(axes, f"{text}: not finite from {_sigma_label(first)}", look.alarm)


def _levels(sigmas: Sequence[float], picture: bool = True) -> np.ndarray:
    """Noise levels to draw a curve through, from infinity, where it is among the given ones, to the picture's 0."""
    sigmas = np.asarray(sigmas, dtype=float)
    finite = sigmas[np.isfinite(sigmas) & (sigmas > 0)]
    finite = finite if len(finite) else np.ones(1)
    infinity = [math.inf] if np.isinf(sigmas).any() else []
    return np.array([*infinity, *np.geomspace(finite.max(), finite.min(), 100), *([0.0] if picture else [])])


def _over_sigma(axes: Axes, levels: np.ndarray, look: Theme, wide: bool) -> Callable[[Iterable[float]], np.ndarray]:
    """An axis of sigma as in ``plots``, with no more ticks than can be read; the map from sigmas to places on it."""
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


def _draw_expected(
    axes: Axes,
    position: Callable[[Iterable[float]], np.ndarray],
    levels: np.ndarray,
    mean: Estimate,
    slope: Estimate,
    noise_means: Sequence[float],
    look: Theme,
) -> list[np.ndarray]:
    """The exact flow that carries a noise mean n to mean + slope n: a line for each, and the band of all within the
    intervals of mean and slope."""

    def flow(mean: float, slope: float, noise_mean: float) -> np.ndarray:
        toward = math.copysign(1.0, slope) * noise_mean
        return np.array([expected_denoised_mean(sigma, mean, abs(slope), toward) for sigma in levels])

    lines = [flow(mean.value, slope.value, noise_mean) for noise_mean in noise_means]
    # the flow's mean grows with either, so the corners bound it
    corners = [flow(m, k, n) for m in (mean.low, mean.high) for k in (slope.low, slope.high) for n in noise_means]
    axes.fill_between(position(levels), np.min(corners, 0), np.max(corners, 0), zorder=1, **_band_style(look))
    for line in lines:
        axes.plot(position(levels), line, zorder=5, **_expected_style(look))
    return lines


def _draw_scatter(
    axes: Axes, noise: np.ndarray, picture: np.ndarray, lines: Mapping[str, tuple[float, float]], look: Theme
) -> list[Line2D]:
    """Pictures' means over the noises', and up to two lines {label: (intercept, slope)}: the fit, the exact flow."""
    for sign, style in _sign_styles(look).items():
        chosen = noise * sign > 0
        axes.plot(noise[chosen], _finite(picture[chosen]), zorder=6, **{**style, "ls": "none"})
    ends = np.array([np.nanmin(noise), np.nanmax(noise)])
    styles = {"color": look.ink, "lw": 1.6}, _expected_style(look)
    drawn = [
        axes.plot(ends, intercept + slope * ends, label=label, zorder=4, **style)[0]
        for (label, (intercept, slope)), style in zip(lines.items(), styles, strict=False)
    ]
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.set_xlabel("mean of the noise", fontsize=TEXT, color=look.ink, labelpad=1)
    _set_ylim(axes, [picture, *(line.get_ydata() for line in drawn)], 10 * PULL_LATENT)
    return drawn


def _set_ylim(axes: Axes, values: Iterable[np.ndarray], least: float) -> None:
    """Around the finite values, and no closer than shows a span of ``least``, lest rounding look like a finding."""
    axes.set_ylim(_limits(values, least))


def _limits(values: Iterable[np.ndarray], least: float) -> tuple[float | None, float | None]:
    values = np.concatenate([np.ravel(value) for value in values])
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None, None
    middle, half = (values.max() + values.min()) / 2, max(np.ptp(values), least) / 2
    return middle - 1.1 * half, middle + 1.1 * half


def _finite(values: Sequence[float]) -> np.ndarray:
    """With NaN for infinity, which matplotlib leaves out."""
    values = np.asarray(values, dtype=float)
    return np.where(np.isfinite(values), values, np.nan)


def _number(value: float) -> str:
    return "infinity" if math.isinf(value) else f"{value + 0.0:.4g}"


def _sigma_label(sigma: float) -> str:
    return {math.inf: "∞", 0.0: "picture"}.get(float(sigma), f"{sigma:.3g}")
