"""The diffusers door: one scheduler class that drives every solver and step schedule of this package.

It keeps no arithmetic of its own.  ``set_timesteps`` asks ``step_schedule`` for the noise levels, ``step`` hands the
network's answer to the solver, so a pipeline takes exactly the steps that ``sample`` takes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput

from ..errors import UserError
from .cfg_pp import cfg_pp_state
from .diffusers_config import FOR_OTHER_CLASSES, MODEL_KEYS, describe_model, warn_of_plain_epsilon
from .diffusers_forward import NO_STEP_LEFT, ForwardProcess
from .noise_schedule import NoiseSchedule
from .prediction import check_prediction_type, to_denoised
from .protocol import Run, find_solver, solver_names
from .sampling import (
    Generators,
    advance,
    check_answer,
    check_generators,
    check_sigmas,
    check_timesteps,
    evaluation_sigmas,
    randn_like,
    start_run,
)
from .solvers import DEFAULT_SOLVER
from .step_schedules import DEFAULT_GUIDANCE, DEFAULT_SPACING, step_schedule, warn_of_finite_start


@dataclass
class ZTSNRSchedulerOutput(BaseOutput):
    """What ``ZTSNRScheduler.step`` returns.

    Attributes:
        prev_sample: (B, C, H, W) the state to ask the network about next; after the last step, the picture.
        pred_original_sample: (B, C, H, W) float32, the denoised picture x0 this network evaluation stands for.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class ZTSNRScheduler(ForwardProcess, SchedulerMixin, ConfigMixin):
    """Exact zero-terminal-SNR sampling in diffusers pipelines, with any solver and spacing of this package.

    The state is variance-preserving, x = alpha x0 + s eps with alpha^2 + s^2 = 1: the network's input needs no scaling,
    ``init_noise_sigma`` is 1, and the first state, at sigma = infinity, is the noise itself.  Pipelines get each state
    in the dtype that they gave; the scheduler keeps it in float32 for itself, and adds to that what the pipeline has
    changed meanwhile.  Timesteps are float32 and fractional, t(sigma) without rounding.

    ``from_config`` takes over betas, number of timesteps, prediction type and zero-SNR flag of any other scheduler:
    ``pipe.scheduler = ZTSNRScheduler.from_config(pipe.scheduler.config)``; what the config leaves out is that other
    class's default.  Keywords override: add ``prediction_type="v_prediction", rescale_betas_zero_snr=True`` where a
    zero-terminal model was published with a plain config.

    Everything that a run's next steps depend on is data: copies and pickles of the scheduler, or of its ``__dict__``,
    continue with the same steps, which tiled pipelines rely on.  Set to another step, it starts a new history there.

    A run split by ``denoising_end`` and ``denoising_start`` equals the whole one for solvers without memory.  Multistep
    solvers start a new history in the second half; those that evaluate twice a step raise an error there, because
    diffusers cuts inside a step.  Both halves need a scheduler with this scaling of the state (this class, DDIM,
    DPM-Solver, UniPC): diffusers' Euler and Heun schedulers keep x / alpha instead, and lose contrast.

    CFG++ (arXiv 2406.08070): set ``unconditional_output``, (B, C, H, W), to the network's answer without the prompt;
    the next ``step`` keeps the noise of that prediction and clears the attribute.  ``attach`` and
    ``ExposureTrueGuidance`` do so with ``cfg_pp=True``.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the betas the network was trained with;
            see ``make_betas``.  trained_betas (T + 1,), if given, replaces all of the others.
        prediction_type: ``v_prediction``, ``epsilon`` or ``sample``.
        rescale_betas_zero_snr: rescale the betas to zero terminal SNR (arXiv 2305.08891, Algorithm 1).
        solver: one of ``SOLVERS``.
        spacing: one of ``SPACINGS``.
        latent_size: (height, width) of the latents, by default those of a 1024 x 1024 picture.  Pipelines choose the
            steps before they know the canvas, so it is a setting: some spacings start where the noise hides the mean
            of a canvas of this size.  ``set_timesteps`` takes it too.
        guidance: scale of classifier-free guidance that the steps are made for, 1 without; pipelines do not pass it on.
            Only ``spectral`` uses it.  ``set_timesteps`` takes it too.
        sigma_start: first finite sigma of the spacings that choose sigmas, instead of the one from latent_size.
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
        # diffusers drops values that equal our defaults when another class reads our config, unless listed as given.
        forgettable = set(self.config.get("_use_default_values", ())).difference(MODEL_KEYS)
        self.register_to_config(**FOR_OTHER_CLASSES, _use_default_values=sorted(forgettable))

        self.schedule = NoiseSchedule.from_config(self.config)
        abar = self.schedule.alphas_cumprod
        self.alphas_cumprod = abar.float()
        self.betas = torch.cat([1 - abar[:1], 1 - abar[1:] / abar[:-1]]).float()
        check_prediction_type(prediction_type, self.schedule.zero_terminal_snr)
        # Both raise on settings that they cannot run.  At denoise 1, ``leading`` would warn.
        self._step_schedule(1, denoise=0.5)
        start_run(solver, (1.0, 0.0), eta, s_noise)

        self.order = find_solver(solver).evaluations  # network evaluations a step
        # until ``set_timesteps``, every timestep that the model was trained on
        self.timesteps = torch.arange(self.schedule.last_timestep, -1, -1, dtype=torch.float32)
        self.sigmas = torch.cat([self.schedule.sigma(self.timesteps.double()), torch.zeros(1, dtype=torch.float64)])
        self.num_inference_steps: int | None = None
        self._begin_run(None)

    # ------------------------------------------------------------------------------------------------------------------
    # Configuration

    @overload
    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: Literal[False] = False, **kwargs: Any
    ) -> Self: ...
    @overload
    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, *, return_unused_kwargs: Literal[True], **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]: ...
    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any):
        """A scheduler from the config of this or any other variance-preserving diffusers scheduler; keywords override.

        Takes over another class's description of the model, not its settings of solver and spacing.

        Raises:
            UserError: the config of a scheduler without betas (flow matching, EDM) or with shifted ones (CogVideoX), or
                with settings that ``__init__`` raises on.

        Warns:
            ZTSNRWarning: neither the config nor the keywords mention v-prediction or zero terminal SNR.
        """
        foreign = isinstance(config, Mapping) and config.get("_class_name") != cls.__name__
        config = describe_model(config) if foreign else config
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        if foreign:
            warn_of_plain_epsilon(config, kwargs)
        return made

    def __len__(self) -> int:
        """Number of timesteps that the model was trained on."""
        return self.config["num_train_timesteps"]

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
            UserError: none or several of the three, levels that do not decrease or lie outside the schedule.

        Warns:
            ZTSNRWarning: the model has zero terminal SNR, and the steps do not begin at infinity.
        """
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas)) != 1:
            raise UserError("set_timesteps takes exactly one of num_inference_steps, timesteps and sigmas")
        if timesteps is not None:
            levels = self.schedule.sigma(check_timesteps(timesteps, self.schedule.last_timestep)).tolist()
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
        evaluations = evaluation_sigmas(self.config["solver"], levels, self.config["eta"])
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
            raise UserError(NO_STEP_LEFT)

    @property
    def begin_index(self) -> int | None:
        """Index in ``timesteps`` at which the pipeline set the run to begin, or None."""
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
        """Go to the step of a timestep, or to the pipeline's begin index; some pipelines call this themselves."""
        self._step_index = self._first_index(timestep)
        self._forget()

    def _first_index(self, timestep: float | torch.Tensor) -> int:
        return self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

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
        generator: Generators | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        s_noise: float | None = None,
    ) -> ZTSNRSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Take the network's answer about ``sample``; return the next state.

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
            raise UserError("the steps are not chosen yet: call set_timesteps before step")
        if self._step_index == len(self.timesteps):
            raise UserError(f"all {self._step_index} evaluations of this run are done; call set_timesteps again")
        if model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
            raise UserError(
                f"the network returned {model_output.shape[1]} channels for {sample.shape[1]}: it predicts a variance "
                "too, which no solver here uses; pass only the first half of the channels"
            )
        check_answer(model_output, sample)
        check_generators(generator, sample)
        if variance_noise is not None:
            check_answer(variance_noise, sample)
        run = self._run_at(timestep)
        x, prediction_type = self._exact(sample), self.config["prediction_type"]
        x0 = to_denoised(model_output, x, run.sigma, prediction_type)
        if self.unconditional_output is not None:
            check_answer(self.unconditional_output, sample)
            unconditional = to_denoised(self.unconditional_output, x, run.sigma, prediction_type)
            x = cfg_pp_state(x, run.sigma, x0, unconditional)
            self.unconditional_output = None

        def noise() -> torch.Tensor:
            unit = randn_like(x, generator) if variance_noise is None else variance_noise.float()
            return (self.config["s_noise"] if s_noise is None else s_noise) * unit

        x = advance(run, x, x0, noise)
        self._step_index = self._run_begin + run.index
        given = x.to(sample.dtype)
        self._state = (x, given)
        if run.done:
            self._forget()
        if not return_dict:
            return given, x0
        return ZTSNRSchedulerOutput(prev_sample=given, pred_original_sample=x0)

    def _exact(self, sample: torch.Tensor) -> torch.Tensor:
        """The state in float32: the one kept, plus what the pipeline has changed in the rounded one since."""
        if self._state is None or self._state[0].shape != sample.shape or self._state[0].device != sample.device:
            return sample.float()
        exact, given = self._state
        return sample.float() if given.dtype == torch.float32 else exact + (sample.float() - given.float())

    def _step_schedule(self, steps: Any, **settings: Any) -> torch.Tensor:
        config = {name: self.config[name] for name in ("spacing", "latent_size", "guidance", "sigma_start")}
        return step_schedule(self.schedule, steps, **config | settings)

    def _begin_run(self, begin_index: int | None) -> None:
        self._begin_index = begin_index
        self._step_index: int | None = None
        self._adds_noise = False  # True if the run begins with a noised picture
        self.unconditional_output: torch.Tensor | None = None  # consumed by the next step, which is one of CFG++
        self._forget()

    def _forget(self) -> None:
        self._run: Run | None = None  # from its first evaluation on
        self._run_begin = 0  # index in ``timesteps`` of that evaluation
        self._state: tuple[torch.Tensor, torch.Tensor] | None = None  # in float32, and as it was given out

    def _run_at(self, timestep: float | torch.Tensor) -> Run:
        """The run at the evaluation ``_step_index``; a new one unless that is the next evaluation of the last run."""
        if self._step_index is None:
            self._step_index = self._first_index(timestep)
        if self._run is not None and self._run_begin + self._run.index == self._step_index:
            return self._run
        self._forget()
        step, middle = divmod(self._step_index, self.order)
        if middle or not 0 <= step < (self.num_inference_steps or 0):
            raise UserError(
                f"a run cannot begin at index {self._step_index}: the {self.num_inference_steps} steps of solver "
                f"{self.config['solver']!r} begin at 0, {self.order}, ... {len(self.timesteps) - 1}"
            )
        if self.order == 2 and self._begin_index and not self._adds_noise:
            once = ", ".join(name for name in solver_names() if find_solver(name).evaluations == 1)
            raise UserError(
                f"solver {self.config['solver']!r} evaluates twice a step and cannot continue another scheduler's run, "
                f"because diffusers' denoising_end cuts inside a step; choose one of {once}"
            )
        self._run_begin = self._step_index
        self._run = start_run(self.config["solver"], self.sigmas[step:].tolist(), self.config["eta"])
        return self._run
