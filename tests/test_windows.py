"""What differs on Windows, simulated: narrow encodings in pipes, files that are held while open or mapped."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.numpy import save_file

import ztsnr


def python(*arguments, encoding=None, **options):
    """A process whose pipes are in an encoding of Windows."""
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | ({"PYTHONIOENCODING": encoding} if encoding else {})
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, env=environment, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Pipes


@pytest.fixture
def far_away(tmp_path):
    """A file whose name and metadata no code page of western Europe has."""
    path = tmp_path / "模型.safetensors"
    save_file({}, path, {"modelspec.title": "黒い猫 \u2500"})
    return path


def test_python_m_is_the_command():
    script = (
        "import sys; from ztsnr.cli import main; sys.argv[0] = 'ztsnr'; main()"  # what pip makes of [project.scripts]
    )
    assert python("-m", "ztsnr", "--help", check=True).stdout == python("-c", script, "--help", check=True).stdout
    assert python("-m", "ztsnr", "--version").stdout.decode().strip() == f"ztsnr, version {ztsnr.__version__}"
    assert python("-m", "ztsnr", "nothing").returncode == 2


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "utf-8"])
def test_names_that_a_pipe_cannot_show_are_escaped(far_away, encoding):
    done = python("-m", "ztsnr", "inspect", far_away, encoding=encoding)
    assert done.returncode == 0, done.stderr
    shown = "模型" if encoding == "utf-8" else r"\u6a21\u578b"
    assert f"{shown}.safetensors" in done.stdout.decode(encoding)


def test_a_mistake_is_told_to_a_narrow_pipe(tmp_path):
    done = python("-m", "ztsnr", "inspect", tmp_path / "模型", encoding="cp1252")
    assert done.returncode == 2
    assert rb"\u6a21\u578b" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_names_that_are_no_text_are_shown(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.safetensors"
    save_file({}, os.fsdecode(path))
    done = python("-m", "ztsnr", "inspect", os.fsdecode(path), encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\udcff.safetensors" in done.stdout


def test_boxes_of_the_settings_are_shown_to_a_narrow_pipe(tmp_path):
    pytest.importorskip("tyro")
    path = tmp_path / "settings.toml"
    path.write_text('out = "run"\nsteps = 3\nmodel.base = "m"\ndata = {batch_size = 2, sources = [{path = "p"}]}\n')
    done = python("-m", "ztsnr", "finetune", path, "--list-settings", encoding="cp1252")
    assert done.returncode == 0, done.stderr
    assert b"--optimizer.learning-rate" in done.stdout


def test_json_is_ascii(far_away):
    done = python("-m", "ztsnr", "inspect", "--json", far_away, encoding="cp1252", check=True)
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["metadata"]["modelspec.title"] == "黒い猫 \u2500"
