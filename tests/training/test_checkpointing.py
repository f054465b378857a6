"""Gradients do not depend on checkpointing, nor on compiling with it."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from ztsnr.training.checkpointing import MODES, apply_checkpointing


@pytest.fixture
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            norm_num_groups=4,
            layers_per_block=1,
        )


def gradients(unet, network=None):
    unet.zero_grad()
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 7, 12, generator=generator)
    network = unet if network is None else network
    predicted = network(noisy, torch.tensor([1.0, 999.0]), text, return_dict=False)[0]
    predicted.square().mean().backward()
    return [parameter.grad.clone() for parameter in unet.parameters()]


def calls(unet):
    """How often the layers of the transformers run for a step."""
    counts = {}

    def count(name):
        counts[name] = counts.get(name, 0) + 1

    hooks = [
        module.register_forward_hook(lambda *_, name=name: count(name.rpartition(".")[2]))
        for name, module in unet.named_modules()
        if "transformer_blocks" in name
    ]
    gradients(unet)
    for hook in hooks:
        hook.remove()
    return counts


def test_gradients_are_the_same(unet):
    expected = gradients(unet)
    for mode in ("full", "selective", "off", "selective", "full"):  # from any to any other
        apply_checkpointing(unet, mode)
        assert all(map(torch.equal, gradients(unet), expected))


def test_modes_compute_again(unet):
    runs = {}
    for mode in MODES:
        apply_checkpointing(unet, mode)
        runs[mode] = calls(unet)["to_q"]
    assert runs["full"] == runs["selective"] == 2 * runs["off"]


def test_unknown_mode_is_refused(unet):
    with pytest.raises(ValueError, match="'some': choose one of off, selective, full"):
        apply_checkpointing(unet, "some")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES[1:])
def test_compiled_gradients_are_the_same(unet, mode):
    expected = gradients(unet)
    torch._dynamo.reset()
    apply_checkpointing(unet, mode)
    compiled = gradients(unet, torch.compile(unet))
    for found, wanted in zip(compiled, expected, strict=True):
        assert (found - wanted).norm() <= 1e-4 * wanted.norm() + 1e-8
