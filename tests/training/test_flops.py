"""FLOPs are those of closed forms, and the published ones of SDXL."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from tests.full_size import SDXL, UNETS
from ztsnr.training.flops import PEAK_BF16, mfu, peak_flops, picture_flops, unet_flops

BATCH, LATENT, TEXT = 3, (16, 24), 7


def small_unet():
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        norm_num_groups=4,
        layers_per_block=1,
    )


def by_hand(unet):
    """Forward FLOPs by the names of modules, from the shapes that pass through them."""
    flops = {}

    def count(name, module, args, kwargs, out):
        if isinstance(module, torch.nn.Conv2d):
            flops[name] = 2 * out.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        elif isinstance(module, torch.nn.Linear):
            flops[name] = 2 * out.numel() * module.in_features
        elif isinstance(module, Attention):
            text = kwargs.get("encoder_hidden_states")
            queries = args[0].shape[1]
            keys = queries if text is None else text.shape[1]
            flops[name] = 2 * 2 * len(args[0]) * queries * keys * args[0].shape[2]

    hooks = [
        module.register_forward_hook(lambda *found, name=name: count(name, *found), with_kwargs=True)
        for name, module in unet.named_modules()
    ]
    with torch.no_grad():
        unet(torch.zeros(BATCH, 4, *LATENT), torch.zeros(BATCH), torch.zeros(BATCH, TEXT, 12))
    for hook in hooks:
        hook.remove()
    return flops


def test_counts_are_those_of_closed_forms():
    unet = small_unet()
    flops = by_hand(unet)
    forward = sum(flops.values())
    assert unet_flops(unet, BATCH, LATENT, TEXT, train=False) == forward
    # backward twice as much, but no gradients of what the network is given
    given = [name for name in flops if name in ("conv_in", "time_embedding.linear_1")]
    given += [name for name in flops if "attn2.to_k" in name or "attn2.to_v" in name]
    assert len(given) == 2 + 2 * 8
    expected = 3 * forward - sum(flops[name] for name in given)
    assert unet_flops(unet, BATCH, LATENT, TEXT) == expected


def test_frozen_weights_have_no_gradients():
    unet = small_unet()
    flops = by_hand(unet)
    # every gradient of an activation behind the first trained layer is there, and of the weights only the last one's
    assert unet_flops(unet, BATCH, LATENT, TEXT, trained=["conv_out.weight"]) == (
        sum(flops.values()) + flops["conv_out"]
    )


def test_checkpointing_computes_again():
    unet = small_unet()
    off, selective, full = (
        unet_flops(unet, BATCH, LATENT, TEXT, checkpointing=mode) for mode in ("off", "selective", "full")
    )
    forward = sum(by_hand(unet).values())
    assert off < selective < full < off + forward
    wide = [flops for name, flops in by_hand(unet).items() if name.endswith("ff.net.0.proj")]
    text = [flops for name, flops in by_hand(unet).items() if "attn2.to_k" in name or "attn2.to_v" in name]
    time = [flops for name, flops in by_hand(unet).items() if name.endswith("time_emb_proj")]
    assert selective - off <= sum(wide + text + time)
    assert selective - off >= sum(wide + text)


def test_sizes_between_are_exact():
    unet = small_unet()
    sizes = [(16, 24), (8, 8), (10, 40), (32, 32)]
    found = picture_flops(unet, sizes, TEXT)
    assert found == pytest.approx([unet_flops(unet, 1, size, TEXT) for size in sizes], rel=1e-12)
    assert picture_flops(unet, sizes[:1], TEXT) == found[:1]


@pytest.mark.slow
def test_sdxl():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS["SDXL base"])
    assert unet_flops(unet, 1, (128, 128), train=False) == pytest.approx(6.76e12, rel=1e-2)
    flops = unet_flops(unet, 1, (128, 128))
    assert flops == pytest.approx(20.23e12, rel=1e-2)
    assert mfu(48.9, flops, peak_flops("NVIDIA H200")) == pytest.approx(1, rel=1e-2)
    with torch.device("meta"):
        half = UNet2DConditionModel(**SDXL, transformer_layers_per_block=(1, 1, 5))
    assert unet_flops(half, 1, (128, 128)) < 0.75 * flops


def test_mfu():
    assert mfu(2, 20e12, 100e12) == pytest.approx(0.4)
    assert mfu(2, 20e12, None) is None


def test_peaks_are_dense():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert max(PEAK_BF16.values()) < 2.6e15  # with sparsity a B200 would have 4.5e15


def test_a_name_that_is_only_alike_has_no_peak():
    assert peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert peak_flops("cpu") is None
