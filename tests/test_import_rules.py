"""Who may import whom, and that importing the package costs nothing."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up: a room imports only what stands before it.
ROOMS = (
    "errors",
    "extras",
    "canvas",
    "files",
    "world",
    "samplers",
    "figures",
    "checkpoints",
    "diagnostics",
    "data",
    "nodes",
    "training",
    "demo",
    "cli",
)
FOLDERS = tuple(room for room in ROOMS if (Path(__file__).resolve().parent.parent / room).is_dir())
NODES_MAY_NOT_USE = {"data"}
ENTRIES = {("__init__.py", "nodes"), ("__init__.py", "moved"), ("__main__.py", "cli"), ("__main__.py", "extras")}
# foreign packages that only some places may import
CONFINED = {
    "comfy": ("nodes/",),
    "comfy_api": ("nodes/", "__init__.py"),
    "comfy_execution": ("nodes/",),
    "folder_paths": ("nodes/",),
    "server": ("nodes/",),
    "diffusers": ("samplers/diffusers_", "checkpoints/", "training/", "demo/"),
}
SAMPLERS_MAY_USE = {"torch", "numpy", "diffusers"}
FILES = sorted(path for room in FOLDERS for path in (ROOT / room).glob("**/*.py")) + [
    path for path in ROOT.glob("*.py") if path.name != "conftest.py"
]


def without_type_checking(tree):
    """The tree without what is imported for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


def imports_of(path, tree=None):
    """Absolute dotted names of everything a file (or a tree of it) imports, relative imports resolved to ztsnr...."""
    package = ["ztsnr", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree or ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join([*module, alias.name]) for alias in node.names)


def room_of(where):
    return where.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rooms_import_only_what_they_may(path):
    where = path.relative_to(ROOT).as_posix()
    room = room_of(where)
    at_run_time = set(imports_of(path, without_type_checking(ast.parse(path.read_text(encoding="utf-8")))))
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "ztsnr" and len(parts) > 1 and parts[1] in ROOMS and parts[1] != room:
            if (where, parts[1]) not in ENTRIES:
                assert room in ROOMS, f"{where} imports {name}"
                assert ROOMS.index(parts[1]) < ROOMS.index(room), f"{where} imports {name}, which stands above it"
                assert parts[1] != "nodes", f"{where} imports {name}"
            if room == "nodes":
                assert parts[1] not in NODES_MAY_NOT_USE, f"{where} imports {name}"
        if parts[0] in CONFINED and name in at_run_time:
            assert where.startswith(CONFINED[parts[0]]), f"{where} imports {name}"
        if room == "samplers" and parts[0] not in {"ztsnr", *sys.stdlib_module_names}:
            assert parts[0] in SAMPLERS_MAY_USE, f"{where} imports {name}"


def graph():
    """Which file imports which, by dotted names; ``from .. import room`` is an import of the room's __init__."""
    names = {}
    for path in FILES:
        dotted = ".".join(["ztsnr", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        names[dotted] = path
    edges = {}
    for dotted, path in names.items():
        found = set()
        for name in imports_of(path):
            while name and name not in names:
                name = name.rpartition(".")[0]
            found.add(name)
        edges[dotted] = found - {"", dotted}
    return edges


def circles(edges):
    """Every set of files that import one another, directly or by way of others (Tarjan's strong components)."""
    order, lowest, stack, found = {}, {}, [], []

    def visit(name):
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            found.extend([part] if len(part) > 1 else [])

    for name in sorted(edges):
        if name not in order:
            visit(name)
    return found


def test_no_file_imports_itself_through_others():
    edges = graph()
    for name in edges:  # a package's own __init__ gathers what its files have, and they may not look back
        edges[name] -= {"ztsnr"}
    assert circles(edges) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_the_rules_can_fail():
    source = ROOT / "samplers" / "sampling.py"
    assert "ztsnr.samplers.solvers.DEFAULT_SOLVER" in set(imports_of(source))
    assert any(name.split(".")[0] == "torch" for name in imports_of(source))


def test_every_room_is_packaged():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in FILES if path.name == "__init__.py"}
    assert set(packages) == {".".join(["ztsnr", *folder.parts]) for folder in folders}


def test_type_checkers_are_told_that_the_package_is_typed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (ROOT / "py.typed").is_file()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["ztsnr"]
    assert "Typing :: Typed" in project["project"]["classifiers"]


def test_importing_the_package_is_cheap():
    program = (
        "import time; start = time.process_time(); import ztsnr; took = time.process_time() - start; import sys;"
        "print(took, any(m.split('.')[0] in ('torch', 'comfy', 'numpy', 'diffusers') for m in sys.modules))"
    )
    outcomes = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
        )
        outcomes.append(done.stdout.split())
    assert all(heavy == "False" for _, heavy in outcomes)
    assert min(float(took) for took, _ in outcomes) < 0.05
