"""The FLOPs of a training step, and the model FLOPs utilisation (MFU).

    MFU = pictures a second x FLOPs of a picture / peak FLOP/s of the device

(Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.)  The FLOPs are those of the model itself: matrix products,
convolutions and attention, forward and backward; a multiplication and an addition count as two.  Recomputation by
checkpointing and in the backward pass of fused attention does not count.  Norms and activations are negligible and not
counted.  For a picture of 1024 x 1024, SDXL takes 6.76 TFLOP forward and 20.23 with the backward pass, so 100 % of an
H100 is 48.9 pictures a second.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .fake_step import FakeStep

# FLOP/s of dense bfloat16 products with float32 sums, from the vendors' data sheets and architecture papers, under the
# names that torch.cuda.get_device_name returns.  Data sheets give twice as much for 2:4 sparse weights.
PEAK_BF16 = {
    "NVIDIA GB200": 2500e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A10": 125e12,
    "NVIDIA RTX 6000 Ada Generation": 364.2e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "AMD Instinct MI300X": 1307.4e12,
}


def unet_flops(
    unet: UNet2DConditionModel,
    batch: int,
    latent: tuple[int, int],
    text_length: int = 77,
    *,
    train: bool = True,
    checkpointing: str = "off",
    trained: Collection[str] | None = None,
) -> int:
    """FLOPs of a U-Net for a batch, counted operation by operation without running it.

    Args:
        unet: U-Net with weights or on the meta device.
        batch: number of pictures.
        latent: (h, w) of the latents.
        text_length: number of tokens in a prompt.
        train: count forward and backward pass, not just forward.
        checkpointing: mode of checkpointing.  Any but "off" also counts recomputation, which MFU must not.
        trained: names of the trained parameters; by default those that require gradients.
    """
    step = FakeStep(
        unet, batch=batch, latent=latent, text_length=text_length, checkpointing=checkpointing, trained=trained
    )
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        loss = step.forward()
        if train:
            step.backward(loss)
    return counter.get_total_flops()


def picture_flops(
    unet: UNet2DConditionModel,
    latents: Sequence[tuple[int, int]],
    text_length: int = 77,
    *,
    trained: Collection[str] | None = None,
) -> list[float]:
    """Training FLOPs of a picture for each size (h, w) of latents; at most three sizes are counted.

    Convolutions and linear layers grow with the area, self-attention with its square, and the layers on times and texts
    not at all, so the FLOPs are a quadratic polynomial in the area.  The network must be able to halve each size at
    each of its levels.
    """
    by_area = {h * w: (h, w) for h, w in latents}
    areas = sorted(by_area)
    known = {areas[0], areas[len(areas) // 2], areas[-1]}
    flops = {area: unet_flops(unet, 1, by_area[area], text_length, trained=trained) for area in known}
    return [  # Lagrange interpolation in the area
        sum(flops[a] * math.prod((h * w - b) / (a - b) for b in known if b != a) for a in known) for h, w in latents
    ]


def mfu(pictures_per_second: float, flops_per_picture: float, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation, between 0 and 1; None if the peak is unknown.

    Args:
        pictures_per_second: speed of one device.
        flops_per_picture: ``unet_flops`` of a batch without checkpointing, divided by its number of pictures.
        peak_flops: ``peak_flops(name)``.
    """
    return None if peak_flops is None else pictures_per_second * flops_per_picture / peak_flops


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s in dense bfloat16 of a device by its ``torch.cuda.get_device_name``; None if unknown."""
    return PEAK_BF16.get(device_name)


def _forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * sdpa_flop_count(query, key, value)  # gradients of two matrix products


_ATTENTION = {  # torch's counter lacks the CPU's operations
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
