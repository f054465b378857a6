"""The exact first step, for every sampler of ComfyUI.

No stock sampler can begin at infinity.  But from there every first-order step has the same limit, x1 = x0 + sigma1 n
in k-diffusion's scaling, and multistep methods carry no memory across it.  So this wrapper takes that step itself, with
one call of the model, and lets the sampler begin at sigma1, as if it had been given the picture's noisy version.
"""

import logging
import math

import comfy.model_management
import comfy.samplers
import torch

from .messages import show
from .model_sampling import INFINITE_SIGMA, ExactVPrediction

KEY = "ztsnr_first_step"


def first_step_wrapper(
    executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *rest, **keywords
):
    """Around ``Sampler.sample`` (WrappersMP.SAMPLER_SAMPLE).

    Args:
        sigmas: (steps + 1,) the first may be inf.  The tensor belongs to the caller and is never written to.
        noise: (B, C, H, W) unit Gaussian; all zero if the graph adds no noise: then the latent is the state.

    Raises:
        ValueError: sigmas that no sampler can run.
    """
    sampler, sigmas = executor.class_obj, sigmas.clone()

    def run(sigmas, callback, noise):
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest, **keywords)

    model_sampling = guider.inner_model.model_sampling
    if not isinstance(model_sampling, ExactVPrediction) or not model_sampling.zsnr or len(sigmas) < 2:
        return run(sigmas, callback, noise)
    _check(sigmas)
    from_text = noise.any() and not latent_image.any()
    if sigmas[0] < INFINITE_SIGMA:
        if from_text:
            show(
                f"The steps start at sigma {sigmas[0]:.4g} and never run t = {model_sampling.schedule.last_timestep}, "
                "the only one from which this zero-SNR model learned to start: expect greyish pictures. Take the "
                "scheduler ztsnr_trailing, ztsnr_spectral, simple, beta or sgm_uniform, and denoise 1.",
                logging.WARNING,
            )
        return run(sigmas, callback, noise)

    sigmas[0] = INFINITE_SIGMA
    # what functions of other packs look up the step in
    extra_args["model_options"]["transformer_options"]["sample_sigmas"] = sigmas
    _keep_schedule_of_masks(extra_args["model_options"], sigmas)
    noise = (noise if noise.any() else latent_image).float()
    if getattr(getattr(sampler, "sampler_function", None), "starts_at_infinity", False):
        return run(sigmas, callback, noise)

    steps = len(sigmas) - 1
    model = comfy.samplers.KSamplerX0Inpaint(guider, sigmas)
    model.latent_image, model.noise = latent_image, noise
    x0 = model(noise, sigmas[0].expand(len(noise)), denoise_mask, **extra_args)
    if callback is not None:
        callback(0, x0, noise, steps)
    x = x0 + sigmas[1] * noise
    if steps == 1:
        return x

    def later(step, x0, x, total_steps):
        callback(step + 1, x0, x, steps)

    # the noise with which the latent, at sigma1, is x
    return run(sigmas[1:].clone(), callback and later, (x - latent_image) / sigmas[1])


def _check(sigmas: torch.Tensor) -> None:
    """Stop before a sampler turns bad sigmas into a black picture, or never returns."""
    values = sigmas.tolist()
    if any(math.isnan(s) or s < 0 for s in values) or any(math.isinf(s) for s in values[1:]):
        raise ValueError(
            f"These sigmas cannot be sampled: {', '.join(f'{s:.4g}' for s in values)}. Only the first may be infinite. "
            "Take another scheduler (ztsnr_trailing, ztsnr_spectral, simple, beta, karras), or set first_step of "
            "ZTSNR Model to 'as ComfyUI does it'."
        )


def _keep_schedule_of_masks(model_options: dict, sigmas: torch.Tensor) -> None:
    """Let a mask that depends on the step (Differential Diffusion) count from the whole schedule's beginning."""
    masks = model_options.get("denoise_mask_function")
    if masks is not None:
        model_options["denoise_mask_function"] = lambda sigma, mask, extra_options: masks(
            sigma, mask, extra_options={**extra_options, "sigmas": sigmas}
        )
