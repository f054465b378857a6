"""An empty latent in one of the sizes that the model was trained on."""

import math

import torch
from comfy_api.latest import io

import nodes as core

from ..canvas import area_buckets, nearest_bucket, novelai_buckets
from ..errors import UserError
from .schema import schema, used_for

BUCKETS = {"SDXL": area_buckets((1024, 1024)), "NovelAI 2022": novelai_buckets()}


def _label(name: str, width: int, height: int) -> str:
    divisor = math.gcd(width, height)
    return f"{name}: {width} x {height} ({width // divisor}:{height // divisor})"


# The entries of the list of sizes: a whole set to search, or one bucket.  Workflows store these texts.
NEAREST = {f"{name}: nearest to image or ratio": buckets for name, buckets in BUCKETS.items()}
FIXED = {_label(name, *bucket): bucket for name, buckets in BUCKETS.items() for bucket in buckets}


class ZTSNRBucketLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ZTSNRBucketLatent",
            display_name="Empty Latent (training bucket)",
            category="ZTSNR",
            description="An empty latent in one of the sizes that the model was trained on: chosen from a list, or "
            "nearest to the shape of an image or to a ratio.",
            search_aliases=["empty latent", "aspect ratio bucket", "resolution", "canvas size", "image size", "SDXL"],
            inputs=[
                io.Combo.Input(
                    "size",
                    options=[*NEAREST, *FIXED],
                    default=_label("SDXL", 1024, 1024),
                    tooltip="Width x height in pixels. 'nearest' takes the shape of the image, or of the ratio if no "
                    "image is connected; with a size from the list, image and ratio do nothing. SDXL and what was "
                    "made from it (Illustrious, NoobAI-XL) need the SDXL sizes; Stable Diffusion 1 models with "
                    "NovelAI ancestry need the NovelAI 2022 ones.",
                ),
                io.Int.Input(
                    "ratio_width",
                    default=2,
                    min=1,
                    max=core.MAX_RESOLUTION,
                    tooltip="First number of the ratio width : height, such as 2 of 2:3; a size in pixels works too.",
                    extra_dict=used_for(size=NEAREST, unless="image"),
                ),
                io.Int.Input(
                    "ratio_height",
                    default=3,
                    min=1,
                    max=core.MAX_RESOLUTION,
                    tooltip="Second number of the ratio width : height, such as 3 of 2:3; a size in pixels works too.",
                    extra_dict=used_for(size=NEAREST, unless="image"),
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=4096, tooltip="Number of latents, one for each picture."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="With 'nearest': the bucket nearest to this image's aspect ratio. Only its shape is used.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The empty latents."),
                io.Int.Output(display_name="width", tooltip="Width of the bucket in pixels."),
                io.Int.Output(display_name="height", tooltip="Height of the bucket in pixels."),
            ],
        )

    @classmethod
    def execute(
        cls, size: str, ratio_width: int, ratio_height: int, batch_size: int, image: torch.Tensor | None = None
    ) -> io.NodeOutput:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}.")
        if size in FIXED:
            width, height = FIXED[size]
        elif size not in NEAREST:
            raise UserError(f"size must be one of the list, not {size!r}: choose it again.")
        elif image is not None:
            width, height = nearest_bucket(image.shape[2], image.shape[1], NEAREST[size])
        else:
            width, height = nearest_bucket(ratio_width, ratio_height, NEAREST[size])
        # the core's own: its dtype and its extra keys depend on the version
        (latent,) = core.EmptyLatentImage().generate(width, height, batch_size)
        return io.NodeOutput(latent, width, height)
