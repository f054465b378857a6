"""Models of full size: the published settings of their networks, and a whole SDXL of random weights (6.9 GB)."""

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
    },
    "Vega": {**SDXL, "transformer_layers_per_block": (1, 1, 2)},
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
TEXT_ENCODERS = {"SDXL base": ("ViT-L", "ViT-bigG"), "SD 1.x": ("ViT-L",), "SD 2.x": ("ViT-H",)}


def unet_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a U-Net, as diffusers builds it; without weights."""
    return shapes(_unet(name))


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def networks(name: str) -> dict[str, torch.nn.Module]:
    """The networks of a model by the names of their folders; without weights."""
    with torch.device("meta"):
        found = {"unet": _unet(name), "vae": diffusers.AutoencoderKL(**VAE)}
        for i, size in enumerate(TEXT_ENCODERS[name]):
            kind = transformers.CLIPTextModelWithProjection if i else transformers.CLIPTextModel
            found[f"text_encoder{'_2' if i else ''}"] = kind(transformers.CLIPTextConfig(**CLIP[size]))
    return found


def _unet(name: str) -> diffusers.UNet2DConditionModel:
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**UNETS[name])


# ----------------------------------------------------------------------------------------------------------------------
# With weights


def write_sdxl(folder: Path, tokenizer: Path, seed: int = 0) -> Path:
    """Write a diffusers folder of SDXL of random weights in float16, zero-SNR v-prediction, and return it.

    Takes about a minute, and memory for one tensor.

    Args:
        tokenizer: a folder with the vocab.json and merges.txt of CLIP, or of any tokenizer of its kind.
    """
    generator = torch.Generator().manual_seed(seed)
    for part, network in networks("SDXL base").items():
        (folder / part).mkdir(parents=True)
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        _write_random(folder / part / f"{stem}.safetensors", shapes(network), generator)
        if part.startswith("text_encoder"):
            network.config.save_pretrained(folder / part)
        else:
            network.save_config(folder / part)
    diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ).save_config(folder / "scheduler")
    for part, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        transformers.CLIPTokenizer.from_pretrained(tokenizer, pad_token=pad, model_max_length=77).save_pretrained(
            folder / part
        )
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "force_zeros_for_empty_prompt": True,
    }
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
