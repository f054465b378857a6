"""Who may import whom, and that importing the package costs nothing."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("samplers", "diagnostics", "checkpoints", "training", "demo", "nodes")
MAY_IMPORT = {
    "samplers": set(),
    "diagnostics": {"samplers"},
    "checkpoints": {"samplers"},
    "training": {"samplers", "diagnostics", "checkpoints"},
    "demo": {"samplers", "diagnostics", "checkpoints", "training"},
    "nodes": {"samplers", "diagnostics", "checkpoints"},
}
ENTRIES = {("__init__.py", "nodes"), ("__main__.py", "cli")}  # what ComfyUI calls, and `python -m ztsnr`
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
FILES = sorted(path for room in ROOMS for path in (ROOT / room).glob("**/*.py")) + [
    path for path in ROOT.glob("*.py") if path.name != "conftest.py"
]


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rooms_import_only_what_they_may(path):
    where = path.relative_to(ROOT).as_posix()
    room = where.split("/")[0] if "/" in where else None
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "ztsnr" and len(parts) > 1:
            is_entry = (where, parts[1]) in ENTRIES
            assert parts[1] not in ("nodes", "cli") or parts[1] == room or is_entry, f"{where} imports {name}"
            if room and parts[1] in ROOMS and parts[1] != room:
                assert parts[1] in MAY_IMPORT[room], f"{where} imports {name}"
        if parts[0] in CONFINED:
            assert where.startswith(CONFINED[parts[0]]), f"{where} imports {name}"
        if room == "samplers" and parts[0] not in {"ztsnr", *sys.stdlib_module_names}:
            assert parts[0] in SAMPLERS_MAY_USE, f"{where} imports {name}"


def test_the_rules_can_fail():
    source = ROOT / "samplers" / "sampling.py"
    assert "ztsnr.samplers.solvers.SOLVERS" in set(imports_of(source))
    assert any(name.split(".")[0] == "torch" for name in imports_of(source))


def test_every_room_is_packaged():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {f"ztsnr.{room}" for room in ROOMS if (ROOT / room / "__init__.py").exists()}
    assert set(packages) == {"ztsnr"} | rooms


def test_importing_the_package_is_cheap():
    program = (
        "import time; start = time.perf_counter(); import ztsnr; took = time.perf_counter() - start; import sys;"
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
