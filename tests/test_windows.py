"""What differs on Windows, simulated: narrow encodings in pipes, files that are held while open or mapped."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

import ztsnr
from ztsnr import files as atomic
from ztsnr.checkpoints import forward, inspect_checkpoint, mark_checkpoint, to_folder, to_single_file
from ztsnr.checkpoints.pipeline import load_pipeline
from ztsnr.checkpoints.verify import verify_checkpoint

from .tiny_pipelines import make_tiny_sdxl
from .windows import windows_files  # noqa: F401 (a fixture)


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


def test_settings_are_shown_to_a_narrow_pipe(tmp_path):
    pytest.importorskip("pydantic")
    path = tmp_path / "settings.toml"
    path.write_text(
        'out = "run"\nsteps = 3\nmodel.base = "m"\ndata = {batch_size = 2, sources = ["\u9ed2"]}\n', encoding="utf-8"
    )
    done = python("-m", "ztsnr", "finetune", path, "--list-settings", encoding="cp1252")
    assert done.returncode == 0, done.stderr
    assert b"optimizer.learning_rate" in done.stdout


def test_json_is_ascii(far_away):
    done = python("-m", "ztsnr", "inspect", "--json", far_away, encoding="cp1252", check=True)
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["metadata"]["modelspec.title"] == "黒い猫 \u2500"


# ----------------------------------------------------------------------------------------------------------------------
# Files that are held


def test_the_stand_in_refuses_what_windows_would(tmp_path, windows):
    path = tmp_path / "folder" / "a.safetensors"
    path.parent.mkdir()
    save_file({"a": np.zeros(4096)}, path)
    mapped = load_file(path)
    for action in (
        path.unlink,
        lambda: path.rename(tmp_path / "b"),
        lambda: os.replace(tmp_path / "new", path),
        lambda: path.parent.rename(tmp_path / "other"),
        lambda: shutil.rmtree(path.parent),
    ):
        with pytest.raises(PermissionError, match="WinError 32"):
            action()
    del mapped
    with path.open("rb"), pytest.raises(PermissionError):
        path.unlink()
    path.unlink()
    (tmp_path / "taken").touch()
    with pytest.raises(FileExistsError):
        path.parent.rename(tmp_path / "taken")


def test_files_and_folders_appear_whole(tmp_path, windows):
    path, folder = tmp_path / "a.bin", tmp_path / "folder"
    for content in (b"old", b"new"):
        with atomic.atomic_write(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    with atomic.atomic_folder(folder) as place:
        (place / "part").mkdir()
        (place / "part" / "a.bin").write_bytes(b"new")
    assert (folder / "part" / "a.bin").read_bytes() == b"new"
    with pytest.raises(ValueError, match="already exists"), atomic.atomic_folder(folder):
        pass
    with pytest.raises(ZeroDivisionError), atomic.atomic_write(path) as file:
        file.write(b"half" * (1 // 0))
    assert path.read_bytes() == b"new"
    assert sorted(tmp_path.iterdir()) == [path, folder]


def test_a_file_that_somebody_holds_is_kept_and_told(tmp_path, windows):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    sentence = r"a\.bin cannot be written: \[WinError 32\] it is being used by another process$"
    with path.open("rb"), pytest.raises(ValueError, match=sentence), atomic.atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["replace", "rename"])
def test_one_refusal_is_not_the_last_word(tmp_path, windows, monkeypatch, name):
    """A scanner holds the new file for a moment."""
    refusals, function = [], getattr(os, name)

    def scanned(*paths):
        if len(refusals) < 2:
            refusals.append(paths)
            raise PermissionError(errno.EACCES, "Access is denied")
        return function(*paths)

    monkeypatch.setattr(os, name, scanned)
    if name == "replace":
        with atomic.atomic_write(tmp_path / "a") as file:
            file.write(b"new")
    else:
        with atomic.atomic_folder(tmp_path / "a") as folder:
            (folder / "b").write_bytes(b"new")
    assert len(refusals) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_checkpoints_are_marked_converted_and_verified(tmp_path, windows):
    folder, file = make_tiny_sdxl(tmp_path / "folder"), tmp_path / "model.safetensors"
    to_single_file(folder, file)
    loaded = load_pipeline(file, config=folder)
    mark_checkpoint(file, ztsnr=True, v_pred=True, out=tmp_path / "marked.safetensors")
    to_folder(file, tmp_path / "back", config=folder)
    assert verify_checkpoint(file, tmp_path / "back", run=True, comfyui=None).sound
    with pytest.raises(ValueError, match=r"cannot be written: .*WinError 32"):  # the pipeline has it mapped
        mark_checkpoint(file, ztsnr=True, v_pred=True, in_place=True)
    del loaded
    gc.collect()
    mark_checkpoint(file, ztsnr=True, v_pred=True, in_place=True)
    mark_checkpoint(folder, ztsnr=True, v_pred=True, in_place=True)
    assert inspect_checkpoint(file).zero_terminal_snr


FAKE_COMFYUI = """
import sys, torch
from safetensors.torch import save_file
save_file({"sigmas": torch.arange(5000.0)}, sys.argv[4], {"about": '{"version": "1"}'})
"""


def test_what_comfyui_answers_is_not_mapped(tmp_path, windows, monkeypatch):
    """A program stands for ComfyUI, whose answer lies in a folder that is removed at once."""
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    monkeypatch.setattr(forward, "INSIDE_COMFYUI", tmp_path / "fake.py")
    (tmp_path / "fake.py").write_text(FAKE_COMFYUI)
    about, found = forward._run_comfyui(tmp_path, tmp_path / "a.safetensors", {"x": torch.zeros(3)}, {})
    assert about == {"version": "1"}
    assert torch.equal(found["sigmas"], torch.arange(5000.0))


def test_what_comfyui_says_is_read_whatever_its_encoding(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    monkeypatch.setattr(forward, "INSIDE_COMFYUI", tmp_path / "fake.py")
    for written, read in ((r"b'caf\xe9'", "caf\ufffd"), ("'模型'.encode()", "模型")):
        (tmp_path / "fake.py").write_text(f"import sys; sys.stderr.buffer.write({written}); sys.exit(1)", "utf-8")
        with pytest.raises(RuntimeError, match=f"could not run a.safetensors: {read}"):
            forward._run_comfyui(tmp_path, tmp_path / "a.safetensors", {"x": torch.zeros(3)}, {})
    (tmp_path / "fake.py").write_text("import sys; sys.exit('模型')", "utf-8")
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")  # as a pipe on Windows is by itself
    with pytest.raises(RuntimeError, match="模型"):
        forward._run_comfyui(tmp_path, tmp_path / "a.safetensors", {"x": torch.zeros(3)}, {})
