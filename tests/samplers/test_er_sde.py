"""ER-SDE-Solver: the paper's coefficients by brute force, its order on exact flows, and its distribution."""

import itertools
import math

import numpy as np
import pytest
import torch

from ztsnr.diagnostics import GaussianModes
from ztsnr.samplers import sample
from ztsnr.samplers.er_sde import er_sde, er_sde_steps
from ztsnr.samplers.prediction import alpha_s
from ztsnr.samplers.sampling import drive, start_run

SIGMAS = (math.inf, 60.0, 11.0, 4.0, 1.3, 0.4, 0.1, 0.0)
STDS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).reshape(1, 3, 1, 1)
GAUSSIAN = GaussianModes(std=STDS)


def by_the_paper(x, sigmas, eta, noise, denoise, points=200_000):
    """The solver of third order in x/alpha, with sums for integrals; x (B, ...) at a finite sigma."""

    def phi(sigma):
        return sigma * (np.exp(sigma**0.3) + 10) ** eta

    y, x0s, slopes = x * math.hypot(1, sigmas[0]), [], []
    for i, (start, end) in enumerate(itertools.pairwise(sigmas)):
        x0s.append(denoise(y / math.hypot(1, start), start))
        if end == 0:
            return x0s[-1]
        ratio = phi(end) / phi(start)
        y = ratio * y + (1 - ratio) * x0s[-1]
        width = (start - end) / points
        middles = end + (np.arange(points) + 0.5) * width
        if i > 0:
            slopes.append((x0s[-1] - x0s[-2]) / (start - sigmas[i - 1]))
            y = y + (end - start + phi(end) * (width / phi(middles)).sum()) * slopes[-1]
        if i > 1:
            bend = (slopes[-1] - slopes[-2]) / ((start - sigmas[i - 2]) / 2)
            y = y + ((end - start) ** 2 / 2 + phi(end) * ((middles - start) * width / phi(middles)).sum()) * bend
        y = y + math.sqrt(end**2 - (start * ratio) ** 2) * noise() if eta > 0 else y
    return y / math.hypot(1, sigmas[-1])


def generator():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("sigmas", [(400.0, *SIGMAS[1:]), (9.0, 8.0, 2.0, 0.5)], ids=["to the picture", "cut short"])
def test_it_is_the_algorithm_of_the_paper(sigmas, eta):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator())
    draws = [generator() for _ in range(2)]

    def noise(source):
        return lambda: torch.randn(x.shape, dtype=torch.float64, generator=source)

    def denoise(x, sigma):
        return torch.tanh(2 * x)

    expected = by_the_paper(x, sigmas, eta, noise(draws[0]), denoise)
    torch.testing.assert_close(
        drive(start_run("er_sde", sigmas, eta), x, denoise, noise(draws[1])), expected, rtol=0, atol=1e-8
    )


@pytest.mark.parametrize(("order", "expected"), [(1, 1), (2, 2), (3, 2)])
def test_order_of_convergence(order, expected):
    """The third order's slope is taken half a step back, so its own bend does not make the flow third order."""
    start, end = 30.0, 0.3
    std = [(alpha**2 * STDS**2 + s**2).sqrt() for alpha, s in (alpha_s(start), alpha_s(end))]
    errors = []
    for steps in (128, 256, 512):
        sigmas = tuple(np.geomspace(start, end, steps + 1).tolist())
        x, run = torch.ones(1, 3, 1, 1, dtype=torch.float64), start_run("er_sde", sigmas, eta=0.0)
        while not run.done:
            x = er_sde(run, x, GAUSSIAN(x, run.sigma), None, order)
            run.index += 1
        errors.append((x / (std[1] / std[0]) - 1).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert min(orders) > expected - 0.2, errors


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_distribution_from_infinity(eta):
    noise = torch.randn(40_000, 3, 1, 1, dtype=torch.float64, generator=generator())
    source = torch.Generator().manual_seed(6)
    sigmas = (math.inf, *np.geomspace(60, 0.02, 150).tolist(), 0.0)
    fresh = lambda: torch.randn(noise.shape, dtype=torch.float64, generator=source)  # noqa: E731
    picture = drive(start_run("er_sde", sigmas, eta), noise, GAUSSIAN, fresh)
    assert torch.allclose(picture.std(0), STDS[0], rtol=0.02)  # 40 000 samples: 0.35 % by chance
    assert torch.allclose(picture.mean(0) / STDS[0], torch.zeros(3, 1, 1, dtype=torch.float64), atol=0.02)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_infinity_is_the_limit_of_large_sigmas(eta):
    exact = er_sde_steps(SIGMAS, eta)
    large = er_sde_steps((1e9, *SIGMAS[1:]), eta)
    for a, b in zip(exact, large, strict=True):
        assert np.allclose([a.keep, *a.weights, a.fresh], [b.keep, *b.weights, b.fresh], rtol=0, atol=1e-6)
    assert exact[0].keep == pytest.approx(alpha_s(60.0)[1] if eta == 0 else 0, abs=1e-12)
    assert exact[0].weights == pytest.approx(alpha_s(60.0)[:1])


def test_no_noise_is_drawn_without_eta():
    drive(start_run("er_sde", SIGMAS, eta=0.0), torch.ones(1, 1, 1, 1), lambda x, sigma: x / 2)


def test_bfloat16_answers():
    noise = torch.randn(1, 3, 4, 4, generator=generator())
    whole = sample(lambda x, sigma: torch.tanh(x), noise, SIGMAS, "er_sde", generator=generator())
    half = sample(lambda x, sigma: torch.tanh(x).bfloat16(), noise, SIGMAS, "er_sde", generator=generator())
    assert half.dtype == torch.float32
    assert torch.allclose(half, whole, atol=0.02)
