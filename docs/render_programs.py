"""Render the table of programs in the docs from the registry in checkpoints/programs.py.

    python docs/render_programs.py            # rewrite the pages
    python docs/render_programs.py --check    # exit with 1 if a page is stale

A page marks where the table stands by ``<!-- table:programs -->`` and ``<!-- /table -->``.
"""

import re
import sys
from pathlib import Path

from ztsnr.checkpoints.programs import PROGRAMS

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/checkpoints.md",)
REGION = re.compile(r"(<!-- table:programs -->\n).*?(<!-- /table -->)", re.DOTALL)


def table() -> str:
    """The table in Markdown, one row for each program."""
    rows = [(program.name, program.looks_at, program.what_to_do) for program in PROGRAMS.values()]
    lines = ["| program | looks at | what to do |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "".join(f"{line}\n" for line in lines)


def render(page: str) -> str:
    """A page with the table in its marked region as the registry has it now."""
    return REGION.sub(lambda region: f"{region[1]}{table()}{region[2]}", page)


def main() -> None:
    stale = []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text("utf-8")
        if (after := render(before)) != before:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                path.write_text(after, "utf-8")
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"stale, run docs/render_programs.py: {', '.join(stale)}")


if __name__ == "__main__":
    main()
