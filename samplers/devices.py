"""What a device can do: float64, and copies that run while the host continues."""

from collections.abc import Sequence

import torch

_HAVE_FLOAT64 = ("cpu", "cuda", "meta")  # Metal, DirectML and many Intel GPUs have none


def has_float64(device: torch.device) -> bool:
    """True if tensors on the device may be float64."""
    return device.type in _HAVE_FLOAT64


def to_float64(values: torch.Tensor | float | Sequence[float]) -> torch.Tensor:
    """The values in float64: on their device if it has float64, else on the CPU, which waits for the device."""
    if not isinstance(values, torch.Tensor):
        return torch.as_tensor(values, dtype=torch.float64)
    # in two steps, because Metal would convert before it copies
    return (values if has_float64(values.device) else values.cpu()).double()


def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32: for sums that stay on the device."""
    return torch.float64 if has_float64(device) else torch.float32


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device.  CUDA copies it while the host continues.

    Metal would, too, but by then the host may have reused the memory that it reads
    (https://github.com/pytorch/pytorch/issues/139550).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
