"""What a device can do: which one ``auto`` takes, which have float64, and which copies may go on by themselves."""

from collections.abc import Sequence

import torch

GPUS = {"cuda": "CUDA", "xpu": "Intel GPU", "mps": "Metal"}  # in the order in which auto takes them
_HAVE_FLOAT64 = ("cpu", "cuda", "meta")  # Metal, DirectML and many Intel GPUs have none


def find_device(
    name: str = "auto", *, setting: str = "device", processes: int = 1, local_rank: int | None = None
) -> torch.device:
    """The device of a setting.

    Args:
        name: such as cpu, cuda, cuda:1, xpu or mps; auto is the first there is of CUDA, XPU and MPS, else the CPU.
        setting: what the user calls the setting.
        processes: number of processes that train together; for more than one it is CUDA or the CPU.
        local_rank: of this process on this machine: the GPU that it takes where the name gives no number.

    Raises:
        ValueError: a device that is not there, or that the processes cannot share.
    """
    if name == "auto":
        name = next(filter(is_there, GPUS if processes == 1 else ["cuda"]), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"{setting} = {name!r} is no device: it is auto, cpu, cuda, xpu, mps or such as cuda:1"
        ) from None
    if processes > 1 and device.index is not None:
        raise ValueError(f"{setting} = {name!r} is one device, and there are {processes} processes: give no number")
    if processes > 1 and device.type not in ("cuda", "cpu"):
        raise ValueError(f"{setting} = {name!r} is for one process, and there are {processes}: take cuda or cpu")
    if not is_there(device.type):
        raise ValueError(f"the device {device} cannot be used: there is no {GPUS[device.type]} here")
    if device.type in ("cuda", "xpu"):
        if device.index is None and local_rank is not None:
            device = torch.device(device.type, local_rank)
        if (device.index or 0) >= (there := getattr(torch, device.type).device_count()):
            raise ValueError(f"the device {device} cannot be used: this machine has {there} GPUs, counted from 0")
    return device


def is_there(kind: str) -> bool:
    """False if it is one of ``GPUS`` and this machine, or this build of torch, has none."""
    if kind == "mps":
        return torch.backends.mps.is_available()
    return kind not in GPUS or getattr(torch, kind).is_available()


def describe_device(device: torch.device) -> str:
    """The device in words: "cuda:0 (NVIDIA H200)", "mps (Metal)", "cpu"."""
    if device.type in ("cuda", "xpu"):
        return f"{device} ({getattr(torch, device.type).get_device_name(device)})"
    return f"{device} ({GPUS[device.type]})" if device.type in GPUS else str(device)


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
    """The tensor on the device.  CUDA copies it while the host goes on.

    Metal would, too, but reads memory that the host may have given to something else by then
    (https://github.com/pytorch/pytorch/issues/139550).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
