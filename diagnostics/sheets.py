"""Contact sheets of ``ztsnr leak``: the same prompt and noise from several starts, and under several guidances."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ..errors import UserError
from ..figures.contact_sheet import contact_sheet
from ..figures.rows import wrapped
from .sampler_verdict import PULL_LEVELS


def start_sheet(
    pictures: np.ndarray, starts: Sequence[str], brightness: np.ndarray, prompt: str, seeds: Sequence[int]
) -> Figure:
    """The same prompt and noise from several starts, one per row, with the brightness under each picture.

    Args:
        pictures: (S, K, H, W, 3) uint8; the first row, exact infinity, is what the others are compared with.
        starts: S labels; lines separated by newlines.
        brightness: (S, K) 0 to 255.
        seeds: (K,) their numbers.

    Raises:
        UserError: shapes that do not match.
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
        pictures: (G, K, H, W, 3) uint8; the first row, no guidance, is what the others are compared with.
        guidances: G names.
        brightness: (G, K) 0 to 255.
        seeds: (K,) their numbers.

    Raises:
        UserError: shapes that do not match.
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
            f"{grid[0]} {what} and {grid[1]} seeds need pictures {(*grid, 'H', 'W', 3)} and brightness {grid}, not "
            f"{pictures.shape} and {brightness.shape}"
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
    """One prompt's pictures, one seed per column."""
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
        note=wrapped(note, line),
    )
