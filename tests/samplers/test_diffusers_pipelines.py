"""ZTSNRScheduler in unmodified diffusers pipelines, made from tiny random networks: nothing is downloaded.

The reference of most tests is ``ztsnr.samplers.sample`` on the same network with guidance written out by hand, which
knows nothing of diffusers' loops.
"""

import math
import subprocess
import sys

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from ztsnr.samplers import DEFAULT_SOLVER, ZTSNRScheduler, guide, rescale_guidance, sample, to_denoised

from ..tiny_pipelines import BLOCKS, POOLED, SDXL_EMBEDDINGS

SIZE, LATENT = 32, (16, 16)  # pixels of a side; height and width of its latent, by the tiny VAE's factor of 2
TEXT = 32  # width of the token embeddings
SD = (StableDiffusionPipeline, StableDiffusionPanoramaPipeline)  # with one text encoder
GUIDANCE = {"guidance_scale": 4.0, "guidance_rescale": 0.7}
TINY_UNET = BLOCKS | {
    "cross_attention_dim": TEXT,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}
TINY_SDXL = TINY_UNET | SDXL_EMBEDDINGS


@pytest.fixture(scope="module")
def networks():
    """Random weights, the same for every test: U-Nets of both kinds, a ControlNet and a VAE."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        up_blocks = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": LATENT[0]}
        controlnet = ControlNetModel(**TINY_SDXL, conditioning_embedding_out_channels=(4, 8))
        for parameter in controlnet.parameters():  # its output layers begin as zeros, which would control nothing
            torch.nn.init.normal_(parameter, std=0.1) if parameter.count_nonzero() == 0 else None
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            force_upcast=False,
        )
        made = {
            "sdxl": UNet2DConditionModel(**TINY_SDXL, **up_blocks),
            "sd": UNet2DConditionModel(**TINY_UNET, **up_blocks),
            "controlnet": controlnet,
            "vae": vae,
        }
    return {name: network.eval() for name, network in made.items()}


@pytest.fixture
def pipeline(networks):
    """pipeline(kind, solver=..., dtype=..., ...): a pipeline of that class with a scheduler of ours."""

    def make(kind, dtype=torch.float32, **config):
        scheduler = ZTSNRScheduler(**{"spacing": "trailing", "latent_size": LATENT} | config)
        parts = {"vae": networks["vae"], "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
        if kind in SD:
            parts |= {"unet": networks["sd"], "safety_checker": None, "feature_extractor": None}
            made = kind(**parts, requires_safety_checker=False)
        else:
            parts |= {"unet": networks["sdxl"], "text_encoder_2": None, "tokenizer_2": None}
            parts |= {"controlnet": networks["controlnet"]} if kind is StableDiffusionXLControlNetPipeline else {}
            # the tiny network has six size embeddings, as the base model does
            refiner = kind in (StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)
            made = kind(**parts, **({"requires_aesthetics_score": False} if refiner else {}))
        made.set_progress_bar_config(disable=True)
        return made if dtype == torch.float32 else made.to(dtype)

    yield make
    for network in networks.values():
        network.float()


def prompt(kind=StableDiffusionXLPipeline, dtype=torch.float32):
    embeddings = torch.randn(2, 7, TEXT, generator=torch.Generator().manual_seed(1)).to(dtype)
    pooled = torch.randn(2, POOLED, generator=torch.Generator().manual_seed(2)).to(dtype)
    arguments = {"prompt_embeds": embeddings[:1], "negative_prompt_embeds": embeddings[1:]}
    if kind not in SD:
        arguments |= {"pooled_prompt_embeds": pooled[:1], "negative_pooled_prompt_embeds": pooled[1:]}
    return arguments


def random_latents(seed, batch=1):
    return torch.randn(batch, 4, *LATENT, generator=torch.Generator().manual_seed(seed))


def reference(pipe, noise, sigmas, generator=None, edit=lambda x: x):
    """``sample`` on the pipeline's own network, with guidance by hand."""
    is_sdxl = not isinstance(pipe, StableDiffusionPipeline)
    words = prompt(type(pipe))
    scheduler = pipe.scheduler

    @torch.no_grad()
    def denoise(x, sigma):
        t = torch.tensor(scheduler.schedule.timestep(sigma), dtype=torch.float32)
        predictions = []
        for sign in ("", "negative_"):
            added = {}
            if is_sdxl:
                sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32).repeat(len(x), 1)
                pooled = words[f"{sign}pooled_prompt_embeds"].repeat(len(x), 1)
                added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
            text = words[f"{sign}prompt_embeds"].repeat(len(x), 1, 1)
            predictions.append(pipe.unet(x, t, encoder_hidden_states=text, **added).sample)
        guided = guide(*predictions, GUIDANCE["guidance_scale"])
        v = rescale_guidance(guided, predictions[0], GUIDANCE["guidance_rescale"])
        return to_denoised(v, x, sigma)

    return sample(denoise, noise, sigmas, scheduler.config.solver, generator=generator)


# ----------------------------------------------------------------------------------------------------------------------
# Text to image


@pytest.mark.parametrize("kind", [StableDiffusionXLPipeline, StableDiffusionPipeline])
@pytest.mark.parametrize("solver", [DEFAULT_SOLVER, "heun", "dpmpp_2s_ancestral", "euler_ancestral", "unipc"])
def test_text_to_image_is_sample(pipeline, kind, solver):
    pipe = pipeline(kind, solver=solver)
    generators = [[torch.Generator().manual_seed(s) for s in (3, 4)] for _ in range(2)]
    arguments = prompt(kind) | GUIDANCE | {"height": SIZE, "width": SIZE, "output_type": "latent"}
    latents = pipe(num_inference_steps=4, num_images_per_prompt=2, generator=generators[0], **arguments).images
    noise = torch.cat([torch.randn(1, 4, *LATENT, generator=g) for g in generators[1]])
    expected = reference(pipe, noise, pipe.scheduler.sigmas, generators[1])
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [StableDiffusionXLPipeline, StableDiffusionPipeline])
def test_a_pipeline_of_any_precision_decodes_at_every_step(pipeline, kind, dtype):
    pipe = pipeline(kind, dtype)
    asked, states = [], []

    def preview(pipe, i, t, kept):
        states.append(kept["latents"].dtype)
        assert pipe.vae.decode(kept["latents"]).sample.isfinite().all()
        return {}

    hook = pipe.unet.register_forward_pre_hook(lambda module, args: asked.append(args[0].dtype))
    try:
        images = pipe(
            **prompt(kind, dtype),
            num_inference_steps=3,
            height=SIZE,
            width=SIZE,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=preview,
        ).images
    finally:
        hook.remove()
    assert images.shape == (1, SIZE, SIZE, 3)
    assert not math.isnan(images.sum())
    assert asked == [dtype] * 3
    assert states == [dtype] * 3


@pytest.mark.parametrize("cut", [{"denoising_end": 0.5}, {"interrupt": True}], ids=["denoising_end", "interrupt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_run_that_is_cut_short_decodes_in_half_precision(pipeline, dtype, cut):
    pipe = pipeline(StableDiffusionXLPipeline, dtype)

    def stop(pipe, i, t, kept):
        pipe._interrupt = "interrupt" in cut and i == 1
        return {}

    arguments = {key: value for key, value in cut.items() if key != "interrupt"}
    images = pipe(
        **prompt(dtype=dtype) | arguments,
        num_inference_steps=4,
        height=SIZE,
        width=SIZE,
        output_type="np",
        callback_on_step_end=stop,
    ).images
    assert images.shape == (1, SIZE, SIZE, 3)
    assert not math.isnan(images.sum())


def test_steps_of_the_caller(pipeline):
    pipe = pipeline(StableDiffusionXLPipeline, solver="dpmpp_2m")
    noise = random_latents(5)
    arguments = prompt() | GUIDANCE | {"latents": noise, "output_type": "latent"}
    by_sigmas = pipe(sigmas=[math.inf, 20.0, 3.0, 0.4], **arguments).images
    torch.testing.assert_close(by_sigmas, reference(pipe, noise, [math.inf, 20, 3, 0.4, 0]), rtol=1e-4, atol=1e-4)
    timesteps = pipe.scheduler.timesteps.tolist()
    assert timesteps[0] == 999
    assert timesteps[1] % 1 != 0
    by_timesteps = pipe(timesteps=timesteps, **arguments).images
    torch.testing.assert_close(by_timesteps, by_sigmas, rtol=1e-3, atol=1e-3)


def test_a_callback_may_edit_the_latents(pipeline):
    pipe = pipeline(StableDiffusionXLPipeline, solver="euler")
    edited = random_latents(6)

    def callback(pipe, i, t, kept):
        return {"latents": edited} if i == 1 else {}

    arguments = prompt() | GUIDANCE | {"latents": random_latents(5), "output_type": "latent"}
    latents = pipe(num_inference_steps=4, callback_on_step_end=callback, **arguments).images
    expected = reference(pipe, edited, pipe.scheduler.sigmas[2:])
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# From an image


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("solver", [DEFAULT_SOLVER, "heun", "euler_ancestral"])
def test_image_to_image_is_sample_from_the_noised_image(pipeline, solver, strength):
    pipe = pipeline(StableDiffusionXLImg2ImgPipeline, solver=solver)
    image = 0.5 * random_latents(7)
    arguments = prompt() | GUIDANCE | {"image": image, "strength": strength, "output_type": "latent"}
    latents = pipe(num_inference_steps=6, generator=torch.Generator().manual_seed(8), **arguments).images
    generator = torch.Generator().manual_seed(8)
    noise = torch.randn(1, 4, *LATENT, generator=generator)
    sigmas = pipe.scheduler.sigmas[-1 - round(6 * strength) :]
    sigma = sigmas[0].item()
    start = noise if strength == 1 else (image + sigma * noise) / math.hypot(1, sigma)
    expected = reference(pipe, start, sigmas, generator)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", [DEFAULT_SOLVER, "heun"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_keeps_what_is_not_masked(pipeline, solver, strength):
    pipe = pipeline(StableDiffusionXLInpaintPipeline, solver=solver)
    image = 0.5 * random_latents(7)
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    latents = pipe(
        **prompt(),
        image=image,
        mask_image=mask,
        height=SIZE,
        width=SIZE,
        strength=strength,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(8),
        output_type="latent",
    ).images
    half = LATENT[1] // 2
    assert torch.equal(latents[..., half:], image[..., half:])
    assert latents.isfinite().all()
    assert (latents[..., :half] - image[..., :half]).abs().max() > 0.1


def test_inpainting_in_half_precision_decodes(pipeline):
    pipe = pipeline(StableDiffusionXLInpaintPipeline, torch.bfloat16)
    states = []
    images = pipe(
        **prompt(dtype=torch.bfloat16),
        image=torch.rand(1, 3, SIZE, SIZE),
        mask_image=torch.ones(1, 1, SIZE, SIZE),
        height=SIZE,
        width=SIZE,
        strength=0.8,
        num_inference_steps=4,
        output_type="np",
        callback_on_step_end=lambda pipe, i, t, kept: states.append(kept["latents"].dtype) or {},
    ).images
    assert images.shape == (1, SIZE, SIZE, 3)
    assert states == [torch.bfloat16] * 3


def test_controlnet_pipeline(pipeline):
    pipe = pipeline(StableDiffusionXLControlNetPipeline, solver="heun")
    picture = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9))
    noise = random_latents(5)
    arguments = prompt() | {"image": picture, "latents": noise, "num_inference_steps": 3, "guidance_scale": 4.0}
    latents = pipe(**arguments, output_type="latent").images
    free = pipe(**arguments, output_type="latent", controlnet_conditioning_scale=0.0).images
    assert latents.isfinite().all()
    assert (latents - free).abs().max() > 1e-3
    images = pipe.to(torch.bfloat16)(**arguments | prompt(dtype=torch.bfloat16) | {"latents": None}, output_type="np")
    assert images.images.shape == (1, SIZE, SIZE, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Base and refiner


def two_halves(pipeline, solver, share, steps=8):
    """A whole run, and the same run handed from one pipeline to another."""
    base, refiner = (pipeline(k, solver=solver) for k in (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline))
    arguments = prompt() | GUIDANCE | {"num_inference_steps": steps, "output_type": "latent"}

    def noise():
        return {"latents": random_latents(5), "generator": torch.Generator().manual_seed(4)}

    whole = base(**arguments, **noise()).images
    given = noise()
    half = base(**arguments, **given, denoising_end=share).images
    both = refiner(**arguments, image=half, denoising_start=share, generator=given["generator"]).images
    return whole, half, both


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
@pytest.mark.parametrize("solver", ["euler", "euler_ancestral", "lcm"])
def test_two_halves_are_one_run(pipeline, solver, share):
    whole, half, both = two_halves(pipeline, solver, share)
    assert not torch.allclose(half, whole, atol=1e-2)
    torch.testing.assert_close(both, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [DEFAULT_SOLVER, "dpmpp_2m"])
def test_a_multistep_solver_begins_its_history_anew_in_the_second_half(pipeline, solver):
    whole, half, both = two_halves(pipeline, solver, 0.5)
    pipe = pipeline(StableDiffusionXLPipeline, solver=solver)
    pipe.scheduler.set_timesteps(8)
    done = int((pipe.scheduler.timesteps >= 500).sum())
    torch.testing.assert_close(both, reference(pipe, half, pipe.scheduler.sigmas[done:]), rtol=1e-4, atol=1e-4)
    assert (both - whole).norm() < 0.1 * whole.norm()


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2s_ancestral", "dpmpp_sde"])
def test_a_two_evaluation_solver_does_not_split(pipeline, solver):
    with pytest.raises(ValueError, match="cannot continue another scheduler's run"):
        two_halves(pipeline, solver, 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Panoramas


def test_views_of_a_panorama_are_runs_of_their_own(pipeline):
    """With views that do not overlap, each is a picture of its own."""
    pipe = pipeline(StableDiffusionPanoramaPipeline)
    pipe.get_views = lambda height, width, **_: [(0, 16, 0, 16), (0, 16, 16, 32)]
    noise = torch.cat([random_latents(5), random_latents(6)], dim=3)
    wide = pipe(
        **prompt(StableDiffusionPanoramaPipeline),
        latents=noise,
        height=SIZE,
        width=2 * SIZE,
        num_inference_steps=5,
        output_type="latent",
    ).images
    single = pipeline(StableDiffusionPipeline)
    for part, view in zip(wide.chunk(2, dim=3), noise.chunk(2, dim=3), strict=True):
        expected = single(**prompt(StableDiffusionPipeline), latents=view, num_inference_steps=5, output_type="latent")
        torch.testing.assert_close(part, expected.images, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_a_saved_pipeline_loads_in_a_fresh_process(pipeline, tmp_path):
    pipe = pipeline(StableDiffusionXLPipeline, solver="unipc", spacing="karras")
    pipe.save_pretrained(tmp_path)
    arguments = prompt() | {"latents": random_latents(5), "num_inference_steps": 3, "output_type": "latent"}
    torch.save({"arguments": arguments, "latents": pipe(**arguments).images}, tmp_path / "expected.pt")
    program = f"""
import torch
from ztsnr.samplers import ZTSNRScheduler
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})
assert type(pipe.scheduler) is ZTSNRScheduler
assert pipe.scheduler.config.solver == "unipc" and pipe.scheduler.config.rescale_betas_zero_snr
expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(pipe(**expected["arguments"]).images, expected["latents"])
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
