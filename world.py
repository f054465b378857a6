"""The processes of a run: the rank of this one, its device, and how they exchange values."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, cast

import torch
import torch.distributed as dist

from .errors import UserError

GPUS = {"cuda": "CUDA", "xpu": "Intel GPU", "mps": "Metal"}  # in the order in which auto tries them
# The other processes wait while the first one reads the headers of all pictures, or exports.
PATIENCE = timedelta(days=1)
_starts = count()
# what gloo says of a process that has ended
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
TROUBLE = "trouble"  # key in the processes' store: the message of one that failed


@dataclass(frozen=True)
class World:
    """The processes of a run, as torchrun starts them.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_size: number of processes on this machine.
        device: device of this process.
        group: process group for CPU tensors and objects; None if there is only one process.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """True in the process that prints and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier(self.group)

    def tell(self, value: Any = None) -> Any:
        """The value that the first process gives, in all processes; the others' arguments are ignored."""
        said = [value]
        if self.size > 1:
            dist.broadcast_object_list(said, 0, self.group)
        return said[0]

    def by_first(self, work: Callable[[], Any]) -> Any:
        """Do something in the first process alone, and give its result, or raise its UserError, in all processes."""
        trouble = result = None
        if self.first:
            try:
                result = work()
            except UserError as error:
                trouble = str(error)
        trouble, result = self.tell((trouble, result))
        if trouble is not None:
            raise UserError(trouble)
        return result

    def any(self, flag: bool) -> bool:
        """True if any rank's flag is set."""
        return bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers; reduced on the CPU to avoid a device sync."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number], dtype=torch.int32)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, self.group)
        return int(numbers)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Average gradients over all processes, in place; for small parameters outside of DDP and FSDP."""
        for parameter in parameters if self.size > 1 else ():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.size


@contextmanager
def start_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun has started, or be the only one.

    If one process fails with a UserError, all stop with the same message.

    Args:
        device: see ``find_device``.

    Raises:
        UserError: there is no such device.
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
    store = dist.PrefixStore(f"ztsnr {next(_starts)}", store)  # torchrun's store, which may hold keys of an earlier run
    # gloo next to NCCL, for CPU tensors
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("world", store), rank=rank, world_size=size)
    try:
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))  # this process is in it
        yield World(rank, size, local_size, place, group)
    except UserError as error:
        with suppress(RuntimeError):  # the store may be gone with the first process
            store.set(TROUBLE, str(error))
        raise
    except RuntimeError as error:  # a collective broke off: did another process fail with a message?
        trouble = None
        with suppress(RuntimeError):
            if store.check([TROUBLE]):
                trouble = store.get(TROUBLE).decode()
        if trouble is None and any(sign in str(error) for sign in LOST):
            trouble = (
                "another process of the run has ended without a message: its own output, or that of torchrun, says "
                "more; continue with --resume auto"
            )
        if trouble is None:
            raise
        raise UserError(trouble) from error
    finally:
        dist.destroy_process_group()


def find_device(
    name: str = "auto", *, setting: str = "device", processes: int = 1, local_rank: int | None = None
) -> torch.device:
    """The device that a setting names.

    Args:
        name: cpu, cuda, cuda:1, xpu, mps, ...; auto takes the first of CUDA, XPU and MPS that exists, else the CPU.
        setting: name of the setting, for messages.
        processes: number of processes that train together; more than one need CUDA or the CPU.
        local_rank: number of this process on this machine; its GPU if the name gives no number.

    Raises:
        UserError: the device does not exist, or the processes cannot share it.
    """
    if name == "auto":
        name = next(filter(is_there, GPUS if processes == 1 else ["cuda"]), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"{setting} = {name!r} is not a device: give auto, cpu, cuda, xpu, mps, or a number as in cuda:1"
        ) from None
    if processes > 1 and device.index is not None:
        raise UserError(f"{setting} = {name!r} names one device for {processes} processes: leave out the number")
    if processes > 1 and device.type not in ("cuda", "cpu"):
        raise UserError(f"{setting} = {name!r} works for one process only, not for {processes}: give cuda or cpu")
    if not is_there(device.type):
        raise UserError(f"the device {device} cannot be used: there is no {GPUS[device.type]} here")
    if device.type in ("cuda", "xpu"):
        if device.index is None and local_rank is not None:
            device = torch.device(device.type, local_rank)
        if (device.index or 0) >= (there := getattr(torch, device.type).device_count()):
            raise UserError(f"the device {device} cannot be used: this machine has {there} GPUs, numbered from 0")
    return device


def is_there(kind: str) -> bool:
    """True if this machine and this build of torch have this kind of device."""
    if kind == "mps":
        return torch.backends.mps.is_available()
    return kind not in GPUS or getattr(torch, kind).is_available()


def describe_device(device: torch.device) -> str:
    """The device for the user: "cuda:0 (NVIDIA H200)", "mps (Metal)", "cpu"."""
    if device.type in ("cuda", "xpu"):
        return f"{device} ({getattr(torch, device.type).get_device_name(device)})"
    return f"{device} ({GPUS[device.type]})" if device.type in GPUS else str(device)
