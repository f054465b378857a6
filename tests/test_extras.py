"""Without the libraries of an extra: the package imports, and what needs one says in one sentence how to install it."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ztsnr.extras import EXTRAS, PROJECTS, explain, extras_named, how_to_install

from .test_import_rules import imports_of

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes"}  # modules of its own
MODULES = {"pillow": "PIL"}  # named otherwise than their project

# Take modules away from the interpreter, as if they had never been installed.
HIDE = """
import sys
hidden = set(sys.argv[1].split(","))
class Finder:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
"""


def without(modules, program, **environment):
    command = [sys.executable, "-c", HIDE + program, ",".join(modules)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def projects(requirements):
    return {re.match(r"[\w-]+", text)[0]: text for text in requirements if not text.startswith(PROJECT["name"])}


# ----------------------------------------------------------------------------------------------------------------------
# Which library is in which extra


def test_extras_are_those_of_the_project():
    groups = PROJECT["optional-dependencies"]
    for module, extra in EXTRAS.items():
        if module not in ("huggingface_hub", "safetensors"):  # which diffusers brings
            assert PROJECTS.get(module, module) in projects(groups[extra]), module
    of_the_pack = projects(PROJECT["dependencies"])
    for extra in ("diffusers", "cli", "plot", "train", "lowbit", "vae"):
        modules = {PROJECTS.get(module, module) for module in EXTRAS}
        assert projects(groups[extra]).keys() - of_the_pack.keys() <= modules, extra


def test_the_node_pack_imports_what_comfyui_has():
    """Of what runs when ComfyUI loads the nodes: no library but those of ``[project].dependencies``."""
    waiting, seen, foreign = ["ztsnr.nodes"], set(), set()
    while waiting:
        name = waiting.pop()
        parts = name.split(".")
        if parts[0] != "ztsnr":
            foreign.add(parts[0])
            continue
        if name in seen:
            continue
        seen.add(name)
        place = ROOT.joinpath(*parts[1:])
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        waiting.append(".".join(parts[:-1]) or "ztsnr")  # what holds it is imported first
        if path.is_file():  # else it is a name inside of a module
            waiting += imports_when_loaded(path)
    assert {"ztsnr.nodes.diagnostic", "ztsnr.samplers.solvers"} <= seen
    allowed = {MODULES.get(name, name) for name in projects(PROJECT["dependencies"])}
    assert foreign - set(sys.stdlib_module_names) - COMFYUI <= allowed


def imports_when_loaded(path):
    """Of a module's own level: neither in functions nor for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return imports_of(path, tree)


def test_dependencies_of_the_node_pack_leave_comfyuis_versions_alone():
    assert all(re.fullmatch(r"[\w-]+", text) for text in PROJECT["dependencies"])


# ----------------------------------------------------------------------------------------------------------------------
# Missing ones


def test_rooms_import_without_any_extra():
    program = """
import json, ztsnr
import ztsnr.canvas, ztsnr.checkpoints, ztsnr.demo, ztsnr.diagnostics, ztsnr.samplers, ztsnr.data.epoch_plan
said = {}
for name in ("ZTSNRScheduler", "attach"):
    try: getattr(ztsnr.samplers, name)
    except ImportError as error: said[name] = str(error)
try: ztsnr.checkpoints.load_pipeline
except ImportError as error: said["load_pipeline"] = str(error)
print(json.dumps(said))
"""
    done = without(EXTRAS, program)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        name: f"{name} needs diffusers: {how_to_install('diffusers')}"
        for name in ("ZTSNRScheduler", "attach", "load_pipeline")
    }


def test_the_command_says_what_it_is_made_with():
    done = without(["click"], "from ztsnr.__main__ import main; main()")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'Error: ztsnr needs click: pip install "comfyui-ztsnr[cli]", or pip install click\n'


COMMANDS = {  # and the first library that each asks for
    "leak model": r"ztsnr leak needs \w+: .*\[(diffusers|cli)\]",
    "example out": r"ztsnr example needs \w+: .*\[(diffusers|cli|train)\]",
    "demo --train cpu": r"ztsnr demo needs \w+: .*\[(diffusers|cli|train)\]",
    "convert . out": r"ztsnr convert needs \w+: .*\[diffusers\]",
    "buckets .": r"ztsnr buckets needs \w+: .*\[train\]",
    "cache . --vae vae": r"ztsnr cache needs \w+: .*\[(train|diffusers)\]",
    "finetune settings.toml": r"ztsnr finetune needs \w+: .*\[(train|diffusers)\]",
    "finetune-vae settings.toml": r"ztsnr finetune-vae needs \w+: .*\[(train|diffusers)\]",
}
RUN = """
import json
from click.testing import CliRunner
from ztsnr.cli import main
commands = %r
found = {}
for command in commands:
    done = CliRunner().invoke(main, command.split(), prog_name="ztsnr")
    found[command] = [done.exit_code, done.output, repr(done.exception)]
print(json.dumps(found))
"""


def test_every_command_names_the_extra_it_lacks(tmp_path):
    modules = EXTRAS.keys() - {"click"}
    done = without(modules, f"import os; os.chdir({str(tmp_path)!r})" + RUN % ([*COMMANDS, "--help", "leak --help"],))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for command in ("--help", "leak --help"):
        assert found[command][0] == 0
    for command, sentence in COMMANDS.items():
        code, output, exception = found[command]
        assert code == 2, (command, output, exception)
        assert re.fullmatch(rf"Error: {sentence}.*\n", output), (command, output)


def test_errors_of_other_libraries_are_bugs():
    for error in (ModuleNotFoundError("No module named 'x'", name="x"), RuntimeError("x"), ImportError("x")):
        assert explain("x", error) is None
        with pytest.raises(type(error), match="x"), extras_named("x"):
            raise error


# ----------------------------------------------------------------------------------------------------------------------
# A torchvision that was built for another torch


@pytest.fixture
def misfit(tmp_path):
    """A stand-in: PyPI's torchvision beside another build of torch raises this where it is imported."""
    place = tmp_path / "path" / "torchvision"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    (tmp_path / "path" / "torchvision-0.1.2.dist-info").mkdir()
    (tmp_path / "path" / "torchvision-0.1.2.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1.2\n")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])}


def test_a_torchvision_that_does_not_fit_torch(misfit, tmp_path):
    (tmp_path / "settings.toml").write_text("")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "a.png")
    save_file({"v_pred": torch.zeros(1)}, tmp_path / "model.safetensors")
    needing = ["leak model", "finetune settings.toml"]
    others = ["--version", "inspect model.safetensors", "verify model.safetensors", "buckets pictures"]
    program = f"import os; os.chdir({str(tmp_path)!r})" + RUN % ([*needing, *others],)
    done = without([], program, **misfit)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for command in needing:
        code, output, exception = found[command]
        assert code == 2, (output, exception)
        sentence = output.splitlines()[-1]
        name = command.split()[0]
        assert sentence.startswith("Error: torchvision 0.1.2 does not fit torch 2."), sentence
        assert f"(operator torchvision::nms does not exist), and ztsnr {name} imports transformers" in sentence
        assert "pip uninstall torchvision" in sentence
    for command in others:
        code, output, exception = found[command]
        assert code == 0, (command, output, exception)
