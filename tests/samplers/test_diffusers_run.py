"""ZTSNRScheduler in other people's loops: copies in mid-run, jumps, and the arguments that stock schedulers take."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers import AysSchedules

from ztsnr.samplers import SOLVERS, ZTSNRScheduler, ZTSNRWarning
from ztsnr.samplers.protocol import find_solver

SIZE = (1, 4, 8, 8)


def unit_noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(x, t):
    return torch.tanh(1.3 * x - 0.4) * (0.2 + t / 1500) - 0.1 * x


def loop(scheduler, x, generator):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
    return x


# ----------------------------------------------------------------------------------------------------------------------
# Copies and jumps


def pickled(scheduler):
    return pickle.loads(pickle.dumps(scheduler))


def taken_over(scheduler):
    """Another scheduler that gets this one's ``__dict__``, as panorama pipelines do it for each of their views."""
    twin = ZTSNRScheduler.from_config(scheduler.config)
    twin.__dict__.update(copy.deepcopy(scheduler.__dict__))
    return twin


@pytest.mark.parametrize("copier", [copy.deepcopy, pickled, taken_over])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_copy_in_the_middle_of_a_run_goes_on_bit_for_bit(solver, copier):
    scheduler = ZTSNRScheduler(solver=solver, latent_size=(8, 8))
    scheduler.set_timesteps(7)
    x = unit_noise(2, 4, 8, 8).bfloat16()
    for t in scheduler.timesteps[:5]:  # with two evaluations a step, between the two
        x = scheduler.step(network(x, t), t, x, generator=seeded(5)).prev_sample
    twin = copier(scheduler)
    assert twin.config == scheduler.config
    pictures = []
    for one in (scheduler, twin):
        state, generator = x, seeded(6)
        for t in one.timesteps[5:]:
            state = one.step(network(state, t), t, state, generator=generator).prev_sample
        pictures.append(state)
    assert torch.equal(*pictures)


def test_nothing_of_a_finished_run_is_kept():
    scheduler = ZTSNRScheduler(latent_size=(8, 8))
    scheduler.set_timesteps(3)
    loop(scheduler, unit_noise(*SIZE).half(), None)
    kept = [value for value in vars(scheduler).values() if isinstance(value, torch.Tensor)]
    assert max(value.ndim for value in kept) == 1
    assert scheduler._run is None
    assert scheduler._state is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_tiles_of_one_scheduler_are_runs_of_their_own(solver):
    """A tiled loop puts the scheduler's state aside for each tile."""
    scheduler = ZTSNRScheduler(solver=solver, latent_size=(8, 8))
    noises, expected = [unit_noise(*SIZE, seed=seed) for seed in range(3)], []
    for seed, noise in enumerate(noises):
        scheduler.set_timesteps(6)
        expected.append(loop(scheduler, noise, seeded(seed)))
    scheduler.set_timesteps(6)
    states, tiles = [copy.deepcopy(scheduler.__dict__) for _ in noises], list(noises)
    generators = [seeded(seed) for seed in range(3)]
    for t in scheduler.timesteps:
        for i, tile in enumerate(tiles):
            scheduler.__dict__.update(states[i])
            tiles[i] = scheduler.step(network(tile, t), t, tile, generator=generators[i]).prev_sample
            states[i] = copy.deepcopy(scheduler.__dict__)
    for tile, picture in zip(tiles, expected, strict=True):
        assert torch.equal(tile, picture)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if find_solver(name).evaluations == 1])
def test_the_index_can_be_set_and_history_begins_anew_there(solver):
    scheduler, x = ZTSNRScheduler(solver=solver, spacing="trailing"), unit_noise(*SIZE)
    scheduler.set_timesteps(6)
    t = scheduler.timesteps

    def step(i, x):
        return scheduler.step(network(x, t[i]), t[i], x, generator=seeded(i)).prev_sample

    first = step(2, x)  # the index comes from the timestep
    assert scheduler.step_index == 3
    step(3, first)
    scheduler._init_step_index(t[2])
    assert scheduler.step_index == 2
    assert torch.equal(step(2, x), first)
    scheduler._step_index = 2
    assert torch.equal(step(2, x), first)


# ----------------------------------------------------------------------------------------------------------------------
# What stock schedulers take

# Of their own mathematics: churn of Karras et al., shifted schedules.
NOT_TAKEN = {"s_churn", "s_tmin", "s_tmax", "mu", "args", "kwargs"}


@pytest.mark.parametrize("stock", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_public_methods_take_what_stock_s_take(stock):
    compared = set()
    for name, method in inspect.getmembers(stock, inspect.isfunction):
        own = method.__qualname__.startswith(stock.__name__) and not name.startswith("_")
        if own and hasattr(ZTSNRScheduler, name):
            theirs = [key for key in inspect.signature(method).parameters if key not in NOT_TAKEN]
            ours = list(inspect.signature(getattr(ZTSNRScheduler, name)).parameters)
            assert set(theirs) <= set(ours), name
            count = min(len(theirs), 4)  # what people give by position
            assert ours[:count] == theirs[:count], name
            compared.add(name)
    assert {"set_timesteps", "step", "scale_model_input", "add_noise", "index_for_timestep"} <= compared
    # pipelines pass an eta of 0 wherever a step takes one, so no stochastic solver would add noise
    assert "eta" not in inspect.signature(ZTSNRScheduler.step).parameters


def test_before_set_timesteps_it_tells_what_the_model_was_trained_with():
    ours = ZTSNRScheduler()
    stock = EulerDiscreteScheduler.from_config(ours.config)
    assert len(ours) == len(stock) == 1000
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert len(ours.sigmas) == len(stock.sigmas) == 1001
    assert (ours.sigmas[0], ours.sigmas[-1]) == (math.inf, 0)
    torch.testing.assert_close(ours.betas, stock.betas, rtol=1e-3, atol=1e-6)


def test_noise_is_added_to_one_picture_at_all_timesteps():
    """Differential image to image; and by keyword, as FreeInit does."""
    scheduler, picture, noise = ZTSNRScheduler(), unit_noise(*SIZE), unit_noise(*SIZE, seed=1)
    scheduler.set_timesteps(5)
    found = scheduler.add_noise(original_samples=picture, noise=noise, timesteps=scheduler.timesteps)
    assert torch.equal(found, torch.cat([scheduler.add_noise(picture, noise, t) for t in scheduler.timesteps]))
    with pytest.raises(ValueError, match="3 timesteps for a batch of 2"):
        scheduler.add_noise(picture.repeat(2, 1, 1, 1), noise, scheduler.timesteps[:3])


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_2m_sde"])
def test_noise_of_a_step_can_be_given(solver):
    x, given = unit_noise(*SIZE), unit_noise(*SIZE, seed=4)
    scheduler = ZTSNRScheduler(solver=solver, spacing="trailing")

    def second_state(**keywords):
        scheduler.set_timesteps(4)
        return scheduler.step(network(x, 999), 999, x, **keywords).prev_sample

    drawn = second_state(generator=seeded(4))
    assert torch.equal(second_state(variance_noise=given), drawn)
    bare = second_state(s_noise=0.0)
    torch.testing.assert_close(second_state(variance_noise=given, s_noise=0.5), (bare + drawn) / 2)
    with pytest.raises(ValueError, match="shape"):
        second_state(variance_noise=given[:, :2])


def test_a_strength_that_leaves_no_step_is_told():
    scheduler, x = ZTSNRScheduler(), unit_noise(*SIZE)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="no step is left to run: strength"):
        scheduler.set_begin_index(4)
    with pytest.raises(ValueError, match="no step is left to run: strength"):
        scheduler.add_noise(x, x, scheduler.timesteps[4:])


def test_a_model_that_predicts_pictures_is_not_called_an_epsilon_one():
    config = EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="sample").config
    assert ZTSNRScheduler.from_config(config).config.prediction_type == "sample"  # a warning would be an error here


@pytest.mark.parametrize(
    "chosen",
    [
        {"sigmas": AysSchedules["StableDiffusionXLSigmas"][:-1]},
        {"timesteps": list(range(951, 0, -50))},
        {"timesteps": AysSchedules["StableDiffusionXLTimesteps"][1:]},
    ],
    ids=["AYS, sigmas", "from 951", "AYS, without the first"],
)
def test_steps_that_never_begin_at_infinity_are_not_taken_in_silence(chosen):
    with pytest.warns(ZTSNRWarning, match="never runs t = 999, the only step that a zero-terminal model learned"):
        ZTSNRScheduler().set_timesteps(**chosen)
    ZTSNRScheduler(rescale_betas_zero_snr=False).set_timesteps(**chosen)


@pytest.mark.parametrize("start", [136.0, 160.0, 20000.0])
def test_the_first_finite_sigma_can_be_chosen(start):
    by_config = ZTSNRScheduler(spacing="karras", sigma_start=start)
    by_config.set_timesteps(6)
    by_run = ZTSNRScheduler(spacing="karras")
    by_run.set_timesteps(6, sigma_start=start)
    for scheduler in (by_config, by_run):
        assert scheduler.sigmas[:2].tolist() == [math.inf, pytest.approx(start)]
