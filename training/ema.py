"""Averages of the weights over training, in float32, and averages of other widths made from snapshots afterwards.

A profile says what share the weights of each step tau have in the average at step t.

- Power function (EDM2, arXiv 2312.02696, section 3): p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1).  Its width
  grows with the training: its standard deviation is the share ``sigma_rel`` of the training's length.
- Constant decay: the share is proportional to decay^(t - tau).  The shares add up to 1 from the first step on, so the
  average needs no warm-up, and never contains the weights that training began with.

Both are weighted means of the weights after each step, and are updated by ``average.lerp_(weights, 1 - kept)``, where
``kept`` is the share of the old average that remains.  Step counts are host integers: an update reads nothing from the
device.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..checkpoints.header import read_header
from ..checkpoints.stream import TensorStream, cast, dtype_name, write_tensors
from ..errors import UserError
from ..files import atomic_write

PROFILE, SIGMA_REL, STEP = "ztsnr.ema", "ztsnr.ema_sigma_rel", "ztsnr.ema_step"  # metadata of a snapshot
WIDEST = 12**-0.5  # sigma_rel of the mean over all steps, gamma = 0

# ----------------------------------------------------------------------------------------------------------------------
# Profiles


@dataclass(frozen=True)
class PowerFunction:
    """EDM2's profile.  Its standard deviation is ``sigma_rel``, in (0, 12^-0.5], times the training's length."""

    sigma_rel: float

    def __post_init__(self):
        gamma_of(self.sigma_rel)

    @property
    def name(self) -> str:
        return f"power_{self.sigma_rel}"

    def kept(self, before: int, step: int) -> float:
        """The product of beta(t) = (1 - 1 / t)^(gamma + 1) over the steps after ``before`` up to ``step``."""
        return (before / step) ** (gamma_of(self.sigma_rel) + 1)


@dataclass(frozen=True)
class ConstantDecay:
    """Shares proportional to decay^age, with a decay between 0 and 1."""

    decay: float

    def __post_init__(self):
        if not 0 < self.decay < 1:
            raise UserError(f"the decay of an average must be between 0 and 1, not {self.decay}")

    @property
    def name(self) -> str:
        return f"decay_{self.decay}"

    def kept(self, before: int, step: int) -> float:
        """1 - (1 - d^(step - before)) / (1 - d^step): the complement of the share of the steps after ``before``."""
        log = math.log(self.decay)
        return 1 - math.expm1(log * (step - before)) / math.expm1(log * step)


Profile = PowerFunction | ConstantDecay


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a power function of this width: the largest root of sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)).

    EDM2, algorithm 2.

    Raises:
        UserError: no exponent of at least 0 has this width.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(f"sigma_rel must be above 0 and at most 12^-0.5 = 0.2886..., not {sigma_rel}")
    inverse = sigma_rel**-2
    return max(float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()), 0.0)  # all three are real


# ----------------------------------------------------------------------------------------------------------------------
# Averages during training


class Ema:
    """Averages of parameters, one per profile.

    Args:
        named_parameters: parameters by name; DTensors are averaged shard by shard.
        profiles: profiles of the averages.
        device: "cpu" keeps the averages in main memory.  The device then sends a copy of the parameters at each update,
            which enters the average at the next one; call ``settle`` before the parameters change.  None keeps the
            averages on the parameters' device.
        every: steps between updates; the weights count as constant in between.

    Attributes:
        step: step of the last update; 0 before the first.

    Raises:
        UserError: averages of sharded parameters are to be kept on another device, or a profile occurs twice.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Tensor],
        profiles: Sequence[Profile] = (PowerFunction(0.05), PowerFunction(0.10)),
        *,
        device: str | torch.device | None = None,
        every: int = 1,
    ):
        self.profiles, self.every, self.step = tuple(profiles), every, 0
        self._parameters = dict(named_parameters)
        if len({profile.name for profile in profiles}) != len(profiles):
            raise UserError("two averages have the same profile: give each once")
        if device is not None and any(isinstance(parameter, DTensor) for parameter in self._parameters.values()):
            raise UserError("averages of sharded parameters stay on their device: set average.on_cpu = false")
        self._averages = {
            profile: {
                name: parameter.detach().to(device=device, dtype=torch.float32, copy=True)
                for name, parameter in self._parameters.items()
            }
            for profile in self.profiles
        }
        elsewhere = device is not None and self.profiles
        self._copies = _Copies(list(self._parameters.values())) if elsewhere else None

    def update(self, step: int) -> None:
        """Update the averages with the parameters after ``step`` optimizer steps, if ``every`` divides it."""
        if step % self.every:
            return
        if step <= self.step:
            raise UserError(f"the averages are at step {self.step}: give a later step than {step}")
        if self._copies is not None:
            # In main memory: average the copy of the last update, then send the next one during the coming step.
            self._take_copies()
            self._copies.send(self.step, step)
        elif self.profiles:
            self._lerp([_local(parameter).float() for parameter in self._parameters.values()], self.step, step)
        self.step = step

    def settle(self) -> None:
        """Make the device finish copying the parameters before it does anything else; the host does not wait."""
        if self._copies is not None:
            self._copies.settle()

    def tensors(self, profile: Profile) -> dict[str, Tensor]:
        """An average by parameter name: the float32 tensors themselves, which updates change."""
        self._take_copies()
        return self._averages[profile]

    @contextmanager
    def applied(self, profile: Profile) -> Iterator[None]:
        """Within the block the parameters have the values of an average; do not update in it.

        The training weights wait in main memory, so the device needs no more memory.  FSDP2 keeps the weights that its
        outermost module gathered in a forward pass, so call ``model.reshard()`` after the block; otherwise the next
        step would still use the average.
        """
        parameters = [_local(parameter) for parameter in self._parameters.values()]
        weights = [parameter.to("cpu", copy=True) for parameter in parameters]
        try:
            for parameter, average in zip(parameters, self.tensors(profile).values(), strict=True):
                parameter.copy_(_local(average))
            yield
        finally:
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)

    def state_tensors(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint: the averages as "PROFILE.PARAMETER", and a copy of "step", () int64."""
        averages = {
            f"{profile.name}.{name}": average
            for profile in self.profiles
            for name, average in self.tensors(profile).items()
        }
        return averages | {"step": torch.tensor(self.step)}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from ``state_tensors``: those of a file, or this object's own after a file was loaded into them.

        Raises:
            UserError: they belong to other profiles or parameters.
        """
        own = self.state_tensors()
        if differing := own.keys() ^ tensors.keys():
            raise UserError(
                f"the saved averages have other profiles or parameters, such as {min(differing)}: give those of the run"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.step = int(tensors["step"])

    def save_snapshot(self, path: str | Path, profile: Profile, *, dtype: torch.dtype = torch.float32) -> None:
        """Write an average to a safetensors file for ``post_hoc``, one tensor at a time.

        With sharded parameters all ranks call this to gather them, and the first rank writes.

        Raises:
            UserError: it cannot be written, ``dtype`` cannot hold its numbers, or there was no update yet; with
                sharded parameters in all ranks.
        """
        if self.step == 0:
            raise UserError("there is no average before the first update")
        averages = self.tensors(profile)
        # still to be gathered
        waiting = {name: average for name, average in averages.items() if isinstance(average, DTensor)}
        is_sharded = bool(waiting)

        def gathered(name: str) -> Tensor:
            if name not in waiting:
                return averages[name]
            return waiting.pop(name).full_tensor()

        streams = {name: _stream(average, partial(gathered, name), dtype) for name, average in averages.items()}
        metadata = {PROFILE: profile.name, STEP: str(self.step)}
        if isinstance(profile, PowerFunction):
            metadata[SIGMA_REL] = repr(profile.sigma_rel)
        trouble = None
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                with atomic_write(path) as file:
                    write_tensors(file, streams, metadata, hashed=False)
            except UserError as error:
                trouble = str(error)
        if is_sharded:
            # Gathering needs all ranks: the others gather every tensor, the first those that it did not reach.
            for name in averages:
                if name in waiting:
                    gathered(name)
            said = [trouble]
            dist.broadcast_object_list(said, 0)
            trouble = said[0]
        if trouble is not None:
            raise UserError(trouble)

    def _take_copies(self) -> None:
        if self._copies is not None and self._copies.steps is not None:
            self._lerp(self._copies.receive(), *self._copies.steps)
            self._copies.steps = None

    def _lerp(self, weights: list[Tensor], before: int, step: int) -> None:
        for profile, averages in self._averages.items():
            targets = [_local(average) for average in averages.values()]
            torch._foreach_lerp_(targets, weights, 1 - profile.kept(before, step))


class _Copies:
    """Copies of the parameters on their way to main memory, in buffers that are reused.

    CUDA copies them on a separate stream, during the forward and backward pass of the next step.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        from_cuda = any(parameter.is_cuda for parameter in parameters)
        self._parameters = [parameter.detach() for parameter in parameters]
        # in the parameters' memory format: otherwise each copy would reorder its tensor, and lerp would read strided
        self._buffers = [torch.empty_like(p, device="cpu", pin_memory=from_cuda) for p in self._parameters]
        self._stream = torch.cuda.Stream() if from_cuda else None
        self._sent = torch.cuda.Event() if from_cuda else None
        self.steps: tuple[int, int] | None = None  # (before, step) of the copy on its way

    def send(self, before: int, step: int) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # the step that changed the parameters comes first
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for buffer, parameter in zip(self._buffers, self._parameters, strict=True):
                buffer.copy_(parameter, non_blocking=True)
        if self._sent is not None:
            self._sent.record(self._stream)
        self.steps = before, step

    def settle(self) -> None:
        if self._sent is not None:
            torch.cuda.current_stream().wait_event(self._sent)

    def receive(self) -> list[Tensor]:
        if self._sent is not None:
            self._sent.synchronize()  # sent one update ago, so this rarely waits
        return [buffer.float() for buffer in self._buffers]


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _stream(tensor: Tensor, whole: Callable[[], Tensor], dtype: torch.dtype) -> TensorStream:
    def read() -> Iterator[bytearray]:
        yield bytearray(whole().cpu().flatten().view(torch.uint8).numpy())

    return cast(TensorStream(dtype_name(tensor.dtype), tuple(tensor.shape), read), dtype_name(dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Averages afterwards


def post_hoc(snapshots: Sequence[str | Path], sigma_rel: float, *, step: int | None = None) -> dict[str, Tensor]:
    """An average of any width at any step, from snapshots of other averages (EDM2, algorithm 3).

    It is the linear combination of snapshots whose profile is the least-squares fit to the wanted one.  Unlike in EDM2
    the coefficients add up to 1: fine-tuned weights differ little from the initial ones, and what all snapshots share
    must come out unscaled.  Without this constraint the sum for a width of 0.075, from eight snapshots each of 0.05 and
    0.10, is off by 0.1 %, which scales the whole model.

    Args:
        snapshots: files that ``Ema.save_snapshot`` wrote in one training, of power functions.
        sigma_rel: width of the average.
        step: step at which the average ends; by default that of the last snapshot.

    Returns:
        float32 tensors by name.  One tensor at a time is read and combined.

    Raises:
        UserError: there is no snapshot, a file is not such a snapshot or has other tensors, the width is out of range,
            or the step is after the last snapshot.
    """
    paths = [Path(path) for path in snapshots]
    if not paths:
        raise UserError("no snapshots were given: give the files in the run's folder snapshots")
    profiles = [_profile_of(path) for path in paths]
    last = max(t for t, _ in profiles)
    step = last if step is None else step
    if not 0 < step <= last:
        raise UserError(f"step must be from 1 to {last}, the last snapshot's, not {step}")
    coefficients = combine(profiles, (step, gamma_of(sigma_rel))).tolist()
    tensors = {}
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, "pt")) for path in paths]
        names = [set(file.keys()) for file in files]
        if differing := set.union(*names) - set.intersection(*names):
            raise UserError(f"the snapshots belong to different models: only some of them have {min(differing)}")
        for name in sorted(names[0]):
            total = torch.zeros(files[0].get_slice(name).get_shape(), dtype=torch.float64)
            for file, coefficient in zip(files, coefficients, strict=True):
                total.add_(file.get_tensor(name).double(), alpha=coefficient)
            tensors[name] = total.float()
    return tensors


def combine(profiles: Sequence[tuple[float, float]], target: tuple[float, float]) -> np.ndarray:
    """The coefficients, with sum 1, of the combination of profiles that is nearest to a target profile.

    They minimise the integral of (sum of c_i p_i - p)^2.  With a multiplier m for the constraint they solve
    (A 1; 1 0) (c m) = (b 1), where A holds the inner products of the profiles, and b those with the target.

    Args:
        profiles: (step, gamma) of each of N.
        target: (step, gamma).

    Returns:
        (N,) float64.
    """
    steps, gammas = np.array(profiles, np.float64).T
    count = len(steps)
    system, wanted = np.ones((count + 1, count + 1)), np.ones(count + 1)
    # The coefficients do not depend on the unit of time; in units of the target's step all entries have similar sizes.
    steps, end = steps / target[0], 1.0
    system[:count, :count] = _inner_product(steps[:, None], gammas[:, None], steps, gammas)
    wanted[:count] = _inner_product(steps, gammas, end, target[1])
    system[count, count] = 0
    return np.linalg.lstsq(system, wanted)[0][:count]  # lstsq, because equal snapshots make the system singular


def _inner_product(
    t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray | float, gamma_b: np.ndarray | float
) -> np.ndarray:
    """The integral of the product of two power-function profiles, up to the earlier end."""
    shorter = np.minimum(t_a, t_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / np.maximum(t_a, t_b)
    return scale * (shorter / t_a) ** gamma_a * (shorter / t_b) ** gamma_b


def _profile_of(path: Path) -> tuple[int, float]:
    """(step, gamma) of a snapshot."""
    metadata = read_header(path).metadata
    if SIGMA_REL not in metadata or STEP not in metadata:
        raise UserError(f"{path} is not a snapshot of a power-function average: its metadata lacks sigma_rel or step")
    return int(metadata[STEP]), gamma_of(float(metadata[SIGMA_REL]))
