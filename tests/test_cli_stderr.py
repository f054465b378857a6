"""Standard error of a command: one sentence for a mistake, a traceback for a bug, and no noise of other libraries."""

import logging
import os
import subprocess
import sys

import pytest

from ztsnr.cli.noise import NOISE, silence_libraries


def python(*arguments, folder):
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment)


def test_a_mistake_is_the_only_line(tmp_path):
    """Of a command that imports torch, diffusers, transformers, peft and torchao."""
    (tmp_path / "settings.toml").write_text("stepz = 3\n")
    done = python("-m", "ztsnr", "finetune", "settings.toml", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: settings.toml has stepz, which does not exist: did you mean steps?\n"


def test_a_bug_shows_its_traceback(tmp_path):
    program = (
        "import sys, numpy as np, safetensors.numpy, ztsnr.checkpoints.inspect as inspect\n"
        "from ztsnr.cli import main\n"
        "def bug(header): return np.zeros(3) + np.zeros(4)\n"
        "inspect._precision = bug\n"
        "safetensors.numpy.save_file({'a': np.zeros(2, np.float32)}, 'a.safetensors')\n"
        "main(['inspect', 'a.safetensors'])\n"
    )
    done = python("-c", program, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.splitlines()[-1].startswith("ValueError: operands could not be broadcast together")
    assert "Error: " not in done.stderr.replace("ValueError: ", "")


@pytest.mark.parametrize("name", NOISE)
def test_other_messages_of_the_libraries_come_through(name, caplog):
    silence_libraries()
    logger = logging.getLogger(name)
    caplog.set_level(logging.WARNING, logger=name)  # whatever a test before has set
    logger.addHandler(caplog.handler)
    try:
        logger.warning(NOISE[name].replace("%s", "a thing") + "x")
        logger.warning("the checkpoint is damaged")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.message for record in caplog.records} == {"the checkpoint is damaged"}
