"""CFG++: the paper's rule, and every solver against exact flows between its edits."""

import itertools
import math

import pytest
import torch

from ztsnr.diagnostics import GaussianModes
from ztsnr.samplers import SOLVERS, NoiseSchedule, sample, step_schedule
from ztsnr.samplers.cfg_pp import cfg_pp_state
from ztsnr.samplers.prediction import alpha_s
from ztsnr.samplers.sampling import drive, randn_like, start_run

SIGMAS = (math.inf, 30.0, 5.0, 1.0, 0.2, 0.0)
# Modes of a 128 x 128 canvas, from its texture to its brightness; the prompt narrows them, or does not.
STDS = torch.logspace(-0.7, math.log10(128), 15, dtype=torch.float64)
STD_C, STD_U = torch.combinations(STDS, with_replacement=True).T.reshape(2, 1, -1, 1, 1)
STOCHASTIC = ("euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde")


def tanh_pair(x, sigma):
    return torch.tanh(2 * x), torch.tanh(x)


def test_euler_takes_the_step_of_the_paper():
    """x_next = alpha_next x0_guided + s_next eps_unconditional; at infinity eps is x."""
    noise = torch.randn(2, 3, 4, 4)
    x = noise.double()
    for sigma, sigma_next in itertools.pairwise(SIGMAS):
        (alpha, s), (alpha_next, s_next) = alpha_s(sigma), alpha_s(sigma_next)
        guided, unconditional = tanh_pair(x, sigma)
        x = alpha_next * guided + s_next * (x - alpha * unconditional) / s
    torch.testing.assert_close(sample(tanh_pair, noise, SIGMAS, "euler", cfg_pp=True), x.float(), rtol=0, atol=1e-6)


def test_euler_ancestral_renoises_with_unconditional_and_fresh_noise():
    noise = torch.randn(2, 3, 4, 4)
    source = torch.Generator().manual_seed(3)
    x = noise.double()
    for sigma, sigma_next in itertools.pairwise(SIGMAS):
        (alpha, s), (alpha_next, s_next) = alpha_s(sigma), alpha_s(sigma_next)
        guided, unconditional = tanh_pair(x, sigma)
        share = math.sqrt(1 - (sigma_next / sigma) ** 2)
        x = alpha_next * guided + s_next * math.sqrt(1 - share**2) * (x - alpha * unconditional) / s
        if sigma_next > 0:
            x = x + s_next * share * torch.randn(noise.shape, generator=source)
    generator = torch.Generator().manual_seed(3)
    found = sample(tanh_pair, noise, SIGMAS, "euler_ancestral", generator=generator, cfg_pp=True)
    torch.testing.assert_close(found, x.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_guidance_nothing_changes(solver):
    noise = torch.randn(2, 3, 4, 4)

    def run(denoise, cfg_pp):
        generator = torch.Generator().manual_seed(1)
        return sample(denoise, noise, SIGMAS, solver, generator=generator, cfg_pp=cfg_pp)

    assert torch.equal(run(lambda x, _: (torch.tanh(x),) * 2, True), run(lambda x, _: torch.tanh(x), False))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_step_is_that_of_ordinary_guidance(solver):
    noise = torch.randn(2, 3, 4, 4)

    def run(denoise, cfg_pp):
        generator = torch.Generator().manual_seed(1)
        seen = []
        sample(
            denoise, noise, SIGMAS, solver, generator=generator, cfg_pp=cfg_pp, callback=lambda *call: seen.append(call)
        )
        return seen[1][2]  # the state after it, or within it

    assert torch.equal(run(tanh_pair, True), run(lambda x, sigma: torch.tanh(2 * x), False))


def edits_and_exact_flow(noise, sigmas, pair, scale):
    """The edits of CFG++ at every sigma; between them the exact flow under guidance by ``scale``.

    With y = x/alpha and k = a^2/(a^2 + sigma^2), a mode's guided x0 is ((1 - scale) k_u + scale k_c) y, and its flow
    y ~ (a_u^2 + sigma^2)^((1 - scale)/2) (a_c^2 + sigma^2)^(scale/2).
    """

    def size(sigma):  # of that flow, times alpha
        alpha, s = alpha_s(sigma)
        return (alpha**2 * STD_U**2 + s**2) ** ((1 - scale) / 2) * (alpha**2 * STD_C**2 + s**2) ** (scale / 2)

    x = noise
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = cfg_pp_state(x, sigma, *pair(x, sigma)) * size(sigma_next) / size(sigma)
    return x


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("scale", [0.6, 1.0])
@pytest.mark.parametrize("solver", [s for s in SOLVERS if s not in ("lcm", "euler", "euler_ancestral")])
def test_every_solver_is_stable_and_closer_than_euler_to_exact_flow_between_edits(solver, scale, steps):
    """Solvers hold the guided x0, and follow its flow; deis holds the unconditional eps, and follows that one.

    Ordinary guidance is unstable in these modes: at scale 5 and 10 steps dpmpp_2m makes 8800 of a noise of 1.
    """
    # at these scales nothing is stiff
    sigmas = tuple(step_schedule(NoiseSchedule.sdxl(), steps, latent_size=(128, 128), guidance=1.0).tolist())
    noise = torch.ones_like(STD_U)

    def pair(x, sigma):
        cond, uncond = GaussianModes(std=STD_C)(x, sigma), GaussianModes(std=STD_U)(x, sigma)
        return uncond + scale * (cond - uncond), uncond

    def picture(solver):
        return drive(start_run(solver, sigmas, eta=0.0), noise, pair)

    exact = edits_and_exact_flow(noise, sigmas, pair, 0.0 if solver == "deis" else scale)
    error, euler = ((picture(name) - exact).abs().max() for name in (solver, "euler"))
    assert error < 0.8 * euler
    assert picture(solver).abs().max() < 1.1 * 128  # what the widest mode comes to


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_fresh_noise_leaves_the_spread_of_pictures_as_it_is(solver):
    """Prompts that differ in their mean alone: guidance moves the mean, and the spread stays a."""
    a, mean = 1.5, 4.0
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(40_000, 1, 1, 1, dtype=torch.float64, generator=generator)
    steps = 300 if solver == "euler_ancestral" else 100
    sigmas = [math.inf, *torch.logspace(2, -2, steps, dtype=torch.float64).tolist(), 0.0]

    def denoise(x, sigma):
        cond, uncond = (GaussianModes(mean=m, std=torch.tensor(a, dtype=torch.float64))(x, sigma) for m in (mean, 0.0))
        return uncond + 0.1 * (cond - uncond), uncond

    def run(eta):
        return drive(start_run(solver, sigmas, eta), noise, denoise, lambda: randn_like(noise, generator))

    picture = run(1.0)
    assert picture.std().item() == pytest.approx(a, rel=0.025)
    assert picture.mean().item() > 3 * 0.1 * mean


@pytest.mark.parametrize("solver", SOLVERS)
def test_batch_equals_single_runs(solver):
    noise = torch.randn(3, 3, 4, 4)

    def run(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return sample(tanh_pair, noise[rows], SIGMAS, solver, generator=generators, cfg_pp=True)

    assert torch.equal(run([0, 1, 2]), torch.cat([run([row]) for row in range(3)]))


def test_bfloat16_predictions():
    noise = torch.randn(1, 3, 4, 4)

    def half(x, sigma):
        return tuple(x0.bfloat16() for x0 in tanh_pair(x, sigma))

    whole = sample(tanh_pair, noise, SIGMAS, "euler", cfg_pp=True)
    found = sample(half, noise, SIGMAS, "euler", cfg_pp=True)
    assert found.dtype == torch.float32
    assert torch.allclose(found, whole, atol=0.03)


@pytest.mark.parametrize(
    ("denoise", "message"),
    [
        (lambda x, sigma: x, "must return a pair"),
        (lambda x, sigma: (x, x, x), "must return a pair"),
        (lambda x, sigma: (x, x[:1]), "shape"),
    ],
)
def test_bad_answers_end_in_one_sentence(denoise, message):
    with pytest.raises(ValueError, match=message):
        sample(denoise, torch.randn(2, 3, 4, 4), SIGMAS, cfg_pp=True)
