"""Guidance that leaves brightness to the prompt, and a CFG rescale that is regular at infinite sigma."""

import math

import torch
from comfy_api.latest import io

from ..errors import UserError
from ..samplers import rescale_contrast, rescale_guidance
from ..samplers.guidance import CONTRAST, EXPOSURE, exposure_true_prediction
from .messages import refused
from .model_patch import schedule_of
from .model_sampling import INFINITE_FROM
from .schema import schema

RESCALES = {"keep the prompt's mean": rescale_contrast, "Lin et al. 2023": rescale_guidance}
DEFAULT_RESCALE = next(iter(RESCALES))


class ZTSNRGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ZTSNRGuidance",
            display_name="ZTSNR Guidance",
            category="ZTSNR",
            description="Strong guidance (CFG) without its burnt colours: brightness, tint and contrast stay those of "
            "the prompt alone. Connect it after other guidance nodes.",
            search_aliases=["CFG", "exposure", "brightness", "burned", "oversaturation", "guidance interval"],
            inputs=[
                io.Model.Input("model", tooltip="The model whose guidance is changed. It is not changed itself."),
                io.Float.Input(
                    "exposure",
                    default=EXPOSURE,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of guidance's effect on brightness and tint to take away; 0 is plain CFG.",
                ),
                io.Float.Input(
                    "contrast",
                    default=CONTRAST,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of guidance's effect on the whole picture's contrast to take away; 0 is plain CFG.",
                ),
                io.Float.Input(
                    "interval_start",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.001,
                    tooltip="Guide from this sigma on, in canvas lengths (sqrt of latent height x width); 0 is off.",
                ),
                io.Float.Input(
                    "interval_end",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.001,
                    tooltip="Guide down to this sigma, in the same unit; 0 guides to the end.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model for any sampler.")],
        )

    @classmethod
    def execute(
        cls, model, exposure: float, contrast: float, interval_start: float, interval_end: float
    ) -> io.NodeOutput:
        start = interval_start or math.inf
        try:
            schedule_of(model.get_model_object("model_sampling"))
            if start <= interval_end:
                raise UserError(
                    f"Guidance from {start:g} down to {interval_end:g} canvas lengths never acts, because sigma falls: "
                    "set interval_start above interval_end, or to 0."
                )
        except UserError as reason:
            return refused(reason, outputs=1)

        def exposure_true_within_interval(args: dict) -> torch.Tensor:
            acts, cond = in_interval(args, start, interval_end), args["cond_denoised"]
            if args["uncond"] is not None:  # at CFG 1 there is no unconditional prediction
                # in place, because that is what a CFG++ sampler gets to see: it takes its noise from there, and would
                # bring back at every step the brightness that is taken away here
                uncond = args["uncond_denoised"]
                uncond.copy_(torch.where(acts, exposure_true_prediction(cond, uncond, cond, exposure, contrast), cond))
            return torch.where(acts, exposure_true_denoised(args, exposure, contrast), cond)

        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(exposure_true_within_interval)
        return io.NodeOutput(patched)


class ZTSNRGuidanceRescale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ZTSNRGuidanceRescale",
            display_name="ZTSNR Guidance Rescale",
            category="ZTSNR",
            description="Takes back the excess contrast of strong guidance (Lin et al. 2023), also in the first step "
            "from infinite sigma. Works together with other guidance nodes.",
            search_aliases=["RescaleCFG", "CFG rescale", "guidance rescale", "oversaturation"],
            inputs=[
                io.Model.Input("model", tooltip="The model whose guidance is rescaled. It is not changed."),
                io.Float.Input(
                    "phi",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 leaves the guidance as it is, 1 brings its contrast down to that of the prompt alone; "
                    "the paper uses 0.7.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(RESCALES),
                    default=DEFAULT_RESCALE,
                    optional=True,  # graphs that were saved before it existed do not have it
                    tooltip="keep the prompt's mean: black stays black. Lin et al. 2023: the paper's, which turns it "
                    "grey; the same as RescaleCFG.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model for any sampler.")],
        )

    @classmethod
    def execute(cls, model, phi: float, method: str = DEFAULT_RESCALE) -> io.NodeOutput:
        try:
            schedule_of(model.get_model_object("model_sampling"))  # v means something else in flow matching and EDM
        except UserError as reason:
            return refused(reason, outputs=1)
        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(lambda args: rescale_denoised(args, phi, RESCALES[method]))
        return io.NodeOutput(patched)


def exposure_true_denoised(args: dict, exposure: float, contrast: float) -> torch.Tensor:
    """x0 after guidance (B, C, H, W), with brightness, tint and contrast left to the conditional x0.

    Whatever CFG function made ``denoised``, and whatever other functions added to it: what it has beyond the
    conditional x0 is the direction of guidance.
    """
    cond, denoised = args["cond_denoised"], args["denoised"]
    return exposure_true_prediction(cond, denoised, cond, exposure, contrast).to(denoised.dtype)


def in_interval(args: dict, start: float, end: float) -> torch.Tensor:
    """Where guidance acts, (B, 1, 1, 1): end < sigma <= start (Kynkaanniemi et al., arXiv 2404.07724).

    Both are in canvas lengths, sqrt(height * width).  Sigma over that length is the standard deviation of the noise's
    canvas mean, so an interval means the same on every canvas.
    """
    height, width = args["input"].shape[-2:]
    sigma = args["sigma"].reshape(-1, *[1] * (args["input"].ndim - 1))
    sigma = sigma.masked_fill(sigma >= INFINITE_FROM, math.inf) / math.sqrt(height * width)
    return (sigma > end) & (sigma <= start)


def rescale_denoised(args: dict, phi: float, rescale=rescale_contrast) -> torch.Tensor:
    """x0 after guidance (B, C, H, W), with the contrast of v brought back toward that of the conditional v.

    v is proportional to x / (sigma^2 + 1) - x0 and the rescale does not care about its size, so nothing is divided by
    sigma; at infinity the first term is 0 and v is -x0.
    """
    sigma = args["sigma"].reshape(-1, *[1] * (args["input"].ndim - 1))
    clean = args["input"] * (sigma**2 + 1).reciprocal().masked_fill_(sigma >= INFINITE_FROM, 0)
    return clean - rescale(clean - args["denoised"], clean - args["cond_denoised"], phi)
