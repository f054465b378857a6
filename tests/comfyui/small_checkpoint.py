"""Write a checkpoint that ComfyUI takes for a zero-terminal-SNR v-prediction SDXL, small enough for a test.

    PYTHON_OF_COMFYUI small_checkpoint.py COMFYUI OUT.safetensors

ComfyUI knows SDXL by the width of the U-Net, the depths of its input blocks and the sizes of its two conditionings, so
this U-Net keeps those of KOALA-700M and leaves out what is not compared: wider levels, attention in the output blocks,
the middle block.  The size of the text encoders is fixed; their layers are zeros, which pass the token embeddings
through, and the file has holes there (1.8 GB to read, 0.3 GB on disk).  The VAE is a TAESD whose picture is a linear
function of the latent, and back, so that what happens to a latent can be read off the picture.
"""

import json
import math
import os
import re
import struct
import sys
import tempfile
from pathlib import Path

import torch

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1, 1, 1],
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 2, 5],
    "transformer_depth_output": [0] * 6,
    "transformer_depth_middle": -2,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "num_heads": -1,
    "num_head_channels": 64,
    "legacy": False,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
# RGB in 0...1, less 0.5, from the four latent channels: brightness, red against blue, green against the two, nothing
RGB = torch.tensor([[0.25, 0.1, -0.1, 0.0], [0.25, 0.0, 0.1, 0.0], [0.25, -0.1, -0.1, 0.0]])
# TAESD limits what it decodes to 3 tanh(z/3); at a sixteenth of SDXL's latents that is a straight line
VAE_SCALE = 1 / 16


def empty_checkpoint(comfyui: str) -> dict[str, torch.Tensor]:
    """Names and shapes of a checkpoint, out of ComfyUI's own modules; no values (the tensors are on "meta")."""
    sys.path.insert(0, comfyui)
    from comfy.cli_args import args

    args.cpu = True
    from comfy import ops, sdxl_clip, supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.taesd.taesd import TAESD

    with torch.device("meta"):
        unet = UNetModel(**UNET, dtype=torch.float16, device="meta", operations=ops.disable_weight_init)
        text_encoders = sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float16)
        vae = TAESD()
        text = supported_models.SDXL(UNET).process_clip_state_dict_for_saving(text_encoders.state_dict())
    return {
        **{f"model.diffusion_model.{name}": tensor for name, tensor in unet.state_dict().items()},
        **{name: tensor for name, tensor in text.items() if not name.endswith("position_ids")},
        **{f"first_stage_model.{name}": tensor for name, tensor in vae.state_dict().items()},
        "v_pred": torch.empty(0, device="meta"),
        "ztsnr": torch.empty(0, device="meta"),
    }


def values(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor | None:
    """The values of one tensor; None stands for zeros."""
    if name.startswith("first_stage_model."):
        return vae_values(name.removeprefix("first_stage_model."), shape)
    if name.startswith("conditioner."):
        if re.search(r"(token|position|positional)_embedding", name):
            return torch.randn(shape, generator=generator)
        return torch.ones(shape) if re.search(r"(ln_|layer_norm)\w*\.weight$", name) else None
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))  # keeps a map's input its size
    return torch.ones(shape) if name.endswith("weight") else None


def vae_values(name: str, shape: torch.Size) -> torch.Tensor | None:
    """TAESD's convolutions pass channels on, its blocks pass their input on, only the first and last ones mix."""
    if name == "vae_scale":
        return torch.tensor(0.13025 * VAE_SCALE)
    if not re.fullmatch(r"taesd_(en|de)coder\.\d+\.(weight|bias)", name):
        return None
    if name.endswith("bias"):
        return {3: torch.full((3,), 0.5), 4: -0.5 * VAE_SCALE * torch.linalg.pinv(RGB).sum(1)}.get(shape[0])
    identity = torch.eye(64)
    # What follows is kept positive for the ReLUs: the latent as max(z, 0) and max(-z, 0), the picture as it is
    matrix = {
        (64, 4): identity[:, :4] - identity[:, 4:8],
        (3, 64): RGB @ (identity[:4] - identity[4:8]) / VAE_SCALE,
        (64, 3): identity[:, :3],
        (4, 64): VAE_SCALE * torch.linalg.pinv(RGB) @ identity[:3],
        (64, 64): identity,
    }[tuple(shape[:2])]
    return torch.nn.functional.pad(matrix[..., None, None], (1, 1, 1, 1))  # the middle of 3 x 3


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file in which zeros are holes; in place at once or not at all."""
    types = {torch.float16: "F16", torch.float32: "F32"}
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": types[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    generator = torch.Generator().manual_seed(0)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, tensor in tensors.items():
                data = values(name, tensor.shape, generator)
                if data is not None:
                    file.seek(8 + len(text) + header[name]["data_offsets"][0])
                    file.write(data.to(tensor.dtype).numpy().tobytes())
            file.truncate(8 + len(text) + end)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


if __name__ == "__main__":
    write(empty_checkpoint(sys.argv[1]), Path(sys.argv[2]))
