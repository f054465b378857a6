"""Pipelines of diffusers, each with tiny networks and what to call it with: rows of ``diffusers_pipelines.py``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline  # its package insists on sentencepiece
from PIL import Image
from tiny_diffusers import (
    FRAMES,
    LATENT,
    OUTER_ATTENTION,
    POOLED,
    SIZE,
    TEXT,
    adapter,
    controlnet,
    image_encoder,
    motion_adapter,
    sd,
    sdxl,
    sdxl_controlnet,
    text_encoder,
    unet,
    union_controlnet,
    vae,
    video_unet,
)

STEPS = 5

Tensor = torch.Tensor
Arguments = dict[str, Any]
Parts = Callable[[], dict[str, Any]]


# ----------------------------------------------------------------------------------------------------------------------
# What pipelines are given


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_picture(seed: int, size: int = SIZE) -> Tensor:
    """(1, 3, size, size) in [0, 1], smooth enough to be a picture."""
    coarse = random_tensor(1, 3, 4, 4, seed=seed)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").sigmoid()


def as_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((255 * picture[0].permute(1, 2, 0)).round().byte().numpy())


PICTURE, CONTROL = random_picture(11), random_picture(12)
MASK = torch.zeros(1, 1, SIZE, SIZE)
MASK[..., : SIZE // 2] = 1
VIDEO = [as_pil(random_picture(seed)) for seed in range(20, 20 + FRAMES)]

CANVAS: Arguments = {"height": SIZE, "width": SIZE}
WORDS: Arguments = {
    "prompt_embeds": random_tensor(1, 7, TEXT, seed=1),
    "negative_prompt_embeds": random_tensor(1, 7, TEXT, seed=2),
}
POOLED_WORDS: Arguments = WORDS | {
    "pooled_prompt_embeds": random_tensor(1, POOLED, seed=3),
    "negative_pooled_prompt_embeds": random_tensor(1, POOLED, seed=4),
}
START: Arguments = {"image": PICTURE, "strength": 0.6}
HOLE: Arguments = {"image": PICTURE, "mask_image": MASK, "strength": 0.6}
CLIP: Arguments = {"num_frames": FRAMES}
FOX = "a fox"


# ----------------------------------------------------------------------------------------------------------------------
# The pipelines


def call(pipe: Any, arguments: Arguments) -> Any:
    """What most pipelines take."""
    return pipe(**arguments)


@dataclass(frozen=True)
class Entry:
    """A pipeline.

    Attributes:
        kind: Its class.
        parts: Makes its networks; those that the class does not take are left out.
        arguments: Of the call. Embeddings get the dtype of the networks.
        run: (pipeline, arguments) -> pictures; arguments have the number of steps and a generator as well.
        note: Why it does not run, where it does not.
    """

    name: str
    kind: type
    parts: Parts
    arguments: Arguments = field(default_factory=dict)
    run: Callable[[Any, Arguments], Any] = call
    note: str = ""


def marigold(pipe: Any, arguments: Arguments) -> Any:
    pipe.empty_text_embedding = WORDS["prompt_embeds"]
    return pipe(PICTURE, processing_resolution=0, **arguments)


def free_init(pipe: Any, arguments: Arguments) -> Any:
    """Two runs, the second from the low frequencies of the first."""
    pipe.enable_free_init(num_iters=2)
    return pipe(**arguments)


def diff_edit(pipe: Any, arguments: Arguments) -> Any:
    """A mask from two prompts, the picture back to noise by DDIM's inverse, and the edited picture."""
    config = pipe.scheduler.config
    betas = {key: config[key] for key in ("beta_schedule", "beta_start", "beta_end", "prediction_type")}
    pipe.inverse_scheduler = diffusers.DDIMInverseScheduler(
        **betas, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    target, negative = arguments["prompt_embeds"], arguments["negative_prompt_embeds"]
    source = -target
    shared = {key: arguments[key] for key in ("num_inference_steps", "generator")}
    mask = pipe.generate_mask(
        PICTURE,
        target_prompt_embeds=target,
        target_negative_prompt_embeds=negative,
        source_prompt_embeds=source,
        source_negative_prompt_embeds=negative,
        num_maps_per_mask=2,
        **shared,
    )
    start = {"inpaint_strength": 0.6}
    inverted = pipe.invert(
        image=PICTURE, prompt_embeds=source, negative_prompt_embeds=negative, **start, **shared
    ).latents
    return pipe(mask_image=mask, image_latents=inverted, **start, **arguments)


def leditspp(pipe: Any, arguments: Arguments) -> Any:
    pipe.invert(as_pil(PICTURE), num_inversion_steps=STEPS, generator=arguments["generator"])
    return pipe(editing_prompt=[FOX], generator=arguments["generator"], output_type="np")


@torch.no_grad()
def differential(pipe: Any, arguments: Arguments) -> Any:
    """Differential image to image: a loop of one's own, in which each pixel is let go at a step of its own.

    The picture is noised to all timesteps in one call.
    """
    pipe.scheduler.set_timesteps(arguments["num_inference_steps"])
    timesteps = pipe.scheduler.timesteps
    picture = pipe.vae.encode(2 * PICTURE.to(pipe.dtype) - 1).latent_dist.mode()
    noise = torch.randn(picture.shape, generator=arguments["generator"], dtype=pipe.dtype)
    noised = pipe.scheduler.add_noise(picture, noise, timesteps)
    free = torch.linspace(0, 1, LATENT) > torch.linspace(0.7, 0, len(timesteps)).view(-1, 1, 1, 1)
    words = torch.cat([arguments["negative_prompt_embeds"], arguments["prompt_embeds"]])
    x = noised[:1]
    for i, t in enumerate(timesteps):
        x = torch.where(free[i : i + 1], x, noised[i : i + 1])
        uncond, cond = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=words).sample.chunk(2)
        x = pipe.scheduler.step(uncond + 4 * (cond - uncond), t, x).prev_sample
    return pipe.vae.decode(x).sample


def _entries() -> list[Entry]:
    def with_unet(**changes: Any) -> Parts:
        return lambda: sd(unet=unet(**changes))

    def with_sdxl_unet(**changes: Any) -> Parts:
        return lambda: sdxl(unet_changes=changes)

    def plus(base: Parts, **made: Callable[[], Any]) -> Parts:
        return lambda: base() | {name: make() for name, make in made.items()}

    def with_words(base: Parts) -> Parts:
        return lambda: base() | text_encoder()

    d = diffusers
    text, pooled = WORDS | CANVAS, POOLED_WORDS | CANVAS
    sd_control, xl_control = plus(sd, controlnet=controlnet), plus(sdxl, controlnet=sdxl_controlnet)
    union = plus(sdxl, controlnet=union_controlnet)
    upscale = plus(with_unet(in_channels=7, num_class_embeds=1000), low_res_scheduler=d.DDPMScheduler)
    x2 = with_unet(in_channels=8, out_channels=5, time_cond_proj_dim=128 + POOLED)
    motion, sdxl_motion = plus(sd, motion_adapter=motion_adapter), plus(sdxl, motion_adapter=motion_adapter)
    return [
        Entry("StableDiffusion", d.StableDiffusionPipeline, sd, text),
        Entry("StableDiffusionImg2Img", d.StableDiffusionImg2ImgPipeline, sd, WORDS | START),
        Entry("StableDiffusionInpaint", d.StableDiffusionInpaintPipeline, with_unet(in_channels=9), text | HOLE),
        Entry("StableDiffusionInpaint, 4 channels", d.StableDiffusionInpaintPipeline, sd, text | HOLE),
        Entry(
            "StableDiffusionDepth2Img",
            d.StableDiffusionDepth2ImgPipeline,
            with_unet(in_channels=5),
            WORDS | START | {"depth_map": CONTROL[:, 0]},
        ),
        Entry(
            "StableDiffusionLatentUpscale",
            d.StableDiffusionLatentUpscalePipeline,
            x2,
            POOLED_WORDS | {"image": random_tensor(1, 4, LATENT // 2, LATENT // 2, seed=5)},
            note="It is for EulerDiscreteScheduler alone: it takes the state for x0 + sigma eps, and asks the "
            "network at log(sigma) / 4, which is infinite here.",
        ),
        Entry(
            "StableDiffusionUpscale",
            d.StableDiffusionUpscalePipeline,
            upscale,
            WORDS | {"image": 2 * random_picture(13, LATENT) - 1},
        ),
        Entry(
            "StableDiffusionImageVariation",
            d.StableDiffusionImageVariationPipeline,
            lambda: sd() | image_encoder(),
            CANVAS | {"image": PICTURE},
        ),
        Entry(
            "StableDiffusionInstructPix2Pix",
            d.StableDiffusionInstructPix2PixPipeline,
            with_unet(in_channels=8),
            WORDS | {"image": PICTURE},
        ),
        Entry("StableDiffusionPanorama", d.StableDiffusionPanoramaPipeline, sd, text | {"width": 3 * SIZE}),
        Entry(
            "StableDiffusionSAG",
            d.StableDiffusionSAGPipeline,
            sd,
            text,
            note="It looks up alphas_cumprod[t] itself, so it refuses every scheduler with fractional timesteps, "
            "diffusers' own Euler too.",
        ),
        Entry(
            "StableDiffusionAttendAndExcite",
            d.StableDiffusionAttendAndExcitePipeline,
            sd,
            text | {"prompt": None, "token_indices": [2], "attn_res": (LATENT // 2,) * 2, "thresholds": {}},
        ),
        Entry(
            "StableDiffusionGLIGEN",
            d.StableDiffusionGLIGENPipeline,
            with_words(with_unet(attention_type="gated")),
            text
            | {
                "gligen_phrases": [FOX],
                "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]],
                "gligen_scheduled_sampling_beta": 1.0,
            },
        ),
        Entry("StableDiffusionPAG", d.StableDiffusionPAGPipeline, sd, text),
        Entry("StableDiffusionControlNet", d.StableDiffusionControlNetPipeline, sd_control, WORDS | {"image": CONTROL}),
        Entry(
            "StableDiffusionControlNetImg2Img",
            d.StableDiffusionControlNetImg2ImgPipeline,
            sd_control,
            WORDS | START | {"control_image": CONTROL},
        ),
        Entry(
            "StableDiffusionControlNetInpaint",
            d.StableDiffusionControlNetInpaintPipeline,
            sd_control,
            WORDS | HOLE | {"control_image": CONTROL},
        ),
        Entry(
            "StableDiffusionAdapter",
            d.StableDiffusionAdapterPipeline,
            plus(with_unet(**OUTER_ATTENTION), adapter=adapter),
            text | {"image": CONTROL},
        ),
        Entry("StableDiffusionLDM3D", d.StableDiffusionLDM3DPipeline, plus(sd, vae=partial(vae, 6)), text),
        Entry("StableDiffusionDiffEdit", d.StableDiffusionDiffEditPipeline, sd, WORDS, diff_edit),
        Entry(
            "SemanticStableDiffusion",
            d.SemanticStableDiffusionPipeline,
            with_words(sd),
            CANVAS | {"prompt": FOX, "editing_prompt": ["night"], "edit_warmup_steps": 1},
        ),
        Entry(
            "LEditsPPStableDiffusion",
            d.LEditsPPPipelineStableDiffusion,
            with_words(sd),
            {},
            leditspp,
            note="It has formulas of its own for DDIM and DPM-Solver, warns, and replaces others by the latter. With "
            "DDIM it calls add_noise with float timesteps, which DDIM does not take.",
        ),
        Entry("differential image to image, own loop", d.StableDiffusionPipeline, sd, WORDS, differential),
        Entry("StableDiffusionXL", d.StableDiffusionXLPipeline, sdxl, pooled),
        Entry(
            "StableDiffusionXL, denoising_end 0.6", d.StableDiffusionXLPipeline, sdxl, pooled | {"denoising_end": 0.6}
        ),
        Entry("StableDiffusionXLImg2Img", d.StableDiffusionXLImg2ImgPipeline, sdxl, POOLED_WORDS | START),
        Entry("StableDiffusionXLInpaint", d.StableDiffusionXLInpaintPipeline, sdxl, pooled | HOLE),
        Entry(
            "StableDiffusionXLInstructPix2Pix",
            d.StableDiffusionXLInstructPix2PixPipeline,
            with_sdxl_unet(in_channels=8),
            pooled | {"image": PICTURE},
        ),
        Entry(
            "StableDiffusionXLControlNet",
            d.StableDiffusionXLControlNetPipeline,
            xl_control,
            POOLED_WORDS | {"image": CONTROL},
        ),
        Entry(
            "StableDiffusionXLControlNetImg2Img",
            d.StableDiffusionXLControlNetImg2ImgPipeline,
            xl_control,
            POOLED_WORDS | START | {"control_image": CONTROL},
        ),
        Entry(
            "StableDiffusionXLControlNetInpaint",
            d.StableDiffusionXLControlNetInpaintPipeline,
            xl_control,
            pooled | HOLE | {"control_image": CONTROL},
        ),
        Entry(
            "StableDiffusionXLControlNetUnion",
            d.StableDiffusionXLControlNetUnionPipeline,
            union,
            POOLED_WORDS | {"control_image": [CONTROL], "control_mode": [0]},
        ),
        Entry(
            "StableDiffusionXLAdapter",
            d.StableDiffusionXLAdapterPipeline,
            plus(with_sdxl_unet(**OUTER_ATTENTION), adapter=adapter),
            pooled | {"image": CONTROL},
        ),
        Entry("StableDiffusionXLPAG", d.StableDiffusionXLPAGPipeline, sdxl, pooled),
        Entry("StableDiffusionXLPAGImg2Img", d.StableDiffusionXLPAGImg2ImgPipeline, sdxl, POOLED_WORDS | START),
        Entry("StableDiffusionXLPAGInpaint", d.StableDiffusionXLPAGInpaintPipeline, sdxl, pooled | HOLE),
        Entry("Kolors", KolorsPipeline, sdxl, pooled),
        Entry("AnimateDiff", d.AnimateDiffPipeline, motion, text | CLIP),
        Entry("AnimateDiff, FreeInit", d.AnimateDiffPipeline, motion, text | CLIP, free_init),
        Entry("AnimateDiffSDXL", d.AnimateDiffSDXLPipeline, sdxl_motion, pooled | CLIP),
        Entry(
            "AnimateDiffVideoToVideo",
            d.AnimateDiffVideoToVideoPipeline,
            motion,
            text | {"video": VIDEO, "strength": 0.6},
        ),
        Entry("TextToVideoSD", d.TextToVideoSDPipeline, plus(sd, unet=video_unet), text | CLIP),
        Entry(
            "I2VGenXL",
            d.I2VGenXLPipeline,
            lambda: sd() | image_encoder() | {"unet": video_unet(d.I2VGenXLUNet)},
            text | CLIP | {"image": as_pil(PICTURE), "target_fps": 8},
        ),
        Entry("MarigoldDepth", d.MarigoldDepthPipeline, with_unet(in_channels=8), {}, marigold),
        Entry("MarigoldNormals", d.MarigoldNormalsPipeline, with_unet(in_channels=8), {}, marigold),
    ]


ENTRIES = {entry.name: entry for entry in _entries()}
