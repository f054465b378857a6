"""Parts of diffusers pipelines, random and small: 32 x 32 pictures, 16 x 16 latents, text embeddings 32 wide.

Every function makes networks anew from torch's random state; a caller who seeds it gets the same weights each time.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    MotionAdapter,
    T2IAdapter,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.tiny_pipelines import BLOCKS, SDXL_EMBEDDINGS, make_tokenizer
from tests.tiny_pipelines import POOLED as POOLED

SIZE, LATENT = 32, 16  # sides in pixels and of their latents
TEXT = 32  # width of the token embeddings
FRAMES = 2

_UNET = {**BLOCKS, "cross_attention_dim": TEXT}
_FLAT = {**_UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
# With the attention in the outer block, as T2I adapters add to blocks with attention in front of the downsampling.
OUTER_ATTENTION = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

Module = torch.nn.Module


def awake(network: Module) -> Module:
    """The network, with random weights where diffusers begins with zeros and a branch would have no effect."""
    for parameter in network.parameters():
        if parameter.ndim != 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def louder(network: Module, gain: float = 4.0) -> Module:
    """A U-Net whose answers are as large as the v of a trained one."""
    torch.nn.init.normal_(network.conv_out.bias, std=0.3)
    network.conv_out.weight.data.mul_(gain)
    return awake(network)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def unet(**changes: Any) -> Module:
    """The U-Net of a Stable Diffusion pipeline."""
    up_blocks = ("CrossAttnUpBlock2D", "UpBlock2D")
    return louder(UNet2DConditionModel(**{**_FLAT, "up_block_types": up_blocks, "sample_size": LATENT, **changes}))


def vae(channels: int = 3) -> Module:
    """A VAE with a factor of 2."""
    made = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        force_upcast=False,
        scaling_factor=1.0,
    )
    return awake(made)


def controlnet(kind: type = ControlNetModel, **changes: Any) -> Module:
    """A ControlNet for ``unet``; ``kind`` may be that for several kinds of control."""
    return awake(kind(**_FLAT, conditioning_embedding_out_channels=(4, 8), **changes))


def adapter() -> Module:
    return awake(T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2))


def motion_adapter() -> Module:
    made = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=4,
        motion_max_seq_length=8,
    )
    return awake(made)


def video_unet(kind: type = UNet3DConditionModel) -> Module:
    """The U-Net of TextToVideoSD, or that of I2VGenXL."""
    made = kind(
        **_UNET,
        sample_size=LATENT,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    return louder(made)


def text_encoder() -> dict[str, Any]:
    """A text encoder and a tokenizer with a letter a token."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer: CLIPTokenizer = make_tokenizer(Path(folder) / "tokenizer", pad="<|endoftext|>")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT,
        intermediate_size=TEXT,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer}


def image_encoder() -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=TEXT,
        projection_dim=TEXT,
        intermediate_size=TEXT,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return {"image_encoder": CLIPVisionModelWithProjection(config).eval(), "feature_extractor": processor}


# ----------------------------------------------------------------------------------------------------------------------
# Sets of them


def sd(**changes: Any) -> dict[str, Any]:
    """The parts of a Stable Diffusion pipeline that is given embeddings of its prompts."""
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    return {"vae": vae(), "unet": changes.get("unet") or unet(), **absent, **changes}


def sdxl(unet_changes: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The parts of an SDXL pipeline, with the size embeddings of the base model."""
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    networks = {"vae": vae(), "unet": unet(**SDXL_EMBEDDINGS, **(unet_changes or {}))}
    return {**networks, **absent, "requires_aesthetics_score": False, **changes}


def sdxl_controlnet() -> Module:
    return controlnet(**SDXL_EMBEDDINGS)


def union_controlnet() -> Module:
    return controlnet(
        ControlNetUnionModel, **SDXL_EMBEDDINGS, num_trans_channel=8, num_proj_channel=8, num_trans_head=2
    )
