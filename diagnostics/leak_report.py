"""The results of a ``ztsnr leak`` run: a table to print, numbers as JSON, and one HTML page with all pictures."""

import base64
import io
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .. import __version__
from ..errors import UserError
from ..extras import no_matplotlib
from ..figures.png import png
from .guidance_shift import moved_most
from .plain import plain
from .verdict import LeakReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "grey": (128, 128, 128),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt: its text, and the colour it asks for, if that is known."""

    text: str
    target: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        return self.text or "(empty prompt)"


@dataclass(frozen=True)
class Settings:
    """What a run measures; measurements with other settings are never mixed in."""

    model: str
    weights: str
    prediction_type: str
    zero_terminal_snr: bool
    prompts: tuple[Prompt, ...]
    negative_prompt: str | None
    seeds: tuple[int, ...]
    size: tuple[int, int]  # width, height in pixels
    steps: int
    scheduler: str
    guidance_scale: float
    reference_steps: int
    offset: float
    dtype: str


@dataclass(frozen=True)
class LeakRun:
    """A finished run.

    Attributes:
        evidence, warnings: what the checkpoint's files say about it, as sentences.
        reports: one per prompt; the first has the verdict on the checkpoint.
        sheet: one entry per start: its sigma, the prompt, the seeds and the brightness of each picture.
        guidance_sheet: one entry per kind of guidance, none first: its name, the file of its pictures, the prompt, the
            seeds and the brightness of each picture; empty without guidance.
        pictures: folder of strip_<prompt>.png, start_<sigma>.png and guidance_<prompt>_<kind>.png, from
            ``row_of_pictures``.
    """

    settings: Settings
    evidence: Sequence[str]
    warnings: Sequence[str]
    reports: Sequence[LeakReport]
    sheet: Sequence[dict[str, Any]]
    guidance_sheet: Sequence[dict[str, Any]]
    pictures: Path


def report_table(run: LeakRun) -> str:
    """Two rows per prompt: the sampler, and the exact flow of the same network."""
    from tabulate import tabulate

    rows = []
    for prompt, report in zip(run.settings.prompts, run.reports, strict=True):
        s = report.sampler
        if s is None:
            continue
        rows += [
            [prompt.name, s.brightness, s.colour_error or "", s.pull, s.slope_ratio or "", f"{s.clipped:.0%}"],
            [
                "  exact flow",
                s.reference_brightness,
                s.reference_colour_error or "",
                "",
                "",
                f"{s.reference_clipped:.0%}",
            ],
        ]
    headers = [
        "prompt",
        "brightness\n(0 to 255)",
        "CIEDE2000 to\nthe colour",
        "pull toward\ngrey (levels)",
        "slope, of the\nexact flow's",
        "clipped",
    ]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=["left"] + ["right"] * 5)


def guidance_table(run: LeakRun) -> str:
    """One row per prompt: how far guidance moves brightness, from the same noise, in levels."""
    from tabulate import tabulate

    prompts = zip(run.settings.prompts, run.reports, strict=True)
    asked = [(prompt, report.guidance) for prompt, report in prompts if report.guidance is not None]
    rows = [
        [prompt.name, answer.unguided_brightness, f"{answer.unguided_spread:.3g}"]
        + [value for shift in answer.shifts for value in (shift.mean, shift.rms)]
        for prompt, answer in asked
    ]
    names = [textwrap.fill(shift.guidance, 14) for shift in asked[0][1].shifts]
    headers = ["prompt", "brightness\nunguided", "spread\nunguided"]
    headers += [f"{name}\n{what}" for name in names for what in ("moves by", "rms")]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1))


def report_json(run: LeakRun) -> bytes:
    """All numbers as JSON: null for NaN, infinity as a word."""
    prompts = zip(run.settings.prompts, run.reports, strict=True)
    content = {
        "ztsnr": __version__,
        "verdict": run.reports[0].verdict,
        "settings": plain(asdict(run.settings)),
        "evidence": list(run.evidence),
        "warnings": list(run.warnings),
        "prompts": [{"prompt": p.text, "target": plain(p.target), **report.to_dict()} for p, report in prompts],
        "sheet": plain(run.sheet),
        "guidance_sheet": plain(run.guidance_sheet),
    }
    return (json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def report_html(run: LeakRun) -> bytes:
    """One HTML page with all numbers and pictures inside."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(str(__package__), "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    missing = no_matplotlib()
    prompts = list(zip(run.settings.prompts, run.reports, strict=True))
    guided = [report.guidance for report in run.reports if report.guidance is not None]
    page = environment.get_template("leak_report.html").render(
        version=__version__,
        run=run,
        prompts=prompts,
        moved=prompts[moved_most(guided)] if guided else None,
        figures=None if missing else _figures(run),
        missing=missing,
    )
    return page.encode()


def _figures(run: LeakRun) -> dict[str, Any]:
    """Figures as data URLs: one per prompt and theme, and the sheets of starts and of guidance."""
    from ..figures.strip import Strip
    from .leak_figure import leak_figure
    from .sheets import guidance_sheet, start_sheet

    def both(draw: Callable[..., "Figure"]) -> dict[str, str]:
        return {theme: _data_url(png(draw(theme=theme))) for theme in ("light", "dark")}

    def strip(number: int) -> Strip:
        pictures, sigmas = load_row(run.pictures / f"strip_{number}.png")
        return Strip(pictures, np.array([float(sigma) for sigma in sigmas]))

    starts = [float(row["start_sigma"]) for row in run.sheet]
    sheet = start_sheet(
        np.stack([load_row(run.pictures / f"start_{start:g}.png")[0] for start in starts]),
        ["infinity" if math.isinf(start) else f"sigma {start:g}" for start in starts],
        np.array([row["brightness"] for row in run.sheet]),
        run.sheet[0]["prompt"],
        run.sheet[0]["seeds"],
    )
    guidance = (
        None
        if not run.guidance_sheet
        else guidance_sheet(
            np.stack([load_row(run.pictures / f"{row['file']}.png")[0] for row in run.guidance_sheet]),
            [row["guidance"] for row in run.guidance_sheet],
            np.array([row["brightness"] for row in run.guidance_sheet]),
            run.guidance_sheet[0]["prompt"],
            run.guidance_sheet[0]["seeds"],
        )
    )
    prompts = [both(partial(leak_figure, report, strip=strip(i))) for i, report in enumerate(run.reports)]
    return {
        "prompts": prompts,
        "sheet": _data_url(png(sheet)),
        "guidance": _data_url(png(guidance)) if guidance else None,
    }


def _data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def row_of_pictures(pictures: np.ndarray, labels: Sequence[str]) -> bytes:
    """Pictures (n, H, W, 3) uint8 side by side in a PNG file, with their labels inside."""
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("labels", json.dumps(list(labels)))
    Image.fromarray(np.concatenate(list(pictures), axis=1)).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def load_row(path: Path) -> tuple[np.ndarray, list[str]]:
    """Pictures (n, H, W, 3) uint8 and labels from a file of ``row_of_pictures``.

    Raises:
        UserError: the file does not exist.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; delete {path.parent.parent / 'measurements.jsonl'} to measure again.")
    with Image.open(path) as image:
        labels = json.loads(image.info["labels"])
        return np.stack(np.split(np.asarray(image.convert("RGB")), len(labels), axis=1)), labels
