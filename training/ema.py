"""Averages of the weights over training, in float32, and any other average made from their snapshots afterwards.

An average over the steps tau up to t is a profile: what share of it the weights of each step have.

- Power function (EDM2, arXiv 2312.02696, section 3): p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1).  It widens with
  the training, so that its width is a share of it, ``sigma_rel``.
- Constant decay: the share is proportional to decay^(t - tau).  The shares add up to 1 from the first step on, so the
  average needs no warm-up, and never contains the weights that training began with.

Both are weighted means of the weights after each step, and are updated by ``average.lerp_(weights, 1 - kept)``, where
``kept`` is what remains of the old average.  Step counts are host integers, and nothing in an update is read from the
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
    """EDM2's profile, whose standard deviation is ``sigma_rel`` of the training's length: above 0, up to 12^-0.5."""

    sigma_rel: float

    def __post_init__(self):
        gamma_of(self.sigma_rel)

    @property
    def name(self) -> str:
        return f"power_{self.sigma_rel}"

    def kept(self, before: int, step: int) -> float:
        """The product of beta(t) = (1 - 1 / t)^(gamma + 1) over the steps behind ``before`` and up to ``step``."""
        return (before / step) ** (gamma_of(self.sigma_rel) + 1)


@dataclass(frozen=True)
class ConstantDecay:
    """Shares in proportion to decay^age, with a decay between 0 and 1."""

    decay: float

    def __post_init__(self):
        if not 0 < self.decay < 1:
            raise UserError(f"the decay of an average must be between 0 and 1, not {self.decay}")

    @property
    def name(self) -> str:
        return f"decay_{self.decay}"

    def kept(self, before: int, step: int) -> float:
        """1 - (1 - d^(step - before)) / (1 - d^step): the old average has the sum of shares 1 - d^before, aged."""
        log = math.log(self.decay)
        return 1 - math.expm1(log * (step - before)) / math.expm1(log * step)


Profile = PowerFunction | ConstantDecay


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a power function of this width: the largest root of sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)).

    EDM2, algorithm 2.

    Raises:
        UserError: a width that no exponent of at least 0 has.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(f"sigma_rel must be above 0 and at most 12^-0.5 = 0.2886..., not {sigma_rel}")
    inverse = sigma_rel**-2
    return max(float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()), 0.0)  # all three are real


# ----------------------------------------------------------------------------------------------------------------------
# Averages during training


class Ema:
    """Averages of some parameters, one of each for each profile.

    Args:
        named_parameters: by name; DTensors are averaged in their own shards.
        profiles: which averages.
        device: "cpu" keeps them in the main memory, where an update is made of a copy that the device has sent since
            the one before; call ``settle`` before the parameters change again.  None where the parameters are.
        every: steps from one update to the next, in which the weights are taken to be those at the end.

    Attributes:
        step: of the last update; 0 before the first.

    Raises:
        UserError: sharded parameters to be kept elsewhere, a profile twice.
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
            raise UserError("a profile is given twice: each average is kept by the name of its profile")
        if device is not None and any(isinstance(parameter, DTensor) for parameter in self._parameters.values()):
            raise UserError("averages of sharded parameters stay on their device: give no other one for them")
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
        """Take the parameters as they are after so many steps of the optimizer; between ``every`` steps, do nothing."""
        if step % self.every:
            return
        if step <= self.step:
            raise UserError(f"the averages have seen step {self.step} already, and cannot take step {step}")
        if self._copies is not None:
            self._take_copies()
            self._copies.send(self.step, step)
        elif self.profiles:
            self._lerp([_local(parameter).float() for parameter in self._parameters.values()], self.step, step)
        self.step = step

    def settle(self) -> None:
        """Have what the device does next wait until the parameters are copied; the host waits for nothing."""
        if self._copies is not None:
            self._copies.settle()

    def tensors(self, profile: Profile) -> dict[str, Tensor]:
        """An average by the names of the parameters: float32, the tensors that updates change."""
        self._take_copies()
        return self._averages[profile]

    @contextmanager
    def applied(self, profile: Profile) -> Iterator[None]:
        """Within the block the parameters have the values of an average.

        The weights of training wait in the main memory, so nothing more is needed on the device.  No update within.
        FSDP2 keeps what the outermost module has gathered in a forward pass, so with it call ``model.reshard()`` at the
        end of the block; otherwise the next step would still see the average.
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
        """Everything for a checkpoint: the averages by "PROFILE.PARAMETER", and "step", () int64, which is a copy."""
        averages = {
            f"{profile.name}.{name}": average
            for profile in self.profiles
            for name, average in self.tensors(profile).items()
        }
        return averages | {"step": torch.tensor(self.step)}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from ``state_tensors``, whether they are a file's or this object's own that were loaded into.

        Raises:
            UserError: those of other profiles or parameters.
        """
        own = self.state_tensors()
        if differing := own.keys() ^ tensors.keys():
            raise UserError(
                f"the saved averages are not of these profiles and parameters: {min(differing)} is in one of them only"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.step = int(tensors["step"])

    def save_snapshot(self, path: str | Path, profile: Profile, *, dtype: torch.dtype = torch.float32) -> None:
        """Write an average to a safetensors file for ``post_hoc``, one tensor at a time.

        With sharded parameters all ranks must call this, as it gathers them; the first rank writes.

        Raises:
            UserError: it cannot be written, ``dtype`` cannot hold its numbers, or nothing is averaged yet; with
                sharded parameters in all ranks.
        """
        if self.step == 0:
            raise UserError("there is no average before the first update")
        averages = self.tensors(profile)
        waiting = {name for name, average in averages.items() if isinstance(average, DTensor)}  # to be gathered
        is_sharded = bool(waiting)

        def gathered(name: str) -> Tensor:
            if name not in waiting:
                return averages[name]
            waiting.remove(name)
            return averages[name].full_tensor()

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
            for name in averages:  # in the other ranks all; in the first what it did not come to, as they wait for it
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
    """The parameters on their way to the main memory, in buffers that are used again.

    CUDA copies them on a stream of its own, beside the forward and backward pass of the next step.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        from_cuda = any(parameter.is_cuda for parameter in parameters)
        self._parameters = [parameter.detach() for parameter in parameters]
        # laid out as the parameters are: otherwise the device would sort each tensor anew, and lerp would walk in steps
        self._buffers = [torch.empty_like(p, device="cpu", pin_memory=from_cuda) for p in self._parameters]
        self._stream = torch.cuda.Stream() if from_cuda else None
        self._sent = torch.cuda.Event() if from_cuda else None
        self.steps: tuple[int, int] | None = None  # (before, step) of the update on its way

    def send(self, before: int, step: int) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # for the step that has changed them
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
            self._sent.synchronize()  # with what was sent an update ago
        return [buffer.float() for buffer in self._buffers]


def _local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _stream(tensor: Tensor, whole: Callable[[], Tensor], dtype: torch.dtype) -> TensorStream:
    def read() -> Iterator[bytearray]:
        yield bytearray(whole().cpu().flatten().view(torch.uint8).numpy())

    return cast(TensorStream(dtype_name(tensor.dtype), tuple(tensor.shape), read), dtype_name(dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Averages afterwards


def post_hoc(snapshots: Sequence[str | Path], sigma_rel: float, *, step: int | None = None) -> dict[str, Tensor]:
    """An average of any width at any step, from snapshots of others (EDM2, algorithm 3).

    It is the combination of the snapshots whose profile is nearest to the wanted one, in the mean square.  Unlike in
    EDM2 its coefficients add up to 1.  Finetuned weights differ little from those that training began with, and what
    all snapshots share has to come out as it is; without the constraint, the sum for a width of 0.075 from eight
    snapshots each of 0.05 and 0.10 is off by 0.1 %, which scales the whole model.

    Args:
        snapshots: files of ``Ema.save_snapshot`` of power functions, of one training.
        sigma_rel: the width wanted.
        step: the end of the training that is averaged over; by default the last of the snapshots.

    Returns:
        float32 by name; each is read and made on its own.

    Raises:
        UserError: no snapshot, files that are no such snapshots or of different tensors, a width out of range, a step
            behind the last snapshot.
    """
    paths = [Path(path) for path in snapshots]
    if not paths:
        raise UserError("there are no snapshots to make an average of")
    profiles = [_profile_of(path) for path in paths]
    last = max(t for t, _ in profiles)
    step = last if step is None else step
    if not 0 < step <= last:
        raise UserError(f"no average at step {step} can be made of snapshots that end at step {last}")
    coefficients = combine(profiles, (step, gamma_of(sigma_rel))).tolist()
    tensors = {}
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, "pt")) for path in paths]
        names = [set(file.keys()) for file in files]
        if differing := set.union(*names) - set.intersection(*names):
            raise UserError(f"the snapshots are not of the same model: only some of them have {min(differing)}")
        for name in sorted(names[0]):
            total = torch.zeros(files[0].get_slice(name).get_shape(), dtype=torch.float64)
            for file, coefficient in zip(files, coefficients, strict=True):
                total.add_(file.get_tensor(name).double(), alpha=coefficient)
            tensors[name] = total.float()
    return tensors


def combine(profiles: Sequence[tuple[float, float]], target: tuple[float, float]) -> np.ndarray:
    """The coefficients, of sum 1, by which profiles come nearest to another one.

    They minimise the integral of (sum of c_i p_i - p)^2, so that with a multiplier for the sum (A 1; 1 0) (c m) = (b 1)
    holds, A and b being the inner products of the profiles with each other and with the target.

    Args:
        profiles: (step, gamma) of each of N.
        target: (step, gamma).

    Returns:
        (N,) float64.
    """
    steps, gammas = np.array(profiles, np.float64).T
    count = len(steps)
    system, wanted = np.ones((count + 1, count + 1)), np.ones(count + 1)
    # the unit of time is of no matter to the coefficients; with the target's, all numbers are of one size
    steps, end = steps / target[0], 1.0
    system[:count, :count] = _inner_product(steps[:, None], gammas[:, None], steps, gammas)
    wanted[:count] = _inner_product(steps, gammas, end, target[1])
    system[count, count] = 0
    return np.linalg.lstsq(system, wanted)[0][:count]  # two snapshots alike share what is theirs


def _inner_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The integral of the product of two power functions, over the steps of the shorter one."""
    shorter = np.minimum(t_a, t_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / np.maximum(t_a, t_b)
    return scale * (shorter / t_a) ** gamma_a * (shorter / t_b) ** gamma_b


def _profile_of(path: Path) -> tuple[int, float]:
    """(step, gamma) of a snapshot."""
    metadata = read_header(path).metadata
    if SIGMA_REL not in metadata or STEP not in metadata:
        raise UserError(f"{path} is no snapshot of a power-function average: it does not say sigma_rel and step")
    return int(metadata[STEP]), gamma_of(float(metadata[SIGMA_REL]))
