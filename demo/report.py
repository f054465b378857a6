"""The report of the trainings: claims, a table, a self-contained HTML page, and the numbers as JSON."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tabulate import tabulate

from .. import __version__
from ..diagnostics.plain import plain
from ..files import atomic_write
from .claims import FINITE, INFINITY, Claim, Run, judge_claims
from .composed import COLOURS
from .evaluation import (
    BLACK,
    FOUR_TIMES,
    GUIDED,
    LONG_PICTURES,
    NOISES,
    OBJECTS,
    START,
    STEPS,
    TWICE,
    WHITE,
    Numbers,
    start_name,
)
from .ideal_solids import bounds
from .measures import WHOLE
from .objectives import EPSILON, OURS, PLAIN, STARVED
from .trainings import Recipe

# rows of the table: training, start
WAYS = (
    (EPSILON, FINITE),
    (PLAIN, FINITE),
    (STARVED, INFINITY),
    (OURS, FINITE),
    (OURS, INFINITY),
)
SHOWN = (BLACK, WHITE, "dark", "light", "red", "blue", "yellow")
HEADERS = (
    "training",
    "from",
    "black",
    "white",
    "dark",
    "light",
    "CIEDE2000",
    "first prediction",
    "uneven ground",
    "explained",
    "v error at T",
)


@dataclass(frozen=True)
class Sheet:
    """A table of a claim: names of the columns, and for each row its name and its cells, pictures as data URLs."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    note: str


def write_report(out: Path, recipe: Recipe, runs: Sequence[Run], seeds: Sequence[int]) -> list[Claim]:
    """Write report.html and results.json into a folder.  Returns the judged claims.

    Args:
        out: The folder.
        recipe: Recipe of the trainings.
        runs: Measurements of one or several training seeds.
        seeds: The training seeds.

    Raises:
        UserError: A file cannot be written.
    """
    claims, limits = judge_claims(runs), bound_rows()  # takes seconds
    files = {
        "results.json": _json(recipe, runs, seeds, claims, limits),
        "report.html": _html(recipe, runs, seeds, claims, limits),
    }
    for name, content in files.items():
        with atomic_write(out / name) as file:
            file.write(content)
    return claims


def claims_text(claims: Sequence[Claim]) -> str:
    """Each claim with its verdict and evidence, as text."""
    lines = []
    for claim in claims:
        lines.append(f"{claim.number}. {claim.text}: {claim.answer}")
        lines += [f"   {evidence}" for evidence in claim.evidence]
    return "\n".join(lines)


def summary_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The rows below HEADERS; mean ± standard deviation for several trainings."""
    rows = []
    for name, start in WAYS:
        there = [run[name] for run in runs if name in run]
        if not there:
            continue
        values = np.array([_summary(numbers, start) for numbers in there])
        rows.append([name, start, *(_spread(column) for column in values.T)])
    return rows


def bound_rows() -> list[list[str]]:
    """The rows below BOUND_HEADERS, from ``ideal_solids``."""
    return [[b.caption, *(f"{v:.0f}" for v in (b.data, b.from_finite, b.from_infinity))] for b in bounds()]


BOUND_HEADERS = ("caption", "its pictures", f"exact flow from {START:g}", "from infinity")


def summary_table(runs: Sequence[Run]) -> str:
    """The summary, as text."""
    return tabulate(summary_rows(runs), HEADERS, disable_numparse=True, colalign=["left"] * 2 + ["right"] * 9)


def _summary(numbers: Numbers, start: str) -> list[float]:
    solids = f"solids/{start}/1"
    things = f"things/{start}/1"
    return [
        *(numbers[f"{solids}/brightness/{ground}"].mean() for ground in (BLACK, WHITE, "dark", "light")),
        np.mean([numbers[f"{solids}/colour/{ground}"].mean() for ground in COLOURS]),
        np.mean([numbers[f"{solids}/first/{ground}"].mean() for ground in COLOURS]),
        np.mean([numbers[f"{things}/unevenness/{ground}"].mean() for ground in (BLACK, WHITE)]),
        np.mean([numbers[f"{things}/explained/{ground}"].mean() for ground in (BLACK, WHITE)]),
        numbers["error/last/held out"].mean() if start == INFINITY else np.nan,
    ]


def _spread(values: np.ndarray) -> str:
    if np.isnan(values).any():
        return ""
    digits = 2 if abs(values.mean()) < 2 else 1
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _json(
    recipe: Recipe, runs: Sequence[Run], seeds: Sequence[int], claims: Sequence[Claim], limits: list[list[str]]
) -> bytes:
    content = {
        "ztsnr": __version__,
        "recipe": asdict(recipe),
        "training seeds": list(seeds),
        "claims": [
            {
                "number": claim.number,
                "text": claim.text,
                "answer": claim.answer,
                "evidence": [{**plain(asdict(one)), "answer": one.answer} for one in claim.evidence],
            }
            for claim in claims
        ],
        "rows": [dict(zip(HEADERS, row, strict=True)) for row in summary_rows(runs)],
        "bounds": [dict(zip(BOUND_HEADERS, row, strict=True)) for row in limits],
    }
    return (json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _html(
    recipe: Recipe, runs: Sequence[Run], seeds: Sequence[int], claims: Sequence[Claim], limits: list[list[str]]
) -> bytes:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        version=__version__,
        recipe=recipe,
        claims=claims,
        sheets=_sheets(runs[0]),
        headers=HEADERS,
        rows=summary_rows(runs),
        bound_headers=BOUND_HEADERS,
        bounds=limits,
        seeds=list(seeds),
        noises=NOISES,
        steps=STEPS,
    )
    return page.encode()


def _sheets(run: Mapping[str, Numbers]) -> dict[str, Sheet]:
    """Pictures for each claim, of one training seed: always the first ones, never chosen ones."""
    names = {FINITE: f"from {START:g}", INFINITY: "from infinity"}
    same = f"{STEPS} Euler steps, without guidance; all pictures have the same noise."
    ways = [way for way in WAYS if way[0] in run]
    own = [way for way in ways if way[0] == OURS]

    def solids(name: str, start: str) -> list[str]:
        return [_url(run[name][f"solids/{start}/1/pictures/{ground}"][0]) for ground in SHOWN]

    def things(name: str, start: str) -> list[str]:
        return [_url(p) for g in (BLACK, WHITE) for p in run[name][f"things/{start}/{GUIDED:g}/pictures/{g}"][:5]]

    def long(kind: str, start: float) -> list[str]:
        return [_url(picture) for picture in run[OURS][f"{kind}/{start_name(start)}/pictures"][:8]]

    def contrast(name: str, start: str) -> str:
        return f"{np.mean([run[name][f'things/{start}/1/unevenness/{g}'].mean() for g in (BLACK, WHITE)]):.1f}"

    first = [
        (f"{name}, {names[start]}", [f"{run[name][f'solids/{start}/1/first/{g}'].mean():.1f}" for g in COLOURS])
        for name, start in ways
    ]
    lengths = (START, TWICE, FOUR_TIMES, np.inf)
    return {
        "1": Sheet(list(SHOWN), [(f"{name}, {names[start]}", solids(name, start)) for name, start in own], same),
        "2": Sheet(
            [*[f"object {i + 1} on black" for i in range(5)], *[f"object {i + 1} on white" for i in range(5)]],
            [(f"{name}, {names[start]}", things(name, start)) for name, start in ways],
            f"{STEPS} Euler steps, CFG {GUIDED:g}; all rows have the same noise. The first five of {OBJECTS} objects.",
        ),
        "2b": Sheet(
            ["levels"],
            [(f"{name}, {names[start]}", [contrast(name, start)]) for name, start in ways],
            "Standard deviation of the ground around an object on black and white, before clipping, without guidance.",
        ),
        "3": Sheet(
            list(COLOURS),
            first,
            "CIEDE2000 between the requested colour and the mean of the first prediction of x0.",
        ),
        "4": Sheet(
            [f"{i + 1}" for i in range(8)],
            [(f"from {start_name(s)}", long("halved", s)) for s in lengths]
            + [(f"64 x 64, from {start_name(s)}", long("literal", s)) for s in lengths],
            f"Snakes, trains and pencils, the first eight of {LONG_PICTURES}; CFG {GUIDED:g}. The upper rows show "
            "the means of 2 x 2 blocks of a canvas twice as wide; a picture counts as whole if one object explains "
            f"more than {WHOLE:.0%} of it. The lower rows show such canvases themselves, which no network saw.",
        ),
        "5": Sheet(
            list(SHOWN),
            [(f"{name}, from infinity", solids(name, INFINITY)) for name in (STARVED, OURS) if name in run],
            same,
        ),
    }


def _url(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
