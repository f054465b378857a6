"""Names and shapes of the tensors of published models, as their single files have them: sd_xl_base_1.0,
v1-5-pruned-emaonly, v2-1_768-ema-pruned, and the smaller relatives of SDXL.

In published_names.json {0-9} and {a|b} stand for each of what they name.  The U-Nets of SDXL's relatives are not in it:
they are SDXL's with whole blocks left out, and with fewer transformer blocks in others.
"""

import itertools
import json
import re
from functools import cache
from pathlib import Path

from .layouts import CLIP, OPEN_CLIP, SDXL_CLIP, SDXL_OPEN_CLIP, UNET, VAE

Shapes = dict[str, tuple[int, ...]]

_SDXL_TEXT_ENCODERS = {SDXL_CLIP: "CLIP ViT-L", SDXL_OPEN_CLIP: "OpenCLIP ViT-bigG"}
# model -> prefix in the single file -> network
NETWORKS = {
    "SD 1.x": {UNET: "SD 1.x U-Net", VAE: "VAE", CLIP: "CLIP ViT-L"},
    "SD 2.x": {UNET: "SD 2.x U-Net", VAE: "VAE", OPEN_CLIP: "OpenCLIP ViT-H"},
    "SDXL base": {UNET: "SDXL U-Net", VAE: "VAE", **_SDXL_TEXT_ENCODERS},
    "SSD-1B": {UNET: "SSD-1B U-Net", VAE: "VAE", **_SDXL_TEXT_ENCODERS},
    "Vega": {UNET: "Vega U-Net", VAE: "VAE", **_SDXL_TEXT_ENCODERS},
    "KOALA 700M": {UNET: "KOALA 700M U-Net", VAE: "VAE", **_SDXL_TEXT_ENCODERS},
    "KOALA 1B": {UNET: "KOALA 1B U-Net", VAE: "VAE", **_SDXL_TEXT_ENCODERS},
}

# U-Net -> the blocks of SDXL's that it has, which it counts anew, and how many transformer blocks are in each
_BLOCKS_OF_SDXL = {
    "SSD-1B U-Net": {
        "input_blocks": {0: 0, 1: 0, 2: 0, 3: 0, 4: 2, 5: 2, 6: 0, 7: 4, 8: 4},
        "middle_block": {0: 0},
        "output_blocks": {0: 4, 1: 4, 2: 10, 3: 2, 4: 1, 5: 1, 6: 0, 7: 0, 8: 0},
    },
    "Vega U-Net": {
        "input_blocks": {0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 0, 7: 2, 8: 2},
        "middle_block": {0: 0},
        "output_blocks": {0: 2, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1, 6: 0, 7: 0, 8: 0},
    },
    "KOALA 700M U-Net": {
        "input_blocks": {0: 0, 1: 0, 3: 0, 4: 2, 6: 0, 7: 5},
        "middle_block": {},
        "output_blocks": {0: 5, 2: 5, 3: 2, 5: 2, 6: 0, 8: 0},
    },
    "KOALA 1B U-Net": {
        "input_blocks": {0: 0, 1: 0, 3: 0, 4: 2, 6: 0, 7: 6},
        "middle_block": {0: 0, 1: 6, 2: 0},
        "output_blocks": {0: 6, 2: 6, 3: 2, 5: 2, 6: 0, 8: 0},
    },
}
_IN_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.*)")
_TRANSFORMER_BLOCK = re.compile(r"\btransformer_blocks\.(\d+)\.")


def published_names(model: str) -> Shapes:
    """Names and shapes of all tensors of a model's single file, except its noise schedule.

    Args:
        model: one of ``NETWORKS``.
    """
    networks = NETWORKS[model].items()
    return {prefix + name: shape for prefix, network in networks for name, shape in network_names(network).items()}


def network_names(network: str) -> Shapes:
    """Names and shapes of the tensors of one network, without its prefix."""
    if network in _BLOCKS_OF_SDXL:
        return _relative_of_sdxl(_BLOCKS_OF_SDXL[network])
    return {name: tuple(shape) for pattern, shape in _patterns()[network].items() for name in _expand(pattern)}


@cache
def _patterns() -> dict[str, dict[str, list[int]]]:
    return json.loads(Path(__file__).with_name("published_names.json").read_text("utf-8"))


def _relative_of_sdxl(blocks: dict[str, dict[int, int]]) -> Shapes:
    names = {}
    for name, shape in network_names("SDXL U-Net").items():
        if match := _IN_BLOCK.fullmatch(name):
            side, number, rest = match[1], int(match[2]), match[3]
            kept = list(blocks[side])
            depth = _TRANSFORMER_BLOCK.search(name)
            if number not in kept or (depth and int(depth[1]) >= blocks[side][number]):
                continue
            name = f"{side}.{kept.index(number)}.{rest}"
        names[name] = shape
    return names


def _expand(pattern: str) -> list[str]:
    """All names that a pattern stands for."""
    parts = re.split(r"\{(.*?)\}", pattern)  # what is in braces comes at the odd places
    choices = [_alternatives(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _alternatives(choice: str) -> list[str]:
    found = []
    for part in choice.split("|"):
        ends = re.fullmatch(r"(\d+)-(\d+)", part)
        found += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [part]
    return found
