"""Render the tables of solvers and spacings from their registries into the pages that show them.

    python docs/render_tables.py

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``.  Run this after adding or changing a solver or a
spacing; a test fails while a page is stale.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ztsnr.samplers import SOLVERS, SPACINGS
from ztsnr.samplers.protocol import find_solver
from ztsnr.samplers.spacings import find_spacing

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/mathematics.md")
MARKED = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def solvers() -> str:
    """One row a solver."""
    rows = [
        (f"`{name}`", entry.evaluations, "yes" if entry.stochastic else "no", entry.description)
        for name, entry in ((name, find_solver(name)) for name in SOLVERS)
    ]
    return table(("solver", "network calls a step", "stochastic", "rule"), rows)


def spacings() -> str:
    """One row a spacing."""
    chooses = {"timesteps": "timesteps", "sigmas": "sigmas", "canvas": "sigmas"}
    rows = [
        (f"`{name}`", chooses[entry.of], entry.description)
        for name, entry in ((name, find_spacing(name)) for name in SPACINGS)
    ]
    return table(("spacing", "chooses", "rule"), rows)


def names() -> str:
    """All names, in four rows."""
    timesteps = [name for name in SPACINGS if find_spacing(name).of == "timesteps"]
    rows = [
        ("deterministic", listed(name for name in SOLVERS if not find_solver(name).stochastic)),
        ("with fresh noise", listed(name for name in SOLVERS if find_solver(name).stochastic)),
        ("**spacings**", ""),
        ("of sigmas", listed(name for name in SPACINGS if name not in timesteps)),
        ("of timesteps", listed(timesteps)),
    ]
    return table(("solvers", "[what each one does](docs/mathematics.md#solvers-and-spacings)"), rows)


TABLES: dict[str, Callable[[], str]] = {"solvers": solvers, "spacings": spacings, "names": names}


def listed(values) -> str:
    """`a`, `b`, `c`"""
    return ", ".join(f"`{value}`" for value in values)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown, without the padding that would change every line with one cell."""
    lines = [head, *rows]
    cells = [[str(cell).replace("``", "`").replace("|", "\\|") for cell in line] for line in lines]
    head_line, *body = ["|".join(["", *(f" {cell} " if cell else " " for cell in line), ""]) for line in cells]
    return "\n".join([head_line, "|" + "---|" * len(head), *body]) + "\n"


def render(page: str) -> str:
    """The page with its tables made anew."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


def main() -> None:
    """Write every page that is stale."""
    for name in PAGES:
        path = ROOT / name
        page = path.read_text(encoding="utf-8")
        rendered = render(page)
        if rendered != page:
            path.write_text(rendered, encoding="utf-8", newline="\n")
            print(f"{name}: tables written")


if __name__ == "__main__":
    main()
