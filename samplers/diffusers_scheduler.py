"""The diffusers door: one scheduler class that drives every solver and step schedule of this package.

It keeps no arithmetic of its own.  ``set_timesteps`` asks ``step_schedule`` for the noise levels, ``step`` hands the
network's answer to the solver, so a pipeline takes exactly the steps that ``sample`` takes.
"""

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput

from ..errors import UserError
from .cfg_pp import cfg_pp_state
from .devices import send
from .noise_schedule import NoiseSchedule
from .prediction import check_prediction_type, to_denoised
from .protocol import Run, find_solver, solver_names
from .sampling import (
    Generators,
    advance,
    check_answer,
    check_generators,
    check_sigmas,
    evaluation_sigmas,
    randn_like,
    start_run,
)
from .solvers import DEFAULT_SOLVER
from .step_schedules import DEFAULT_GUIDANCE, DEFAULT_SPACING, ZTSNRWarning, step_schedule, warn_of_finite_start

# What a noise schedule and a network are in every diffusers config.
_MODEL_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
# Means nothing here.  Other classes read it when they take over our config, and their own defaults are wrong for latent
# models: a spacing that never runs t = T, x0 clipped to [-1, 1], PNDM's Runge-Kutta warm-up.
_FOR_OTHER_CLASSES = {
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}


_NO_STEP_LEFT = (
    "no step is left to run: strength times the number of steps is below 1; raise the strength or the number of steps"
)


@dataclass
class ZTSNRSchedulerOutput(BaseOutput):
    """What ``ZTSNRScheduler.step`` returns.

    Attributes:
        prev_sample: (B, C, H, W) the state to ask the network about next; after the last step, the picture.
        pred_original_sample: (B, C, H, W) float32, the denoised picture x0 this network evaluation stands for.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class ZTSNRScheduler(SchedulerMixin, ConfigMixin):
    """Exact zero-terminal-SNR sampling in diffusers pipelines, with any solver and spacing of this package.

    The state is variance-preserving, x = alpha x0 + s eps with alpha^2 + s^2 = 1: the network's input needs no scaling,
    ``init_noise_sigma`` is 1, and the first state, at sigma = infinity, is the noise itself.  Pipelines get each state
    in the dtype that they gave; the scheduler keeps it in float32 for itself, and adds to that what the pipeline has
    changed meanwhile.  Timesteps are float32 and fractional, t(sigma) without rounding.

    ``from_config`` takes over betas, number of timesteps, prediction type and zero-SNR flag of any other scheduler:
    ``pipe.scheduler = ZTSNRScheduler.from_config(pipe.scheduler.config)``; what the config does not say is that other
    class's default.  Keywords win: add ``prediction_type="v_prediction", rescale_betas_zero_snr=True`` where a
    zero-terminal model was published with a plain config.

    Everything that a run's next steps depend on is data: copies and pickles of the scheduler, or of its ``__dict__``,
    go on with the same steps, as tiled pipelines need it.  Set to another step, it begins a new history there.

    A run split by ``denoising_end`` and ``denoising_start`` equals the whole one for solvers without memory.  Multistep
    solvers begin their history anew in the second half; those that evaluate twice a step are refused there, because
    diffusers cuts inside a step.  Both halves need a scheduler with this scaling of the state (this class, DDIM,
    DPM-Solver, UniPC): diffusers' Euler and Heun schedulers keep x / alpha instead, and lose contrast.

    CFG++ (arXiv 2406.08070): set ``unconditional_output``, (B, C, H, W), to what the network answered without the
    prompt, and the next ``step`` keeps the noise of that prediction and takes it off again.  ``attach`` and
    ``ExposureTrueGuidance`` do so with ``cfg_pp=True``.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the betas the network was trained with;
            see ``make_betas``.  trained_betas (T + 1,), if given, stands for all of the others.
        prediction_type: ``v_prediction``, ``epsilon`` or ``sample``.
        rescale_betas_zero_snr: rescale the betas to zero terminal SNR (arXiv 2305.08891, Algorithm 1).
        solver: one of ``SOLVERS``.
        spacing: one of ``SPACINGS``.
        latent_size: (height, width) of the latents, by default those of a 1024 x 1024 picture.  Pipelines choose the
            steps before they know the canvas, so it is configured: some spacings start where the noise hides the mean
            of a canvas of this size.  ``set_timesteps`` takes it too.
        guidance: scale of classifier-free guidance that the steps are for, 1 without; pipelines do not tell it either.
            ``spectral`` alone uses it.  ``set_timesteps`` takes it too.
        sigma_start: first finite sigma of the spacings that choose sigmas, instead of the one that latent_size gives.
        eta: share of fresh noise of the stochastic solvers; 0 makes all but ``lcm`` deterministic.
        s_noise: standard deviation of that fresh noise, 1 by the theory.

    Raises:
        UserError: an unknown name, invalid betas or settings, epsilon under zero terminal SNR.
    """

    _compatibles = [*(kind.name for kind in KarrasDiffusionSchedulers), "LCMScheduler", "TCDScheduler"]  # noqa: RUF012
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | torch.Tensor | None = None,
        prediction_type: str = "v_prediction",
        rescale_betas_zero_snr: bool = True,
        solver: str = DEFAULT_SOLVER,
        spacing: str = DEFAULT_SPACING,
        latent_size: tuple[int, int] = (128, 128),
        eta: float = 1.0,
        s_noise: float = 1.0,
        guidance: float = DEFAULT_GUIDANCE,
        sigma_start: float | None = None,
    ):
        if not isinstance(solver, str):
            raise UserError(
                f"solver must be a name, not {solver!r}, because configs are saved as JSON: register the function with "
                "@solver and give its name"
            )
        if trained_betas is not None:
            trained_betas = torch.as_tensor(trained_betas, dtype=torch.float64).tolist()
            self.register_to_config(trained_betas=trained_betas, num_train_timesteps=len(trained_betas))
        # Values that equal our defaults are forgotten when another class reads our config, unless they count as given.
        forgettable = set(self.config.get("_use_default_values", ())).difference(_MODEL_KEYS)
        self.register_to_config(**_FOR_OTHER_CLASSES, _use_default_values=sorted(forgettable))

        self.schedule = NoiseSchedule.from_config(self.config)
        abar = self.schedule.alphas_cumprod
        self.alphas_cumprod = abar.float()
        self.betas = torch.cat([1 - abar[:1], 1 - abar[1:] / abar[:-1]]).float()
        check_prediction_type(prediction_type, self.schedule.zero_terminal_snr)
        # Both refuse settings that they cannot run.  At denoise 1, ``leading`` would warn.
        self._step_schedule(1, denoise=0.5)
        start_run(solver, (1.0, 0.0), eta, s_noise)

        self.order = find_solver(solver).evaluations  # network evaluations a step
        # until ``set_timesteps``, all that the model was trained with
        self.timesteps = torch.arange(self.schedule.last_timestep, -1, -1, dtype=torch.float32)
        self.sigmas = torch.cat([self.schedule.sigma(self.timesteps.double()), torch.zeros(1, dtype=torch.float64)])
        self.num_inference_steps: int | None = None
        self._begin_run(None)

    # ------------------------------------------------------------------------------------------------------------------
    # Configuration

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs):
        """A scheduler from the config of this or any other variance-preserving diffusers scheduler; keywords win.

        The solver's and spacing's settings of other classes are not taken over, their description of the model is.

        Raises:
            UserError: the config of a scheduler without betas (flow matching, EDM) or with other ones (CogVideoX), or
                one this class refuses.

        Warns:
            ZTSNRWarning: neither the config nor the keywords say that the model predicts v or has zero terminal SNR.
        """
        foreign = isinstance(config, Mapping) and config.get("_class_name") != cls.__name__
        if foreign:
            config = _describe_model(config)
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        if foreign and not (_told_by_config(config) or _told_by_user(kwargs)):
            warnings.warn(
                "this config says neither v-prediction nor zero terminal SNR, so the model is sampled as a plain "
                'epsilon one; for a ZTSNR model add prediction_type="v_prediction", rescale_betas_zero_snr=True, or '
                'prediction_type="epsilon" if it is an epsilon one indeed',
                ZTSNRWarning,
                stacklevel=2,
            )
        return made

    def __len__(self) -> int:
        """Number of timesteps that the model was trained with."""
        return self.config.num_train_timesteps

    # ------------------------------------------------------------------------------------------------------------------
    # Before the loop

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        *,
        latent_size: tuple[int, int] | None = None,
        guidance: float | None = None,
        sigma_start: float | None = None,
    ) -> None:
        """Choose the steps of a run, from exactly one of their number, their timesteps or their sigmas.

        Sets ``sigmas``, the (steps + 1,) float64 noise levels on the CPU, and ``timesteps``, one float32 entry a
        network evaluation: ``steps`` of them, or 2 steps - 1 for the solvers that evaluate twice a step.

        Args:
            num_inference_steps: number of steps; their levels follow the config's spacing.
            device: where ``timesteps`` goes.
            timesteps: (steps,) decreasing, fractional or whole.
            sigmas: (steps,) or (steps + 1,) decreasing, the first may be inf; a final 0 is appended if missing.
            latent_size: (height, width) of this run's latents, instead of the config's.
            guidance: scale of this run's guidance, instead of the config's.
            sigma_start: first finite sigma of this run, instead of the config's.

        Raises:
            UserError: none or several of the three, levels that do not decrease or that the schedule does not have.

        Warns:
            ZTSNRWarning: a zero-terminal model, and steps that do not begin at infinity.
        """
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas)) != 1:
            raise UserError("set_timesteps takes exactly one of num_inference_steps, timesteps and sigmas")
        if timesteps is not None:
            levels = self.schedule.sigma(self._check_timesteps(timesteps)).tolist()
        elif sigmas is not None:
            levels = [float(sigma) for sigma in (sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas)]
        else:
            run = {"latent_size": latent_size, "guidance": guidance, "sigma_start": sigma_start}
            told = {name: value for name, value in run.items() if value is not None}
            levels = self._step_schedule(num_inference_steps, **told).tolist()
        levels = check_sigmas(levels if levels and levels[-1] == 0 else [*levels, 0.0])
        if math.isinf(levels[0]) and not self.schedule.zero_terminal_snr:
            raise UserError(
                f"sigmas begin at infinity, but this schedule ends at {self.schedule.sigma_max:.4g}: start there, or "
                "set rescale_betas_zero_snr=True if the model was trained with zero terminal SNR"
            )
        if num_inference_steps is None:
            warn_of_finite_start(self.schedule, levels[0], "the list of steps")
        evaluations = evaluation_sigmas(self.config.solver, levels, self.config.eta)
        self.timesteps = self.schedule.timestep(torch.tensor(evaluations, dtype=torch.float64)).float().to(device)
        self.sigmas = torch.tensor(levels, dtype=torch.float64)
        self.num_inference_steps = len(levels) - 1
        self._begin_run(None)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at ``timesteps[begin_index]``: image to image, inpainting, the second half of a split run.

        Raises:
            UserError: no step is left from there.
        """
        self._begin_run(begin_index)
        if self.num_inference_steps is not None and begin_index >= len(self.timesteps):
            raise UserError(_NO_STEP_LEFT)

    @property
    def begin_index(self) -> int | None:
        """Where the pipeline said the run begins, or None."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Index in ``timesteps`` of the next network evaluation; None before the first."""
        return self._step_index

    def index_for_timestep(self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """Position of a timestep in ``timesteps``, or in others; of two equal ones the second, where a step begins.

        Reads the device: ``step`` asks once a run at most, and never if ``set_begin_index`` was called.
        """
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (timesteps.cpu() == float(timestep)).nonzero()
        if len(found) == 0:
            raise UserError(f"timestep {float(timestep):g} is not among the timesteps of this run")
        return int(found[-1])

    def _init_step_index(self, timestep: float | torch.Tensor) -> None:
        """Go to the step of a timestep, or to where the pipeline said the run begins; pipelines call this by name."""
        begin = self._begin_index
        self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        self._forget()

    # ------------------------------------------------------------------------------------------------------------------
    # The loop

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The network's input: the state as it is."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        s_noise: float | None = None,
    ) -> ZTSNRSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Take the network's answer about ``sample`` and move on to the next state.

        Nothing here reads the device, except the very first ``timestep`` of a run whose begin index was not set.

        Args:
            model_output: (B, C, H, W) what the network answered, guidance included, in any floating dtype.
            timestep: the timestep it was asked about; the scheduler counts steps itself and needs it only to begin.
            sample: (B, C, H, W) the state it was asked about; it may have been edited since the last step.
            generator: source of the noise of stochastic solvers; a list gives each sample its own.
            variance_noise: (B, C, H, W) unit Gaussian, instead of that noise.
            return_dict: return a ``ZTSNRSchedulerOutput`` rather than a tuple of the same two tensors.
            s_noise: standard deviation of the noise in this step, instead of the config's.

        Returns:
            prev_sample in the dtype of ``sample``, and x0.

        Raises:
            UserError: called before ``set_timesteps`` or after the last step, or with tensors that do not match.
        """
        if self.num_inference_steps is None:
            raise UserError("call set_timesteps before step: the steps are not chosen yet")
        if self._step_index == len(self.timesteps):
            raise UserError(f"all {self._step_index} evaluations of this run are done; call set_timesteps for another")
        if model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
            raise UserError(
                f"the network returned {model_output.shape[1]} channels for {sample.shape[1]}: it predicts a variance "
                "as well, which no solver here uses; pass the first half of the channels"
            )
        check_answer(model_output, sample)
        check_generators(generator, sample)
        if variance_noise is not None:
            check_answer(variance_noise, sample)
        run = self._run_at(timestep)
        x, prediction_type = self._exact(sample), self.config.prediction_type
        x0 = to_denoised(model_output, x, run.sigma, prediction_type)
        if self.unconditional_output is not None:
            check_answer(self.unconditional_output, sample)
            unconditional = to_denoised(self.unconditional_output, x, run.sigma, prediction_type)
            x = cfg_pp_state(x, run.sigma, x0, unconditional)
            self.unconditional_output = None

        def noise() -> torch.Tensor:
            unit = randn_like(x, generator) if variance_noise is None else variance_noise.float()
            return (self.config.s_noise if s_noise is None else s_noise) * unit

        x = advance(run, x, x0, noise)
        self._step_index += 1
        given = x.to(sample.dtype)
        self._state = (x, given)
        if run.done:
            self._forget()
        if not return_dict:
            return given, x0
        return ZTSNRSchedulerOutput(prev_sample=given, pred_original_sample=x0)

    def _exact(self, sample: torch.Tensor) -> torch.Tensor:
        """The state in float32: what was kept of it, and what the pipeline has changed in the rounded one since."""
        if self._state is None or self._state[0].shape != sample.shape or self._state[0].device != sample.device:
            return sample.float()
        exact, given = self._state
        return sample.float() if given.dtype == torch.float32 else exact + (sample.float() - given.float())

    # ------------------------------------------------------------------------------------------------------------------
    # The forward process

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = alpha x0 + s eps; at a zero-terminal t = T exactly the noise.

        Args:
            original_samples: (B, C, H, W) pictures x0.
            noise: (B, C, H, W) unit Gaussian eps.
            timesteps: () or (B,), fractional or whole.  B may be 1 in any of the three: it stands for all then.

        Returns:
            (B, C, H, W) in the dtype of ``original_samples``; the sum is taken in float32 at least.
        """
        self._adds_noise = True
        alpha, s = self._alpha_s(timesteps, original_samples)
        return (alpha * original_samples + s * noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = alpha eps - s x0, the target of v-prediction; at a zero-terminal t = T exactly -x0.

        Shapes and dtypes as in ``add_noise``, ``sample`` being the picture x0 (arXiv 2202.00512).
        """
        alpha, s = self._alpha_s(timesteps, sample)
        return (alpha * noise - s * sample).to(sample.dtype)

    def _alpha_s(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha(t) and s(t) shaped (B or 1, 1, ...), on the device of ``like``."""
        timesteps = torch.as_tensor(timesteps).reshape(-1)
        if len(timesteps) == 0:
            raise UserError(_NO_STEP_LEFT)
        if len(timesteps) != len(like) and 1 not in (len(timesteps), len(like)):
            raise UserError(f"{len(timesteps)} timesteps for a batch of {len(like)}: give one a sample, or one")
        u = 1 / self.schedule.sigma(timesteps).reshape(-1, *[1] * (like.ndim - 1))  # exactly 0 at sigma = inf
        s = (1 + u**2).rsqrt()
        dtype = torch.promote_types(like.dtype, torch.float32)
        return tuple(send(c.to(dtype), like.device) for c in (u * s, s))

    # ------------------------------------------------------------------------------------------------------------------

    def _step_schedule(self, steps: int, **settings: Any) -> torch.Tensor:
        config = {name: self.config[name] for name in ("spacing", "latent_size", "guidance", "sigma_start")}
        return step_schedule(self.schedule, steps, **config | settings)

    def _begin_run(self, begin_index: int | None) -> None:
        self._begin_index = begin_index
        self._step_index: int | None = None
        self._adds_noise = False  # whether the run begins with a noised picture
        self.unconditional_output: torch.Tensor | None = None  # consumed by the next step, which is one of CFG++
        self._forget()

    def _forget(self) -> None:
        self._run: Run | None = None  # from its first evaluation on
        self._run_begin = 0  # index in ``timesteps`` of that evaluation
        self._state: tuple[torch.Tensor, torch.Tensor] | None = None  # in float32, and as it was given out

    def _run_at(self, timestep: float | torch.Tensor) -> Run:
        """The run, at the evaluation that ``_step_index`` names; a new one where that is not the next of the last."""
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        if self._run is not None and self._run_begin + self._run.index == self._step_index:
            return self._run
        self._forget()
        step, middle = divmod(self._step_index, self.order)
        if middle or not 0 <= step < self.num_inference_steps:
            raise UserError(
                f"a run cannot begin at index {self._step_index}: with {self.num_inference_steps} steps of solver "
                f"{self.config.solver!r} they begin at 0, {self.order}, ... {len(self.timesteps) - 1}"
            )
        if self.order == 2 and self._begin_index and not self._adds_noise:
            once = ", ".join(name for name in solver_names() if find_solver(name).evaluations == 1)
            raise UserError(
                f"solver {self.config.solver!r} evaluates twice a step and cannot go on with another scheduler's run, "
                f"because diffusers' denoising_end cuts inside a step; use one of {once}"
            )
        self._run_begin = self._step_index
        self._run = start_run(self.config.solver, self.sigmas[step:].tolist(), self.config.eta)
        return self._run

    def _check_timesteps(self, timesteps: Sequence[float] | torch.Tensor) -> torch.Tensor:
        timesteps = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        last = self.schedule.last_timestep
        if not ((timesteps >= 0) & (timesteps <= last)).all() or not (timesteps.diff() < 0).all():
            raise UserError(f"timesteps must decrease and lie in [0, {last}], not {timesteps.tolist()}")
        return timesteps


def _told_by_config(config: Mapping[str, Any]) -> bool:
    """Whether a config is of any but a plain epsilon model, or was ours once, when the user has been told."""
    return config["rescale_betas_zero_snr"] or config["prediction_type"] != "epsilon" or "solver" in config


def _told_by_user(keywords: Mapping[str, Any]) -> bool:
    return "prediction_type" in keywords or "rescale_betas_zero_snr" in keywords


def _describe_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Another scheduler's config, with what it leaves unsaid about the model put into words."""
    name = config.get("_class_name")  # absent from the config of a scheduler that was constructed, not loaded
    scheduler_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    defaults = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    if isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin):
        signature = inspect.signature(scheduler_class.__init__).parameters
        defaults |= {key: signature[key].default for key in _MODEL_KEYS if key in signature}
    # values that equal a class's defaults are forgotten when a config changes class; those of the model must not be
    forgettable = [key for key in config.get("_use_default_values", ()) if key not in _MODEL_KEYS]
    said = {key: value for key, value in config.items() if key != "timestep_spacing"}
    model = {**defaults, **said, "_use_default_values": forgettable}
    if model.get("beta_schedule") is None and model.get("trained_betas") is None:
        raise UserError(
            f"the config of {name or 'that scheduler'} has no betas: ZTSNRScheduler is for variance-preserving models, "
            "not for flow matching or EDM"
        )
    if model.get("snr_shift_scale", 1.0) != 1.0:
        raise UserError(
            f"the config of {name or 'that scheduler'} shifts its noise levels (snr_shift_scale "
            f"{model['snr_shift_scale']:g}): ZTSNRScheduler has no such table"
        )
    return model


def stock_euler(**config: Any) -> diffusers.EulerDiscreteScheduler:
    """diffusers' own Euler scheduler for a Stable Diffusion v-prediction model: what to compare with."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return diffusers.EulerDiscreteScheduler(**betas, prediction_type="v_prediction", **config)
