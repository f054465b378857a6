"""The kinds of guidance in the exposure benchmark are CFG where they must be, and its measures are what they say."""

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import norm

from ztsnr.demo.composed import Asked
from ztsnr.samplers import guide, rescale_contrast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import exposure as bench

SIGMAS = (math.inf, 40.0, 1.0, 0.03)


@pytest.fixture
def predictions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Conditional and unconditional x0, and the state that they are of."""
    random = torch.Generator().manual_seed(0)
    cond, uncond, x = (torch.randn(3, 4, 16, 16, generator=random) for _ in range(3))
    return cond + 1, uncond - 0.5, x


class TwoAnswers:
    """Stands for a network: one x0 for any caption, another for none."""

    shape = (4, 16, 16)

    def __init__(self, cond: torch.Tensor, uncond: torch.Tensor):
        self.answers = {True: cond, False: uncond}

    def denoise(self, captions):
        return lambda x, sigma: self.answers[any(captions)]


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(
    "join",
    [
        partial(bench.rescaled, phi=0.0),
        partial(bench.rescaled, by=rescale_contrast, phi=0.0),
        partial(bench.exposure_true, exposure=0.0, contrast=0.0),
        partial(bench.projected, eta=1.0),
        partial(bench.frequency_decoupled, low=1.0),
    ],
    ids=["rescale", "rescale, mean", "exposure-true", "projected", "frequency-decoupled"],
)
def test_without_its_own_doing_a_kind_is_cfg(predictions, join, sigma):
    cond, uncond, x = predictions
    torch.testing.assert_close(join(cond, uncond, 5.0, x, sigma), guide(cond, uncond, 5.0), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", bench.KINDS, ids=lambda kind: kind.name)
def test_at_scale_1_every_kind_is_the_prompt_alone(predictions, kind):
    cond, uncond, x = predictions
    for sigma in SIGMAS:
        torch.testing.assert_close(kind.join(cond, uncond, 1.0, x, sigma), cond, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", bench.KINDS, ids=lambda kind: kind.name)
def test_a_batch_is_single_runs(predictions, kind):
    cond, uncond, x = predictions
    for sigma in SIGMAS:
        batch = kind.join(cond, uncond, 5.0, x, sigma)
        single = [kind.join(*(rows[i : i + 1] for rows in (cond, uncond)), 5.0, x[i : i + 1], sigma) for i in range(3)]
        torch.testing.assert_close(batch, torch.cat(single), atol=1e-4, rtol=1e-4)


def test_guidance_acts_inside_the_interval_alone(predictions):
    cond, uncond, x = predictions
    network, guided = TwoAnswers(cond, uncond), guide(cond, uncond, 5.0)

    def answer(interval: tuple[float, float], sigma: float) -> torch.Tensor:
        kind = bench.Kind("interval", bench.cfg, interval)
        return bench.guided_denoise(network, ["a fox"] * 3, kind, 5.0)(x, sigma)

    for sigma in SIGMAS:
        assert torch.equal(answer((0.0, math.inf), sigma), guided)
    # the canvas is 16 long
    for sigma, inside in ((math.inf, False), (4.1, False), (4.0, True), (0.17, True), (0.16, False), (0.03, False)):
        assert torch.equal(answer((0.01, 0.25), sigma), guided if inside else cond), sigma


def test_the_projection_leaves_what_is_orthogonal_to_the_picture(predictions):
    cond, difference, x = predictions
    along = (difference * cond).flatten(1).sum(1) / cond.square().flatten(1).sum(1)
    orthogonal = difference - along[:, None, None, None] * cond
    for d, kept in ((0.3 * cond, 0.0), (difference, 1.0)):
        added = bench.projected(cond, cond - d, 3.0, x, 1.0) - cond
        torch.testing.assert_close(added, 2 * kept * orthogonal, atol=1e-5, rtol=1e-4)


def test_frequencies_of_guidance_are_decoupled(predictions):
    cond, _, x = predictions
    flat = torch.tensor([1.0, -2, 3, 0.5]).view(1, 4, 1, 1).expand(3, -1, 16, 16)
    checkers = (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16))
    for difference, share in ((flat, 0.5), (checkers.expand(3, 4, -1, -1), 1.0)):
        added = bench.frequency_decoupled(cond, cond - difference, 5.0, x, 1.0) - cond
        torch.testing.assert_close(added, 4 * share * difference, atol=1e-5, rtol=1e-5)


def test_the_mean_alone_comes_from_the_prompt(predictions):
    cond, uncond, x = predictions
    guided = bench.exposure_true(cond, uncond, 5.0, x, 1.0, exposure=1.0, contrast=0.0)
    torch.testing.assert_close(guided.mean((2, 3)), cond.mean((2, 3)), atol=1e-5, rtol=0)
    centred = [rows - rows.mean((2, 3), keepdim=True) for rows in (guided, guide(cond, uncond, 5.0))]
    torch.testing.assert_close(*centred, atol=1e-5, rtol=0)


def test_measures_of_known_pictures(monkeypatch):
    asked = [Asked("black", "fox"), Asked("black", "fox"), Asked("dark", "fox")]
    monkeypatch.setattr(bench, "adherence", lambda *_: (np.array([True, True, False]), np.array([True, False, True])))
    pictures = np.full((3, 32, 32, 3), 20.0)
    pictures[1] = -40
    pictures[2, :16] = 300
    found = bench.measure(pictures, asked, None, None)
    black = bench.asked_luma("black")
    assert 4 < black < 9  # shades of black are cut at 0: 16 / sqrt(2 pi) and a little
    np.testing.assert_allclose(found["brightness"], [20, 0, 137.5])
    np.testing.assert_allclose(found["off"], [20 - black, -black, math.nan])
    np.testing.assert_allclose(found["clipped"], [0, 1, 0.5])
    assert found["both"].tolist() == [True, False, False]


def test_brightness_is_moved_by_the_rms_of_what_pictures_changed():
    alone = {"brightness": np.array([10.0, 20, 30, 40])}
    assert bench.moved({"brightness": np.array([13.0, 16, 30, 40])}, alone).value == pytest.approx(2.5)


def test_table_and_picture():
    pictures = np.random.default_rng(0).uniform(-50, 300, (4, 32, 32, 3))
    answers = {name: np.array([True, False, True, True]) for name in ("thing", "ground", "both")}
    numbers = {
        "brightness": pictures.mean((1, 2, 3)),
        "off": np.array([1.0, -1, 1, math.nan]),
        "clipped": np.full(4, 0.25),
        **answers,
    }
    brighter = numbers | {"brightness": numbers["brightness"] + 7}
    found = {(kind.name, scale): brighter for kind in bench.KINDS for scale in (2.0, 5.0)}
    text = bench.table(found, numbers, numbers)
    assert len(text.splitlines()) == 3 + 2 + 2 * len(bench.KINDS)
    row = next(line for line in text.splitlines() if line.startswith("FDG"))
    for cell in ("7.000 ± 0.000", "25.00 ± 0.00", "75 ("):
        assert cell in row
    assert bench.draw(found, numbers).startswith(b"\xff\xd8")


@pytest.mark.parametrize(("scale", "level"), [(1.0, 0), (2.0, -18), (3.0, -28), (5.0, -43), (7.5, -56)])
def test_the_darkest_of_five_shades_under_guidance(scale, level):
    """docs/mathematics.md, "Guidance and exposure": the exact guided flow of a canvas mean, in levels of 255."""
    shades, spread = np.linspace(0, 255, 5), 16.0

    def denoised(x, u):  # x0 with the prompt for the first shade, and without
        variance = spread**2 + u**-2
        log_share = -((x[:, None] - shades) ** 2) / (2 * variance)
        share = np.exp(log_share - log_share.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        each = shades + spread**2 / variance * (x[:, None] - shades)
        return each[:, 0], (share * each).sum(1)

    def velocity(log_u, x):  # dX/dlog u = x0 - X, X = x / alpha
        cond, uncond = denoised(x, math.exp(log_u))
        return uncond + scale * (cond - uncond) - x

    noise = norm.ppf((np.arange(40) + 0.5) / 40)
    start = 1e-6  # noise of a million levels stands for infinity: x0 of all pictures is their mean
    first = shades.mean() + scale * (shades[0] - shades.mean()) + noise / start
    flow = solve_ivp(velocity, (math.log(start), math.log(10)), first, rtol=1e-7, atol=1e-6)
    assert flow.y[:, -1].mean() == pytest.approx(level, abs=0.6)
