"""Optimizers, and their state as plain tensors.

To add an optimizer is to add one entry: a function with ``@optimizer`` that makes it.

Parameters are float32, or bfloat16 where an optimizer rounds stochastically; they may be sharded (FSDP2's DTensor).
``make_optimizer`` creates the whole state at once, where libraries do so in the first step.  So what does not fit into
memory is known before training, a state can be loaded before the first step, and the state of a parameter always has
the same tensors.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from ..errors import UserError
from ..extras import needs

FLOAT32 = 4  # bytes

Groups = list[dict[str, Any]]
State = dict[str, Tensor | int]

# ----------------------------------------------------------------------------------------------------------------------
# The registry


@dataclass(frozen=True)
class Entry:
    """An optimizer that can be chosen.

    Attributes:
        make: makes it of groups of parameters and the arguments lr, betas, eps, weight_decay, bf16_stochastic_round.
        new_state: the state of a parameter before the first step: what the first step would create, except where that
            is wrong, for sharded parameters and those in bfloat16.
        state_bytes: bytes of a parameter's state by its shape, without the step count.
        library: package that has to be installed for it; None if torch or transformers have it.
        rounds: True if it can round parameters in bfloat16 stochastically.
        shards: True if it works with sharded parameters.
    """

    make: Callable[..., Optimizer]
    new_state: Callable[[Optimizer, Tensor], State]
    state_bytes: Callable[[torch.Size], int]
    library: str | None = None
    rounds: bool = False
    shards: bool = True


ENTRIES: dict[str, Entry] = {}


def optimizer(
    name: str,
    *,
    new_state: Callable[[Optimizer, Tensor], State],
    state_bytes: Callable[[torch.Size], int],
    library: str | None = None,
    rounds: bool = False,
    shards: bool = True,
) -> Callable[[Callable[..., Optimizer]], Callable[..., Optimizer]]:
    """Register the function below as what makes the optimizer ``name``; for the arguments see ``Entry``."""

    def register(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
        ENTRIES[name] = Entry(make, new_state, state_bytes, library, rounds, shards)
        return make

    return register


# ----------------------------------------------------------------------------------------------------------------------
# AdamW (arXiv 1711.05101), fused


def _adamw_state(optimizer: Optimizer, parameter: Tensor) -> State:
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


@optimizer("adamw", new_state=_adamw_state, state_bytes=lambda shape: 2 * FLOAT32 * shape.numel())
def _adamw(groups: Groups, *, bf16_stochastic_round: bool, **adam: Any) -> Optimizer:
    return torch.optim.AdamW(groups, **adam, fused=True)


# ----------------------------------------------------------------------------------------------------------------------
# torchao's AdamW, which keeps the moments in 8 bits (arXiv 2110.02861) or 4 bits (arXiv 2309.01507)


def _low_bit_state(optimizer: Any, parameter: Tensor) -> State:
    def moment(signed: bool) -> Tensor:
        if not _is_uneven(parameter):  # otherwise some ranks might quantise it and others not
            buffer = optimizer._new_buffer(parameter, signed)
            if _is_quantised(buffer):
                return buffer
        # torchao's own buffer has the parameter's dtype, and in bfloat16 a decay of 0.999 has no effect
        return torch.zeros_like(parameter, dtype=torch.float32)

    return {"step": torch.zeros(()), "exp_avg": moment(signed=True), "exp_avg_sq": moment(signed=False)}


def _quantised_bytes(shape: torch.Size, bits: int, block: int, pads: bool = False) -> int:
    """Codes, a float32 scale per block, and a float32 value per code; small parameters stay in float32."""
    count = shape.numel()
    if count < 4096 or (count % block and not pads):
        return 2 * FLOAT32 * count
    return 2 * (count * bits // 8 + FLOAT32 * (-(-count // block) + 2**bits))


@optimizer(
    "adamw8bit",
    new_state=_low_bit_state,
    state_bytes=partial(_quantised_bytes, bits=8, block=256),
    library="torchao",
    rounds=True,
)
def _adamw8bit(groups: Groups, **arguments: Any) -> Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, **arguments)


@optimizer(
    "adamw4bit",
    new_state=_low_bit_state,
    state_bytes=partial(_quantised_bytes, bits=4, block=128),
    library="torchao",
    rounds=True,
)
def _adamw4bit(groups: Groups, **arguments: Any) -> Optimizer:
    from torchao.optim import AdamW4bit

    return AdamW4bit(groups, **arguments)


# ----------------------------------------------------------------------------------------------------------------------
# transformers' Adafactor (arXiv 1804.04235) without a first moment and without its relative steps, so that the learning
# rate means what it means elsewhere; betas and eps are not used.  torch's own reads the device twice per parameter and
# step, always scales the learning rate by the weights, and refuses sharded parameters.  Both factor the last two
# dimensions, which saves little for 3 x 3 convolutions.


def _adafactor_state(optimizer: Optimizer, parameter: Tensor) -> State:
    step = {"step": torch.zeros(()), "RMS": 0}
    zeros = torch.zeros_like(parameter)
    if parameter.ndim < 2:
        return step | {"exp_avg_sq": zeros}
    row, column = zeros.mean(dim=-1), zeros.mean(dim=-2)
    if isinstance(column, DTensor):  # a mean over the sharded dimension is still one per rank
        column = column.redistribute(placements=[Replicate() if p.is_partial() else p for p in column.placements])
    return step | {"exp_avg_sq_row": row, "exp_avg_sq_col": column}


def _factored_bytes(shape: torch.Size) -> int:
    """Bytes of the means over rows and columns that replace a matrix."""
    count = shape.numel()
    return FLOAT32 * (count if len(shape) < 2 else count // shape[-1] + count // shape[-2])


@optimizer("adafactor", new_state=_adafactor_state, state_bytes=_factored_bytes)
def _adafactor(groups: Groups, *, lr: float, weight_decay: float, **unused: Any) -> Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False)


# ----------------------------------------------------------------------------------------------------------------------
# bitsandbytes' AdamW in 8 bits


def _bitsandbytes_state(optimizer: Any, parameter: Tensor) -> State:
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)  # what it reads of a group is equal in all groups
    state = optimizer.state[parameter]
    shared = {entry: state[entry].clone() for entry in ("qmap1", "qmap2") if entry in state}
    return state | shared  # safetensors refuses tensors that share memory


@optimizer(
    "bnb_adamw8bit",
    new_state=_bitsandbytes_state,
    state_bytes=partial(_quantised_bytes, bits=8, block=256, pads=True),
    library="bitsandbytes",
    shards=False,
)
def _bnb_adamw8bit(groups: Groups, *, bf16_stochastic_round: bool, **adam: Any) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit(groups, **adam)


OPTIMIZERS = tuple(ENTRIES)
LOW_BIT = tuple(name for name, entry in ENTRIES.items() if entry.rounds)

# ----------------------------------------------------------------------------------------------------------------------
# Making one


def make_optimizer(
    name: str,
    groups: Iterable[Mapping[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    bf16_stochastic_round: bool = False,
) -> Optimizer:
    """An optimizer with its whole state, zero.

    Args:
        name: one of OPTIMIZERS.
        groups: as torch takes them, {"params": [...]}; "lr" in a group is the absolute learning rate that it has
            instead of ``lr``, and "weight_decay" likewise.
        lr: learning rate that ``set_lr`` multiplies.
        betas, eps: Adam's constants.
        weight_decay: decoupled, for all parameters of a group, norms and biases included.
        bf16_stochastic_round: round parameters in bfloat16 up or down with the probability that makes the mean exact.
            It draws from torch's global generator of the device, which must be in the same state on all ranks that
            hold the same parameter, and after a resume.

    Raises:
        UserError: there is no such optimizer, its library is not installed, or it does not work for the parameters.
    """
    if name not in ENTRIES:
        raise UserError(f"there is no optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}")
    entry = ENTRIES[name]
    if bf16_stochastic_round and not entry.rounds:
        raise UserError(f"{name} does not round stochastically: choose {' or '.join(LOW_BIT)}")
    # "initial_lr" as torch's schedulers name it
    prepared = [{**group, "params": list(group["params"]), "initial_lr": group.get("lr", lr)} for group in groups]
    _check_parameters(name, entry, prepared, bf16_stochastic_round)
    arguments = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    try:
        made = entry.make(prepared, **arguments, bf16_stochastic_round=bf16_stochastic_round)
    except ImportError:
        if entry.library is None:
            raise
        raise UserError(needs(name, entry.library)) from None
    with torch.no_grad():
        for parameter in _parameters(made):
            made.state[parameter] = entry.new_state(made, parameter)
    return made


def _check_parameters(name: str, entry: Entry, groups: Groups, bf16_stochastic_round: bool) -> None:
    for parameter in (parameter for group in groups for parameter in group["params"]):
        if parameter.dtype != torch.float32 and not (bf16_stochastic_round and parameter.dtype == torch.bfloat16):
            raise UserError(
                f"the optimizer was given parameters in {parameter.dtype}, in which small updates are lost: keep them "
                f"in float32, or in bfloat16 with bf16_stochastic_round of {' or '.join(LOW_BIT)}"
            )
        if isinstance(parameter, DTensor) and not entry.shards:
            raise UserError(f"{name} does not work with sharded parameters: choose adamw8bit")


def _is_uneven(parameter: Tensor) -> bool:
    """True if ranks hold parts of different sizes."""
    if not isinstance(parameter, DTensor):
        return False
    mesh, placements = parameter.device_mesh, parameter.placements
    shards = math.prod(mesh.size(i) for i, placement in enumerate(placements) if isinstance(placement, Shard))
    return parameter.shape[0] % shards != 0


def _is_quantised(value: Tensor) -> bool:
    """True for a tensor of torchao that consists of several."""
    local = value.to_local() if isinstance(value, DTensor) else value
    return hasattr(local, "__tensor_flatten__")


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


# ----------------------------------------------------------------------------------------------------------------------
# Clipping


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients together so that their norm is at most ``max_norm``.

    Args:
        parameters: parameters of all groups, either all of them sharded over one mesh or none.
        max_norm: None leaves the gradients as they are.

    Returns:
        The global L2 norm before clipping, a scalar float32 tensor on the device.  It is not read here; if it is not
        finite, the clipped gradients are not finite either.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


# ----------------------------------------------------------------------------------------------------------------------
# State

DERIVED = "RMS"  # of Adafactor: made anew in each step before it is used


def optimizer_tensors(optimizer: Optimizer, named_parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an optimizer: its own tensors, so that what is loaded into them is loaded into the optimizer.

    Args:
        optimizer: made by ``make_optimizer``.
        named_parameters: those that it does not have are passed over.

    Returns:
        By "PARAMETER.ENTRY", such as "conv_in.weight.exp_avg", plain tensors or, of sharded parameters, DTensors.
        Quantised entries become "PARAMETER.ENTRY.PART", with parts codes, scale and qmap.  Python numbers become
        0-dim tensors, which are copies: finish what was loaded into them with ``load_optimizer_tensors``.
    """
    return {
        f"{name}.{entry}{part}": tensor
        for name, parameter in named_parameters.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
        if entry != DERIVED
        for part, tensor in _plain(value).items()
    }


def load_optimizer_tensors(
    optimizer: Optimizer, named_parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Load the state that ``optimizer_tensors`` returned for another optimizer; parameters do not change.

    Low-bit optimizers quantise the larger parameters only, which for sharded ones depends on the number of ranks.

    Raises:
        UserError: tensors that this optimizer does not have, or has in another shape or type, or that are missing.
    """
    own = optimizer_tensors(optimizer, named_parameters)
    if differing := own.keys() ^ tensors.keys():
        some = min(differing)
        where = "has no" if some in own else "has"
        raise UserError(
            f"the saved state {where} {some}, one of {len(differing)} tensors by which it differs from the state of "
            "this optimizer: resume with the optimizer, the trained parameters and the number of shards of that run"
        )
    for key, tensor in own.items():
        if (tensor.shape, tensor.dtype) != (tensors[key].shape, tensors[key].dtype):
            raise UserError(
                f"the saved {key} is {tuple(tensors[key].shape)} in {tensors[key].dtype}, and this optimizer has "
                f"{tuple(tensor.shape)} in {tensor.dtype}"
            )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
    for name, parameter in named_parameters.items():
        state = optimizer.state.get(parameter, {})
        numbers = [entry for entry, value in state.items() if entry != DERIVED and not isinstance(value, Tensor)]
        state.update({entry: tensors[f"{name}.{entry}"].item() for entry in numbers})


def _plain(value: Tensor | float) -> dict[str, Tensor]:
    """An entry of a state as plain tensors, by what their names end in."""
    if not isinstance(value, Tensor):
        return {"": torch.tensor(value)}
    if not _is_quantised(value):
        return {"": value}
    local = cast(Any, value.to_local() if isinstance(value, DTensor) else value)
    parts = {name: getattr(local, name) for name in local.__tensor_flatten__()[0]}
    if isinstance(value, DTensor):  # each rank has as many codes and scales, and the same qmap
        for name in parts.keys() - {"qmap"}:
            parts[name] = DTensor.from_local(parts[name], value.device_mesh, value.placements, run_check=False)
    return {f".{name}": part for name, part in parts.items()}
