"""Optimizers, how their learning rate goes, and their state as plain tensors.

Parameters are float32, or bfloat16 where an optimizer rounds stochastically; they may be sharded (FSDP2's DTensor).
``make_optimizer`` creates the whole state at once, where libraries do in the first step.  So what does not fit into
memory is known before training, a checkpoint can be loaded before the first step, and the state of a parameter always
has the same tensors.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from ..errors import UserError
from ..extras import needs

OPTIMIZERS = ("adamw", "adamw8bit", "adamw4bit", "adafactor", "bnb_adamw8bit")
LOW_BIT = ("adamw8bit", "adamw4bit")  # torchao's
SCHEDULES = ("constant", "cosine", "rsqrt")

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
    """An optimizer with all its state, zero.

    - adamw: torch's AdamW (arXiv 1711.05101), fused.
    - adamw8bit, adamw4bit: torchao's, which keep the moments in 8 bits (arXiv 2110.02861) or 4 (2309.01507).
    - adafactor: transformers' Adafactor (arXiv 1804.04235) without a first moment and without its relative steps, so
      that the learning rate means what it means elsewhere; ``betas`` and ``eps`` are not used.  torch's own reads the
      device twice a parameter and step, always scales the learning rate by the weights, and refuses sharded
      parameters.  Both factor the last two dimensions, which saves little for 3 x 3 convolutions.
    - bnb_adamw8bit: bitsandbytes' AdamW in 8 bits; no sharded parameters.

    Args:
        name: one of OPTIMIZERS.
        groups: as torch takes them, {"params": [...]}; "lr" in one is the absolute learning rate that it has instead
            of ``lr``, and "weight_decay" likewise.
        lr: learning rate that ``set_lr`` multiplies.
        betas, eps: of Adam.
        weight_decay: decoupled, for all parameters of a group, those of norms and biases too.
        bf16_stochastic_round: for the parameters in bfloat16 of a low-bit optimizer: round them up or down with the
            probability that makes the mean right.  It draws from torch's global generator of the device, which must
            be in the same state on all ranks that hold the same parameter, and after a resume.

    Raises:
        UserError: no such optimizer, a library that is not installed, or parameters that it does not work for.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"there is no optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}")
    if bf16_stochastic_round and name not in LOW_BIT:
        raise UserError(f"{name} does not round stochastically: {' and '.join(LOW_BIT)} do")
    # "initial_lr" as torch's schedulers name it
    groups = [{**group, "params": list(group["params"]), "initial_lr": group.get("lr", lr)} for group in groups]
    _check_parameters(name, groups, bf16_stochastic_round)

    adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if name == "adamw":
        optimizer, new_state = torch.optim.AdamW(groups, **adam, fused=True), _adamw_state
    elif name in LOW_BIT:
        optimizer = _low_bit_class(name)(groups, **adam, bf16_stochastic_round=bf16_stochastic_round)
        new_state = _low_bit_state
    elif name == "adafactor":
        from transformers.optimization import Adafactor

        optimizer = Adafactor(groups, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False)
        new_state = _adafactor_state
    else:
        optimizer, new_state = _bitsandbytes_class()(groups, **adam), _bitsandbytes_state
    with torch.no_grad():
        for parameter in _parameters(optimizer):
            optimizer.state[parameter] = new_state(optimizer, parameter)
    return optimizer


def _check_parameters(name: str, groups: list[dict], bf16_stochastic_round: bool) -> None:
    for parameter in (parameter for group in groups for parameter in group["params"]):
        if parameter.dtype != torch.float32 and not (bf16_stochastic_round and parameter.dtype == torch.bfloat16):
            raise UserError(
                f"the optimizer was given parameters in {parameter.dtype}, in which small updates are lost: keep them "
                f"in float32, or in bfloat16 with bf16_stochastic_round of {' or '.join(LOW_BIT)}"
            )
        if name == "bnb_adamw8bit" and isinstance(parameter, DTensor):
            raise UserError("bnb_adamw8bit does not work with sharded parameters: choose adamw8bit")


def _low_bit_class(name: str) -> type[Optimizer]:
    try:
        from torchao import optim
    except ImportError:
        raise UserError(needs(name, "torchao")) from None
    return optim.AdamW8bit if name == "adamw8bit" else optim.AdamW4bit


def _bitsandbytes_class() -> type[Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(needs("bnb_adamw8bit", "bitsandbytes")) from None
    return AdamW8bit


# What the first step of each would create, but where that is wrong: for sharded parameters and those in bfloat16.


def _adamw_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _low_bit_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    def moment(signed: bool) -> Tensor:
        if not _is_uneven(parameter):  # else some ranks might quantise it and others not
            buffer = optimizer._new_buffer(parameter, signed)
            if _is_quantised(buffer):
                return buffer
        # torchao's own has the parameter's type, and in bfloat16 a decay of 0.999 is lost
        return torch.zeros_like(parameter, dtype=torch.float32)

    return {"step": torch.zeros(()), "exp_avg": moment(signed=True), "exp_avg_sq": moment(signed=False)}


def _adafactor_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor | int]:
    step = {"step": torch.zeros(()), "RMS": 0}
    zeros = torch.zeros_like(parameter)
    if parameter.ndim < 2:
        return step | {"exp_avg_sq": zeros}
    row, column = zeros.mean(dim=-1), zeros.mean(dim=-2)
    if isinstance(column, DTensor):  # a mean over the sharded dimension is one of each rank still
        column = column.redistribute(placements=[Replicate() if p.is_partial() else p for p in column.placements])
    return step | {"exp_avg_sq_row": row, "exp_avg_sq_col": column}


def _bitsandbytes_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor | int]:
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)  # what it asks of a group is the same in all
    state = optimizer.state[parameter]
    shared = {entry: state[entry].clone() for entry in ("qmap1", "qmap2") if entry in state}
    return state | shared  # safetensors refuses tensors that share memory


def _is_uneven(parameter: Tensor) -> bool:
    """Whether ranks have parts of different sizes."""
    if not isinstance(parameter, DTensor):
        return False
    mesh, placements = parameter.device_mesh, parameter.placements
    shards = math.prod(mesh.size(i) for i, placement in enumerate(placements) if isinstance(placement, Shard))
    return parameter.shape[0] % shards != 0


def _is_quantised(value: Tensor) -> bool:
    """Whether this is a tensor of torchao that consists of several."""
    local = value.to_local() if isinstance(value, DTensor) else value
    return hasattr(local, "__tensor_flatten__")


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


# ----------------------------------------------------------------------------------------------------------------------
# Learning rate


def lr_factor(
    step: int,
    *,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int | None = None,
    final_share: float = 0.0,
    reference_steps: int | None = None,
) -> float:
    """What the learning rate of a step is multiplied by; it depends on nothing else, so a resume needs no state.

    - constant: 1.
    - cosine: from 1 behind the warm-up along half a cosine to ``final_share`` at ``total_steps`` (arXiv 1608.03983).
    - rsqrt: 1 / sqrt(max(step / reference_steps, 1)), the decay of EDM2 (arXiv 2312.02696).

    Args:
        step: about to be taken, from 0.
        schedule: one of SCHEDULES.
        warmup_steps: over which a factor goes up linearly, from 1 / warmup_steps in step 0 to 1.
        total_steps: of the training; for cosine only.
        final_share: for cosine only.
        reference_steps: for rsqrt only.

    Raises:
        UserError: no such schedule, or a number that it needs is missing or out of range.
    """
    warmup = min((step + 1) / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    if schedule == "constant":
        return warmup
    if schedule == "cosine":
        if total_steps is None or total_steps <= warmup_steps:
            raise UserError(f"cosine needs total_steps above the {warmup_steps} of the warm-up, not {total_steps}")
        progress = min(max(step - warmup_steps, 0) / (total_steps - warmup_steps), 1.0)
        return warmup * (final_share + (1 - final_share) * (1 + math.cos(math.pi * progress)) / 2)
    if schedule == "rsqrt":
        if reference_steps is None or reference_steps < 1:
            raise UserError(f"rsqrt needs reference_steps of at least 1, not {reference_steps}")
        return warmup / math.sqrt(max(step / reference_steps, 1.0))
    raise UserError(f"there is no learning-rate schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Give every group its learning rate times ``lr_factor`` of the step."""
    for group in optimizer.param_groups:
        lr = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):  # torchao's, on the CPU; compiled once for all values
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


# ----------------------------------------------------------------------------------------------------------------------
# Clipping


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients together so that their norm is at most ``max_norm``.

    Args:
        parameters: of all groups, either all of them sharded over one mesh or none.
        max_norm: None leaves the gradients as they are.

    Returns:
        () float32 on the device, the global L2 norm before.  It is not read here; if it is not finite, neither are
        the gradients behind a clipping.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
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
    """Give an optimizer the state that ``optimizer_tensors`` of another one was; parameters stay as they are.

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
    local = value.to_local() if isinstance(value, DTensor) else value
    parts = {name: getattr(local, name) for name in local.__tensor_flatten__()[0]}
    if isinstance(value, DTensor):  # each rank has as many codes and scales, and the same qmap
        for name in parts.keys() - {"qmap"}:
            parts[name] = DTensor.from_local(parts[name], value.device_mesh, value.placements, run_check=False)
    return {f".{name}": part for name, part in parts.items()}
