"""The processes of a run: which one this is, what device it computes on, and what one tells the others."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError

GPUS = {"cuda": "CUDA", "xpu": "Intel GPU", "mps": "Metal"}  # in the order in which auto takes them
# the others wait while the first process reads the headers of all pictures, or exports
PATIENCE = timedelta(days=1)
_starts = count()
TROUBLE = "trouble"  # in the store of the processes: the sentence of the one that ended


@dataclass(frozen=True)
class World:
    """The processes of a run, as torchrun starts them.

    Attributes:
        rank, size: which one this is, and how many they are.
        local_size: of them on this machine.
        device: of this one.
        group: of all, for what is on the CPU; None if there is but one.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier(self.group)

    def tell(self, value: Any = None) -> Any:
        """What the first one says, to all."""
        said = [value]
        if self.size > 1:
            dist.broadcast_object_list(said, 0, self.group)
        return said[0]

    def any(self, flag: bool) -> bool:
        """Whether it is so for one of them; asked on the CPU, so that no device is waited for."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, self.group)
        return bool(flags)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all of them, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Over all of them, in place, of small parameters that no wrapper looks after."""
        for parameter in parameters if self.size > 1 else ():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.size


@contextmanager
def start_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun has started, or be the only one.

    A UserError in one process ends all of them: those that are waiting for this one lose it, and raise the same.

    Raises:
        UserError: a device that is not there.
    """
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    place = find_device(device, setting="speed.device", processes=size, local_rank=local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(rank, size, local_size, place)
        return
    store, _, _ = next(dist.rendezvous("env://", rank, size))
    store = dist.PrefixStore(f"ztsnr {next(_starts)}", store)  # torchrun's, which has what a run before put there
    # gloo beside NCCL, for what is on the CPU
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("world", store), rank=rank, world_size=size)
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield World(rank, size, local_size, place, group)
    except UserError as error:
        with suppress(RuntimeError):  # the store may have ended with the first process
            store.set(TROUBLE, str(error))
        raise
    except RuntimeError as error:  # of one that this one waited for in vain?
        trouble = None
        with suppress(RuntimeError):
            if store.check([TROUBLE]):
                trouble = store.get(TROUBLE).decode()
        if trouble is None:
            raise
        raise UserError(trouble) from error
    finally:
        dist.destroy_process_group()


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
        UserError: a device that is not there, or that the processes cannot share.
    """
    if name == "auto":
        name = next(filter(is_there, GPUS if processes == 1 else ["cuda"]), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"{setting} = {name!r} is no device: it is auto, cpu, cuda, xpu, mps or such as cuda:1"
        ) from None
    if processes > 1 and device.index is not None:
        raise UserError(f"{setting} = {name!r} is one device, and there are {processes} processes: give no number")
    if processes > 1 and device.type not in ("cuda", "cpu"):
        raise UserError(f"{setting} = {name!r} is for one process, and there are {processes}: take cuda or cpu")
    if not is_there(device.type):
        raise UserError(f"the device {device} cannot be used: there is no {GPUS[device.type]} here")
    if device.type in ("cuda", "xpu"):
        if device.index is None and local_rank is not None:
            device = torch.device(device.type, local_rank)
        if (device.index or 0) >= (there := getattr(torch, device.type).device_count()):
            raise UserError(f"the device {device} cannot be used: this machine has {there} GPUs, counted from 0")
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
