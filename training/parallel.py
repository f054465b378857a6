"""One process or many: who this one is, and the network as all of them train it together."""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..samplers.devices import find_device
from .memory_plan import shard_units
from .networks import Denoiser
from .precision import MixedPrecision

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

    A ValueError in one process ends all of them: those that are waiting for this one lose it, and raise the same.

    Raises:
        ValueError: a device that is not there.
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
    except ValueError as error:
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
        raise ValueError(trouble) from error
    finally:
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# The network


class Replicated:
    """Every process has the whole network and a share of the batch; gradients are averaged (DistributedDataParallel).

    Args:
        denoiser: on the device.
        dtype: to compute in.
        trained: names of the parameters that are trained in some stage.
        kept_in: dtype of these.

    Attributes:
        parameters: name -> trained parameter.
    """

    def __init__(
        self, denoiser: Denoiser, dtype: torch.dtype, trained: Collection[str], kept_in: torch.dtype, world: World
    ):
        self._precise = MixedPrecision(denoiser, dtype, trained, kept_in)
        self.parameters = self._precise.masters
        self._world = world
        self._module: torch.nn.Module = self._precise

    def train_only(self, names: Collection[str]) -> None:
        """Train these parameters from now on."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
        if self._world.size > 1:
            if isinstance(self._module, DistributedDataParallel):
                self._module._remove_autograd_hooks()  # else both would reduce, for as long as the old one lives
            ids = [self._world.device.index] if self._world.device.type == "cuda" else None
            self._module = DistributedDataParallel(self._precise, device_ids=ids, gradient_as_bucket_view=True)

    def __call__(self, *args: Any) -> torch.Tensor:
        return self._module(*args)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Within the block gradients stay with each process."""
        with self._module.no_sync() if self._world.size > 1 else nullcontext():
            yield

    def refresh(self) -> None:
        """Give the network itself the parameters as they are now, for use without this wrapper."""
        with torch.no_grad():
            self._precise.cast()


class Sharded:
    """Every process keeps a share of the weights, and fetches each block when it is its turn (FSDP2).

    With ``hsdp`` the shares are those of one machine, and machines have copies of each other.  For the arguments and
    attributes see ``Replicated``; here the parameters are DTensors.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        dtype: torch.dtype,
        trained: Collection[str],
        kept_in: torch.dtype,
        world: World,
        hsdp: bool,
    ):
        # FSDP shares out contiguous weights only; convolutions follow the layout of their input all the same
        self._denoiser = denoiser.to(kept_in, memory_format=torch.contiguous_format)
        if hsdp:
            shape, names = (world.size // world.local_size, world.local_size), ("replicate", "shard")
        else:
            shape, names = (world.size,), ("shard",)
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
        # by itself FSDP would cast all inputs, the float32 sizes of pictures too
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        denoiser.unet.register_forward_pre_hook(_cast_sample(dtype), with_kwargs=True)
        self._roots: list[FSDPModule] = []
        encoders_trained = any(name.startswith("text_encoders.") for name in trained)
        for encoder in denoiser.text_encoders:
            if not encoders_trained:
                encoder.to(dtype)
                continue
            # each part by itself: transformers knows an encoder's hidden states by its class, which FSDP changes
            for part in _parts(encoder):
                self._roots.append(fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True))
        for block in shard_units(denoiser.unet):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        self._roots.append(fully_shard(denoiser.unet, mesh=mesh, mp_policy=policy))
        wanted = set(trained)
        self.parameters = {name: p for name, p in denoiser.named_parameters() if name in wanted}
        self._see_all_trained()

    def _see_all_trained(self) -> None:
        """FSDP settles in which dtype a block's gradients are reduced when it first fetches the block, and settles
        nothing for one that is frozen then: so have it fetch each with all that is trained in any stage."""
        self.train_only(self.parameters)
        for module in self._denoiser.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()

    def train_only(self, names: Collection[str]) -> None:
        """Train these parameters from now on."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)

    def __call__(self, *args: Any) -> torch.Tensor:
        return self._denoiser(*args)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Within the block gradients stay with each process."""
        for root in self._roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in self._roots:
                root.set_requires_gradient_sync(True)

    def refresh(self) -> None:
        """Drop what was fetched of the weights before they changed."""
        for root in self._roots:
            root.reshard()


def _parts(encoder: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers of a text encoder, its embeddings, and what comes behind."""
    for child in encoder.children():
        layers = getattr(child, "layers", None)
        if layers is not None:
            yield from layers
        elif hasattr(child, "encoder"):  # the text_model of an encoder with a projection
            yield from _parts(child)
        else:
            yield child


def _cast_sample(dtype: torch.dtype) -> Any:
    """What casts a U-Net's noisy latents; the pipeline's have the dtype of the weights, which FSDP keeps in float32."""

    def cast(unet: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (args[0].to(dtype), *args[1:]), kwargs

    return cast


def parallelize(
    denoiser: Denoiser,
    strategy: str,
    dtype: torch.dtype,
    trained: Collection[str],
    kept_in: torch.dtype,
    world: World,
) -> Replicated | Sharded:
    """The network as all processes train it together.

    Args:
        strategy: ddp, fsdp or hsdp.  One process alone has nothing to share.
    """
    if world.size == 1 or strategy == "ddp":
        return Replicated(denoiser, dtype, trained, kept_in, world)
    return Sharded(denoiser, dtype, trained, kept_in, world, hsdp=strategy == "hsdp")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which this process may have a share alone, put together; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
