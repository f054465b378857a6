"""A diffusers pipeline as the mean-leak test sees it: a network, a sampler, and a way to pictures.

Nothing here imports diffusers; everything needed comes with the pipeline.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from ..errors import UserError
from ..samplers import NoiseSchedule, guide, to_denoised
from .ideal_models import Model
from .latent_stats import LatentMeanRecorder, LatentStatistics
from .leak_probes import Run, ToRGB

Guidance = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # of x0 with the prompt, x0 without, scale


def encode(pipe: Any, prompt: str, negative_prompt: str | None = None) -> dict[str, torch.Tensor]:
    """A prompt's embeddings, under their argument names in Stable Diffusion (XL) pipelines.

    Args:
        negative_prompt: None for the pipeline's default, which for SDXL is not the empty prompt.
    """
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeddings = pipe.encode_prompt(
        prompt=prompt,
        device=pipe.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negative_prompt,
    )
    return dict(zip(names, embeddings, strict=False))


def network(
    pipe: Any,
    embeddings: dict[str, torch.Tensor],
    schedule: NoiseSchedule,
    prediction_type: str,
    guidance_scale: float = 1.0,
    guidance: Guidance = guide,
) -> Model:
    """``denoise(x_vp, sigma) -> x0`` of the pipeline's U-Net; guided unless the scale is 1."""
    unet = pipe.unet
    kinds = ("", "negative_") if guidance_scale != 1 else ("",)
    text = torch.cat([embeddings[f"{kind}prompt_embeds"] for kind in kinds])
    is_xl = "pooled_prompt_embeds" in embeddings
    pooled = torch.cat([embeddings[f"{kind}pooled_prompt_embeds"] for kind in kinds]) if is_xl else None

    @torch.no_grad()
    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        t = torch.tensor(schedule.timestep(sigma), dtype=torch.float32, device=x.device)
        batch = len(x)
        added = {}
        if pooled is not None:  # original size, crop, target size
            height, width = (side * pipe.vae_scale_factor for side in x.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=text.dtype, device=x.device)
            added["added_cond_kwargs"] = {
                "text_embeds": pooled.repeat_interleave(batch, 0),
                "time_ids": sizes.expand(len(kinds) * batch, -1),
            }
        states = x.to(unet.dtype).repeat(len(kinds), 1, 1, 1)
        predictions = unet(states, t, encoder_hidden_states=text.repeat_interleave(batch, 0), **added).sample
        x0 = to_denoised(predictions, x.float().repeat(len(kinds), 1, 1, 1), sigma, prediction_type)
        if len(kinds) == 1:
            return x0
        prompted, unprompted = x0.chunk(2)
        return guidance(prompted, unprompted, guidance_scale)

    return denoise


def sampler(
    pipe: Any,
    embeddings: dict[str, torch.Tensor],
    steps: int,
    guidance_scale: float,
    on_denoised: Callable[[float | torch.Tensor, torch.Tensor], None] | None = None,
) -> Run:
    """The pipeline itself, with its own scheduler, from a given noise to latents.

    Args:
        on_denoised: called with (sigma, x0) at every step.
    """

    def run(noise: torch.Tensor) -> tuple[torch.Tensor, LatentStatistics]:
        recorder = LatentMeanRecorder(2 * steps, on_denoised)
        height, width = (side * pipe.vae_scale_factor for side in noise.shape[-2:])
        latents = pipe(
            **embeddings,
            latents=noise.to(pipe.unet.dtype),
            num_images_per_prompt=len(noise),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            callback_on_step_end=recorder.on(pipe),
        ).images
        return latents, recorder.read()

    return run


def vae_to_rgb(pipe: Any) -> ToRGB:
    """Latents (B, C, H, W) through the pipeline's VAE to (B, 3, H, W), 0 to 1 and beyond."""
    vae = pipe.vae

    def statistic(name: str, default: float, like: torch.Tensor) -> torch.Tensor:
        values = getattr(vae.config, name, None)
        return torch.as_tensor(default if values is None else values, dtype=torch.float32).to(like).view(-1, 1, 1)

    @torch.no_grad()
    def to_rgb(latents: torch.Tensor) -> torch.Tensor:
        latents = latents.float()
        std, mean = statistic("latents_std", 1.0, latents), statistic("latents_mean", 0.0, latents)
        latents = latents * std / vae.config.scaling_factor + mean
        # one at a time: decoding takes more memory than sampling
        pictures = [vae.decode(row.to(vae.dtype)).sample.float() for row in latents.split(1)]
        return torch.cat(pictures) / 2 + 0.5

    return to_rgb


def use_scheduler(pipe: Any, name: str, spacing: str | None, latent_size: tuple[int, int]) -> str:
    """Give the pipeline a scheduler by name; its name and spacing in words.

    Args:
        name: "ztsnr", "model" for the one it came with, or the class name of another that suits it.
        spacing: of its steps; None for its default.
        latent_size: (height, width), which our spacings depend on.

    Raises:
        UserError: an unknown scheduler or spacing.
    """
    config = pipe.scheduler.config
    if name == "ztsnr":
        from ..samplers import ZTSNRScheduler

        # a config without prediction_type means epsilon; the test finds out whether that is right
        chosen = {"prediction_type": config.get("prediction_type", "epsilon")}
        chosen |= {} if spacing is None else {"spacing": spacing}
        ours: Any = ZTSNRScheduler.from_config(config, latent_size=latent_size, **chosen)
        pipe.scheduler = ours
        return f"ZTSNRScheduler ({ours.config.solver}, {ours.config.spacing})"
    if name != "model":
        classes = {kind.__name__: kind for kind in pipe.scheduler.compatibles}
        if name not in classes:
            raise UserError(f"scheduler must be ztsnr, model or one of {', '.join(sorted(classes))}, not {name!r}")
        pipe.scheduler = classes[name].from_config(config)
    if spacing is not None:
        if spacing not in ("trailing", "leading", "linspace"):
            raise UserError(
                f"spacing of {type(pipe.scheduler).__name__} must be trailing, leading or linspace, not {spacing!r}"
            )
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=spacing)
    return f"{type(pipe.scheduler).__name__} ({pipe.scheduler.config.get('timestep_spacing', 'its own spacing')})"


def fingerprint(pipe: Any) -> str:
    """A hash of a pipeline's weights, from a few values per tensor: it changes with training, not with the path."""
    digest = hashlib.sha256()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        for tensor in part.state_dict().values() if part is not None else ():
            values = tensor.flatten()
            digest.update(values[:: max(1, len(values) // 8)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
