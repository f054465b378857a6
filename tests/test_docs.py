"""The pages of docs/: the picture of the rooms is true, public names have an entry, links lead somewhere."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import ztsnr.checkpoints
import ztsnr.diagnostics
import ztsnr.samplers

from .test_import_rules import FILES, ROOMS, imports_of, room_of

ROOT = Path(__file__).resolve().parent.parent
GROUND = {"errors", "extras", "canvas", "files", "world"}  # "ground" in the picture; whoever stands above may use it


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_both_readmes_have_the_same_tables():
    english, chinese = (
        [line.count("|") for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        for name in ("README.md", "README.zh.md")
    )
    assert english == chinese


# ----------------------------------------------------------------------------------------------------------------------
# The picture of the rooms


def drawn():
    """Which rooms a room reaches along the arrows, itself included."""
    picture = page("architecture").split("```mermaid", 2)[1].split("```")[0]
    arrows = re.findall(r"^ +(\w+) --> (\w+)$", picture, re.MULTILINE)
    reached = {room: {room} for room in ROOMS} | {"ground": {"ground"}}
    for room in ROOMS:  # from the ground up
        for above, below in arrows:
            if above == room:
                reached[room] |= reached[below]
    return reached


def test_every_import_follows_the_arrows():
    reached = drawn()
    for path in FILES:
        room = room_of(path.relative_to(ROOT).as_posix())
        for name in imports_of(path):
            parts = name.split(".")
            if room in reached and parts[0] == "ztsnr" and len(parts) > 1 and parts[1] in ROOMS:
                other = parts[1]
                assert other in reached[room] or other in GROUND, f"{path} imports {name}: no arrow leads there"


def test_the_picture_has_every_room():
    picture = page("architecture").split("```mermaid", 2)[1].split("```")[0]
    assert [room for room in ROOMS if not re.search(rf"\b{room}\b", picture)] == []


# ----------------------------------------------------------------------------------------------------------------------
# The API reference


@pytest.mark.parametrize("room", ["samplers", "checkpoints", "diagnostics"])
def test_every_public_name_is_in_the_reference(room):
    text = page(f"api/{room}")
    names = getattr(ztsnr, room).__all__
    assert [name for name in names if not re.search(rf"(\.{name}$|`{name}`)", text, re.MULTILINE)] == []


# ----------------------------------------------------------------------------------------------------------------------
# Links


@pytest.fixture
def hooks():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("target", "source", "uri", "link"),
    [
        ("docs/leak.md", "README.md", "index.md", "leak.md"),
        ("docs/networks.jpg", "README.md", "index.md", "networks.jpg"),
        ("../README.md", "docs/leak.md", "leak.md", "index.md"),
        ("../benchmarks/RESULTS.md", "docs/leak.md", "leak.md", "results.md"),
        ("../leak.md", "docs/api/samplers.md", "api/samplers.md", "../leak.md"),
        ("../training/config.py", "docs/leak.md", "leak.md", "https://e.org/blob/main/training/config.py"),
    ],
)
def test_links_of_the_site(hooks, target, source, uri, link):
    assert hooks.site_link(target, source, uri, "https://e.org") == link


def test_links_into_nothing_fail(hooks):
    with pytest.raises(sys.modules["mkdocs"].exceptions.PluginError, match="does not exist"):
        hooks.site_link("../nothing.md", "docs/leak.md", "leak.md", "https://e.org")


def test_the_package_is_found_under_its_name(hooks, tmp_path):
    hooks.link_package(tmp_path)
    assert (tmp_path / "ztsnr" / "samplers" / "sampling.py").is_file()
    assert (tmp_path / "ztsnr" / "canvas.py").is_file()
    assert not (tmp_path / "ztsnr" / "tests").exists()
