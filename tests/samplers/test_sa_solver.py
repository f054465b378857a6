"""SA-Solver: a predictor-corrector that spells out every state, its order on exact flows, and its distribution."""

import itertools
import math

import numpy as np
import pytest
import torch

from ztsnr.diagnostics import GaussianModes
from ztsnr.samplers import NoiseSchedule, sample
from ztsnr.samplers.prediction import alpha_s
from ztsnr.samplers.sa_solver import NOISY, sa_solver_steps
from ztsnr.samplers.sampling import drive, start_run

SIGMAS = (math.inf, 60.0, 11.0, 6.0, 4.0, 1.3, 0.7, 0.4, 0.1, 0.0)
STDS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).reshape(1, 3, 1, 1)
GAUSSIAN = GaussianModes(std=STDS)


def generator():
    return torch.Generator().manual_seed(5)


def unfolded(x, sigmas, eta, noise, denoise):
    """The algorithm with predicted and corrected state side by side; integrals as sums over log sigma."""
    lambdas = -np.log(sigmas[:-1] if sigmas[-1] == 0 else sigmas)
    count = len(sigmas) - 1
    left = count - 1 if sigmas[-1] == 0 else 10**6

    def move(x, i, x0s, nodes, z):
        """Step i from x, with x0 through its last values at the nodes."""
        start, end, tau = lambdas[i], lambdas[i + 1], taus[i]
        alpha, s = alpha_s(sigmas[i + 1])
        grid = start + (np.arange(100_000) + 0.5) * (end - start) / 100_000
        growth = (1 + tau**2) * np.exp((1 + tau**2) * (grid - end)) * (end - start) / 100_000
        x = s / alpha_s(sigmas[i])[1] * math.exp(-(tau**2) * (end - start)) * x
        for j, node in enumerate(nodes):
            others = [other for other in nodes if other != node]
            basis = np.prod([(grid - other) / (node - other) for other in others], axis=0)
            x = x + alpha * float((growth * basis).sum()) * x0s[-1 - j]
        return x + s * math.sqrt(-math.expm1(-2 * tau**2 * (end - start))) * z

    taus = [eta if NOISY[0] <= end <= NOISY[1] else 0.0 for end in sigmas[1:]]
    predicted, corrected, x0s, z = x, x, [], 0.0
    for i in range(count):
        x0s.append(denoise(predicted, sigmas[i]))
        if sigmas[i + 1] == 0:
            return x0s[-1]
        if i > 0:
            corrected = move(corrected, i - 1, x0s, lambdas[i::-1][: min(4, left - i + 1)], z)
        z = noise() if taus[i] > 0 else 0.0
        predicted = move(corrected, i, x0s, lambdas[i::-1][: min(3, left - i)], z)
    return predicted


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("sigmas", [(400.0, *SIGMAS[1:]), (9.0, 8.0, 6.5, 2.0, 0.9, 0.5)], ids=["whole", "cut short"])
def test_it_is_the_algorithm_of_the_paper(sigmas, eta):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator())
    draws = [generator() for _ in range(2)]

    def noise(source):
        return lambda: torch.randn(x.shape, dtype=torch.float64, generator=source)

    def denoise(x, sigma):
        return torch.tanh(2 * x)

    expected = unfolded(x, sigmas, eta, noise(draws[0]), denoise)
    torch.testing.assert_close(
        drive(start_run("sa_solver", sigmas, eta), x, denoise, noise(draws[1])), expected, rtol=0, atol=1e-7
    )


def test_order_of_convergence():
    """A predictor of order 3 and a corrector of order 4 are of fourth order together."""
    start, end = 30.0, 0.3
    std = [(alpha**2 * STDS**2 + s**2).sqrt() for alpha, s in (alpha_s(start), alpha_s(end))]
    errors = []
    for steps in (64, 128, 256):
        sigmas = tuple(np.geomspace(start, end, steps + 1).tolist())
        x = drive(start_run("sa_solver", sigmas, eta=0.0), torch.ones(1, 3, 1, 1, dtype=torch.float64), GAUSSIAN)
        errors.append((x / (std[1] / std[0]) - 1).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert min(orders) > 3.8, errors


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_distribution_from_infinity(eta):
    noise = torch.randn(40_000, 3, 1, 1, dtype=torch.float64, generator=generator())
    source = torch.Generator().manual_seed(6)
    sigmas = (math.inf, *np.geomspace(60, 0.02, 150).tolist(), 0.0)
    fresh = lambda: torch.randn(noise.shape, dtype=torch.float64, generator=source)  # noqa: E731
    picture = drive(start_run("sa_solver", sigmas, eta), noise, GAUSSIAN, fresh)
    assert not torch.allclose(picture, drive(start_run("sa_solver", sigmas, eta=0.0), noise, GAUSSIAN), atol=0.1)
    assert torch.allclose(picture.std(0), STDS[0], rtol=0.015)  # 40 000 samples: 0.35 % by chance
    assert torch.allclose(picture.mean(0) / STDS[0], torch.zeros(3, 1, 1, dtype=torch.float64), atol=0.02)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_infinity_is_the_limit_of_large_sigmas(eta):
    """It is approached as slowly as 1/log sigma: values known there lose their weight in that way."""

    def difference(large):
        exact, near = sa_solver_steps(SIGMAS, eta), sa_solver_steps((large, *SIGMAS[1:]), eta)
        numbers = [
            pair
            for a, b in zip(exact, near, strict=True)
            for pair in [
                (a.keep, b.keep),
                (a.fresh, b.fresh),
                *itertools.zip_longest(a.weights, b.weights, fillvalue=0),
            ]
        ]
        return max(abs(a - b) for a, b in numbers)

    assert difference(1e300) < 0.01
    assert difference(1e150) == pytest.approx(2 * difference(1e300), rel=0.05)


def test_a_noisy_first_step_keeps_none_of_the_starting_noise():
    """A step from infinity into the noisy range draws all of its noise anew."""
    (first, _) = sa_solver_steps((math.inf, 1.0, 0.0), 1.0)
    assert first == (0.0, (pytest.approx(alpha_s(1.0)[0]),), pytest.approx(alpha_s(1.0)[1]))


def test_the_noisy_range_is_that_of_sdxl():
    schedule = NoiseSchedule.sdxl()
    assert pytest.approx((schedule.sigma(0.2 * 999), schedule.sigma(0.8 * 999)), rel=1e-9) == NOISY


@pytest.mark.parametrize("eta", [0.01, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("steps", [2, 3, 1000])
def test_weights_leave_a_constant_as_it_is(steps, eta):
    sigmas = (math.inf, *np.geomspace(500, 0.03, steps).tolist(), 0.0)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    picture = drive(
        start_run("sa_solver", sigmas, eta), x, lambda x, sigma: torch.full_like(x, -2.4), lambda: torch.zeros_like(x)
    )
    assert picture.item() == pytest.approx(-2.4, abs=1e-9)


def test_bfloat16_answers():
    noise = torch.randn(1, 3, 4, 4, generator=generator())
    whole = sample(lambda x, sigma: torch.tanh(x), noise, SIGMAS, "sa_solver", generator=generator())
    half = sample(lambda x, sigma: torch.tanh(x).bfloat16(), noise, SIGMAS, "sa_solver", generator=generator())
    assert half.dtype == torch.float32
    assert torch.allclose(half, whole, atol=0.02)
