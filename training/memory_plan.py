"""What a training step will hold in the device's memory, computed before the first one.

The state (weights, gradients, optimizer, averages) follows from the shapes of the parameters.  For what the forward
pass saves for the backward pass, and for what both need temporarily, there is no formula: the step runs on tensors
without data (training/fake_step.py), and the bytes of all live tensors are added up.

The plan is for eager mode.  torch.compile saves less for the backward pass, so the plan is an upper bound there, given
that a compiled backward pass returns the gradients of all weights at its end.  The plan does not know the workspaces of
cuBLAS, cuDNN and NCCL, nor what the allocator loses to fragmentation; the reserve is for them.
"""

import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..canvas import Size
from ..errors import UserError
from .checkpointing import MODES
from .fake_step import FakeStep, fused_attention, without_data
from .optimizers import ENTRIES, FLOAT32

GIB = 2**30
RESERVE = 3 * GIB
GATHERED = "gathered blocks"


# ----------------------------------------------------------------------------------------------------------------------
# State


def state_bytes(
    unet: UNet2DConditionModel,
    *,
    optimizer: str = "adamw",
    dtype: torch.dtype = torch.bfloat16,
    ema_profiles: int = 0,
    trained: Collection[str] | None = None,
    others: Iterable[torch.nn.Module] = (),
    shards: int = 1,
    units: Sequence[torch.nn.Module] | None = None,
) -> dict[str, int]:
    """Bytes of each part of what stays on a device between steps, gradients included.

    Args:
        unet: with weights or on the meta device.
        optimizer: one of OPTIMIZERS.
        dtype: dtype that the network computes in (training/precision.py): trained parameters are float32 and are cast
            to it, the others are stored in it.
        ema_profiles: number of averages of the trained parameters on the device, float32.
        trained: names of the trained parameters; by default those that require gradients.
        others: further networks on the device.  Their parameters that require gradients count as trained, the rest at
            their own size.
        shards: number of devices that share the U-Net's state (FSDP).
        units: modules that FSDP gathers one after another; by default ``shard_units``.

    Raises:
        UserError: there is no such optimizer.
    """
    if optimizer not in ENTRIES:
        raise UserError(f"there is no optimizer {optimizer!r}: choose one of {', '.join(ENTRIES)}")
    named = dict(unet.named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad} if trained is None else trained
    frozen = [parameter for name, parameter in named.items() if name not in trained]
    rest = [tensor for network in others for tensor in (*network.parameters(), *network.buffers())]
    shapes = [named[name].shape for name in trained] + [tensor.shape for tensor in rest if tensor.requires_grad]
    count = sum(shape.numel() for shape in shapes)
    width = dtype.itemsize
    # What FSDP shares among the devices.
    divided = {
        "trained parameters": FLOAT32 * count,
        f"{optimizer} state": sum(map(ENTRIES[optimizer].state_bytes, shapes)),
        "averages": ema_profiles * FLOAT32 * count,
        "frozen parameters": width * _count(frozen),
        "gradients": FLOAT32 * count,
    }
    # Without FSDP the network keeps a cast of every trained parameter (MixedPrecision).
    cast = {"their casts": width * count if dtype != torch.float32 else 0}
    if shards > 1:
        divided = {name: -(-size // shards) for name, size in divided.items()}
        largest = max(_count(unit.parameters()) for unit in units or shard_units(unet))
        # FSDP holds two gathered blocks, the computing one and the prefetched next one; and one block's gradients in
        # float32 before they are reduced.
        cast = {GATHERED: largest * (2 * width + FLOAT32)}
    return divided | cast | {"other networks": sum(tensor.nbytes for tensor in rest if not tensor.requires_grad)}


def shard_units(unet: UNet2DConditionModel) -> list[torch.nn.Module]:
    """The blocks of a U-Net, which FSDP shards one by one."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return [block for block in blocks if block is not None]


def _count(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


# ----------------------------------------------------------------------------------------------------------------------
# Activations


@dataclass(frozen=True)
class Activations:
    """Bytes that a step allocates in addition to the state.

    Attributes:
        saved: bytes at the end of the forward pass, saved for the backward pass.
        peak: the maximum.
        peak_with_gradients: the maximum together with the float32 gradients, in a step that begins without them.
    """

    saved: int
    peak: int
    peak_with_gradients: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate, until these are freed.

    Args:
        known: tensors that do not count.

    Attributes:
        live: bytes now.
        peak: maximum so far.
        gradients: bytes that became gradients.
        peak_with_gradients: maximum of ``live + gradients`` so far.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = self.gradients = self.peak_with_gradients = 0
        self._storages: dict[int, weakref.ref] = {}
        for tensor in known:
            self._follow(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._follow(storage, storage.nbytes())
        return made

    def accumulate(self, parameter: torch.nn.Parameter) -> None:
        """Hook for a parameter with a new gradient, which becomes, in float32, a part of the state."""
        size = FLOAT32 * parameter.numel()
        if parameter.dtype == torch.float32:  # the gradient itself moves into the state
            parameter.grad = None
            self._note(size)
        else:  # for a moment there are the cast's gradient and its float32 copy
            self._note(size)
            parameter.grad = None
        self.gradients += size

    def _follow(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._storages:
            return

        def freed(_: weakref.ref) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self._note()

    def _note(self, more: int = 0) -> None:
        self.peak = max(self.peak, self.live + more)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + more + self.gradients)


def measure_activations(step: FakeStep) -> Activations:
    """Bytes that a step's forward and backward pass allocate."""
    with LiveBytes([*step.parameters, *step.inputs]) as counted:
        for parameter in step.parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(counted.accumulate)
        loss = step.forward()
        saved = counted.live - loss.nbytes
        step.backward(loss)
    return Activations(saved, counted.peak, counted.peak_with_gradients)


def measure_encoding(vae: AutoencoderKL, batch: int, bucket: Size) -> int:
    """Maximum bytes, besides the VAE itself, to encode a batch of pictures of a bucket."""
    network = without_data(vae)
    with torch.no_grad(), fused_attention(), LiveBytes(network.parameters()) as counted:
        network.encode(torch.empty(batch, 3, *bucket[::-1], dtype=vae.dtype, device="meta"))
    return counted.peak


# ----------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class MemoryPlan:
    """What fits.

    Attributes:
        state: bytes of each part of the state.
        activations: bytes of a step for each checkpointing mode, with the largest bucket.
        encoding: bytes to make latents.
        totals: maximum bytes for each mode, the fastest mode first.
        bucket: (width, height) of the largest bucket in pixels.
        batch: number of pictures that this device computes at a time.
        memory: bytes of the device.
        reserve: bytes of the device that the plan leaves free.
    """

    state: dict[str, int]
    activations: dict[str, Activations]
    encoding: int
    totals: dict[str, int]
    bucket: Size
    batch: int
    memory: int
    reserve: int

    @property
    def mode(self) -> str | None:
        """The fastest mode that fits; None if none does."""
        return next((mode for mode in self.totals if self._fits(mode)), None)

    @property
    def advice(self) -> str:
        """A sentence with what to change if no mode fits."""
        mode = min(self.totals, key=self.totals.__getitem__)
        begin = (
            f"training needs {_gib(self.totals[mode])} GiB with gradient checkpointing {mode!r}, but the device has "
            f"{_gib(self.memory)} GiB less a reserve of {_gib(self.reserve)} GiB: "
        )
        # With accumulation the gradients stay; what a part takes is proportional to its pictures.
        room = self.memory - self.reserve - sum(self.state.values())
        pictures = room * self.batch // max(self.activations[mode].peak, self.encoding)
        if 1 <= pictures < self.batch:
            return f"{begin}compute {pictures} pictures at a time and accumulate {-(-self.batch // pictures)} parts"
        ways = []
        if size := self.state["averages"]:
            ways.append(f"keep the averages on the CPU ({_gib(size)} GiB)")
        if size := self.state.get("adamw state"):
            ways.append(f"take the optimizer adamw8bit (adamw's state is {_gib(size)} GiB)")
        ways.append(f"share the state among {'more ' * (GATHERED in self.state)}devices (fsdp)")
        if self.state["trained parameters"] > self.state["frozen parameters"]:
            ways.append("train an adapter (LoRA)")
        return begin + ", or ".join(ways)

    def __str__(self) -> str:
        same = {**self.state, "making latents at most": self.encoding}
        found = self.activations.values()
        rows = [
            [f"GiB, {self.batch} x {self.bucket[0]} x {self.bucket[1]}", *self.activations],
            *([part, *[_gib(size)] * len(found)] for part, size in same.items() if size),
            ["saved activations", *(_gib(of.saved) for of in found)],
            ["activations at most", *(_gib(of.peak) for of in found)],
            ["all at most", *(_gib(total) for total in self.totals.values())],
            [
                f"fits {_gib(self.memory)} less {_gib(self.reserve)}",
                *("yes" if self._fits(mode) else "no" for mode in self.totals),
            ],
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        end = f"gradient checkpointing: {self.mode}" if self.mode else self.advice
        return "\n".join([*lines, end])

    def _fits(self, mode: str) -> bool:
        return self.totals[mode] + self.reserve <= self.memory


def plan(
    unet: UNet2DConditionModel,
    *,
    batch: int,
    buckets: Sequence[Size],
    memory: int,
    reserve: int = RESERVE,
    factor: int = 8,
    text_length: int = 77,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: str = "adamw",
    ema_profiles: int = 0,
    trained: Collection[str] | None = None,
    others: Iterable[torch.nn.Module] = (),
    shards: int = 1,
    units: Sequence[torch.nn.Module] | None = None,
    gradients_kept: bool = False,
    encoding: int = 0,
    compiled: bool = False,
    modes: Sequence[str] = MODES,
) -> MemoryPlan:
    """Plan the memory of training, and choose the fastest checkpointing that fits.  Takes seconds per mode for SDXL.

    Args:
        unet, optimizer, dtype, ema_profiles, trained, others, shards, units: see ``state_bytes``.
        batch: number of pictures that this device computes at a time.
        buckets: (width, height) in pixels; the plan is for the largest.
        memory: bytes of the device; for a GPU ``device_memory``.
        reserve: bytes for what the plan does not know.
        factor: pixels per latent along each side.
        text_length: number of tokens of a prompt.
        gradients_kept: gradients exist before the backward pass, with accumulation or DistributedDataParallel.
        encoding: ``measure_encoding``, if the step makes the latents, before the U-Net's gradients; else 0.
        compiled: torch.compile compiles the whole U-Net.
        modes: checkpointing modes to choose from, the fastest first.

    Raises:
        UserError: there is no such optimizer or mode.
    """
    others = list(others)
    state = state_bytes(
        unet,
        optimizer=optimizer,
        dtype=dtype,
        ema_profiles=ema_profiles,
        trained=trained,
        others=others,
        shards=shards,
        units=units,
    )
    # A compiled backward pass returns all gradients at its end, next to those that are kept; in eager mode each one is
    # copied to float32 and freed before the next.
    at_once = dtype.itemsize * state["trained parameters"] // FLOAT32 if compiled and shards == 1 else 0
    width, height = bucket = max(buckets, key=lambda size: size[0] * size[1])
    activations, totals = {}, {}
    for mode in modes:
        step = FakeStep(
            unet,
            batch=batch,
            latent=(height // factor, width // factor),
            text_length=text_length,
            dtype=dtype,
            checkpointing=mode,
            trained=trained,
        )
        found = activations[mode] = measure_activations(step)
        # The maximum is in the backward pass, or while the latents are made, when no activations are saved yet.
        if gradients_kept or shards > 1:
            totals[mode] = sum(state.values()) + max(found.peak, encoding, at_once)
        else:  # the gradients grow while the activations are freed
            totals[mode] = sum(state.values()) - state["gradients"] + max(found.peak_with_gradients, encoding)
    return MemoryPlan(state, activations, encoding, totals, bucket, batch, memory, reserve)


def device_memory(device: torch.device | int | None = None) -> int:
    """Bytes of a GPU that this process has allocated or can allocate."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
