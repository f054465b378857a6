"""The exact first step, for every sampler of ComfyUI.

No stock sampler can begin at infinity.  But from there every first-order step has the same limit, x1 = x0 + sigma1 n
in k-diffusion's scaling, and multistep methods carry no memory across it.  So this wrapper takes that step itself, with
one call of the model, and lets the sampler begin at sigma1, as if it had been given the picture's noisy version.

CFG++ samplers treat their first step differently from later ones, so they take it themselves, from a number that is
infinity to rounding.
"""

import logging
import math

import comfy.model_management
import comfy.samplers
import torch

from ..errors import UserError
from .messages import show
from .model_sampling import INFINITE_FROM, INFINITE_SIGMA, ExactSchedule, ExactVPrediction

KEY = "ztsnr_first_step"
CFG_PP_START = 2.0**20  # so large that (x - x0) / sigma, which CFG++ samplers take, is the noise itself
SCALED = 100.0  # rms of a latent from which on it is noise that is multiplied by sigma; pictures have about 1
REPLACED = (
    "A node after ZTSNR Model (ModelSamplingDiscrete, for example) has replaced its exact schedule, so the first "
    "step is ComfyUI's. Remove that node: ZTSNR Model does the same and more."
)


def first_step_wrapper(
    executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *rest, **keywords
):
    """Around ``Sampler.sample`` (WrappersMP.SAMPLER_SAMPLE).

    Args:
        sigmas: (steps + 1,) the first means infinity from INFINITE_FROM on.  The tensor belongs to the caller and is
            never written to.
        noise: (B, C, H, W) unit Gaussian; all zero if the graph adds no noise: then the latent is the state.

    Raises:
        UserError: sigmas that no sampler can run, or a latent that contains NaN or infinity.
    """
    sampler, given, sigmas = executor.class_obj, float(sigmas[0]) if len(sigmas) else 0.0, sigmas.clone()

    def run(sigmas, callback, noise, extra_args=extra_args):
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest, **keywords)

    model_sampling = guider.inner_model.model_sampling
    if not isinstance(model_sampling, ExactSchedule):
        show(REPLACED, logging.WARNING)
        return run(sigmas, callback, noise)
    if not isinstance(model_sampling, ExactVPrediction) or not model_sampling.zsnr or len(sigmas) < 2:
        return run(sigmas, callback, noise)
    _check(sigmas, latent_image)
    if given < INFINITE_FROM:
        from_text = bool(noise.any()) and not latent_image.any() and sigmas[0] > sigmas[1]
        if from_text:
            show(
                f"The steps start at sigma {given:.4g} and never run t = {model_sampling.schedule.last_timestep}, the "
                "only one from which this zero-SNR model learned to start: expect greyish pictures. In KSampler, set "
                "scheduler to ztsnr_trailing, ztsnr_spectral, simple, beta or sgm_uniform, and denoise to 1; in custom "
                "sampling, use ZTSNR Scheduler.",
                logging.WARNING,
            )
        return run(sigmas, callback, noise)

    sigmas[0] = INFINITE_SIGMA
    # what functions of other packs look up the step in
    extra_args["model_options"]["transformer_options"]["sample_sigmas"] = sigmas
    _keep_schedule_of_masks(extra_args["model_options"], sigmas)
    if not noise.any():
        noise = _unit_noise(latent_image, given)
        if denoise_mask is None:
            latent_image = torch.zeros_like(latent_image)  # it was the noise, and no picture to come back to
    noise = noise.float()
    function = getattr(sampler, "sampler_function", None)
    if "cfg_pp" in getattr(function, "__name__", ""):
        sigmas[0] = CFG_PP_START
        return run(sigmas, callback, noise)
    if getattr(function, "starts_at_infinity", False):
        return run(sigmas, callback, noise)

    steps = len(sigmas) - 1
    model = comfy.samplers.KSamplerX0Inpaint(guider, sigmas)
    model.latent_image, model.noise = latent_image, noise
    state = INFINITE_SIGMA * noise
    x0 = without_noise(model(state, sigmas[0].expand(len(noise)), denoise_mask, **extra_args), noise)
    if callback is not None:
        callback(0, x0, state, steps)
    x = x0 + sigmas[1] * noise
    if steps == 1:
        return x

    def later(step, x0, x, total_steps):
        callback(step + 1, x0, x, steps)

    # Brownian samplers grow their noise from the range of sigmas, which begins lower here: with the seed of another
    # stage, which begins there too, they would draw that stage's noise once more
    seed, redraws = extra_args.get("seed"), getattr(sampler, "inpaint_options", {}).get("random", False)
    rest_args = extra_args if seed is None or redraws else extra_args | {"seed": seed + 1}
    # the noise with which the latent, at sigma1, is x
    return run(sigmas[1:].clone(), callback and later, (x - latent_image) / sigmas[1], rest_args)


def without_noise(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x0 at infinity, without what a function of another pack has added in proportion to x (Epsilon Scaling).

    Args:
        x0: (B, C, H, W) after guidance.
        noise: the unit noise that the network was asked about.
    """
    dims = tuple(range(1, x0.ndim))
    share = (x0 * noise).sum(dims, keepdim=True) / noise.square().sum(dims, keepdim=True)
    # no prediction holds more than about its own size of the noise
    return x0 - share.masked_fill(share.abs() < 2, 0) * noise


def _unit_noise(latent: torch.Tensor, sigma: float) -> torch.Tensor:
    """The noise in a latent to which no more is added: as it is, or multiplied by the first sigma of the steps."""
    return latent / sigma if latent.square().mean().sqrt() > SCALED else latent


def _check(sigmas: torch.Tensor, latent: torch.Tensor) -> None:
    """UserError before a sampler turns bad numbers into a black picture, or never returns."""
    values = sigmas.tolist()
    if any(math.isnan(s) or s < 0 for s in values) or any(math.isinf(s) for s in values[1:]):
        raise UserError(
            f"These sigmas cannot be sampled: {', '.join(f'{s:.4g}' for s in values)}. Only the first may be infinite. "
            "Use ZTSNR Scheduler instead of the node that made them, or set first_step of ZTSNR Model to 'as ComfyUI "
            "does it'."
        )
    if not latent.isfinite().all():
        raise UserError(
            "The latent contains NaN or infinity: check the nodes that made it, such as a VAE in half precision."
        )


def _keep_schedule_of_masks(model_options: dict, sigmas: torch.Tensor) -> None:
    """Let a mask that depends on the step (Differential Diffusion) count from the whole schedule's beginning."""
    masks = model_options.get("denoise_mask_function")
    if masks is not None:
        model_options["denoise_mask_function"] = lambda sigma, mask, extra_options: masks(
            sigma, mask, extra_options={**extra_options, "sigmas": sigmas}
        )
