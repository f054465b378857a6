"""The names and shapes of published files against the networks that diffusers and transformers build."""

import pytest
import torch

from ztsnr.checkpoints import SUPPORTED
from ztsnr.checkpoints.layouts import UNET
from ztsnr.checkpoints.published import NETWORKS, published_names
from ztsnr.checkpoints.single_file import single_file_tensors

from ..full_size import networks, shapes, unet_shapes

RELATIVES = [name for name in NETWORKS if name not in ("SD 1.x", "SD 2.x")]


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_those_of_the_networks(tmp_path, write_checkpoint, name):
    """The lists were written down from published files, and the single file is made of what diffusers builds."""
    parts = {part: shapes(network) for part, network in networks("SDXL base" if name in RELATIVES else name).items()}
    parts["unet"] = unet_shapes(name)
    for part, names in parts.items():
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        write_checkpoint(tmp_path / part / f"{stem}.safetensors", names)
    expected = published_names(name)
    if name == "SD 2.x":  # of which diffusers drops what is not used
        unused = ("resblocks.23.", "text_projection", "logit_scale")
        expected = {key: shape for key, shape in expected.items() if not any(part in key for part in unused)}
        assert len(expected) == 1228 - 14
    assert {key: tensor.shape for key, tensor in single_file_tensors(tmp_path).items()} == expected


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),  # of the U-Net: 0.86, 0.87, 2.57, 1.33, 0.75, 0.78 and 1.16 billion
    [
        ("SD 1.x", 1131, 859_520_964),
        ("SD 2.x", 1228, 865_910_724),
        ("SDXL base", 2515, 2_567_463_684),
        ("SSD-1B", 1779, 1_331_334_404),
        ("Vega", 1399, 745_225_604),
        ("KOALA 700M", 1419, 782_822_724),
        ("KOALA 1B", 1625, 1_161_184_324),
    ],
)
def test_sizes(name, tensors, parameters):
    names = published_names(name)
    assert len(names) == tensors
    sizes = [torch.Size(shape).numel() for key, shape in names.items() if key.startswith(UNET)]
    assert sum(sizes) == parameters


def test_every_supported_architecture_is_published():
    assert {"KOALA" if name.startswith("KOALA") else name for name in NETWORKS} == SUPPORTED


def test_lists_are_not_shared():
    published_names("SDXL base").clear()
    assert published_names("SDXL base")
