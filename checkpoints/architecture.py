"""Which network a checkpoint holds, told from the names and shapes of its tensors.

The U-Nets are told apart by what ComfyUI compares (comfy/model_detection.py, comfy/supported_models.py): the widths of
what comes in, and the depths of the transformers in the first half.
"""

import re
from collections.abc import Collection, Mapping

Shapes = Mapping[str, tuple[int, ...]]

# what kind of file it is
SINGLE_FILE = "single file"
PREFIXED_UNET = "U-Net only, single-file names"
BARE_UNET = "U-Net only, bare names"
DIFFUSERS_UNET = "diffusers U-Net file"
DIFFUSERS_FOLDER = "diffusers folder"
LORA = "LoRA"
UNKNOWN = "unknown format"

SUPPORTED = frozenset({"SD 1.x", "SD 2.x", "SDXL base", "SSD-1B", "Vega", "KOALA"})

# (channels, width of the text, width of SDXL's sizes or of unCLIP's image)
_BY_WIDTHS = {
    (320, 768, None): "SD 1.x",
    (320, 1024, None): "SD 2.x",
    (320, 1024, 1536): "SD 2.x unCLIP",
    (320, 1024, 2048): "SD 2.x unCLIP",
    (384, 1280, 2560): "SDXL refiner",
}
_SDXL_WIDTHS = (320, 2048, 2816)
_SDXL_BY_DEPTHS = {
    (0, 0, 2, 2, 10, 10): "SDXL base",
    (0, 0, 2, 2, 4, 4): "SSD-1B",
    (0, 0, 1, 1, 2, 2): "Vega",
    (0, 2, 5): "KOALA",
    (0, 2, 6): "KOALA",
}
_BY_WIDTH_OF_TEXT: dict[int | None, str] = {
    768: "SD 1.x",
    1024: "SD 2.x",
    1280: "SDXL refiner",
    2048: "SDXL base",
}  # all that a LoRA tells
_TRANSFORMERS = {
    "joint_blocks.0.context_block.attn.qkv.weight": "Stable Diffusion 3",
    "double_blocks.0.img_attn.norm.key_norm.scale": "Flux",
    "double_layers.0.attn.w1q.weight": "AuraFlow",
    "clf.1.weight": "Stable Cascade",
    "t_block.1.weight": "PixArt",
    "cap_embedder.1.weight": "Lumina 2 or Z-Image",
    "txt_norm.weight": "Qwen-Image",
    "head.modulation": "Wan",
}

# The same places in the single-file and in the diffusers layout
_FIRST_CONVOLUTION = ("input_blocks.0.0.weight", "conv_in.weight")
_EXTRA_EMBEDDING = ("label_emb.0.0.weight", "add_embedding.linear_1.weight", "class_embedding.linear_1.weight")
_RESIDUAL_BLOCK = re.compile(
    r"input_blocks\.(\d{1,3})\.0\.in_layers\.0\.weight|down_blocks\.(\d{1,3})\.resnets\.(\d{1,3})\.conv1\.weight"
)
_TRANSFORMER_BLOCK = re.compile(
    r"(?:input_blocks\.(\d{1,3})\.1|down_blocks\.(\d{1,3})\.attentions\.(\d{1,3}))\.transformer_blocks\.(\d{1,3})\.(.*)"
)
_LORA_OF_TEXT = re.compile(r"attn2[._](?:processor[.])?to_k[._]lora[._](down|A)\b")


def unet_architecture(shapes: Shapes) -> str:
    """The name of a U-Net, one of ``SUPPORTED`` or another one, or "unknown".

    Args:
        shapes: name -> shape of every tensor of the file, without the prefix of the U-Net.
    """
    depths = {}
    text_width = None
    for name, shape in shapes.items():
        if match := _RESIDUAL_BLOCK.fullmatch(name):
            depths.setdefault(_position(match.groups()), 0)
        elif match := _TRANSFORMER_BLOCK.fullmatch(name):
            *position, depth, rest = match.groups()
            position = _position(position)
            depths[position] = max(depths.get(position, 0), int(depth) + 1)
            if rest == "attn2.to_k.weight":
                text_width = _width(shape, 1)
    widths = (_first(shapes, _FIRST_CONVOLUTION, 0), text_width, _first(shapes, _EXTRA_EMBEDDING, 1))

    if any("time_stack." in name or "temporal_transformer_blocks." in name for name in shapes):
        return "Stable Video Diffusion"
    if widths == _SDXL_WIDTHS:
        if "edm_mean" in shapes or "edm_vpred.sigma_max" in shapes:
            return "SDXL with EDM noise levels"
        return _SDXL_BY_DEPTHS.get(tuple(depths[position] for position in sorted(depths)), "unknown")
    return _BY_WIDTHS.get(widths) or transformer_architecture(shapes)


def input_channels(shapes: Shapes) -> int | None:
    """Number of input channels of a U-Net: 4 for a latent, more for inpainting and editing; None without a U-Net."""
    return _first(shapes, _FIRST_CONVOLUTION, 1)


def transformer_architecture(shapes: Shapes) -> str:
    """The name of a network that is not a U-Net of Stable Diffusion, for messages, or "unknown"."""
    return next((name for key, name in _TRANSFORMERS.items() if key in shapes), "unknown")


def is_sdxl(names: Collection[str]) -> bool:
    """True if a U-Net takes picture sizes as input, as SDXL's does.

    Args:
        names: names of diffusers' tensors.
    """
    return "add_embedding.linear_1.weight" in names


def lora_architecture(shapes: Shapes) -> str:
    """The family of U-Nets that a LoRA is for, by the width of the text it attends to, or "unknown"."""
    width = next((_width(shape, 1) for name, shape in shapes.items() if _LORA_OF_TEXT.search(name)), None)
    return _BY_WIDTH_OF_TEXT.get(width, "unknown")


def _position(numbers) -> tuple[int, ...]:
    return tuple(int(number) for number in numbers if number is not None)


def _first(shapes: Shapes, names: tuple[str, ...], axis: int) -> int | None:
    return next((_width(shapes[name], axis) for name in names if name in shapes), None)


def _width(shape: tuple[int, ...], axis: int) -> int | None:
    return shape[axis] if len(shape) > axis else None
