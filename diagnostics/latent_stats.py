"""Mean and spread of the latents over a run: of the state, of the denoised prediction, and of the initial noise.

A picture's brightness is the mean of its latents, and a sampler that leaks carries the mean of the noise into it.
``LatentMeanRecorder`` records both at every network evaluation, in ``sample``, in diffusers pipelines and in ComfyUI.
It keeps them on the device until they are read, so a run waits for nothing and its result stays the same to the last
bit.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..samplers import NoiseSchedule
from ..samplers.devices import to_float64
from ..samplers.prediction import check_prediction_type
from ..samplers.sampling import check_answer


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """What a recorder recorded, as numpy arrays; a step is one network evaluation.

    Means and standard deviations (of the population, dividing by N) are over all dimensions after the channel.

    Attributes:
        sigmas: (steps,) float64 noise levels in float32 precision, inf allowed.
        state_mean, state_std: (steps, B, C) float32, of the variance-preserving state x = alpha x0 + s eps that the
            network was asked about; at infinity the noise itself.
        denoised_mean, denoised_std: (steps, B, C) float32, of the prediction x0, guidance included.
        noise_mean, noise_std: (B, C) float32, of the unit noise the run began with; None if unknown.
        canvas: N, the values of a channel: H W, or F H W of a video.  sqrt(N) * noise_mean is the noise mean in units
            of its standard deviation.
    """

    sigmas: np.ndarray
    state_mean: np.ndarray
    state_std: np.ndarray
    denoised_mean: np.ndarray
    denoised_std: np.ndarray
    noise_mean: np.ndarray | None
    noise_std: np.ndarray | None
    canvas: int

    def nonfinite(self) -> str | None:
        """A sentence that says where NaN or infinite values began; None if there are none."""
        means = np.stack([self.state_mean, self.denoised_mean], axis=1)  # in the order in which they came to be
        found = np.argwhere(~np.isfinite(means))
        if len(found) == 0:
            return None
        steps, _, samples, channels = means.shape
        step, which, sample, channel = found[0].tolist()
        return (
            f"NaN or infinite values began at step {step + 1} of {steps} (sigma {self.sigmas[step]:.4g}), in channel "
            f"{channel + 1} of {channels} of the {('state', 'prediction')[which]} (sample {sample + 1} of {samples})"
        )


class LatentMeanRecorder:
    """Records mean and standard deviation of the latents at every step of a run, per sample and channel.

    In ``sample``::

        recorder = LatentMeanRecorder()
        sample(denoise, noise, sigmas, callback=recorder)
        statistics = recorder.read()

    In a diffusers pipeline, with any scheduler of a variance-preserving model::

        pipe(prompt, callback_on_step_end=recorder.on(pipe))

    Elsewhere call ``begin`` once, then ``record`` at every evaluation.  A recorder can serve any number of runs, one
    after another; each starts empty.  Only ``read`` waits for the device.

    The noise a run began with is known from ``begin(noise)``; in a run that begins at infinity, where the state is the
    noise; and in diffusers pipelines that begin with nothing else, which are those without a ``strength``.

    Args:
        steps: initial capacity; it grows as needed.
        on_denoised: called with (sigma, x0) at every evaluation, for example to keep pictures.
    """

    def __init__(
        self, steps: int = 64, on_denoised: Callable[[float | torch.Tensor, torch.Tensor], None] | None = None
    ):
        if steps < 1:
            raise UserError(f"steps must be at least 1, not {steps}")
        self._room = steps
        self._on_denoised = on_denoised
        self.begin()

    def begin(self, noise: torch.Tensor | None = None) -> None:
        """Clear the last run and start a new one.

        Args:
            noise: (B, C, ...) the unit noise it begins with, if known.
        """
        if noise is not None:
            _check_latents(noise)
        self._shape = None if noise is None else noise.shape
        self._noise = None if noise is None else _std_mean(noise)
        self._rows = None  # (room, 1 + 4 B C): sigma, then (state, denoised) x (std, mean) x B x C
        self._count = 0

    def record(
        self, sigma: float | torch.Tensor, x: torch.Tensor, x0: torch.Tensor, x_scale: float | torch.Tensor = 1.0
    ) -> None:
        """Write down one network evaluation.

        Args:
            sigma: its noise level, inf allowed; a number or a tensor () on any device.
            x: (B, C, ...) the state, any floating dtype.
            x0: (B, C, ...) the denoised prediction.
            x_scale: what makes x variance-preserving: alpha = 1 / sqrt(1 + sigma^2) for k-diffusion's x0 + sigma eps.

        Raises:
            UserError: no dimension of space, shapes or devices of x and x0 that differ, a shape that changes in a run.
        """
        _check_latents(x)
        check_answer(x0, x)
        if self._shape is not None and x.shape != self._shape:
            raise UserError(
                f"latents of shape {tuple(x.shape)} in a run that began with {tuple(self._shape)}: call begin() before "
                "another run"
            )
        if self._rows is None:
            self._shape = x.shape
            columns = 1 + 4 * math.prod(x.shape[:2])
            self._rows = torch.empty(self._room, columns, dtype=torch.float32, device=x.device)
        elif self._count == len(self._rows):
            self._rows = torch.cat([self._rows, torch.empty_like(self._rows)])
        row = self._rows[self._count]
        row[:1].fill_(sigma)
        torch.stack([x_scale * _std_mean(x), _std_mean(x0)], out=row[1:].view(2, 2, *x.shape[:2]))
        self._count += 1
        if self._on_denoised is not None:
            self._on_denoised(sigma, x0)

    def __call__(self, i: int, sigma: float, x: torch.Tensor, x0: torch.Tensor) -> None:
        """The callback of ``sample``; evaluation 0 starts a run, unless ``begin`` just did."""
        if i == 0 and self._count > 0:
            self.begin()
        self.record(sigma, x, x0)

    def on(self, pipe: Any) -> Callable[[Any, int, Any, dict], dict]:
        """Start a run in a diffusers pipeline: ``pipe(..., callback_on_step_end=recorder.on(pipe))``.

        Such a callback receives only the result of a step.  So this wraps ``pipe.scheduler.step`` until the run's last
        step, and then restores it.  Call it again before every run, after choosing the scheduler.  x0 is what
        the network predicts, guidance included, before any clipping of the scheduler's.

        Raises:
            UserError: the scheduler's model is not variance-preserving, but flow matching for example.
        """
        scheduler = pipe.scheduler
        schedule = _noise_schedule(scheduler)
        begins_with_noise = "strength" not in inspect.signature(pipe.__call__).parameters
        onlooker = _StepOnlooker(scheduler)
        self.begin()

        def callback(pipe: Any, i: int, t: Any, tensors: dict) -> dict:
            model_output, timestep, sample, scale = onlooker.take()
            if self._count == 0 and begins_with_noise:
                self.begin(sample.float() / float(scheduler.init_noise_sigma))
            sigma = _noise_level(scheduler, schedule, timestep, scale)
            x = sample.float() if scale == 1 else sample.float() / math.hypot(1, sigma)
            self.record(sigma, x, _denoised(model_output, x, sigma, scheduler.config.prediction_type))
            if i + 1 == getattr(pipe, "num_timesteps", len(scheduler.timesteps)):
                onlooker.leave()
            return {}

        return callback

    def read(self) -> LatentStatistics:
        """The run so far, copied to the host in one transfer.  NaN and infinite values are kept.

        Raises:
            UserError: nothing was recorded since ``begin``.
        """
        if self._rows is None or self._shape is None or self._count == 0:
            raise UserError("the recorder has recorded no step: pass it to a sampler as callback and run that first")
        rows = self._rows[: self._count]
        noise = rows[:0] if self._noise is None else self._noise.to(rows.device)
        values = torch.cat([rows.flatten(), noise.flatten()]).cpu().numpy()
        table = values[: rows.numel()].reshape(rows.shape)
        sigmas = table[:, 0].astype(np.float64)
        batch = self._shape[:2]
        (state_std, state_mean), (denoised_std, denoised_mean) = np.moveaxis(
            table[:, 1:].reshape(-1, 2, 2, *batch), 0, 2
        )
        if self._noise is not None:
            noise_std, noise_mean = values[rows.numel() :].reshape(2, *batch)
        else:
            known = math.isinf(sigmas[0])
            noise_std, noise_mean = (state_std[0], state_mean[0]) if known else (None, None)
        return LatentStatistics(
            sigmas=sigmas,
            state_mean=state_mean,
            state_std=state_std,
            denoised_mean=denoised_mean,
            denoised_std=denoised_std,
            noise_mean=noise_mean,
            noise_std=noise_std,
            canvas=math.prod(self._shape[2:]),
        )


def _std_mean(x: torch.Tensor) -> torch.Tensor:
    """Standard deviation and mean over all but batch and channel, (2, B, C) float32."""
    return torch.stack(torch.std_mean(x.detach().float(), dim=tuple(range(2, x.ndim)), correction=0))


def _check_latents(x: torch.Tensor) -> None:
    if x.ndim < 3:
        raise UserError(f"latents must have shape (B, C, H, W) or (B, C, F, H, W), not {tuple(x.shape)}")


# ----------------------------------------------------------------------------------------------------------------------
# diffusers, without importing it.


class _StepOnlooker:
    """Replaces ``scheduler.step`` and keeps the arguments of its last call for the callback that follows."""

    def __init__(self, scheduler: Any):
        displaced = vars(scheduler).get("step")
        if isinstance(displaced, _StepOnlooker):  # left by an aborted run
            displaced.leave()
        functools.update_wrapper(self, scheduler.step)  # pipelines read the signature; first, as it copies attributes
        self._scheduler = scheduler
        self._step = scheduler.step
        self._displaced = vars(scheduler).get("step")
        self._seen = None
        scheduler.step = self

    def __call__(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # 1 / sqrt(1 + sigma^2) where the state is k-diffusion's x0 + sigma eps, 1 where it is variance-preserving
        scale = self._scheduler.scale_model_input(torch.ones(()), timestep).item()
        result = self._step(model_output, timestep, sample, *args, **kwargs)
        if self._seen is None:
            self._seen = model_output, timestep, sample, scale
        else:  # no callback took the last step: that run was aborted, and this is another
            self.leave()
        return result

    def __reduce__(self):
        # a copy of the scheduler gets a step of its own, which is not recorded
        return getattr, (self._scheduler, "step")

    def take(self) -> tuple[torch.Tensor, float | torch.Tensor, torch.Tensor, float]:
        """The arguments of the last step, and the scale of its state."""
        if self._seen is None:
            raise UserError(
                "the recorder saw no step of this run: call recorder.on(pipe) again before every run, after choosing "
                "the scheduler"
            )
        seen, self._seen = self._seen, None
        return seen

    def leave(self) -> None:
        """Restore ``scheduler.step``."""
        self._seen = None
        if vars(self._scheduler).get("step") is self:
            del self._scheduler.step
            if self._displaced is not None:
                self._scheduler.step = self._displaced


def _noise_schedule(scheduler: Any) -> NoiseSchedule:
    """The noise schedule of a scheduler; UserError if its model is not variance-preserving."""
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None or getattr(scheduler.config, "use_flow_sigmas", False):
        raise UserError(
            f"{type(scheduler).__name__} is for flow matching or EDM models; the recorder supports only "
            "variance-preserving models, x = alpha x0 + s eps"
        )
    check_prediction_type(scheduler.config.prediction_type, zero_terminal_snr=False)
    return NoiseSchedule(alphas_cumprod)


def _noise_level(
    scheduler: Any, schedule: NoiseSchedule, timestep: float | torch.Tensor, scale: float
) -> float | torch.Tensor:
    """Sigma of the scheduler's last evaluation; a tensor () if only the device knows it."""
    sigmas: Any = getattr(scheduler, "sigmas", ())
    is_per_evaluation = len(sigmas) == len(scheduler.timesteps) + 1
    listed = float(sigmas[scheduler.step_index - 1]) if is_per_evaluation else math.nan  # they are kept on the CPU
    if scale < 1:
        # KDPM2 and DPMSolverSDE ask between the levels they list; elsewhere the list is the more precise
        measured = math.sqrt(1 - scale**2) / scale if scale > 0 else math.inf
        return listed if math.isclose(listed, measured, rel_tol=1e-3) else measured
    if is_per_evaluation:
        return listed
    timestep = torch.as_tensor(timestep).reshape(1)  # a table indexed with a tensor () would read it on the host
    return schedule.sigma(timestep)[0]


def _denoised(
    model_output: torch.Tensor, x: torch.Tensor, sigma: float | torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """``to_denoised`` for a sigma that may be known to the device alone."""
    check_answer(model_output, x)
    u = 1 / to_float64(sigma)  # exactly 0 at infinity
    s = (1 + u**2).rsqrt()
    alpha, s = (scale.to(torch.promote_types(x.dtype, torch.float32)) for scale in (u * s, s))
    model_output = model_output.to(x.dtype)
    if prediction_type == "v_prediction":
        return alpha * x - s * model_output
    if prediction_type == "epsilon":
        return (x - s * model_output) / alpha
    return model_output
