"""The report of a reproduction: a table, a page with everything inside it, the numbers as JSON, and one sheet."""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tabulate import tabulate

from .. import __version__
from ..checkpoints.atomic import atomic_write
from ..diagnostics.leak import Estimate, plain
from ..diagnostics.output import no_matplotlib, png
from .reproduction import LARGE_STARTS, OURS, PLAIN, SEEDS, STARVED, TRAININGS, Measured, Reproduction, starts_of
from .reproduction_claims import JUDGED_STEPS, LARGE_STEPS, Claim, judge_claims
from .reproduction_measures import (
    BANDS,
    SHAPES,
    SOLIDS,
    KnownPrompt,
    Row,
    Start,
    frechet_distance,
    pixel_statistics,
)

ALARM = 30  # levels of brightness
SHOWN_SOLIDS = SOLIDS[:5]  # black, white, red, green, blue

Runs = Sequence[dict[str, Measured]]


@dataclass(frozen=True)
class Sheet:
    """What is shown of a claim: names of the columns, and for each row its name and its cells, data URLs or texts."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    note: str


def write_report(reproduction: Reproduction, runs: Runs) -> tuple[list[Claim], list[list]]:
    """Write report.html, results.json and, where there is matplotlib, sheet.png into the folder.

    Args:
        runs: of one or several training seeds, each by the names of its trainings.

    Returns:
        The claims, judged, and ``summary_rows``.

    Raises:
        ValueError: a file cannot be written.
    """
    claims = judge_claims(runs)
    rows = summary_rows(runs, reproduction.reference())
    files = {
        "results.json": _json(reproduction, runs, claims, rows),
        "report.html": _html(reproduction, runs, claims, rows),
    }
    if no_matplotlib() is None:
        files["sheet.png"] = png(_figure(runs))
    for name, content in files.items():
        with atomic_write(reproduction.out / name) as file:
            file.write(content)
    return claims, rows


def claims_text(claims: Sequence[Claim]) -> str:
    """Each claim with its answer and what it rests on."""
    lines = []
    for claim in claims:
        lines.append(f"{claim.number}. {claim.text}: {claim.answer}")
        lines += [f"   {evidence}" for evidence in claim.evidence]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The table

HEADERS = (
    "training",
    "start",
    "steps",
    "brightness error",
    "CIEDE2000",
    "background",
    "coarse contrast",
    "first prediction",
    "Fréchet",
)


def summary_rows(runs: Runs, reference: np.ndarray) -> list[list]:
    """A row for each training, start and number of steps: HEADERS; several trainings as mean ± standard deviation."""
    rows = []
    for training in TRAININGS:
        for start in starts_of(runs[0][training].rows):
            for steps in sorted({row.steps for row in runs[0][training].rows}):
                values = np.array([_summary(run[training].rows, start, steps, reference) for run in runs])
                rows.append([training, name_of(start), steps, *map(_spread, values.T)])
    return rows


def summary_table(rows: Sequence[Sequence], steps: int = JUDGED_STEPS) -> str:
    """Those of one number of steps, to be printed."""
    shown = [row for row in rows if row[2] == steps]
    return tabulate(shown, HEADERS, disable_numparse=True, colalign=["left"] * 2 + ["right"] * 7)


def _summary(rows: Sequence[Row], start: Start, steps: int, reference: np.ndarray) -> list[float]:
    rows = [row for row in rows if (row.start, row.steps) == (start, steps)]
    solids = [row for row in rows if row.prompt in SOLIDS]
    shapes = [row for row in rows if row.prompt in SHAPES]
    pictures = [picture for row in rows for picture in row.pictures]
    return [
        np.mean([row.brightness_error for row in solids]),
        np.mean([row.colour_error for row in solids]),
        np.mean([row.background_share for row in shapes]),
        np.mean([row.coarse_contrast for row in solids[:2]]),
        np.mean([row.first_colour_error for row in solids]),
        frechet_distance(pixel_statistics(pictures), reference),
    ]


def _spread(values: np.ndarray) -> str:
    if np.isnan(values).any():
        return ""
    digits = 2 if abs(values.mean()) < 1 else 1
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def name_of(start: Start) -> str:
    """In words."""
    if isinstance(start, str):
        return "leading (SDXL's)"
    return "infinity" if math.isinf(start) else f"{start:g}"


def leak_shares(runs: Runs) -> list[tuple[str, list[str]]]:
    """For each training that can be asked at infinity, the share of the peak with its interval, a text a seed."""
    asked = [name for name in TRAININGS if runs[0][name].leak is not None]
    return [(name, [str(Estimate(**run[name].leak["share"])) for run in runs]) for name in asked]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _json(reproduction: Reproduction, runs: Runs, claims: Sequence[Claim], rows: Sequence[Sequence]) -> bytes:
    content = {
        "ztsnr": __version__,
        "size": reproduction.size,
        "recipe": asdict(reproduction.recipe),
        "training seeds": [run[OURS].seed for run in runs],
        "noise seeds": list(SEEDS),
        "claims": [
            {
                "number": claim.number,
                "text": claim.text,
                "answer": claim.answer,
                "evidence": [{**plain(asdict(one)), "answer": one.answer} for one in claim.evidence],
            }
            for claim in claims
        ],
        "rows": [dict(zip(HEADERS, row, strict=True)) for row in rows],
        "leak": [{name: measured.leak for name, measured in run.items()} for run in runs],
    }
    return (json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _html(reproduction: Reproduction, runs: Runs, claims: Sequence[Claim], rows: Sequence[Sequence]) -> bytes:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    recipe = reproduction.recipe
    side = runs[0][OURS].rows[0].pictures.shape[1]
    about = (
        f"{recipe.steps} steps of {recipe.batch_size} pictures of about {side} x {side} pixels, which the program "
        f"draws itself; the pictures below are of the first training, with the noise of seed {SEEDS[0]}."
    )
    page = environment.get_template("reproduction_report.html").render(
        version=__version__,
        trainings=list(TRAININGS),
        about=about,
        claims=claims,
        sheets=_sheets(runs[0]),
        table=[HEADERS, *rows],
        leaks=leak_shares(runs),
        seeds_of_training=[run[OURS].seed for run in runs],
        seeds=len(SEEDS),
        runs=len(runs),
    )
    return page.encode()


def _sheets(run: dict[str, Measured]) -> dict[int, Sheet]:
    """Pictures for each claim, of one training."""
    infinity = math.inf
    solid_names = [prompt.text for prompt in SHOWN_SOLIDS]
    from_everywhere = [
        (f"{OURS}, from {name_of(start)}", _pictures(run[OURS].rows, SHOWN_SOLIDS, start))
        for start in starts_of(run[OURS].rows)
    ]
    pulled = [
        (f"{OURS}, from infinity", _pictures(run[OURS].rows, (*SOLIDS[:2], *SHAPES), infinity)),
        (f"{PLAIN}, from 14.6", _pictures(run[PLAIN].rows, (*SOLIDS[:2], *SHAPES), 14.6)),
        (f"{PLAIN}, {name_of('leading')}", _pictures(run[PLAIN].rows, (*SOLIDS[:2], *SHAPES), "leading")),
    ]
    large = [
        (f"{OURS}, from {name_of(start)}", _pictures(run[OURS].large, BANDS, start, LARGE_STEPS))
        for start in LARGE_STARTS
    ]
    starved = [
        (f"{name}, from infinity", _pictures(run[name].rows, SHOWN_SOLIDS, infinity)) for name in (STARVED, OURS)
    ]
    same_noise = f"{JUDGED_STEPS} Euler steps, the same noise everywhere."
    return {
        1: Sheet(solid_names, from_everywhere, same_noise),
        2: Sheet([prompt.text for prompt in (*SOLIDS[:2], *SHAPES)], pulled, same_noise),
        3: Sheet(
            [prompt.text for prompt in SOLIDS],
            [(name, _first_errors(run[name].rows)) for name in (OURS, PLAIN, STARVED)],
            "CIEDE2000 between the colour asked for and the mean of the very first prediction of x0, from pure noise.",
        ),
        4: Sheet([prompt.text for prompt in BANDS], large, f"{LARGE_STEPS} Euler steps, a canvas of double length."),
        5: Sheet(solid_names, starved, same_noise),
    }


def _first_errors(rows: Sequence[Row]) -> list[str]:
    found = {row.prompt: row for row in rows if (row.start, row.steps) == (math.inf, JUDGED_STEPS)}
    return [f"{found[prompt].first_colour_error:.1f}" for prompt in SOLIDS]


def _pictures(
    rows: Sequence[Row], prompts: Sequence[KnownPrompt], start: Start, steps: int = JUDGED_STEPS
) -> list[str]:
    found = {row.prompt: row for row in rows if (row.start, row.steps) == (start, steps)}
    return [_data_url(found[prompt].pictures[0]) for prompt in prompts if prompt in found]


def _data_url(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(runs: Runs):
    """The README's picture: solid colours as each training makes them."""
    from ..diagnostics.plots import contact_sheet

    run = runs[0]
    lines = [
        (OURS, math.inf, "as this package trains and samples"),
        (OURS, 14.6, "the same network, from finite noise"),
        (STARVED, math.inf, "Min-SNR weights without a floor"),
        (PLAIN, 14.6, "no zero terminal SNR"),
        ("epsilon, plain", 14.6, "as SDXL was trained"),
        ("epsilon, plain", "leading", "and as it is sampled"),
    ]
    pictures, captions, alarms = [], [], []
    for training, start, _ in lines:
        rows = {row.prompt: row for row in run[training].rows if (row.start, row.steps) == (start, JUDGED_STEPS)}
        shown = [rows[prompt] for prompt in SOLIDS]
        pictures.append([row.pictures[0] for row in shown])
        captions.append([f"off by {row.brightness_error:.0f}" for row in shown])
        alarms.append([row.brightness_error > ALARM for row in shown])
    return contact_sheet(
        np.array(pictures),
        [f"{training}\n{what}\nfrom {name_of(start)}" for training, start, what in lines],
        [(prompt.text.replace(" background", ""), 1) for prompt in SOLIDS],
        captions,
        np.array(alarms),
        title="Four ways to train, and where sampling begins",
        subtitle=(
            f"The same weights before, the same noise; {JUDGED_STEPS} Euler steps. "
            f"Off by: mean brightness, in levels of 255, over {len(SEEDS)} noises"
        ),
    )


def write_readme_picture(sheet: Path, out: Path) -> None:
    """The sheet as a JPEG."""
    with Image.open(sheet) as image, atomic_write(out) as file:
        image.convert("RGB").save(file, "JPEG", quality=90)
