"""Recording sampling runs from outside: every evaluation of the network, under every sampler.

Two wrappers around ComfyUI's guider, and a function inside it.  OUTER_SAMPLE sees the initial noise and the result of a
run, and lies outside of every wrapper of the sampler, so the order of nodes does not matter.  PREDICT_NOISE sees each
evaluation, with its sigma, and the prediction after guidance; a post_cfg function sees the prediction for the prompt
alone.  Nothing is changed and nothing waits for the device, so pictures stay the same to the last bit.
"""

import math

import comfy.model_sampling
import torch
from comfy.patcher_extension import WrappersMP

from ..diagnostics import LatentMeanRecorder
from .model_sampling import INFINITE_SIGMA, ExactSchedule

KEY = "ztsnr_latent_mean_probe"


class RunProbe:
    """The last run of a probed MODEL.

    Attributes:
        recorder: means of the state, the prediction and the noise at every evaluation.
        predictions: the first sample's x0 at every evaluation, (1, C, H, W); or a video's first frame.
        unguided: the first prediction for the prompt alone, before guidance; None if unknown.
        latent_format: the model's.
        result: (B, C, ...) the run's result, scaled as in a LATENT; None if it did not finish.
    """

    def __init__(self):
        self.recorder = LatentMeanRecorder()
        self.predictions: list[torch.Tensor] = []
        self.unguided: torch.Tensor | None = None
        self.latent_format = None
        self.result: torch.Tensor | None = None
        self._shape: torch.Size | None = None
        self._end: float | None = None  # sigma that the run stopped at

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Around ``CFGGuider.outer_sample`` (WrappersMP.OUTER_SAMPLE)."""
        adds_noise = bool(noise.any())
        is_next_stage = not adds_noise and self._end == float(sigmas[0]) and self._shape == noise.shape
        if not is_next_stage:
            self.recorder.begin(noise if adds_noise else None)
            self.predictions.clear()
            self.unguided = None
        self.latent_format = executor.class_obj.model_patcher.get_model_object("latent_format")
        self._shape, self._end, self.result = noise.shape, None, None
        self.result = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        self._end = float(sigmas[-1])
        return self.result

    def predict_noise(self, executor, x, timestep, *args, **kwargs):
        """Around ``CFGGuider.predict_noise`` (WrappersMP.PREDICT_NOISE), which returns x0."""
        x0 = executor(x, timestep, *args, **kwargs)
        if x.shape == self._shape:  # some samplers of other packs also evaluate smaller pictures
            sigma, x_scale = noise_level(executor.class_obj.inner_model.model_sampling, timestep)
            self.recorder.record(sigma, x, x0, x_scale)
            self.predictions.append(first_picture(x0))
        return x0

    def post_cfg(self, args: dict):
        """A post_cfg function that changes nothing: it records the prediction for the prompt alone."""
        cond = args["cond_denoised"]
        if not self.predictions and cond.shape == self._shape:
            self.unguided = first_picture(cond)
        return args["denoised"]


def first_picture(x0: torch.Tensor) -> torch.Tensor:
    """A copy of the first sample of a prediction (B, C, ...); of a video its first frame."""
    return x0[(slice(1), slice(None), *[slice(1)] * (x0.ndim - 4))].detach().clone()


def watch(model, probe: RunProbe):
    """A clone of a MODEL whose runs the probe records."""
    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, probe.outer_sample)
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, probe.predict_noise)
    watched.set_model_sampler_post_cfg_function(probe.post_cfg)
    return watched


def unwatched(model):
    """A clone of a MODEL without probes."""
    model = model.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE):
        model.remove_wrappers_with_key(kind, KEY)
    functions = model.model_options.get("sampler_post_cfg_function", [])
    others = [function for function in functions if not isinstance(getattr(function, "__self__", None), RunProbe)]
    if len(others) < len(functions):
        model.model_options["sampler_post_cfg_function"] = others
    return model


def noise_level(model_sampling, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise level that ComfyUI's sigma means, computed on the device.

    Args:
        timestep: (B,) as samplers give it to the model: k-diffusion's sigma, or the time 0...1 of flow matching.

    Returns:
        Standard deviation of the noise over that of the signal, inf where the state is noise; and what makes the state
        variance-preserving.  Tensors () float32.
    """
    sigma = timestep.flatten()[0].float()
    if isinstance(model_sampling, comfy.model_sampling.CONST):  # x = (1 - sigma) x0 + sigma noise
        noise = sigma * noise_scale(model_sampling)
        return noise / (1 - sigma), ((1 - sigma) ** 2 + noise**2).rsqrt()
    scale = (sigma**2 + 1).rsqrt().masked_fill(sigma.isinf(), 1)
    if isinstance(model_sampling, ExactSchedule):
        sigma = sigma.masked_fill(sigma >= INFINITE_SIGMA, math.inf)
    return sigma, scale


def noise_scale(model_sampling) -> float:
    """Standard deviation of a flow model's noise; cores without this setting know 1 alone."""
    return getattr(model_sampling, "noise_scale", 1.0)
