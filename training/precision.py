"""Parameters in float32, arithmetic in bfloat16 or float16.

Autocast computes norms and sums in float32, which makes activations larger than necessary; a network entirely in
bfloat16 loses updates smaller than 1/256 of a weight.  Here each trained weight is a float32 parameter, and each
forward pass gives the network its cast.  Gradients come back through the cast, so the optimizer, the average of the
weights, clipping, accumulation and DistributedDataParallel see ordinary float32 parameters with float32 gradients.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..errors import UserError


class MixedPrecision(torch.nn.Module):
    """A network whose trained parameters are float32 and that computes in another dtype.

    The casts stay in the network until the next forward pass, because gradient checkpointing recomputes parts of it in
    the backward pass.

    Args:
        network: changed in place: its other parameters are cast to the dtype permanently.
        dtype: dtype to compute in; with float32 nothing is cast.
        trained: names of the parameters that are trained, now or in a later stage.
        kept_in: dtype of the trained parameters; bfloat16 only for an optimizer that rounds stochastically.

    Attributes:
        masters: name -> the trained parameter.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        dtype: torch.dtype,
        trained: Collection[str],
        kept_in: torch.dtype = torch.float32,
    ):
        super().__init__()
        self._network = (network,)  # in a tuple: its casts are not parameters of this module
        self.dtype = dtype
        self.masters: dict[str, torch.nn.Parameter] = {}
        self._places: list[tuple[dict, str]] = []
        for prefix, module in network.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                if name in trained:
                    self.masters[name] = torch.nn.Parameter(parameter.detach().to(kept_in))
                    self._places.append((module._parameters, key))
                elif parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[key] = buffer.to(dtype)
        if len(self.masters) < len(trained):
            raise UserError(f"the network has no parameter {min(set(trained) - self.masters.keys())}")
        self.parameter_list = torch.nn.ParameterList(self.masters.values())
        with torch.no_grad():
            self.cast()

    @property
    def network(self) -> torch.nn.Module:
        """The network, with the casts of the last forward pass or the last ``cast``."""
        return self._network[0]

    def cast(self) -> None:
        """Give the network casts of the current parameters."""
        for (parameters, key), master in zip(self._places, self.parameter_list, strict=True):
            parameters[key] = master.to(self.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.cast()
        return self.network(*args, **kwargs)


class LossScale:
    """Scales the loss so that small gradients do not vanish in float16 (arXiv 1710.03740, section 3.2).

    The scale doubles after ``interval`` steps with a finite gradient in a row, and halves after a step without, which
    is skipped.  torch's GradScaler checks each process's own shard of the gradient, so processes could disagree.

    Args:
        device: device of the loss.
        interval: steps until the scale doubles.
    """

    def __init__(self, device: torch.device, interval: int = 2000):
        self.scale = torch.full((), 2.0**16, device=device)
        self.finite = torch.zeros((), device=device)
        self._interval = interval

    def unscale(self, parameters: Iterable[torch.Tensor]) -> None:
        """Divide the gradients of the parameters by the scale, in place."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], 1 / self.scale)

    def update(self, bad: torch.Tensor) -> None:
        """Adjust the scale after a step.

        Args:
            bad: () float32, 1 if the step's gradient was not finite.
        """
        self.finite.add_(1).mul_(1 - bad)
        doubles = self.finite >= self._interval
        self.scale.mul_(torch.where(bad.bool(), 0.5, torch.where(doubles, 2.0, 1.0)))
        self.finite.mul_(~doubles)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors for the state of the run; loading into them restores it."""
        return {"scale": self.scale, "finite": self.finite}
