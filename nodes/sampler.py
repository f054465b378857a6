"""ZTSNR Sampler: the package's own solvers, as a SAMPLER."""

import math

import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch
from comfy_api.latest import io

from ..errors import UserError
from ..samplers import DEFAULT_SOLVER, SOLVERS, sample
from .first_step import without_noise
from .model_sampling import INFINITE_FROM, INFINITE_SIGMA, ExactVPrediction
from .schema import schema, used_for

ETA = ("euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "sa_solver")
FRESH_NOISE = (*ETA, "lcm")


class ZTSNRSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ZTSNRSampler",
            display_name="ZTSNR Sampler",
            category="ZTSNR",
            description="Solvers for which infinite sigma is an ordinary point; the same steps as the diffusers "
            "scheduler of this package. Best with sigmas from ZTSNR Scheduler.",
            search_aliases=["solver", "KSamplerSelect", "spectral", "dpmpp", "unipc", "euler", "er_sde", "CFG++"],
            inputs=[
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    default=DEFAULT_SOLVER,
                    tooltip="spectral: the most accurate at few steps. Names with ancestral or sde, sa_solver and lcm "
                    "add fresh noise.",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Share of fresh noise of sa_solver and of the ancestral and sde solvers; 0 makes them "
                    "deterministic. The others do not use it.",
                    extra_dict=used_for(solver=ETA),
                ),
                io.Float.Input(
                    "s_noise",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Strength of the fresh noise, including that of lcm; 1 in theory.",
                    extra_dict=used_for(solver=FRESH_NOISE),
                ),
                io.Boolean.Input(
                    "cfg_pp",
                    default=False,
                    optional=True,  # workflows saved before it existed do not have it
                    tooltip="CFG++: guidance changes the picture, the noise stays unconditional. Set cfg to 1 or less.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, solver: str, eta: float, s_noise: float, cfg_pp: bool = False) -> io.NodeOutput:
        options = {"solver": solver, "eta": eta, "s_noise": s_noise, "cfg_pp": cfg_pp}
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_ztsnr, extra_options=options))


@torch.no_grad()
def sample_ztsnr(model, x, sigmas, extra_args=None, callback=None, disable=None, *, solver, eta, s_noise, cfg_pp=False):
    """``samplers.sample`` with the signature of k-diffusion's samplers.

    Args:
        model: ``model(x, sigma, **extra_args) -> x0`` in k-diffusion's scaling, x = x0 + sigma eps; for infinity see
            ``model_sampling``.
        x: (B, C, H, W) the state at sigmas[0].
        sigmas: (steps + 1,)
        cfg_pp: guide by CFG++; without a negative prompt nothing changes.
    """
    _check(model.inner_model.inner_model.model_sampling, sigmas)
    extra_args = extra_args or {}
    levels = [math.inf if sigma >= INFINITE_FROM else sigma for sigma in sigmas.tolist()]
    one_each = x.new_ones(len(x))
    kept = {}
    if cfg_pp:
        extra_args = _keep_unconditional(extra_args, kept)

    def denoise(x_vp: torch.Tensor, sigma: float) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x, level = _to_k_diffusion(x_vp, sigma)
        x0 = model(x, level * one_each, **extra_args)
        if math.isinf(sigma):
            x0 = without_noise(x0, x_vp)
        unconditional = kept.pop("x0", None)
        if not cfg_pp:
            return x0
        return x0, x0 if unconditional is None else unconditional

    def report(i: int, sigma: float, x_vp: torch.Tensor, x0: torch.Tensor) -> None:
        x, sigma = _to_k_diffusion(x_vp, sigma)
        callback({"i": i, "denoised": x0, "x": x, "sigma": sigma, "sigma_hat": sigma})

    # the CPU's generator, so that a seed means one picture on every device; not the seed of the starting noise
    generator = torch.Generator().manual_seed((extra_args.get("seed") or 0) + 1)
    x = _to_variance_preserving(x, levels[0])
    x = sample(
        denoise, x, levels, solver, eta=eta, s_noise=s_noise, generator=generator, cfg_pp=cfg_pp,
        callback=callback and report,
    )  # fmt: skip
    return _to_k_diffusion(x, levels[-1])[0]


sample_ztsnr.starts_at_infinity = True


def _keep_unconditional(extra_args: dict, kept: dict) -> dict:
    """The model's arguments, changed so that each call leaves its unconditional x0 in ``kept["x0"]``."""

    def keep(args: dict) -> torch.Tensor:
        # zeros stand for the prediction that a guider without a negative prompt does not have
        kept["x0"] = None if args["uncond"] is None else args["uncond_denoised"]
        return args["denoised"]

    options = extra_args.get("model_options", {}).copy()
    # without the optimization that skips it at cfg 1
    options = comfy.model_patcher.set_model_options_post_cfg_function(options, keep, disable_cfg1_optimization=True)
    return extra_args | {"model_options": options}


def _to_k_diffusion(x_vp: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
    """x and sigma as ComfyUI writes them."""
    sigma = min(sigma, INFINITE_SIGMA)
    return x_vp * math.hypot(1, sigma), sigma


def _to_variance_preserving(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x / math.hypot(1, min(sigma, INFINITE_SIGMA))


def _check(model_sampling, sigmas: torch.Tensor) -> None:
    if not isinstance(model_sampling, comfy.model_sampling.EPS):
        raise UserError(
            "The ZTSNR Sampler is for Stable Diffusion 1.x, 2.x and XL models, not for flow matching: use a sampler "
            "from KSamplerSelect."
        )
    if sigmas[0] >= INFINITE_FROM and not isinstance(model_sampling, ExactVPrediction):
        raise UserError(
            f"The sigmas begin at {float(sigmas[0]):g}, but this model's schedule ends at "
            f"{float(model_sampling.sigma_max):g}: put ZTSNR Model (v-prediction) before the sampler."
        )
