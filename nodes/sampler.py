"""ZTSNR Sampler: the package's own solvers, as a SAMPLER."""

import math

import comfy.model_sampling
import comfy.samplers
import torch
from comfy_api.latest import io

from ..samplers import DEFAULT_SOLVER, SOLVERS, sample
from .model_sampling import INFINITE_SIGMA, ExactVPrediction
from .schema import schema


class ZTSNRSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ZTSNRSampler",
            display_name="ZTSNR Sampler",
            category="ZTSNR",
            description="Solvers to which infinite sigma is an ordinary point; the same steps as the diffusers "
            "scheduler of this package. Best with sigmas from ZTSNR Scheduler.",
            search_aliases=["solver", "KSamplerSelect", "spectral", "dpmpp", "unipc", "euler"],
            inputs=[
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    default=DEFAULT_SOLVER,
                    tooltip="spectral: the most accurate at few steps. unipc: calmer below ten steps with strong "
                    "guidance. Names with ancestral or sde, and lcm, add fresh noise in every step.",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Share of fresh noise of the ancestral and sde solvers; 0 makes them deterministic. The "
                    "others do not use it.",
                ),
                io.Float.Input(
                    "s_noise",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Strength of the fresh noise of the ancestral and sde solvers and of lcm; 1 by the theory.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, solver: str, eta: float, s_noise: float) -> io.NodeOutput:
        options = {"solver": solver, "eta": eta, "s_noise": s_noise}
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_ztsnr, extra_options=options))


@torch.no_grad()
def sample_ztsnr(model, x, sigmas, extra_args=None, callback=None, disable=None, *, solver, eta, s_noise):
    """``samplers.sample`` with the signature of k-diffusion's samplers.

    Args:
        model: ``model(x, sigma, **extra_args) -> x0`` in k-diffusion's scaling, x = x0 + sigma eps; the noise itself at
            infinity (see ``model_sampling``).
        x: (B, C, H, W) the state at sigmas[0].
        sigmas: (steps + 1,)
    """
    _check(model.inner_model.inner_model.model_sampling, sigmas)
    extra_args = extra_args or {}
    levels = [math.inf if sigma >= INFINITE_SIGMA else sigma for sigma in sigmas.tolist()]
    one_each = x.new_ones(len(x))

    def denoise(x_vp: torch.Tensor, sigma: float) -> torch.Tensor:
        x, sigma = _to_k_diffusion(x_vp, sigma)
        return model(x, sigma * one_each, **extra_args)

    def report(i: int, sigma: float, x_vp: torch.Tensor, x0: torch.Tensor) -> None:
        x, sigma = _to_k_diffusion(x_vp, sigma)
        callback({"i": i, "denoised": x0, "x": x, "sigma": sigma, "sigma_hat": sigma})

    # the CPU's generator, so that a seed means one picture on every device; not the seed of the starting noise
    generator = torch.Generator().manual_seed((extra_args.get("seed") or 0) + 1)
    x = _to_variance_preserving(x, levels[0])
    x = sample(denoise, x, levels, solver, eta=eta, s_noise=s_noise, generator=generator, callback=callback and report)
    return _to_k_diffusion(x, levels[-1])[0]


sample_ztsnr.starts_at_infinity = True


def _to_k_diffusion(x_vp: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
    """x and sigma as ComfyUI writes them."""
    return (x_vp, INFINITE_SIGMA) if math.isinf(sigma) else (x_vp * math.hypot(1, sigma), sigma)


def _to_variance_preserving(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x if math.isinf(sigma) else x / math.hypot(1, sigma)


def _check(model_sampling, sigmas: torch.Tensor) -> None:
    if not isinstance(model_sampling, comfy.model_sampling.EPS):
        raise ValueError(
            "The ZTSNR Sampler is for Stable Diffusion 1.x, 2.x and XL models, not for flow matching: take a sampler "
            "from KSamplerSelect."
        )
    if sigmas[0] >= INFINITE_SIGMA and not isinstance(model_sampling, ExactVPrediction):
        raise ValueError(
            f"The sigmas begin at {float(sigmas[0]):g}, but this model's schedule ends at "
            f"{float(model_sampling.sigma_max):g}: put ZTSNR Model (v-prediction) before the sampler."
        )
