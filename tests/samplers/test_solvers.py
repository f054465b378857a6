"""Each solver against exact flows: its order from infinity, its distribution, its reproducibility."""

import itertools
import math

import numpy as np
import pytest
import torch

from ztsnr.diagnostics import GaussianModes
from ztsnr.samplers import SOLVERS
from ztsnr.samplers.prediction import alpha_s
from ztsnr.samplers.protocol import find_solver
from ztsnr.samplers.sampling import advance, drive, evaluation_sigmas, randn_like, sample, start_run

STDS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).reshape(1, 3, 1, 1)
GAUSSIAN = GaussianModes(std=STDS)
STOCHASTIC = (
    "euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "sa_solver", "lcm",
)  # fmt: skip
FIRST_ORDER = ("euler", "euler_ancestral")


def run(solver, x, sigmas, denoise, eta=0.0, generator=None):
    """``sample`` in the dtype of x: the float32 of the product would hide high orders."""
    return drive(start_run(solver, sigmas, eta), x, denoise, lambda: randn_like(x, generator))


def even_in_angle(steps, end):
    return [math.inf, *np.tan(np.linspace(math.pi / 2, math.atan(end), steps + 1)[1:])]


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "lcm"])
def test_order_of_convergence_from_infinity(solver):
    """At sigma = 0.3 the exact state is sqrt(alpha^2 a^2 + s^2) times the noise; at 0 it is a times the noise."""
    expected = 1 if solver in FIRST_ORDER else 2
    for end in (0.3, 0.0):
        alpha, s = alpha_s(end)
        exact = (alpha**2 * STDS**2 + s**2).sqrt()
        errors = []
        for steps in (128, 256, 512):
            x = run(solver, torch.ones(1, 3, 1, 1, dtype=torch.float64), even_in_angle(steps, end), GAUSSIAN)
            errors.append((x / exact - 1).abs().max().item())
        orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
        assert errors[-1] < 5e-3
        assert min(orders) > expected - 0.35, (end, errors)


@pytest.mark.parametrize(
    "solver", ["euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"]
)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_solvers_reach_the_right_distribution(solver, eta):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(40_000, 3, 1, 1, dtype=torch.float64, generator=generator)
    steps = 500 if solver in FIRST_ORDER else 120
    picture = run(solver, noise, [math.inf, *np.geomspace(60, 0.02, steps), 0.0], GAUSSIAN, eta, generator)
    assert torch.allclose(picture.std(0), STDS[0], rtol=0.025)
    assert torch.allclose(picture.mean(0) / STDS[0], torch.zeros(3, 1, 1, dtype=torch.float64), atol=0.02)


def test_lcm_denoises_and_adds_all_noise_anew():
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 3, 4, 4)
    picture = sample(lambda x, sigma: torch.tanh(x), noise, [math.inf, 1.0, 0.0], "lcm", generator=generator)
    fresh = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    middle = (torch.tanh(noise) + fresh) / math.sqrt(2)
    assert torch.allclose(picture, torch.tanh(middle), atol=1e-6)


def test_euler_is_ddim():
    """x_next = alpha_next x0 + s_next eps, written out."""
    noise = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    sigmas = [math.inf, 5.0, 0.7, 0.0]
    x = noise
    for sigma, sigma_next in itertools.pairwise(sigmas):
        (alpha, s), (alpha_next, s_next) = alpha_s(sigma), alpha_s(sigma_next)
        x0 = torch.tanh(x)
        x = alpha_next * x0 + s_next * (x - alpha * x0) / s
    assert torch.allclose(run("euler", noise, sigmas, lambda x, sigma: torch.tanh(x)), x, atol=1e-12)


def test_first_step_from_infinity_is_exact():
    """x_1 = alpha_1 D + s_1 n for every deterministic solver that has no second look at the step."""
    noise = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    alpha, s = alpha_s(50.0)
    expected = alpha * torch.tanh(noise) + s * noise
    for solver in ("spectral", "angle", "euler", "dpmpp_2m", "unipc", "deis", "res_multistep"):
        assert torch.allclose(
            run(solver, noise, [math.inf, 50.0], lambda x, sigma: torch.tanh(x)), expected, atol=1e-12
        )


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_returns_the_prediction(solver):
    noise = torch.randn(2, 3, 4, 4)
    assert torch.equal(sample(lambda x, sigma: x / 2, noise, [math.inf, 0.0], solver), noise / 2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_constant_prediction_is_reached_without_bias(solver):
    """Weights of x0 sum to exactly what a constant needs, whatever the steps are."""
    sigmas = [math.inf, 300.0, 40.0, 39.0, 2.0, 0.4, 0.05, 0.0]
    noise = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    picture = run(solver, noise, sigmas, lambda x, sigma: torch.full_like(x, -2.4))
    assert torch.allclose(picture, torch.full_like(picture, -2.4), atol=1e-12)
    halfway = run(solver, noise, sigmas[:-3], lambda x, sigma: torch.full_like(x, -2.4))
    if solver not in STOCHASTIC or solver == "dpmpp_2s_ancestral":
        alpha, s = alpha_s(2.0)
        assert torch.allclose(halfway, alpha * -2.4 + s * noise, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_batch_equals_single_runs(solver):
    noise = torch.randn(4, 3, 4, 4)
    sigmas = [math.inf, 30.0, 5.0, 1.0, 0.2, 0.0]

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    def denoise(x, sigma):
        return torch.tanh(2 * x)

    batch = sample(denoise, noise, sigmas, solver, generator=generators())
    for row, generator in enumerate(generators()):
        single = sample(denoise, noise[row : row + 1], sigmas, solver, generator=generator)
        assert torch.equal(batch[row : row + 1], single)
    if solver in STOCHASTIC:
        assert not torch.equal(batch, sample(denoise, noise, sigmas, solver, generator=generators()[::-1]))


# lcm draws all its noise anew, and deis extrapolates eps, which this edit makes jump
@pytest.mark.parametrize("solver", [s for s in SOLVERS if s not in ("lcm", "deis")])
def test_an_edited_state_keeps_its_edit(solver):
    """Inpainting replaces part of the state between two steps: what it put there must be what the next step sees."""
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    run = start_run(solver, (math.inf, 20.0, 4.0, 1.0, 0.0), eta=0.0)
    known = torch.full_like(x, 0.25)
    evaluations = find_solver(solver).evaluations
    for _ in range(2 * evaluations):
        x = advance(run, x, known)
    assert run.sigma == 4.0
    alpha, s = alpha_s(4.0)
    x = alpha * known + s * 7.0  # the known picture under a noise of 7
    for _ in range(evaluations):
        x = advance(run, x, known)
    assert run.sigma == 1.0
    alpha, s = alpha_s(1.0)
    assert torch.allclose(x, alpha * known + s * 7.0, atol=1e-12)


def test_evaluation_sigmas():
    sigmas = [math.inf, 20.0, 4.0, 1.0, 0.0]
    for solver in SOLVERS:
        visited = evaluation_sigmas(solver, sigmas)
        if find_solver(solver).evaluations == 2:
            assert visited[::2] == sigmas[:-1]
            assert len(visited) == 2 * 4 - 1
        else:
            assert visited == sigmas[:-1]


def test_ancestral_euler_without_fresh_noise_is_euler():
    noise = torch.randn(1, 3, 4, 4)
    sigmas = [math.inf, 20.0, 4.0, 1.0, 0.0]
    for solver in ("euler_ancestral",):
        ours = sample(lambda x, sigma: torch.tanh(x), noise, sigmas, solver, eta=0.0)
        assert torch.allclose(ours, sample(lambda x, sigma: torch.tanh(x), noise, sigmas, "euler"), atol=1e-6)


def test_two_steps_of_2m_and_sde_2m_agree_without_noise():
    noise = torch.randn(1, 3, 4, 4)
    sigmas = [math.inf, 20.0, 4.0, 1.0, 0.3, 0.0]
    two_m = sample(lambda x, sigma: torch.tanh(x), noise, sigmas, "dpmpp_2m")
    assert torch.allclose(
        sample(lambda x, sigma: torch.tanh(x), noise, sigmas, "dpmpp_2m_sde", eta=0.0), two_m, atol=1e-6
    )
