"""CFG rescale that is regular at infinite sigma."""

import torch
from comfy_api.latest import io

from ..samplers import rescale_guidance
from .messages import refused
from .model_patch import schedule_of
from .schema import schema


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
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model for any sampler.")],
        )

    @classmethod
    def execute(cls, model, phi: float) -> io.NodeOutput:
        try:
            schedule_of(model.get_model_object("model_sampling"))  # v is something else in flow matching and EDM
        except ValueError as reason:
            return refused(reason, outputs=1)
        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(lambda args: rescale_denoised(args, phi))
        return io.NodeOutput(patched)


def rescale_denoised(args: dict, phi: float) -> torch.Tensor:
    """x0 after guidance (B, C, H, W), with the contrast of v brought back toward that of the conditional v.

    v is proportional to x / (sigma^2 + 1) - x0 and the rescale does not care about its size, so nothing is divided by
    sigma; at infinity the first term is 0 and v is -x0.
    """
    sigma = args["sigma"].reshape(-1, *[1] * (args["input"].ndim - 1))
    clean = args["input"] / (sigma**2 + 1)
    return clean - rescale_guidance(clean - args["denoised"], clean - args["cond_denoised"], phi)
