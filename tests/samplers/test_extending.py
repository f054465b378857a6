"""The examples of docs/extending.md run, and do what the page says."""

import re
from pathlib import Path

import pytest
import torch

from ztsnr.diagnostics import GaussianModes
from ztsnr.samplers import NoiseSchedule, protocol, sample, spacings, step_schedule

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.fixture
def names(monkeypatch):
    """What the page's code defines, when all of it is run from top to bottom."""
    monkeypatch.setattr(protocol, "_ENTRIES", dict(protocol._ENTRIES))
    monkeypatch.setattr(spacings, "_ENTRIES", dict(spacings._ENTRIES))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    namespace = {"__name__": "extending"}
    exec("\n".join(blocks), namespace)
    return namespace


def test_the_function_without_a_name_is_euler(names):
    sigmas = step_schedule(NoiseSchedule.sdxl(), 20, latent_size=(16, 16))
    euler = sample(names["denoise"], names["noise"], sigmas, "euler")
    assert torch.allclose(names["picture"], euler, atol=1e-5)


def test_the_example_is_of_second_order(names):
    std = torch.tensor(2.0, dtype=torch.float64)
    noise = torch.ones(1, 1, 2, 2)
    errors = []
    for steps in (20, 40):
        sigmas = torch.linspace(torch.pi / 2, 0.1, steps + 1, dtype=torch.float64).tan()
        sigmas[0] = torch.inf
        picture = sample(GaussianModes(std=std), noise, sigmas, "halfway")
        exact = (noise.double() * (std**2 + sigmas[-1] ** 2).sqrt() / (1 + sigmas[-1] ** 2).sqrt()).float()
        errors.append((picture - exact).abs().max().item())
    assert errors[0] < 0.01
    assert errors[0] / errors[1] > 3


def test_the_spacings_begin_at_infinity_and_end_at_zero(names):
    for name in ("squares", "early"):
        sigmas = step_schedule(NoiseSchedule.sdxl(), 20, name, latent_size=(16, 16))
        assert len(sigmas) == 21
        assert sigmas[0] == torch.inf
        assert sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()
