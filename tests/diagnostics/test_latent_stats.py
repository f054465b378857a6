"""The recorder's numbers are those of the latents, and looking on changes nothing.

Tensors on the ``meta`` device have shapes and no values: code that runs on them has read nothing from the device.
"""

import copy
import functools
import math
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from ztsnr.diagnostics import GaussianCanvas
from ztsnr.diagnostics.latent_stats import LatentMeanRecorder
from ztsnr.samplers import NoiseSchedule, ZTSNRScheduler, sample, step_schedule
from ztsnr.samplers.prediction import alpha_s
from ztsnr.samplers.sampling import evaluation_sigmas

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # in diffusers


def random(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_numpy(tensors):
    """Mean and standard deviation over all but batch and channel, in float64: two (steps, B, C)."""
    arrays = [t.double().numpy() for t in tensors]
    axes = tuple(range(2, arrays[0].ndim))
    return np.stack([a.mean(axes) for a in arrays]), np.stack([a.std(axes) for a in arrays])


def close(statistic, expected, tolerance=2e-6):
    np.testing.assert_allclose(statistic, expected, rtol=tolerance, atol=tolerance)


def record_all(recorder, evaluations):
    for i, (sigma, x, x0) in enumerate(evaluations):
        recorder(i, sigma, x, x0)
    return recorder.read()


# ----------------------------------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize("solver", ["spectral", "heun", "euler_ancestral"])
@pytest.mark.parametrize("shape", [(2, 4, 12, 20), (1, 16, 3, 6, 8), (3, 1, 50)])
def test_every_state_of_a_run_is_summed_as_numpy_sums_it(solver, shape):
    recorder, seen = LatentMeanRecorder(steps=1), []

    def callback(i, sigma, x, x0):
        recorder(i, sigma, x, x0)
        seen.append((sigma, x.clone(), x0.clone()))

    def denoise(x, sigma):
        return 0.3 * x.tanh() - 2.4

    noise = random(shape)
    sigmas = step_schedule(NoiseSchedule.sdxl(), 9, latent_size=(16, 16))
    sample(denoise, noise, sigmas, solver, generator=torch.Generator().manual_seed(1), callback=callback)
    found = recorder.read()

    levels, states, predictions = zip(*seen, strict=True)
    assert len(levels) >= 9
    np.testing.assert_array_equal(found.sigmas, np.float32(levels))
    assert found.sigmas[0] == math.inf
    close((found.state_mean, found.state_std), by_numpy(states))
    close((found.denoised_mean, found.denoised_std), by_numpy(predictions))
    close((found.noise_mean, found.noise_std), [s[0] for s in by_numpy([noise])])
    assert found.canvas == math.prod(shape[2:])
    assert found.sigmas.dtype == np.float64
    assert found.state_mean.dtype == found.noise_std.dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_float32_whatever_the_latents_are(dtype):
    x, x0 = random((2, 4, 128, 128), dtype=dtype), random((2, 4, 128, 128), 1, dtype) + 0.1
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = record_all(LatentMeanRecorder(), [(math.inf, x, x0)])
    finally:
        torch.set_default_dtype(before)
    close((found.state_mean, found.state_std), by_numpy([x]))
    close((found.denoised_mean, found.denoised_std), by_numpy([x0]))


def test_the_exact_flow_of_a_gaussian_canvas():
    mean, tau, texture, side = -2.4, 0.3, 0.6, 32
    canvas = GaussianCanvas(mean, tau, texture)
    noise = random((3, 2, side, side)).double()
    z = side * noise.mean((2, 3)).numpy()
    grain = noise.std((2, 3), correction=0).numpy()
    schedule = NoiseSchedule.sdxl()
    sigmas = step_schedule(schedule, 60, latent_size=(side, side))
    recorder = LatentMeanRecorder()
    sample(canvas, noise.float(), sigmas, callback=recorder)
    found = recorder.read()
    close(z, side * found.noise_mean, 1e-5)
    for step, sigma in enumerate(found.sigmas):
        alpha, s = alpha_s(sigma)
        spread = math.sqrt(alpha**2 * tau**2 + s**2 / side**2)
        wide = math.sqrt(alpha**2 * texture**2 + s**2)
        close(found.state_mean[step], alpha * mean + z * spread, 2e-3)
        close(found.denoised_mean[step], mean + z * alpha * tau**2 / spread, 2e-3)
        close(found.state_std[step], wide * grain, 2e-3)
        close(found.denoised_std[step], alpha * texture**2 / wide * grain, 2e-3)


def test_a_scaled_state_is_made_variance_preserving():
    x, x0 = random((1, 4, 8, 8)), random((1, 4, 8, 8), 1)
    recorder = LatentMeanRecorder()
    recorder.record(4096.0, 4096 * x, x0, 1 / 4096)
    recorder.record(torch.tensor(math.inf), x, x0, torch.tensor(2.0))
    found = recorder.read()
    np.testing.assert_array_equal(found.sigmas, [4096, math.inf])
    means, stds = by_numpy([x, 2 * x])
    close((found.state_mean, found.state_std), (means, stds))


def test_room_grows():
    evaluations = [(float(20 - i), random((2, 3, 4, 4), i), random((2, 3, 4, 4), 100 + i)) for i in range(20)]
    small, large = (record_all(LatentMeanRecorder(steps), evaluations) for steps in (1, 64))
    for name in ("sigmas", "state_mean", "state_std", "denoised_mean", "denoised_std"):
        np.testing.assert_array_equal(getattr(small, name), getattr(large, name))
    assert small.sigmas.tolist() == [sigma for sigma, *_ in evaluations]


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def test_the_noise_is_what_is_known_of_it():
    x = random((2, 4, 8, 8))
    recorder = LatentMeanRecorder()
    assert record_all(recorder, [(14.6, x, x)]).noise_mean is None
    assert record_all(recorder, [(14.6, x, x)]).noise_std is None

    noise = random((2, 4, 8, 8), 1)
    recorder.begin(noise)
    found = record_all(recorder, [(14.6, x, x), (2.0, x, x)])
    close((found.noise_mean, found.noise_std), [s[0] for s in by_numpy([noise])])
    assert len(found.sigmas) == 2
    assert record_all(recorder, [(14.6, x, x)]).noise_mean is None  # of another run nothing is known


def test_every_run_starts_afresh():
    recorder = LatentMeanRecorder()
    for shape, dtype, steps in [((1, 4, 8, 8), torch.float32, 3), ((2, 16, 5, 4, 4), torch.bfloat16, 2)]:
        evaluations = [(10.0 - i, random(shape, i, dtype), random(shape, 9 + i, dtype)) for i in range(steps)]
        found = record_all(recorder, evaluations)
        assert found.sigmas.tolist() == [10.0 - i for i in range(steps)]
        close(found.state_mean, by_numpy([x for _, x, _ in evaluations])[0])
        assert found.canvas == math.prod(shape[2:])
    recorder.begin()
    with pytest.raises(ValueError, match="has recorded no step"):
        recorder.read()


def test_what_was_read_stays():
    recorder = LatentMeanRecorder()
    x = random((1, 4, 8, 8))
    found = record_all(recorder, [(2.0, x, x)])
    before = found.state_mean.copy()
    record_all(recorder, [(2.0, 5 * x, x), (1.0, 5 * x, x)])
    np.testing.assert_array_equal(found.state_mean, before)


def test_gradients_and_inference_mode():
    x = random((1, 4, 8, 8)).requires_grad_()
    recorder = LatentMeanRecorder(1)
    recorder.record(2.0, x, 2 * x)
    recorder.record(1.0, x, 2 * x)
    close(recorder.read().state_mean, by_numpy([x.detach()] * 2)[0])
    with torch.inference_mode():
        recorder(0, 2.0, x, 2 * x)
        recorder(1, 1.0, x, 2 * x)
    close(recorder.read().denoised_mean, by_numpy([2 * x.detach()] * 2)[0])


def test_nothing_is_read_from_the_device():
    x = torch.empty((2, 4, 8, 8), device="meta")
    recorder = LatentMeanRecorder(steps=1)
    recorder.begin(x)
    for sigma in (math.inf, 3.0, torch.empty((), device="meta")):
        recorder.record(sigma, x, x, torch.empty((), device="meta"))
    with pytest.raises(NotImplementedError, match="meta"):
        recorder.read()  # and there is where it is


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        (("x0", 1, 3), "began at step 2 of 3 (sigma 5), in channel 4 of 4 of the prediction (sample 2 of 2)"),
        (("x", 1, 0), "began at step 2 of 3 (sigma 5), in channel 1 of 4 of the state (sample 2 of 2)"),
        (("x", 0, 2), "began at step 1 of 3 (sigma inf), in channel 3 of 4 of the state (sample 2 of 2)"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_where_values_stop_being_numbers(where, sentence, value):
    name, step, channel = where
    evaluations = [{"sigma": s, "x": random((2, 4, 8, 8)), "x0": random((2, 4, 8, 8))} for s in (math.inf, 5.0, 1.0)]
    assert record_all(LatentMeanRecorder(), [e.values() for e in evaluations]).nonfinite() is None
    evaluations[step][name][1, channel, 3, 3] = value
    evaluations[2]["x"][:] = math.nan  # and from there on everywhere
    found = record_all(LatentMeanRecorder(), [e.values() for e in evaluations])
    assert sentence in found.nonfinite()
    assert np.isfinite(found.state_mean).sum() + np.isfinite(found.denoised_mean).sum() == 6 * 8 - 8 - 1


def test_bad_input_ends_in_a_sentence():
    recorder = LatentMeanRecorder()
    x = random((2, 4, 8, 8))
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        LatentMeanRecorder(steps=0)
    with pytest.raises(ValueError, match="has recorded no step"):
        recorder.read()
    with pytest.raises(ValueError, match=r"not \(8, 8\)"):
        recorder.record(1.0, x[0, 0], x[0, 0])
    with pytest.raises(ValueError, match=r"not \(8,\)"):
        recorder.begin(x[0, 0, 0])
    with pytest.raises(ValueError, match=r"shape \(2, 4, 8, 1\) for a state of shape \(2, 4, 8, 8\)"):
        recorder.record(1.0, x, x[..., :1])
    recorder.record(1.0, x, x)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 8, 8\) in a run that began with \(2, 4, 8, 8\)"):
        recorder.record(0.5, x[:1], x[:1])
    recorder.begin(x)
    with pytest.raises(ValueError, match=r"\(2, 4, 16, 4\) in a run that began with \(2, 4, 8, 8\)"):
        recorder(0, 1.0, x.reshape(2, 4, 16, 4), x.reshape(2, 4, 16, 4))


# ----------------------------------------------------------------------------------------------------------------------
# diffusers pipelines, made from tiny random networks

SIZE, LATENT = 32, (16, 16)
TEXT, POOLED = 32, 16
STOCK = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
}
ZERO_SNR = STOCK | {"rescale_betas_zero_snr": True}
OURS = {"spacing": "trailing", "latent_size": LATENT}
SCHEDULERS = {
    "euler trailing": lambda: EulerDiscreteScheduler(**ZERO_SNR, timestep_spacing="trailing"),
    "euler leading": lambda: EulerDiscreteScheduler(**ZERO_SNR, timestep_spacing="leading"),
    "euler linspace": lambda: EulerDiscreteScheduler(**STOCK, timestep_spacing="linspace"),
    "euler karras": lambda: EulerDiscreteScheduler(**ZERO_SNR, use_karras_sigmas=True),
    "euler epsilon": lambda: EulerDiscreteScheduler(**STOCK | {"prediction_type": "epsilon"}),
    "euler sample": lambda: EulerDiscreteScheduler(**STOCK | {"prediction_type": "sample"}),
    "euler ancestral": lambda: EulerAncestralDiscreteScheduler(**ZERO_SNR, timestep_spacing="trailing"),
    "heun": lambda: HeunDiscreteScheduler(**STOCK, timestep_spacing="trailing"),
    "kdpm2": lambda: KDPM2DiscreteScheduler(**STOCK),
    "ddim": lambda: DDIMScheduler(**ZERO_SNR, timestep_spacing="trailing", clip_sample=False),
    "ddim epsilon": lambda: DDIMScheduler(**STOCK | {"prediction_type": "epsilon"}, clip_sample=False),
    "dpmpp 2m": lambda: DPMSolverMultistepScheduler(**ZERO_SNR, timestep_spacing="trailing"),
    "dpmpp 2m karras": lambda: DPMSolverMultistepScheduler(**ZERO_SNR, use_karras_sigmas=True),
    "dpmpp 2m sde": lambda: DPMSolverMultistepScheduler(**STOCK, algorithm_type="sde-dpmsolver++"),
    "unipc": lambda: UniPCMultistepScheduler(**ZERO_SNR, timestep_spacing="trailing"),
    "ours": lambda: ZTSNRScheduler(**OURS),
    "ours heun": lambda: ZTSNRScheduler(**OURS, solver="heun"),
    "ours dpmpp_2s_ancestral": lambda: ZTSNRScheduler(**OURS, solver="dpmpp_2s_ancestral"),
    "ours plain": lambda: ZTSNRScheduler(**OURS, rescale_betas_zero_snr=False),
}


@pytest.fixture(scope="module")
def networks():
    shared = {
        "sample_size": LATENT[0],
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": TEXT,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    sdxl = {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "sd": UNet2DConditionModel(**shared).eval(),
            "sdxl": UNet2DConditionModel(**shared, **sdxl).eval(),
            "vae": AutoencoderKL(
                block_out_channels=(8, 16),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
            ).eval(),
        }


@pytest.fixture
def pipeline(networks):
    def make(scheduler, kind=StableDiffusionXLPipeline):
        parts = {"vae": networks["vae"], "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
        if "XL" in kind.__name__:
            parts |= {"unet": networks["sdxl"], "text_encoder_2": None, "tokenizer_2": None}
            parts |= {} if kind is StableDiffusionXLPipeline else {"requires_aesthetics_score": False}
        else:
            parts |= {"unet": networks["sd"], "safety_checker": None, "feature_extractor": None}
            parts |= {"requires_safety_checker": False}
        pipe = kind(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    yield make
    for network in networks.values():
        network.float()


def arguments(pipe, steps=5, batch=2, seed=3, dtype=torch.float32):
    """What a run needs, by the kind of pipeline; the generator is new every time."""
    words = {
        "prompt_embeds": random((1, 7, TEXT), 11, dtype),
        "negative_prompt_embeds": random((1, 7, TEXT), 12, dtype),
        "guidance_scale": 4.0,
        "num_images_per_prompt": batch,
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    name = type(pipe).__name__
    if "XL" in name:
        words |= {"pooled_prompt_embeds": random((1, POOLED), 13, dtype)}
        words |= {"negative_pooled_prompt_embeds": random((1, POOLED), 14, dtype)}
    if "Img2Img" in name or "Inpaint" in name:
        words |= {"image": 0.5 * random((batch, 4, *LATENT), 15), "strength": 0.7}
    if "Inpaint" in name:
        mask = torch.zeros(1, 1, SIZE, SIZE)
        mask[..., : SIZE // 2] = 1
        words |= {"mask_image": mask}
    if "strength" not in words or "Inpaint" in name:
        words |= {"height": SIZE, "width": SIZE}
    return words


def run(pipe, callback=None, **given):
    return pipe(**arguments(pipe, **given), callback_on_step_end=callback).images


def watch(pipe, recorder, **given):
    """A recorded run beside what the network was asked, what the scheduler was given and what x0 it answers itself.

    Returns:
        the latents, the network's inputs, the scheduler's samples, the predictions; lists of (B, C, H, W).
    """
    asked, samples, predictions = [], [], []
    scheduler = pipe.scheduler
    step, convert = scheduler.step, getattr(scheduler, "convert_model_output", None)

    @functools.wraps(step)  # pipelines ask it whether it takes a generator
    def spy(model_output, t, sample, return_dict=True, **kwargs):
        samples.append(sample.clone())
        out = step(model_output, t, sample, return_dict=True, **kwargs)
        if convert is None:
            predictions.append(out.pred_original_sample.clone())
        return (out.prev_sample,)

    def spy_on_conversion(*args, **kwargs):
        predictions.append(convert(*args, **kwargs))
        return predictions[-1]

    scheduler.step = spy
    if convert is not None:
        scheduler.convert_model_output = spy_on_conversion
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: asked.append(args[0].chunk(2)[0].clone()))
    latents = run(pipe, recorder.on(pipe), **given)
    hook.remove()
    assert vars(scheduler).pop("step") is spy  # what stood in for step before stands there again
    vars(scheduler).pop("convert_model_output", None)
    return latents, asked, samples, predictions


def sigmas_of(scheduler):
    """The noise level of every evaluation, from the scheduler's own tables."""
    if isinstance(scheduler, DDIMScheduler):
        abar = scheduler.alphas_cumprod.double()[scheduler.timesteps].numpy()
        with np.errstate(divide="ignore"):
            return np.sqrt((1 - abar) / abar)
    if isinstance(scheduler, ZTSNRScheduler):
        return np.array(evaluation_sigmas(scheduler.config.solver, scheduler.sigmas.tolist()))
    sigmas = scheduler.sigmas.double().numpy()
    if isinstance(scheduler, KDPM2DiscreteScheduler):
        middle = scheduler.sigmas_interpol.double().numpy()
        return np.array([(middle if i % 2 else sigmas)[i] for i in range(len(scheduler.timesteps))])
    return sigmas[:-1]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_pipelines_are_recorded_with_every_scheduler_and_left_as_they_were(pipeline, name):
    pipe, recorder = pipeline(SCHEDULERS[name]()), LatentMeanRecorder()
    plain = run(pipe)
    latents, asked, _, predictions = watch(pipe, recorder)
    assert torch.equal(latents, plain)
    found = recorder.read()
    assert len(found.sigmas) == len(asked) == len(pipe.scheduler.timesteps)
    np.testing.assert_allclose(found.sigmas, sigmas_of(pipe.scheduler), rtol=2e-4)
    close((found.state_mean, found.state_std), by_numpy(asked), 1e-5)
    means, stds = by_numpy(predictions)
    scale = max(1, np.abs(stds).max())  # an untrained epsilon network predicts thousands at high noise
    close((found.denoised_mean / scale, found.denoised_std / scale), (means / scale, stds / scale), 2e-5)

    noise = random((2, 4, *LATENT), 3)
    close((found.noise_mean, found.noise_std), [s[0] for s in by_numpy([noise])], 1e-5)


def test_known_noise_levels(pipeline):
    levels = {}
    for name in ("euler trailing", "ddim", "ours", "euler linspace"):
        pipe, recorder = pipeline(SCHEDULERS[name]()), LatentMeanRecorder()
        run(pipe, recorder.on(pipe))
        levels[name] = recorder.read().sigmas[0]
    assert levels["euler trailing"] == pytest.approx(4096)
    assert levels["euler linspace"] == pytest.approx(14.614641, rel=1e-5)
    assert levels["ddim"] == levels["ours"] == math.inf


@pytest.mark.parametrize("scheduler", ["euler trailing", "dpmpp 2m", "ddim", "ours", "ours heun"])
@pytest.mark.parametrize(
    "kind",
    [
        StableDiffusionPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
    ],
)
def test_every_kind_of_pipeline(pipeline, kind, scheduler):
    pipe, recorder = pipeline(SCHEDULERS[scheduler](), kind), LatentMeanRecorder()
    plain = run(pipe, steps=6)
    latents, asked, _, predictions = watch(pipe, recorder, steps=6)
    assert torch.equal(latents, plain)
    found = recorder.read()
    assert len(found.sigmas) == len(asked)
    assert len(asked) <= len(pipe.scheduler.timesteps)
    np.testing.assert_allclose(found.sigmas, sigmas_of(pipe.scheduler)[-len(asked) :], rtol=2e-4)
    close((found.state_mean, found.state_std), by_numpy(asked), 1e-5)
    close((found.denoised_mean, found.denoised_std), by_numpy(predictions), 2e-5)
    assert (found.noise_mean is None) == (kind is not StableDiffusionPipeline)


def test_a_half_precision_pipeline_is_recorded_in_its_own_dtype(pipeline):
    pipe, recorder = pipeline(SCHEDULERS["ours"]()).to(torch.bfloat16), LatentMeanRecorder()
    plain = run(pipe, dtype=torch.bfloat16)
    latents, asked, samples, predictions = watch(pipe, recorder, dtype=torch.bfloat16)
    assert torch.equal(latents, plain)
    assert (samples[1].dtype, asked[1].dtype) == (torch.bfloat16, torch.bfloat16)
    found = recorder.read()
    close((found.state_mean, found.state_std), by_numpy(samples))
    # the scheduler predicts from the state that it keeps, which is more exact than what the pipeline has
    close((found.denoised_mean, found.denoised_std), by_numpy(predictions), 1e-3)


def test_a_run_that_stock_euler_cannot_do_is_told_about(pipeline):
    pipe, recorder = pipeline(SCHEDULERS["euler trailing"]()), LatentMeanRecorder()
    pipe(**arguments(pipe), sigmas=[math.inf, 10.0, 1.0, 0.0], callback_on_step_end=recorder.on(pipe))
    found = recorder.read()
    assert len(found.sigmas) == 3
    assert "began at step 1 of 3 (sigma inf), in channel 1 of 4 of the state (sample 1 of 2)" in found.nonfinite()


def test_a_run_that_ends_early_is_let_go_of(pipeline):
    pipe, recorder = pipeline(SCHEDULERS["euler trailing"]()), LatentMeanRecorder()
    pipe(**arguments(pipe, steps=10), denoising_end=0.5, callback_on_step_end=recorder.on(pipe))
    assert "step" not in vars(pipe.scheduler)
    assert len(recorder.read().sigmas) == 5


def test_a_run_that_is_broken_off_leaves_nothing_behind(pipeline):
    pipe, recorder = pipeline(SCHEDULERS["euler trailing"]()), LatentMeanRecorder()
    callback = recorder.on(pipe)

    def broken(pipe, i, t, tensors):
        if i == 2:
            raise KeyboardInterrupt
        return callback(pipe, i, t, tensors)

    with pytest.raises(KeyboardInterrupt):
        run(pipe, broken)
    assert len(recorder.read().sigmas) == 2
    plain = run(pipe)  # not recorded: what looked on sees that it is not meant, and goes
    assert "step" not in vars(pipe.scheduler)
    assert len(recorder.read().sigmas) == 2

    recorder.on(pipe)
    other = LatentMeanRecorder()
    assert torch.equal(run(pipe, other.on(pipe)), plain)  # neither stacked
    assert "step" not in vars(pipe.scheduler)
    assert len(other.read().sigmas) == 5


def test_an_interrupted_pipeline(pipeline):
    pipe, recorder = pipeline(SCHEDULERS["ddim"]()), LatentMeanRecorder()
    callback = recorder.on(pipe)

    def interrupting(pipe, i, t, tensors):
        pipe._interrupt = i == 1
        return callback(pipe, i, t, tensors)

    run(pipe, interrupting)
    assert len(recorder.read().sigmas) == 2
    assert len(run(pipe, recorder.on(pipe))) == 2
    assert len(recorder.read().sigmas) == 5
    assert "step" not in vars(pipe.scheduler)


def test_a_copied_or_saved_scheduler_is_not_looked_at(pipeline, tmp_path):
    for name in ("euler trailing", "ours"):
        pipe, recorder = pipeline(SCHEDULERS[name]()), LatentMeanRecorder()
        config = dict(pipe.scheduler.config)
        recorder.on(pipe)
        assert dict(pipe.scheduler.config) == config
        pipe.scheduler.save_pretrained(tmp_path)
        kind = type(pipe.scheduler)
        original = pipe.scheduler
        for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original)), kind.from_pretrained(tmp_path)):
            assert twin.step.__func__ is kind.step
            assert twin.step.__self__ is twin
            pipe.scheduler = twin
            run(pipe)
        with pytest.raises(ValueError, match="has recorded no step"):
            recorder.read()


def test_a_callback_serves_one_run(pipeline):
    pipe, recorder = pipeline(SCHEDULERS["ours"]()), LatentMeanRecorder()
    callback = recorder.on(pipe)
    run(pipe, callback)
    with pytest.raises(ValueError, match="again before every run"):
        run(pipe, callback)
    run(pipe, recorder.on(pipe), batch=3, steps=7)  # and the recorder any number, of any shape
    assert recorder.read().state_mean.shape == (7, 3, 4)


def test_schedulers_it_cannot_follow_are_refused(pipeline):
    pipe, recorder = pipeline(FlowMatchEulerDiscreteScheduler()), LatentMeanRecorder()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler is for flow matching"):
        recorder.on(pipe)
    pipe = pipeline(DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    with pytest.raises(ValueError, match="only variance-preserving"):
        recorder.on(pipe)
    pipe = pipeline(SCHEDULERS["euler trailing"]())
    pipe.scheduler.register_to_config(prediction_type="original_sample")
    with pytest.raises(ValueError, match="unknown prediction_type 'original_sample'"):
        recorder.on(pipe)
    assert "step" not in vars(pipe.scheduler)


class DDIMWithoutArithmetic(DDIMScheduler):
    """DDIM whose own step, which needs values, does nothing."""

    def step(self, model_output, timestep, sample):
        return (sample,)


@pytest.mark.parametrize(
    "scheduler",
    [SCHEDULERS["euler trailing"](), DDIMWithoutArithmetic(**ZERO_SNR)],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_nothing_is_read_from_the_device_in_a_pipeline(pipeline, scheduler):
    pipe, recorder = pipeline(scheduler), LatentMeanRecorder()
    callback = recorder.on(pipe)
    scheduler.set_timesteps(3)
    scheduler.timesteps = scheduler.timesteps.to("meta")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = torch.empty((1, 4, 8, 8), device="meta", dtype=torch.bfloat16)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(scheduler.scale_model_input(x, t), t, x)[0]
        callback(pipe, i, t, {"latents": x})
    assert "step" not in vars(scheduler)
    with pytest.raises(NotImplementedError, match="meta"):
        recorder.read()
