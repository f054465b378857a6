"""``ExposureTrueGuidance`` in an unmodified modular pipeline of tiny random networks, with text encoders."""

import itertools

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks

from ztsnr.samplers import (
    DEFAULT_SOLVER,
    ExposureTrueGuidance,
    ZTSNRScheduler,
    attach,
    exposure_true,
    exposure_true_guidance,
    rescale_contrast,
    sample,
    to_denoised,
)
from ztsnr.samplers.prediction import alpha_s, from_denoised

from ..tiny_pipelines import make_tiny_sdxl
from .test_diffusers_guidance import EPSILON, SCALE, assert_same, two_pictures
from .test_diffusers_pipelines import LATENT, SIZE, random_latents


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pipe = StableDiffusionXLPipeline.from_pretrained(make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def modular(tiny):
    """modular(solver=..., ...): the same tiny pipeline in both forms, with one scheduler."""

    def make(**config):
        tiny.scheduler = ZTSNRScheduler(**{"spacing": "trailing", "latent_size": LATENT} | config)
        blocks = StableDiffusionXLAutoBlocks().init_pipeline()
        blocks.update_components(**{name: part for name, part in tiny.components.items() if part is not None})
        blocks.set_progress_bar_config(disable=True)
        return tiny, blocks

    yield make
    tiny.to(torch.float32)


TEXT = {"prompt": "a cat", "negative_prompt": "dark", "num_inference_steps": 4, "height": SIZE, "width": SIZE}


def paint(blocks, guider, **more):
    blocks.update_components(guider=guider)
    latents = more.pop("latents", random_latents(5))
    return blocks(**TEXT | {"latents": latents, "output_type": "latent", "output": "latents"} | more)


def words_of(pipe):
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        return dict(zip(names, pipe.encode_prompt("a cat", negative_prompt="dark"), strict=True))


@pytest.mark.parametrize("solver", [DEFAULT_SOLVER, "heun"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_modular_pipeline_is_sample(modular, solver, rescale):
    pipe, blocks = modular(solver=solver)
    guider = ExposureTrueGuidance(SCALE, guidance_rescale=rescale, scheduler=blocks.scheduler)
    noise = random_latents(5, batch=2)
    latents = paint(blocks, guider, latents=noise, num_images_per_prompt=2)
    pictures = two_pictures(pipe, words_of(pipe))

    def denoise(x, sigma):
        cond, uncond = pictures(x, sigma)
        guided = exposure_true_guidance(cond, uncond, SCALE)
        v = rescale_contrast(from_denoised(guided, x, sigma), from_denoised(cond, x, sigma), rescale)
        return to_denoised(v, x, sigma)

    assert_same(latents, sample(denoise, noise, pipe.scheduler.sigmas, solver))
    assert not pipe.unet._forward_pre_hooks


def test_both_doors_give_one_picture(modular):
    pipe, blocks = modular(**EPSILON)
    latents = paint(blocks, ExposureTrueGuidance(SCALE, 1.0, 0.5, scheduler=blocks.scheduler))
    with attach(pipe, 1.0, 0.5):
        expected = pipe(**TEXT, latents=random_latents(5), guidance_scale=SCALE, output_type="latent").images
    assert_same(latents, expected)


def test_a_modular_pipeline_in_half_precision(modular):
    pipe, blocks = modular()
    expected = paint(blocks, ExposureTrueGuidance(SCALE, scheduler=blocks.scheduler))
    pipe.to(torch.bfloat16)
    latents = paint(
        blocks, ExposureTrueGuidance(SCALE, scheduler=blocks.scheduler), latents=random_latents(5).bfloat16()
    )
    assert latents.dtype == torch.bfloat16
    assert (latents.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.5, 1.0)])
def test_an_interval_of_guidance(modular, start, stop):
    pipe, blocks = modular(solver="euler")
    latents = paint(blocks, ExposureTrueGuidance(SCALE, start=start, stop=stop, scheduler=blocks.scheduler))
    pictures, sigmas = two_pictures(pipe, words_of(pipe)), pipe.scheduler.sigmas.tolist()

    def denoise(x, sigma):
        cond, uncond = pictures(x, sigma)
        within = start <= sigmas.index(sigma) / 4 < stop
        return exposure_true_guidance(cond, uncond, SCALE) if within else cond

    assert_same(latents, sample(denoise, random_latents(5), sigmas, "euler"))


def test_an_evaluation_of_a_late_half_step_is_guided(modular):
    _, blocks = modular(solver="heun")
    guider, asked = ExposureTrueGuidance(SCALE, scheduler=blocks.scheduler), []
    with blocks.unet.register_forward_hook(lambda module, args, output: asked.append(guider.num_conditions)):
        paint(blocks, guider)
    assert asked == [2] * 14


def test_a_scale_of_one_is_the_prompt_alone(modular):
    pipe, blocks = modular()
    latents = paint(blocks, ExposureTrueGuidance(1.0, scheduler=blocks.scheduler))
    pictures = two_pictures(pipe, words_of(pipe))
    expected = sample(lambda x, sigma: pictures(x, sigma)[0], random_latents(5), pipe.scheduler.sigmas)
    assert_same(latents, expected)
    disabled = paint(blocks, ExposureTrueGuidance(SCALE, stop=0.0, scheduler=blocks.scheduler))
    assert torch.equal(disabled, latents)


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfg_pp_of_a_guider(modular, scale):
    pipe, blocks = modular(solver="euler")
    latents = paint(blocks, ExposureTrueGuidance(scale, cfg_pp=True, scheduler=blocks.scheduler))
    pictures = two_pictures(pipe, words_of(pipe))
    x, sigmas = random_latents(5), pipe.scheduler.sigmas.tolist()
    for sigma, after in itertools.pairwise(sigmas):
        cond, uncond = pictures(x, sigma)
        true = exposure_true(cond - uncond, cond)
        (alpha, s), (alpha_next, s_next) = alpha_s(sigma), alpha_s(after)
        x = alpha_next * (cond + (scale - 1) * true) + s_next * (x - alpha * (cond - true)) / s
    assert_same(latents, x)


def test_a_guider_is_copied_and_saved(modular, tmp_path):
    _, blocks = modular()
    guider = ExposureTrueGuidance(3.0, 0.7, scheduler=blocks.scheduler)
    copy = guider.new(guidance_scale=2.0)
    assert (copy.guidance_scale, copy.exposure, copy.scheduler) == (2.0, 0.7, blocks.scheduler)
    guider.save_pretrained(tmp_path)
    loaded = ExposureTrueGuidance.from_pretrained(tmp_path)
    assert (loaded.guidance_scale, loaded.exposure, loaded.scheduler) == (3.0, 0.7, None)
    with pytest.raises(ValueError, match=r"guider\.scheduler = pipe\.scheduler"):
        paint(blocks, loaded)
    loaded.scheduler = blocks.scheduler
    assert torch.equal(paint(blocks, loaded), paint(blocks, guider))


def test_a_guider_leaves_no_hook_when_a_run_fails(modular):
    _, blocks = modular()
    guider = ExposureTrueGuidance(SCALE, scheduler=blocks.scheduler)
    expected = paint(blocks, guider)

    def fail(module, args, output):
        raise RuntimeError("stop")

    with blocks.unet.register_forward_hook(fail), pytest.raises(RuntimeError, match="stop"):
        paint(blocks, guider)
    assert torch.equal(paint(blocks, guider), expected)
    assert not blocks.unet._forward_pre_hooks


def test_what_a_guider_refuses():
    scheduler = ZTSNRScheduler()
    for settings, sentence in (
        ({"guidance_scale": -1.0}, "guidance scale"),
        ({"guidance_scale": float("nan")}, "guidance scale"),
        ({"exposure": 1.5}, "exposure must lie"),
        ({"contrast": -0.5}, "contrast must lie"),
        ({"guidance_rescale": 2.0}, "guidance_rescale must lie"),
        ({"start": 1.5}, "start"),
        ({"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}, "has no betas"),
        ({"cfg_pp": True, "scheduler": DDIMScheduler()}, "cfg_pp needs"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ExposureTrueGuidance(**{"scheduler": scheduler} | settings)
    guider, transformer = ExposureTrueGuidance(scheduler=scheduler), torch.nn.Identity()
    guider.prepare_models(transformer)
    with pytest.raises(ValueError, match="for U-Nets"):
        transformer(torch.zeros(1))
