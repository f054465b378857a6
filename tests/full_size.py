"""Models of full size: the published settings of their networks, and whole ones of random weights (SDXL: 6.9 GB).

Those with the smallest U-Nets that ComfyUI knows have the text encoders and the VAE of full size all the same.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import transformers

# As far as they shape the networks (config.json of each)
SD = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
UNETS = {
    "SD 1.x": {**SD, "cross_attention_dim": 768, "attention_head_dim": 8},
    "SD 2.x": {
        **SD,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SDXL base": {**SDXL, "transformer_layers_per_block": (1, 2, 10)},
    "SSD-1B": {
        **SDXL,
        "transformer_layers_per_block": (1, 2, 4),
        "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
    },
    "Vega": {**SDXL, "transformer_layers_per_block": (1, 1, 2), "mid_block_type": "UNetMidBlock2D"},
    "KOALA 700M": {
        **SDXL,
        "layers_per_block": 1,
        "transformer_layers_per_block": (0, 2, 5),
        "mid_block_type": None,
    },
    "KOALA 1B": {**SDXL, "layers_per_block": 1, "transformer_layers_per_block": (0, 2, 6)},
    "SDXL refiner": {
        **SDXL,
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 1280,
        "attention_head_dim": (6, 12, 24, 24),
        "transformer_layers_per_block": 4,
        "projection_class_embeddings_input_dim": 2560,
    },
}
CLIP = {
    "ViT-L": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
    "ViT-H": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "ViT-bigG": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
# ComfyUI tells U-Nets by the width of the first block and of the text, and SDXL's by the depths of the first half
SMALLEST_UNETS = {
    name: {
        **UNETS[name],
        "block_out_channels": (320, 320),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": heads,
    }
    for name, heads in {"SD 1.x": 8, "SD 2.x": 5}.items()
} | {
    "KOALA": {
        **SDXL,
        "block_out_channels": (320, 320, 320),
        "layers_per_block": 1,
        "attention_head_dim": 5,
        "transformer_layers_per_block": (1, 2, 5),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",) * 3,
    }
}
TEXT_ENCODERS = {"SDXL base": ("ViT-L", "ViT-bigG"), "SD 1.x": ("ViT-L",), "SD 2.x": ("ViT-H",)}


def unet_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a U-Net, as diffusers builds it; without weights."""
    return shapes(_unet(UNETS[name]))


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def networks(name: str, unet: dict | None = None) -> dict[str, torch.nn.Module]:
    """The networks of a model by the names of their folders, with a U-Net of other settings if given; no weights."""
    with torch.device("meta"):
        found = {"unet": _unet(unet or UNETS[name]), "vae": diffusers.AutoencoderKL(**VAE)}
        for i, size in enumerate(TEXT_ENCODERS[name]):
            kind = transformers.CLIPTextModelWithProjection if i else transformers.CLIPTextModel
            found[f"text_encoder{'_2' if i else ''}"] = kind(transformers.CLIPTextConfig(**CLIP[size]))
    return found


def _unet(settings: dict) -> diffusers.UNet2DConditionModel:
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**settings)


# ----------------------------------------------------------------------------------------------------------------------
# With weights


def write_folder(
    folder: Path,
    name: str,
    tokenizer: Path,
    *,
    unet: dict | None = None,
    prediction_type: str = "v_prediction",
    zero_snr: bool = True,
) -> Path:
    """Write a diffusers folder of random weights in float16, and return it.

    SDXL takes half a minute, and memory for one tensor.

    Args:
        name: a key of TEXT_ENCODERS.
        tokenizer: a folder with the vocab.json and merges.txt of CLIP, or of any tokenizer of its kind.
        unet: settings of another U-Net.
    """
    generator = torch.Generator().manual_seed(0)
    for part, network in networks(name, unet).items():
        (folder / part).mkdir(parents=True)
        is_text = part.startswith("text_encoder")
        stem = "model" if is_text else "diffusion_pytorch_model"
        _write_random(folder / part / f"{stem}.safetensors", shapes(network), generator)
        if is_text:
            network.config.save_pretrained(folder / part)
        else:
            network.save_config(folder / part)
    diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
        steps_offset=1,
    ).save_config(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    pads = {"tokenizer": "!" if name == "SD 2.x" else "<|endoftext|>"}
    if name == "SDXL base":
        index["_class_name"] = "StableDiffusionXLPipeline"
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        pads["tokenizer_2"] = "!"
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    for part, pad in pads.items():
        clip = transformers.CLIPTokenizer.from_pretrained(tokenizer, pad_token=pad, model_max_length=77)
        clip.save_pretrained(folder / part)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _write_random(path: Path, shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in _random(name, shape, generator):
                file.write(piece.numpy())
        file.flush()
        os.fsync(file.fileno())


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Weights with which numbers neither grow nor vanish on their way through the network, and no two are the same."""
    if len(shape) > 1:
        mean, deviation = 0.0, 0.02 if "embedding" in name else math.prod(shape[1:]) ** -0.5
    else:
        mean, deviation = float("norm" in name and name.endswith("weight")), 0.02
    for count in [4_000_000] * (math.prod(shape) // 4_000_000) + [math.prod(shape) % 4_000_000]:
        yield torch.empty(count).normal_(mean, deviation, generator=generator).half()
