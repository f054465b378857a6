"""Solvers and spacings as entries of a registry: what they claim about themselves, and new ones."""

import math
import pickle

import numpy as np
import pytest
import torch

import ztsnr.samplers
from ztsnr.errors import UserError
from ztsnr.samplers import NoiseSchedule, ZTSNRScheduler, protocol, sample, solver, spacing, spacings, step_schedule
from ztsnr.samplers.prediction import alpha_s
from ztsnr.samplers.protocol import find_solver
from ztsnr.samplers.sampling import start_run
from ztsnr.samplers.spacings import find_spacing

SOLVERS = (
    "spectral", "angle", "euler", "heun", "dpmpp_2m", "unipc", "deis", "res_multistep", "euler_ancestral",
    "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "sa_solver", "lcm",
)  # fmt: skip
SPACINGS = (
    "spectral", "trailing", "linspace", "leading", "beta", "ays", "karras", "exponential", "polyexponential",
    "kl_optimal",
)  # fmt: skip
NOISE = torch.randn(1, 3, 8, 8)
SIGMAS = [math.inf, 20.0, 3.0, 0.5, 0.0]


def denoise(x, sigma):
    return torch.tanh(x)


@pytest.fixture
def clean_registries(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(protocol, "_ENTRIES", dict(protocol._ENTRIES))
    monkeypatch.setattr(spacings, "_ENTRIES", dict(spacings._ENTRIES))


def ddim(run, x, x0, noise):
    """DDIM, written out."""
    (alpha, s), (alpha_end, s_end) = (alpha_s(sigma) for sigma in run.ends)
    return alpha_end * x0 + s_end * (x - alpha * x0) / s


def test_names_are_tuples_in_the_order_of_the_menus():
    assert ztsnr.samplers.SOLVERS == ztsnr.samplers.solvers.SOLVERS == SOLVERS
    assert ztsnr.samplers.SPACINGS == ztsnr.samplers.step_schedules.SPACINGS == SPACINGS


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_counts_network_calls(name):
    calls = []
    sample(lambda x, sigma: calls.append(sigma) or denoise(x, sigma), NOISE, SIGMAS, name)
    assert len(calls) == find_solver(name).evaluations * (len(SIGMAS) - 2) + 1  # the step to 0 takes one


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_that_are_not_stochastic_are_deterministic(name):
    pictures = [sample(denoise, NOISE, SIGMAS, name, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert torch.equal(*pictures) is not find_solver(name).stochastic


@pytest.mark.parametrize("entry", [*map(find_solver, SOLVERS), *map(find_spacing, SPACINGS)], ids=lambda e: e.name)
def test_every_entry_is_described_in_one_line(entry):
    assert entry.description.endswith((".", "`."))
    assert len(entry.description) < 120


@pytest.mark.parametrize("name", SPACINGS)
def test_spacings_choose_what_they_say(name):
    entry = find_spacing(name)
    schedule = NoiseSchedule.sdxl(zero_terminal_snr=False)
    if entry.of == "timesteps":
        with pytest.raises(UserError, match="takes no sigma_start"):
            step_schedule(schedule, 5, name, sigma_start=5.0)
    else:
        assert step_schedule(schedule, 5, name, sigma_start=5.0)[0] == pytest.approx(5.0)
    if entry.rho is None:
        with pytest.raises(UserError, match="takes no rho"):
            step_schedule(schedule, 5, name, rho=2.0)
    else:
        default = step_schedule(schedule, 5, name)
        assert torch.equal(step_schedule(schedule, 5, name, rho=entry.rho), default)
        assert not torch.equal(step_schedule(schedule, 5, name, rho=entry.rho + 1), default)


# ----------------------------------------------------------------------------------------------------------------------
# New ones


@pytest.mark.usefixtures("clean_registries")
def test_a_new_solver_runs_through_every_door():
    solver("ours")(ddim)
    assert (*SOLVERS, "ours") == ztsnr.samplers.SOLVERS
    expected = sample(denoise, NOISE, SIGMAS, "euler")
    assert torch.allclose(sample(denoise, NOISE, SIGMAS, "ours"), expected, atol=1e-6)
    scheduler = ZTSNRScheduler.from_config(ZTSNRScheduler(solver="ours", prediction_type="sample").config)
    scheduler.set_timesteps(sigmas=SIGMAS)
    x = NOISE
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, None), t, x).prev_sample
    assert torch.allclose(x, expected, atol=1e-6)


@pytest.mark.usefixtures("clean_registries")
def test_a_new_solver_may_look_twice():
    looks = []

    @solver(evaluations=2, second_look=lambda start, end, eta: 2 * end)
    def twice(run, x, x0, noise):
        looks.append((run.sigma, run.is_second_look))
        return x if run.levels[run.index] != run.levels[-1] else x0

    sample(denoise, NOISE, [math.inf, 3.0, 0.0], "twice")
    assert looks == [(math.inf, False), (6.0, True), (3.0, False)]


def test_any_function_is_a_solver():
    assert torch.allclose(sample(denoise, NOISE, SIGMAS, ddim), sample(denoise, NOISE, SIGMAS, "euler"), atol=1e-6)
    run = pickle.loads(pickle.dumps(start_run(ddim, tuple(SIGMAS))))
    assert find_solver(run.solver).function is ddim
    # a registered function keeps its second look
    calls = []
    heun = find_solver("heun").function
    sample(denoise, NOISE, SIGMAS, heun, callback=lambda *call: calls.append(call))
    assert len(calls) == 7


def test_a_scheduler_takes_names_alone():
    with pytest.raises(UserError, match="register the function with @solver"):
        ZTSNRScheduler(solver=ddim)


def test_a_run_without_noise_is_told_that_its_solver_draws_some():
    with pytest.raises(AssertionError, match="draws some"):
        ztsnr.samplers.sampling.drive(start_run("lcm", tuple(SIGMAS)), NOISE, denoise)


@pytest.mark.usefixtures("clean_registries")
@pytest.mark.parametrize("of", ["timesteps", "sigmas", "canvas"])
def test_a_new_spacing(of):
    functions = {
        "timesteps": lambda last, steps: np.linspace(last, 1, steps),
        "sigmas": lambda steps, low, high: np.geomspace(high, low, steps),
        "canvas": lambda steps, canvas, start, low, guidance: np.geomspace(start or canvas, low, steps),
    }
    spacing("ours", of=of)(functions[of])
    assert (*SPACINGS, "ours") == ztsnr.samplers.SPACINGS
    sigmas = step_schedule(NoiseSchedule.sdxl(), 6, "ours", latent_size=(16, 16))
    assert sigmas[0] == math.inf
    if of != "timesteps":
        assert sigmas[1] == pytest.approx(16)
    assert len(ZTSNRScheduler(spacing="ours").config) > 0


@pytest.mark.usefixtures("clean_registries")
def test_a_name_belongs_to_one_function():
    solver("ours")(ddim)
    solver("ours")(ddim)  # as a notebook's cell that runs again
    with pytest.raises(UserError, match="solver 'euler' already exists; choose another name"):
        solver("euler")(ddim)
    with pytest.raises(UserError, match="spacing 'karras' already exists"):
        spacing("karras", of="timesteps")(ddim)


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: solver(evaluations=3), "evaluations must be 1 or 2"),
        (lambda: solver(second_look=max), "needs evaluations=2"),
        (lambda: spacing(of="steps"), "of must be one of timesteps, sigmas, canvas"),
        (lambda: spacing(of="timesteps", rho=1.0), "are for of='sigmas'"),
    ],
)
def test_wrong_entries_are_refused(register, message):
    with pytest.raises(UserError, match=message):
        register()
