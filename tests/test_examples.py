"""The scripts in examples/ run, and do what they say."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ztsnr.training.ema import Ema, PowerFunction

from .tiny_pipelines import make_tiny_sdxl

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
WEIGHTS = ROOT / "demo" / "weights"


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_tested(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    assert f'example("{path.stem}")' in Path(__file__).read_text(encoding="utf-8")


def test_scheduler_swap(tmp_path):
    make_tiny_sdxl(tmp_path / "model")
    example("scheduler_swap").main(str(tmp_path / "model"), "completely black", str(tmp_path / "out.png"))
    assert Image.open(tmp_path / "out.png").size == (32, 32)


@pytest.mark.parametrize(("prompt", "level"), [("completely black", 0), ("completely white", 255)])
def test_own_loop_paints_what_was_asked(tmp_path, prompt, level):
    example("own_loop").main(prompt, str(tmp_path / "out.png"))
    assert abs(np.asarray(Image.open(tmp_path / "out.png")).mean() - level) < 12


def test_own_solver_is_of_second_order():
    errors = example("own_solver").main()
    assert errors["spectral"] < errors["straight"] < errors["euler"] / 2


@pytest.mark.parametrize(("file", "status"), [("v_zero_snr", 0), ("v_plain", 1)])
def test_leak_gate(file, status):
    gate = example("leak_gate")
    assert gate.main(str(WEIGHTS / f"{file}.safetensors"), "completely black", str(WEIGHTS / "config")) == status


def test_post_hoc_average(tmp_path):
    """Of weights that grow with the square root of time, beside the average of that width made during the training."""
    weight = torch.nn.Parameter(torch.zeros(3))
    kept, wanted = (PowerFunction(0.05), PowerFunction(0.10)), PowerFunction(0.07)
    ema, exact = (Ema({"weight": weight}, profiles) for profiles in (kept, (wanted,)))
    for step in range(1, 201):
        weight.data.fill_(step**0.5)
        ema.update(step)
        exact.update(step)
        if step % 50 == 0:
            for profile in kept:
                ema.save_snapshot(tmp_path / f"{profile.name}-step-{step:08d}.safetensors", profile)
    (path,) = example("post_hoc_average").main(str(tmp_path), str(tmp_path / "out"), "0.07")
    torch.testing.assert_close(load_file(path)["weight"], exact.tensors(wanted)["weight"], rtol=1e-3, atol=0)
