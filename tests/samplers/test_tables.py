"""The tables of solvers and spacings in the docs are those of the registries."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def renderer():
    spec = importlib.util.spec_from_file_location("render_tables", ROOT / "docs" / "render_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_fresh(renderer):
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in renderer.PAGES}
    stale = [name for name, page in pages.items() if renderer.render(page) != page]
    assert stale == [], "run: python docs/render_tables.py"
    shown = {found[2] for page in pages.values() for found in renderer.MARKED.finditer(page)}
    assert shown == set(renderer.TABLES)


def test_a_stale_table_is_noticed(renderer):
    page = "before\n<!-- table:solvers -->\n| old |\n<!-- /table -->\nafter\n"
    assert renderer.render(page) == f"before\n<!-- table:solvers -->\n{renderer.solvers()}<!-- /table -->\nafter\n"
    assert "| `heun` | 2 | no | " in renderer.solvers()
    assert "| `trailing` | timesteps | " in renderer.spacings()


def test_cells_are_escaped(renderer):
    assert renderer.table(("a", "b"), [("x|y", "``z``")]) == "| a | b |\n|---|---|\n| x\\|y | `z` |\n"
