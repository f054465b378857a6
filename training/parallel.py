"""The network as all processes of a run train it together."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..world import World
from .memory_plan import shard_units
from .networks import Denoiser
from .precision import MixedPrecision


class Replicated:
    """Every process has the whole network and a share of the batch; gradients are averaged (DistributedDataParallel).

    Args:
        denoiser: the network, on the device.
        dtype: dtype to compute in.
        trained: names of the parameters that are trained in any stage.
        kept_in: dtype of the trained parameters.
        world: the processes of the run.

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
                self._module._remove_autograd_hooks()  # else both reduce gradients until the old one is freed
            ids = [self._world.device.index] if self._world.device.type == "cuda" else None
            self._module = DistributedDataParallel(self._precise, device_ids=ids, gradient_as_bucket_view=True)

    def __call__(self, *args: Any) -> torch.Tensor:
        return self._module(*args)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Within the block gradients stay local; the next backward pass outside of it exchanges their sum."""
        module = self._module
        with module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext():
            yield

    def refresh(self) -> None:
        """Give the network itself the current parameters, for use without this wrapper."""
        with torch.no_grad():
            self._precise.cast()


class Sharded:
    """Every process keeps a shard of the weights, and gathers each block when it computes (FSDP2).

    With ``hsdp`` the processes of one machine share the weights, and each machine has a copy.  For the arguments and
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
        # FSDP shards only contiguous weights; convolutions still follow the memory format of their input
        self._denoiser = cast(Any, denoiser).to(kept_in, memory_format=torch.contiguous_format)  # as torch takes it
        if hsdp:
            shape, names = (world.size // world.local_size, world.local_size), ("replicate", "shard")
        else:
            shape, names = (world.size,), ("shard",)
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
        # FSDP would otherwise cast all inputs, even the float32 sizes of pictures
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        denoiser.unet.register_forward_pre_hook(_cast_sample(dtype), with_kwargs=True)
        self._roots: list[FSDPModule] = []
        encoders_trained = any(name.startswith("text_encoders.") for name in trained)
        for encoder in denoiser.text_encoders:
            if not encoders_trained:
                encoder.to(dtype)
                continue
            # part by part: transformers finds an encoder's hidden states by its class, which FSDP changes
            for part in _parts(encoder):
                self._roots.append(fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True))
        for block in shard_units(denoiser.unet):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        self._roots.append(fully_shard(denoiser.unet, mesh=mesh, mp_policy=policy))
        wanted = set(trained)
        self.parameters = {name: p for name, p in denoiser.named_parameters() if name in wanted}
        self._see_all_trained()

    def _see_all_trained(self) -> None:
        """Gather each block once with everything trained.

        FSDP fixes the dtype in which a block's gradients are reduced when it first gathers the block, and none for a
        block that is frozen then.
        """
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
        """Within the block gradients stay local; the next backward pass outside of it exchanges their sum."""
        for root in self._roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in self._roots:
                root.set_requires_gradient_sync(True)

    def refresh(self) -> None:
        """Drop gathered weights, after the parameters changed."""
        for root in self._roots:
            root.reshard()


def _parts(encoder: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers of a text encoder, its embeddings, and its last parts."""
    for child in encoder.children():
        layers = getattr(child, "layers", None)
        if layers is not None:
            yield from layers
        elif hasattr(child, "encoder"):  # the text_model of an encoder with a projection
            yield from _parts(child)
        else:
            yield child


def _cast_sample(dtype: torch.dtype) -> Any:
    """A hook that casts the U-Net's noisy latents; a pipeline gives them in the weights' dtype, float32 under FSDP."""

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
    """Wrap the network for the strategy; for the other arguments see ``Replicated``.

    Args:
        strategy: ddp, fsdp or hsdp; ignored if there is only one process.
    """
    if world.size == 1 or strategy == "ddp":
        return Replicated(denoiser, dtype, trained, kept_in, world)
    return Sharded(denoiser, dtype, trained, kept_in, world, hsdp=strategy == "hsdp")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
