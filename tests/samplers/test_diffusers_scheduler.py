"""ZTSNRScheduler: its numbers against closed forms and diffusers' own schedulers, its configs against theirs."""

import json
import math

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ztsnr.samplers import (
    DEFAULT_SOLVER,
    SOLVERS,
    SPACINGS,
    NoiseSchedule,
    ZTSNRScheduler,
    ZTSNRWarning,
    from_denoised,
    sample,
    step_schedule,
    to_denoised,
)
from ztsnr.samplers.protocol import find_solver

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FINITE = {"rescale_betas_zero_snr": False}
TIMESTEPS = [999, 851, 700.5, 520, 333, 210.25, 100, 20]  # uneven on purpose
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
# every class whose config from_config promises to take, and whether it knows zero terminal SNR
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
EPSILON = {"prediction_type": "epsilon"}  # said, so that nothing warns
NEITHER = "neither v-prediction nor zero terminal SNR"
FOREIGN = {
    "EulerDiscreteScheduler": True,
    "EulerAncestralDiscreteScheduler": True,
    "DDIMScheduler": True,
    "DDPMScheduler": True,
    "DPMSolverMultistepScheduler": True,
    "UniPCMultistepScheduler": True,
    "LCMScheduler": True,
    "TCDScheduler": True,
    "PNDMScheduler": False,
    "HeunDiscreteScheduler": False,
    "LMSDiscreteScheduler": False,
    "DEISMultistepScheduler": False,
}


def unit_noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(x, t):
    """Any smooth function of state and timestep, elementwise so that a batch is nothing but its samples."""
    return torch.tanh(1.3 * x - 0.4) * (0.2 + t / 1500) - 0.1 * x


def loop(scheduler, x, model=network, generator=None, begin=0, edit=None):
    """A pipeline's denoising loop."""
    scheduler.set_begin_index(begin)
    for i, t in enumerate(scheduler.timesteps[begin:]):
        model_output = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(model_output, t, x, generator=generator, return_dict=False)[0]
        if edit is not None:
            x = edit(i, x)
    return x


def ideal(mean, std, prediction_type="v_prediction"):
    """The exact network for pictures whose values are N(mean, std^2), as a function of (state, sigma)."""

    def model(x, sigma):
        alpha, s = (0.0, 1.0) if math.isinf(sigma) else (1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))
        x0 = mean + alpha * std**2 / (alpha**2 * std**2 + s**2) * (x - alpha * mean)
        return from_denoised(x0, x, sigma, prediction_type)

    return model


# ----------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("v_prediction", True), ("sample", True), ("epsilon", False), ("v_prediction", False)],
)
def test_loop_is_sample_bit_for_bit(solver, prediction_type, zero_snr):
    scheduler = ZTSNRScheduler(
        solver=solver, spacing="trailing", prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr
    )
    scheduler.set_timesteps(7)
    visited = iter(scheduler.timesteps)

    def denoise(x, sigma):
        return to_denoised(network(x, next(visited)), x, sigma, prediction_type)

    noise = unit_noise(2, 4, 6, 6)
    generators = [[torch.Generator().manual_seed(s) for s in (5, 6)] for _ in range(2)]
    expected = sample(denoise, noise, scheduler.sigmas, solver, generator=generators[0])
    assert torch.equal(loop(scheduler, noise, generator=generators[1]), expected)
    assert next(visited, None) is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_default_spacing_runs_every_solver_from_infinity_to_zero(solver):
    scheduler = ZTSNRScheduler(solver=solver, latent_size=(16, 16))
    scheduler.set_timesteps(6)
    assert scheduler.sigmas[0] == math.inf
    assert scheduler.sigmas[-1] == 0
    assert scheduler.sigmas.dtype == torch.float64
    assert scheduler.timesteps[0] == 999
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.order == find_solver(solver).evaluations
    assert len(scheduler.timesteps) == (11 if find_solver(solver).evaluations == 2 else 6)
    assert scheduler.init_noise_sigma == 1
    generator = torch.Generator().manual_seed(0)
    assert loop(scheduler, unit_noise(1, 4, 16, 16), generator=generator).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 40),
    solver=st.sampled_from(SOLVERS),
    spacing=st.sampled_from([spacing for spacing in SPACINGS if spacing != "leading"]),
    latent_size=st.tuples(st.integers(1, 256), st.integers(1, 256)),
    zero_snr=st.booleans(),
)
def test_any_combination_comes_to_a_finite_end(steps, solver, spacing, latent_size, zero_snr):
    scheduler = ZTSNRScheduler(solver=solver, spacing=spacing, latent_size=latent_size, rescale_betas_zero_snr=zero_snr)
    scheduler.set_timesteps(steps)
    assert scheduler.num_inference_steps == steps
    assert len(scheduler.timesteps) == (2 * steps - 1 if scheduler.order == 2 else steps)
    assert (scheduler.timesteps.diff() <= 0).all()
    picture = loop(scheduler, unit_noise(1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    assert picture.isfinite().all()


@pytest.mark.parametrize("spacing", ["trailing", "karras", "spectral"])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "unipc", "angle", DEFAULT_SOLVER])
def test_mean_of_a_picture_of_one_colour_is_exact(solver, spacing):
    # std 0: x0 is known to the network from the first evaluation on, and no solver may lose any of it
    scheduler = ZTSNRScheduler(solver=solver, spacing=spacing, latent_size=(32, 32))
    scheduler.set_timesteps(10)
    sigmas = iter(scheduler.schedule.sigma(scheduler.timesteps.double()).tolist())
    picture = loop(scheduler, unit_noise(1, 4, 32, 32), lambda x, t: ideal(-2.4, 0.0)(x, next(sigmas)))
    assert (picture + 2.4).abs().max() < 2e-4


@pytest.mark.parametrize("std", [0.1, 1.0, 8.0])
def test_gaussian_pictures_reach_their_closed_form(std):
    # along the flow z = (x - alpha mean) / sqrt(alpha^2 std^2 + s^2) is constant: the answer is mean + std * noise
    scheduler = ZTSNRScheduler(latent_size=(32, 32), guidance=1)
    scheduler.set_timesteps(20)
    sigmas = iter(scheduler.sigmas.tolist())
    noise = unit_noise(1, 4, 32, 32)
    picture = loop(scheduler, noise, lambda x, t: ideal(-2.4, std)(x, next(sigmas)))
    assert (picture - (-2.4 + std * noise)).abs().max() < 0.005 * std * noise.abs().max()


def test_an_edited_sample_is_the_one_that_is_continued():
    noise = unit_noise(1, 4, 8, 8)
    scheduler = ZTSNRScheduler(solver="euler", spacing="trailing")
    scheduler.set_timesteps(4)
    edited = loop(scheduler, noise, edit=lambda i, x: torch.full_like(x, 0.5) if i == 1 else x)
    again = loop(scheduler, torch.full_like(noise, 0.5), begin=2)
    assert torch.equal(edited, again)


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lcm"])
def test_a_batch_with_seeds_equals_single_runs(solver):
    noise = unit_noise(4, 4, 8, 8)
    scheduler = ZTSNRScheduler(solver=solver, spacing="trailing")

    def run(rows, seeds):
        scheduler.set_timesteps(5)
        return loop(scheduler, noise[rows], generator=[torch.Generator().manual_seed(s) for s in seeds])

    singles = [run([i], [i]) for i in range(4)]
    assert torch.equal(run([0, 1, 2, 3], range(4)), torch.cat(singles))
    assert not torch.equal(run([0], [7]), singles[0])


def test_each_step_draws_from_the_generator_it_is_given():
    scheduler = ZTSNRScheduler(solver="euler_ancestral", spacing="trailing")

    def run(seeds):
        scheduler.set_timesteps(3)
        x = unit_noise(1, 4, 8, 8)
        for seed, t in zip(seeds, scheduler.timesteps, strict=True):
            generator = torch.Generator().manual_seed(seed)
            x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
        return x

    assert torch.equal(run([1, 2, 3]), run([1, 2, 3]))
    assert not torch.equal(run([1, 2, 3]), run([1, 9, 3]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_choosing_the_steps_draws_no_global_random_numbers(solver):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ZTSNRScheduler(solver=solver, spacing="trailing").set_timesteps(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_output_names_state_and_denoised_picture():
    scheduler = ZTSNRScheduler(solver="euler", spacing="trailing")
    scheduler.set_timesteps(4)
    x = unit_noise(1, 4, 8, 8)
    v = network(x, scheduler.timesteps[0])
    output = scheduler.step(v, scheduler.timesteps[0], x)
    assert torch.equal(output.pred_original_sample, -v)  # at infinity v = -x0
    sigma = scheduler.sigmas[1].item()
    torch.testing.assert_close(output.prev_sample, (-v + sigma * x) / math.hypot(1, sigma))


# ----------------------------------------------------------------------------------------------------------------------
# Beginning in the middle: image to image, inpainting, split runs


@pytest.mark.parametrize("told", [True, False], ids=["set_begin_index", "by timestep"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_from_the_middle_is_sample_on_the_rest_of_the_sigmas(solver, told):
    scheduler = ZTSNRScheduler(solver=solver, spacing="trailing")
    scheduler.set_timesteps(8)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    begin = 3 * scheduler.order
    visited = iter(scheduler.timesteps[begin:])
    x = unit_noise(1, 4, 8, 8)

    def denoise(x, sigma):
        return to_denoised(network(x, next(visited)), x, sigma)

    expected = sample(denoise, x, scheduler.sigmas[3:], solver, generator=generators[0])
    if told:
        scheduler.set_begin_index(begin)
        scheduler.add_noise(x, x, scheduler.timesteps[begin])  # as image to image does
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(x, t), t, x, generator=generators[1]).prev_sample
    assert torch.equal(x, expected)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if find_solver(name).evaluations == 2])
def test_a_solver_with_two_evaluations_does_not_go_on_with_a_run_that_diffusers_cut(solver):
    scheduler, x = ZTSNRScheduler(solver=solver), unit_noise(1, 4, 8, 8)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(6)
    with pytest.raises(ValueError, match="evaluates twice a step and cannot continue"):
        scheduler.step(x, scheduler.timesteps[6], x)


def test_a_one_evaluation_solver_without_memory_can_be_split_anywhere():
    noise = unit_noise(1, 4, 8, 8)
    scheduler = ZTSNRScheduler(solver="euler")
    scheduler.set_timesteps(6)
    whole = loop(scheduler, noise)
    scheduler.set_timesteps(6)
    half = noise
    for t in scheduler.timesteps[:4]:
        half = scheduler.step(network(half, t), t, half).prev_sample
    assert torch.equal(loop(scheduler, half, begin=4), whole)


def test_a_run_cannot_begin_between_the_evaluations_of_a_step():
    scheduler = ZTSNRScheduler(solver="heun", spacing="trailing")
    scheduler.set_timesteps(4)
    x = unit_noise(1, 4, 8, 8)
    for index in (1, -1):
        scheduler.set_begin_index(index)
        with pytest.raises(ValueError, match="cannot begin at index"):
            scheduler.step(x, scheduler.timesteps[1], x)


def test_index_for_timestep_takes_the_second_of_two_equal_ones():
    scheduler = ZTSNRScheduler(solver="heun", spacing="trailing")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[1] == scheduler.timesteps[2]
    assert scheduler.index_for_timestep(scheduler.timesteps[1]) == 2
    assert scheduler.index_for_timestep(999) == 0
    with pytest.raises(ValueError, match="not among the timesteps"):
        scheduler.index_for_timestep(998)


def test_step_and_begin_index_are_tracked_as_pipelines_expect():
    scheduler = ZTSNRScheduler(solver="euler", spacing="trailing")
    scheduler.set_timesteps(3)
    assert scheduler.begin_index is None
    assert scheduler.step_index is None
    loop(scheduler, unit_noise(1, 4, 8, 8), begin=1)
    assert (scheduler.begin_index, scheduler.step_index) == (1, 3)
    scheduler.set_timesteps(3)
    assert (scheduler.begin_index, scheduler.step_index) == (None, None)


# ----------------------------------------------------------------------------------------------------------------------
# Parity with diffusers' own classes


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"), [("v_prediction", True), ("v_prediction", False), ("epsilon", False)]
)
def test_euler_is_diffusers_ddim(prediction_type, zero_snr):
    config = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    ddim = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing", **config)
    ddim.set_timesteps(10)
    ours = ZTSNRScheduler(solver="euler", **config)
    ours.set_timesteps(timesteps=ddim.timesteps)
    assert torch.equal(ours.timesteps, ddim.timesteps.float())
    x = expected = unit_noise(2, 4, 8, 8)
    for t in ddim.timesteps:
        expected = ddim.step(network(expected, t), t, expected).prev_sample
    torch.testing.assert_close(loop(ours, x), expected, rtol=2e-6, atol=2e-5)


def finite_sigmas():
    return [*NoiseSchedule.sdxl(False).sigma(torch.tensor(TIMESTEPS, dtype=torch.float64)).tolist(), 0.0]


def peer_loop(peer, x, model, sigmas, **step_arguments):
    """Drive a diffusers scheduler with a class of its own over the very sigmas we use."""
    peer.set_timesteps(len(sigmas) - 1)
    peer.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    peer.set_begin_index(0)
    for i, t in enumerate(peer.timesteps):
        x = peer.step(model(x, TIMESTEPS[i]), t, x, **step_arguments).prev_sample
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("solver", "peer", "arguments"),
    [
        ("euler", DPMSolverMultistepScheduler, {"solver_order": 1}),
        ("dpmpp_2m", DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
        ("unipc", UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2"}),
    ],
)
def test_multistep_solvers_are_those_of_diffusers(solver, peer, arguments, prediction_type):
    sigmas = finite_sigmas()
    x = unit_noise(2, 4, 8, 8)
    peer = peer(**BETAS, prediction_type=prediction_type, **arguments)
    expected = peer_loop(peer, x, network, sigmas)
    ours = ZTSNRScheduler(solver=solver, prediction_type=prediction_type, **FINITE)
    ours.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, torch.tensor(TIMESTEPS))
    torch.testing.assert_close(loop(ours, x), expected, rtol=0, atol=1e-4)
    # and the parity says something: another solver is much further away
    other = "dpmpp_2m" if solver == "euler" else "euler"
    other = ZTSNRScheduler(solver=other, prediction_type=prediction_type, **FINITE)
    other.set_timesteps(sigmas=sigmas)
    assert (loop(other, x) - expected).abs().max() > 1e-2


def test_dpmpp_2m_sde_is_that_of_diffusers():
    sigmas = finite_sigmas()
    x = unit_noise(2, 4, 8, 8)
    peer = DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction", algorithm_type="sde-dpmsolver++")
    expected = peer_loop(peer, x, network, sigmas, generator=torch.Generator().manual_seed(1))
    ours = ZTSNRScheduler(solver="dpmpp_2m_sde", **FINITE)
    ours.set_timesteps(sigmas=sigmas)
    answer = loop(ours, x, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-4)


def test_euler_ancestral_is_that_of_diffusers():
    sigmas = finite_sigmas()
    x = unit_noise(2, 4, 8, 8)
    peer = EulerAncestralDiscreteScheduler(**BETAS, prediction_type="v_prediction")
    # its state is x0 + sigma eps, and its network sees that divided by sqrt(1 + sigma^2), which is our state
    levels = iter(sigmas)

    def model(state, t):
        return network(state / math.hypot(1, next(levels)), t)

    expected = peer_loop(peer, x * math.hypot(1, sigmas[0]), model, sigmas, generator=torch.Generator().manual_seed(1))
    ours = ZTSNRScheduler(solver="euler_ancestral", **FINITE)
    ours.set_timesteps(sigmas=sigmas)
    answer = loop(ours, x, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Steps that the caller chooses


def test_sigmas_of_the_caller_are_run_as_they_are():
    scheduler = ZTSNRScheduler(solver="euler")
    for sigmas in ([math.inf, 30.0, 2.5, 0.3], torch.tensor([math.inf, 30.0, 2.5, 0.3, 0.0])):
        scheduler.set_timesteps(sigmas=sigmas)
        assert scheduler.sigmas.tolist() == pytest.approx([math.inf, 30, 2.5, 0.3, 0], rel=1e-6)
        assert scheduler.num_inference_steps == 4
        assert scheduler.timesteps[0] == 999
        torch.testing.assert_close(
            scheduler.schedule.sigma(scheduler.timesteps[1:].double()), scheduler.sigmas[1:-1], rtol=1e-4, atol=0
        )


def test_timesteps_of_the_caller_may_be_fractional():
    scheduler = ZTSNRScheduler(solver="heun")
    scheduler.set_timesteps(timesteps=[999, 640.25, 20])
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([999, 640.25, 640.25, 20, 20]))
    assert scheduler.sigmas[0] == math.inf
    assert scheduler.sigmas[1] == pytest.approx(scheduler.schedule.sigma(640.25))


def test_latent_size_of_the_run_wins_over_the_config():
    scheduler = ZTSNRScheduler(spacing="karras")
    scheduler.set_timesteps(5)
    assert scheduler.sigmas[1] == pytest.approx(128)
    scheduler.set_timesteps(5, latent_size=(64, 64))
    assert scheduler.sigmas[1] == pytest.approx(64)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_spectral_steps_are_for_the_guidance_that_it_is_told(guidance):
    told, default = ZTSNRScheduler(guidance=guidance), ZTSNRScheduler()
    expected = step_schedule(told.schedule, 12, latent_size=(128, 128), guidance=guidance)
    told.set_timesteps(12)
    assert torch.equal(told.sigmas, expected)
    default.set_timesteps(12, guidance=guidance)
    assert torch.equal(default.sigmas, expected)
    default.set_timesteps(12)  # not told again
    assert torch.equal(default.sigmas, step_schedule(told.schedule, 12, latent_size=(128, 128), guidance=5))
    assert not torch.equal(default.sigmas, expected)


@pytest.mark.parametrize("spacing", ["spectral", "karras", "exponential", "polyexponential", "kl_optimal"])
def test_a_range_starts_where_the_config_says(spacing):
    scheduler = ZTSNRScheduler(spacing=spacing, sigma_start=77.0)
    scheduler.set_timesteps(12)
    assert scheduler.sigmas[0] == math.inf
    assert scheduler.sigmas[1] == pytest.approx(77)
    finite = ZTSNRScheduler(spacing=spacing, sigma_start=9.0, **FINITE)
    finite.set_timesteps(12)
    assert finite.sigmas[0] == pytest.approx(9)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "exactly one of"),
        ({"num_inference_steps": 4, "sigmas": [math.inf, 1.0]}, "exactly one of"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"timesteps": [999, 999, 5]}, "timesteps must decrease"),
        ({"timesteps": [1000, 5]}, r"lie in \[0, 999\]"),
        ({"timesteps": [999, math.nan]}, "timesteps must decrease"),
        ({"timesteps": []}, "a beginning and an end"),
        ({"sigmas": [1.0, 2.0]}, "sigmas must decrease"),
        ({"sigmas": [5.0, math.inf]}, "only the first sigma may be infinite"),
        ({"sigmas": [math.nan, 1.0]}, "NaN"),
        ({"num_inference_steps": 4, "latent_size": (0, 8)}, "at least 1 x 1"),
        ({"num_inference_steps": 4, "guidance": -2.0}, "guidance must be a finite number of at least 0, not -2"),
    ],
)
def test_steps_that_make_no_sense_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ZTSNRScheduler().set_timesteps(**arguments)


def test_infinity_is_refused_where_the_schedule_has_none():
    with pytest.raises(ValueError, match=r"this schedule ends at 14\.61"):
        ZTSNRScheduler(**FINITE).set_timesteps(sigmas=[math.inf, 1.0])


# ----------------------------------------------------------------------------------------------------------------------
# Forward process


@pytest.mark.parametrize("zero_snr", [True, False])
def test_add_noise_and_velocity_are_those_of_ddpm(zero_snr):
    ddpm = DDPMScheduler(**BETAS, rescale_betas_zero_snr=zero_snr)
    ours = ZTSNRScheduler(rescale_betas_zero_snr=zero_snr)
    x0, noise = unit_noise(6, 4, 8, 8), unit_noise(6, 4, 8, 8, seed=1)
    timesteps = torch.tensor([0, 1, 500, 900, 998, 999])
    for method in ("add_noise", "get_velocity"):
        expected = getattr(ddpm, method)(x0, noise, timesteps)
        torch.testing.assert_close(getattr(ours, method)(x0, noise, timesteps), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("t", [999, 999.0, torch.tensor(999), torch.tensor([999.0]), torch.tensor([999, 999])])
def test_pure_noise_is_exact_at_the_last_timestep(t, dtype):
    scheduler = ZTSNRScheduler()
    x0, noise = 30 * unit_noise(2, 4, 8, 8, dtype=dtype), unit_noise(2, 4, 8, 8, seed=1, dtype=dtype)
    noised, velocity = scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t)
    assert torch.equal(noised, noise)
    assert torch.equal(velocity, -x0)
    assert noised.dtype == velocity.dtype == dtype


def test_add_noise_takes_fractional_timesteps_one_a_sample():
    scheduler = ZTSNRScheduler()
    scheduler.set_timesteps(10)
    x0, noise = unit_noise(10, 4, 8, 8), unit_noise(10, 4, 8, 8, seed=1)
    sigma = scheduler.sigmas[1:-1].float().view(-1, 1, 1, 1)
    expected = (x0[1:] + sigma * noise[1:]) / (1 + sigma**2).sqrt()
    noised = scheduler.add_noise(x0, noise, scheduler.timesteps)
    torch.testing.assert_close(noised[1:], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="10 timesteps for a batch of 3"):
        scheduler.add_noise(x0[:3], noise[:3], scheduler.timesteps)


# ----------------------------------------------------------------------------------------------------------------------
# Dtypes


@pytest.mark.parametrize("solver", [DEFAULT_SOLVER, "heun", "dpmpp_2m_sde"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_pipeline_gets_the_dtype_that_it_gave(solver, dtype):
    scheduler = ZTSNRScheduler(solver=solver, latent_size=(16, 16))
    scheduler.set_timesteps(5)
    x = unit_noise(1, 4, 16, 16).to(dtype)
    for t in scheduler.timesteps:
        # with guidance, pipelines scale the doubled batch
        scaled = scheduler.scale_model_input(torch.cat([x] * 2), t)
        assert scaled.dtype == dtype
        model_output = network(scaled, t).to(dtype).chunk(2)[0]
        output = scheduler.step(model_output, t, x)
        x = output.prev_sample
        assert output.pred_original_sample.dtype == torch.float32
        assert x.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "lcm"])  # which keeps nothing of the state
def test_between_steps_the_state_is_float32(solver, dtype):
    """A network that answers the same whatever it is asked: the run differs from float32 by its last rounding alone."""
    scheduler, answer = ZTSNRScheduler(solver=solver, spacing="trailing"), unit_noise(1, 4, 8, 8, seed=2).to(dtype)

    def run(x, edit=None):
        scheduler.set_timesteps(12)
        fresh = torch.Generator().manual_seed(1)
        return loop(scheduler, x, lambda x, t: answer.to(x.dtype), generator=fresh, edit=edit)

    noise = unit_noise(1, 4, 8, 8).to(dtype)
    assert torch.equal(run(noise), run(noise.float()).to(dtype))

    inpainted = unit_noise(1, 4, 8, 8, seed=3) > 0

    def edit(i, x):
        return x + 0.25 * inpainted if i == 4 else x

    torch.testing.assert_close(run(noise, edit).float(), run(noise.float(), edit), rtol=0.02, atol=0.02)


def test_a_bfloat16_network_does_not_make_the_state_lose_its_mean():
    # mean 2.4 with a contrast of 0.6, as a bright picture: only the network's answers are rounded
    def run(dtype):
        scheduler = ZTSNRScheduler(latent_size=(64, 64))
        scheduler.set_timesteps(20)
        sigmas = iter(scheduler.sigmas.tolist())
        noise = unit_noise(1, 4, 64, 64).to(dtype)
        return loop(scheduler, noise, lambda x, t: ideal(-2.4, 0.6)(x.float(), next(sigmas)).to(dtype)).float()

    assert (run(torch.bfloat16).mean() - run(torch.float32).mean()).abs() < 0.6 / 255


# ----------------------------------------------------------------------------------------------------------------------
# No reads of the device in the loop


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_reads_no_tensor(solver, no_host_reads):
    scheduler = ZTSNRScheduler(solver=solver, spacing="trailing")
    scheduler.set_timesteps(4)
    timesteps = list(scheduler.timesteps)
    x = unit_noise(2, 4, 8, 8).bfloat16()
    scheduler.set_begin_index(0)
    with no_host_reads():
        for t in timesteps:
            model_output = network(scheduler.scale_model_input(torch.cat([x, x]), t), t)[:2]
            x = scheduler.step(model_output, t, x, generator=[torch.Generator(), torch.Generator()]).prev_sample
            scheduler.add_noise(x, x, t)
    with pytest.raises(AssertionError, match="on the host"), no_host_reads():
        x.sum().item()  # the guard itself works


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_does_not_synchronise_a_gpu(solver):
    scheduler = ZTSNRScheduler(solver=solver, spacing="trailing")
    scheduler.set_timesteps(4, device="cuda")
    x = unit_noise(2, 4, 64, 64).cuda().half()
    generator = torch.Generator("cuda").manual_seed(0)
    scheduler.set_begin_index(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps:
            model_output = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(model_output, t, x, generator=generator).prev_sample
            scheduler.add_noise(x, x, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Configs


def test_defaults_are_those_of_a_zero_terminal_sdxl_model():
    config = ZTSNRScheduler().config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert (config.solver, config.latent_size) == (DEFAULT_SOLVER, (128, 128))
    assert (config.guidance, config.sigma_start) == (5, None)
    assert torch.equal(ZTSNRScheduler().schedule.alphas_cumprod, NoiseSchedule.sdxl().alphas_cumprod)


@pytest.mark.parametrize("zero_snr", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", FOREIGN)
def test_from_config_takes_over_the_model_of_any_class(name, prediction_type, zero_snr):
    zero_snr = zero_snr and FOREIGN[name] and prediction_type == "v_prediction"
    given = {"num_train_timesteps": 900, "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    given |= {"rescale_betas_zero_snr": True} if zero_snr else {}
    theirs = getattr(diffusers, name)(**given, prediction_type=prediction_type, timestep_spacing="leading")
    ours = ZTSNRScheduler.from_config(theirs.config, **(EPSILON if prediction_type == "epsilon" else {}))
    assert ours.config.prediction_type == prediction_type
    assert ours.config.rescale_betas_zero_snr is zero_snr
    assert ours.config.num_train_timesteps == 900
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    ours.set_timesteps(3)
    assert bool(ours.sigmas[0] == math.inf) is zero_snr
    assert loop(ours, unit_noise(1, 4, 8, 8)).isfinite().all()


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_config_does_not_say_is_the_other_class_s_default(name):
    theirs = getattr(diffusers, name)()  # linear betas and epsilon, mostly; nothing of it is ours
    ours = ZTSNRScheduler.from_config(theirs.config, **EPSILON)
    assert (ours.config.prediction_type, ours.config.rescale_betas_zero_snr) == ("epsilon", False)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    bare = ZTSNRScheduler.from_config({"_class_name": name}, **EPSILON)  # as from_pretrained reads it from a file
    assert torch.equal(bare.alphas_cumprod, ours.alphas_cumprod)


def test_sdxl_base_stays_an_epsilon_model_until_told_otherwise():
    with pytest.warns(ZTSNRWarning, match=NEITHER):
        plain = ZTSNRScheduler.from_config(SDXL)
    assert (plain.config.prediction_type, plain.config.rescale_betas_zero_snr) == ("epsilon", False)
    assert torch.equal(plain.schedule.alphas_cumprod, NoiseSchedule.sdxl(False).alphas_cumprod)
    v = ZTSNRScheduler.from_config(SDXL | {"prediction_type": "v_prediction"})
    assert (v.config.prediction_type, v.config.rescale_betas_zero_snr) == ("v_prediction", False)
    told = ZTSNRScheduler.from_config(SDXL, prediction_type="v_prediction", rescale_betas_zero_snr=True, solver="heun")
    assert (told.config.prediction_type, told.config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert (told.config.solver, told.order) == ("heun", 2)
    with pytest.warns(ZTSNRWarning, match=NEITHER):
        unknown = ZTSNRScheduler.from_config(SDXL | {"_class_name": "SomebodysScheduler"})
    assert unknown.config.prediction_type == "epsilon"


def test_a_config_that_says_nothing_of_zero_snr_is_not_taken_in_silence():
    """As diffusers makes it for a single file, whatever the file holds."""
    plain = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config
    with pytest.warns(ZTSNRWarning, match=NEITHER):
        ZTSNRScheduler.from_config(plain)
    for keywords in (V, EPSILON, {"rescale_betas_zero_snr": False}):
        ZTSNRScheduler.from_config(plain, **keywords)
    ZTSNRScheduler.from_config(plain | V)
    ZTSNRScheduler.from_config(ZTSNRScheduler.from_config(plain, **EPSILON).config)  # it has been said once


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rescale_betas_zero_snr": False, "prediction_type": "epsilon"},
        {"solver": "unipc", "beta_end": 0.02, "guidance": 3.5, "sigma_start": 300.0},
    ],
    ids=["defaults", "epsilon", "own settings"],
)
def test_round_trip_through_another_class(name, config):
    ours = ZTSNRScheduler(**config)
    theirs = getattr(diffusers, name).from_config(ours.config)
    assert theirs.config.prediction_type == ours.config.prediction_type
    assert theirs.config.timestep_spacing == "trailing"
    assert not theirs.config.get("clip_sample", False)
    if FOREIGN[name]:
        torch.testing.assert_close(theirs.alphas_cumprod, ours.alphas_cumprod, rtol=1e-3, atol=1e-6)
    back = ZTSNRScheduler.from_config(theirs.config, prediction_type=ours.config.prediction_type)
    for key, value in ours.config.items():
        if not key.startswith("_"):
            assert back.config[key] == value, key
    assert torch.equal(back.alphas_cumprod, ours.alphas_cumprod)


def test_euler_made_from_our_config_runs_the_last_timestep():
    euler = EulerDiscreteScheduler.from_config(ZTSNRScheduler().config)
    euler.set_timesteps(10)
    assert euler.timesteps[0] == 999
    # in float32, whose last bit depends on the processor
    assert euler.sigmas[0].item() == pytest.approx(4096, rel=1e-6)


def test_save_and_load(tmp_path):
    ours = ZTSNRScheduler(solver="unipc", latent_size=(96, 160), eta=0.5, guidance=7.5, sigma_start=300.0)
    ours.save_pretrained(tmp_path)
    for loaded in (ZTSNRScheduler.from_pretrained(tmp_path), ZTSNRScheduler.from_config(ours.config)):
        for scheduler in (ours, loaded):
            scheduler.set_timesteps(9)
        assert torch.equal(loaded.timesteps, ours.timesteps)
        assert (loaded.config.solver, loaded.config.eta) == ("unipc", 0.5)
        assert (loaded.config.guidance, loaded.config.sigma_start) == (7.5, 300)
    euler = EulerDiscreteScheduler.from_pretrained(tmp_path)
    assert (euler.config.prediction_type, euler.config.rescale_betas_zero_snr) == ("v_prediction", True)
    EulerDiscreteScheduler.from_config(SDXL).save_pretrained(tmp_path)
    with pytest.warns(ZTSNRWarning, match=NEITHER):
        assert ZTSNRScheduler.from_pretrained(tmp_path).config.prediction_type == "epsilon"


def test_a_config_saved_before_guidance_was_in_it_loads(tmp_path):
    ZTSNRScheduler(solver="unipc").save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({key: said[key] for key in said if key not in ("guidance", "sigma_start")}))
    loaded = ZTSNRScheduler.from_pretrained(tmp_path)
    assert (loaded.config.guidance, loaded.config.sigma_start) == (5, None)
    loaded.set_timesteps(9)
    assert torch.equal(loaded.sigmas, step_schedule(loaded.schedule, 9, latent_size=(128, 128)))


def test_trained_betas_of_any_kind_are_used_and_saved(tmp_path):
    betas = torch.linspace(1e-4, 0.03, 500, dtype=torch.float64)
    ours = ZTSNRScheduler(trained_betas=betas, **FINITE)
    assert ours.config.num_train_timesteps == 500
    torch.testing.assert_close(ours.schedule.alphas_cumprod, (1 - betas).cumprod(0))
    ours.save_pretrained(tmp_path)
    assert torch.equal(ZTSNRScheduler.from_pretrained(tmp_path).alphas_cumprod, ours.alphas_cumprod)


def test_compatibles_are_classes_of_diffusers():
    assert {EulerDiscreteScheduler, DDIMScheduler, UniPCMultistepScheduler} <= set(ZTSNRScheduler().compatibles)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"solver": "ddim"}, "unknown solver 'ddim'; choose one of"),
        ({"spacing": "sgm_uniform"}, "unknown spacing 'sgm_uniform'; choose one of"),
        ({"prediction_type": "flow"}, "unknown prediction_type"),
        ({"prediction_type": "epsilon"}, "an epsilon model cannot start from infinite sigma"),
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule"),
        ({"beta_end": 1.5}, r"betas must lie in \(0, 1\]"),
        ({"eta": -1.0}, "eta must be a finite number"),
        ({"guidance": math.nan}, "guidance must be a finite number of at least 0, not nan"),
        ({"spacing": "trailing", "sigma_start": 9.0}, "spacing 'trailing' chooses timesteps and takes no sigma_start"),
        ({"spacing": "karras", "sigma_start": math.inf}, r"must be finite and in \(0\.02917, inf\], not inf"),
        ({"latent_size": (0, 8)}, "latent_size must be at least 1 x 1"),
    ],
)
def test_configs_that_make_no_sense_are_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        ZTSNRScheduler(**config)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (SDXL | {"rescale_betas_zero_snr": True}, "an epsilon model cannot start"),
        (CogVideoXDDIMScheduler(snr_shift_scale=3.0, **V).config, r"shifts its noise levels \(snr_shift_scale 3\)"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "has no betas"),
        ({"_class_name": "EDMEulerScheduler"}, "has no betas"),
        (diffusers.FlowMatchEulerDiscreteScheduler().config, "has no betas"),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "unknown prediction_type"),
    ],
)
def test_foreign_configs_that_cannot_be_ours_are_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        ZTSNRScheduler.from_config(config)


def test_steps_out_of_order_or_shape_are_refused():
    scheduler = ZTSNRScheduler(solver="euler", spacing="trailing")
    x = unit_noise(2, 4, 8, 8)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="the network returned 8 channels for 4: it predicts a variance"):
        scheduler.step(torch.cat([x, x], 1), 999, x)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 8, 8\) for a state of shape \(2, 4, 8, 8\)"):
        scheduler.step(x[:1], 999, x)
    with pytest.raises(ValueError, match="answer is on meta, the state on cpu"):
        scheduler.step(x.to("meta"), 999, x)
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        scheduler.step(x, 999, x, generator=[torch.Generator()] * 3)
    with pytest.raises(ValueError, match="not among the timesteps"):
        scheduler.step(x, 998, x)
    loop(scheduler, x)
    with pytest.raises(ValueError, match="all 2 evaluations of this run are done"):
        scheduler.step(x, 0, x)
