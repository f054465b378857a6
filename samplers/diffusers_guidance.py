"""The diffusers door of guidance: exposure-true guidance and CFG++ (arXiv 2406.08070), in every pipeline of a U-Net.

diffusers guides by uncond + w (cond - uncond).  With T of ``exposure_true``, and

    uncond' = cond - T(cond - uncond)

instead of uncond, the same formula gives cond + (w - 1) T(cond - uncond) for every w.  So the pipeline itself does not
change: ``attach`` changes the output of its U-Net, and the pipeline's own guidance scale, guidance rescale and
callbacks work as before.  Modular pipelines leave guidance to a guider; theirs is ``ExposureTrueGuidance``.
"""

import math
import sys
import weakref
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch.utils.hooks import RemovableHandle

from ..errors import UserError
from .devices import send
from .diffusers_scheduler import ZTSNRScheduler
from .guidance import CONTRAST, EXPOSURE, check_scale, exposure_true, exposure_true_prediction, guide, rescale_contrast

# Pipelines whose batch is not ordered uncond, cond.
_OTHER_ORDER = (
    "LEditsPPPipelineStableDiffusionXL",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionPanoramaPipeline",
)


def attach(
    pipe: DiffusionPipeline, exposure: float = EXPOSURE, contrast: float = CONTRAST, *, cfg_pp: bool = False
) -> RemovableHandle:
    """Make a pipeline's own ``guidance_scale`` true to the prompt's exposure, until the handle is removed.

    For the pipelines of Stable Diffusion 1.x, 2.x and XL and all that work like them: image to image, inpainting,
    ControlNet, adapters, Kolors, perturbed attention (whose direction, cond - perturbed, is treated alike).  It is a
    forward hook on ``pipe.unet`` that acts while ``pipe`` itself runs with guidance: other pipelines that share the
    U-Net are not affected, and can be attached too.  A run without guidance does not change.

        handle = attach(pipe)                        with attach(pipe, exposure=1.0):
        pipe(prompt, guidance_scale=5.0)                 pipe(prompt, guidance_scale=5.0)
        handle.remove()

    With ``cfg_pp`` the pipeline's guidance scale is the lambda of CFG++, which is small: lambda is at most 1 in the
    paper, and pipelines ask for an unconditional prediction only above 1, so give 1 < guidance_scale <= 2.  For a
    lambda of at most 1 use ``ExposureTrueGuidance`` in a modular pipeline.

    A U-Net compiled by ``pipe.unet = torch.compile(pipe.unet)`` works, before or after ``attach``.
    ``pipe.unet.compile()`` works only after ``attach``.

    Args:
        pipe: a pipeline whose scheduler is variance-preserving, ``ZTSNRScheduler`` or one of diffusers' own.
        exposure, contrast: see ``exposure_true``; 0 and 0 are classifier-free guidance.
        cfg_pp: guide by CFG++; needs a ``ZTSNRScheduler``.

    Returns:
        A handle: ``remove()`` takes the hook away, and so does leaving a ``with`` block.

    Raises:
        UserError: an unsupported pipeline or scheduler, a pipeline that is already attached, a U-Net compiled in
            place before, exposure or contrast outside [0, 1].
    """
    if not (hasattr(pipe, "unet") and hasattr(type(pipe), "do_classifier_free_guidance")):
        raise UserError(
            f"attach needs a pipeline with a unet and a do_classifier_free_guidance, which {type(pipe).__name__} lacks"
        )
    if other := {base.__name__ for base in type(pipe).__mro__}.intersection(_OTHER_ORDER):
        raise UserError(f"attach does not support {other.pop()}: its batch is not ordered uncond, cond")
    if any(isinstance(hook, _Hook) and hook.pipe() is pipe for hook in pipe.unet._forward_hooks.values()):
        raise UserError("guidance is already attached to this pipeline: remove that handle first")
    _refuse_compiled(pipe.unet)
    hook = _Hook(pipe, exposure, contrast, cfg_pp)
    return pipe.unet.register_forward_hook(hook, with_kwargs=True)


class _Hook:
    """The forward hook of ``attach``: replaces every prediction other than cond by cond - T(cond - other)."""

    def __init__(self, pipe: DiffusionPipeline, exposure: float, contrast: float, cfg_pp: bool):
        _check_shares(exposure, contrast)
        self.pipe = weakref.ref(pipe)  # the U-Net must not keep its pipeline alive
        self.exposure, self.contrast, self.cfg_pp = exposure, contrast, cfg_pp
        self.picture = _Picture()
        self.picture.read(pipe.scheduler)
        if cfg_pp:
            _check_cfg_pp(pipe.scheduler)

    @torch.compiler.disable
    def __call__(self, unet: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        pipe = self.pipe()
        if pipe is None or not _is_running(pipe):
            return None
        # In the batch: uncond if there is guidance, cond, perturbed if there is perturbed attention.
        guided = int(pipe.do_classifier_free_guidance)
        parts = 1 + guided + int(getattr(pipe, "do_perturbed_attention_guidance", False))
        if parts == 1:
            return None
        prediction = output[0]
        chunks = list(prediction.chunk(parts))
        cond = chunks[guided]
        picture = self.picture(pipe.scheduler, prediction, *_question(args, kwargs)).chunk(parts)[guided]
        for i, other in enumerate(chunks):
            if i != guided:
                chunks[i] = exposure_true_prediction(cond, other, picture, self.exposure, self.contrast)
        if self.cfg_pp and guided:
            _hand_over(pipe.scheduler, chunks[0])
        # Back to the network's dtype, which stock schedulers give the next state.
        changed = torch.cat([chunk.to(prediction.dtype) for chunk in chunks])
        return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)


class ExposureTrueGuidance(BaseGuidance):
    """Exposure-true guidance for diffusers' modular pipelines.

        pipe.update_components(guider=ExposureTrueGuidance(5.0, scheduler=pipe.scheduler))

    Args:
        guidance_scale: w, at least 0; 1 is the prompt alone.  With ``cfg_pp``, the lambda of CFG++: 0 to 1 in the
            paper.
        exposure, contrast: see ``exposure_true``; 0 and 0 are classifier-free guidance.
        guidance_rescale: phi of ``rescale_contrast``, 0 to 1, for v-prediction.
        cfg_pp: guide by CFG++; needs a ``ZTSNRScheduler``.
        start, stop: the share of the run, 0 to 1, in which there is guidance; outside of it, the prompt alone.
        enabled: False is the prompt alone.
        scheduler: the pipeline's scheduler, which knows the signal and the noise in a state.  It is not
            saved in the config: set it again on a loaded guider.

    Raises:
        UserError: a setting out of range, a scheduler that is not variance-preserving or is missing when the
            pipeline runs, a U-Net compiled in place.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012
    ignore_for_config = ["scheduler"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 5.0,
        exposure: float = EXPOSURE,
        contrast: float = CONTRAST,
        guidance_rescale: float = 0.0,
        cfg_pp: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        *,
        scheduler: SchedulerMixin | None = None,
    ):
        super().__init__(start, stop, enabled)
        self.register_to_config(_use_default_values=[])  # a copy would forget what was given by position
        check_scale(guidance_scale)
        _check_shares(exposure, contrast)
        if not 0 <= guidance_rescale <= 1:
            raise UserError(f"guidance_rescale must lie in [0, 1], not {guidance_rescale}")
        self.guidance_scale = guidance_scale
        self.exposure = exposure
        self.contrast = contrast
        self.guidance_rescale = guidance_rescale
        self.cfg_pp = cfg_pp
        self.scheduler = scheduler
        self._picture = _Picture()
        self._question: tuple[Any, Any] | None = None  # what the U-Net was asked: sample and timestep
        self._handle: RemovableHandle | None = None
        if scheduler is not None:
            self._picture.read(scheduler)
            if cfg_pp:
                _check_cfg_pp(scheduler)

    def new(self, **kwargs):
        """A copy with some settings changed."""
        scheduler = kwargs.pop("scheduler", self.scheduler)
        copy: Any = super().new(**kwargs)
        copy.scheduler = scheduler
        return copy

    def prepare_inputs(self, data: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> list:
        """One batch with the prompt and, where there is guidance, one without it."""
        return [self._prepare_batch(data, i, name) for i, name in enumerate(self._predictions)]

    def prepare_inputs_from_block_state(self, data, input_fields: dict[str, str | tuple[str, str]]) -> list:
        """As ``prepare_inputs``, from the fields of a block state."""
        return [
            self._prepare_batch_from_block_state(input_fields, data, i, name)
            for i, name in enumerate(self._predictions)
        ]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Hook the U-Net to see its input, which pipelines do not pass to a guider."""
        super().prepare_models(denoiser)
        _refuse_compiled(denoiser)
        self.cleanup_models(denoiser)
        self._handle = denoiser.register_forward_pre_hook(self._listen, with_kwargs=True)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _listen(self, denoiser: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._question = _question(args, kwargs)

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        """The guided prediction (B, C, H, W), in the dtype of ``pred_cond``."""
        if pred_uncond is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        if self.scheduler is None:
            raise UserError("ExposureTrueGuidance needs the pipeline's scheduler: guider.scheduler = pipe.scheduler")
        question, self._question = self._question, None
        assert question is not None  # the U-Net was asked before
        picture = self._picture(self.scheduler, pred_cond, *question)
        uncond = exposure_true_prediction(pred_cond, pred_uncond, picture, self.exposure, self.contrast)
        pred = guide(pred_cond.float(), uncond, self.guidance_scale)
        if self.guidance_rescale > 0:
            pred = rescale_contrast(pred, pred_cond.float(), self.guidance_rescale)
        if self.cfg_pp:
            _hand_over(self.scheduler, uncond)
        return GuiderOutput(pred=pred.to(pred_cond.dtype), pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """True while the U-Net evaluates the batch with the prompt."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """Number of batches in the current step."""
        return len(self._predictions)

    @property
    def _predictions(self) -> list[str]:
        return self._input_predictions[: 2 if self._is_guiding() else 1]

    def _is_guiding(self) -> bool:
        # CFG++ at lambda = 1 still takes the noise of the unconditional prediction
        if not self._enabled or (math.isclose(self.guidance_scale, 1.0) and not self.cfg_pp):
            return False
        if self._num_inference_steps is None:
            return True
        # pipelines count evaluations, and some solvers take two a step
        evaluations = self._num_inference_steps * getattr(self.scheduler, "order", 1)
        return int(self._start * evaluations) <= self._step < int(self._stop * evaluations)


class _Picture:
    """The picture x0 that a prediction stands for, up to a factor, read without waiting for the device."""

    config: Any = None

    def read(self, scheduler: Any) -> None:
        """Take prediction type and noise levels from a scheduler's config."""
        model = scheduler
        if not isinstance(scheduler, ZTSNRScheduler):
            # Ours reads the config of every other scheduler, and raises on flow matching and EDM.
            prediction_type = scheduler.config.get("prediction_type", "epsilon")
            model = ZTSNRScheduler.from_config(scheduler.config, prediction_type=prediction_type)
        abar = model.schedule.alphas_cumprod
        self.config = scheduler.config
        self.prediction_type = model.config["prediction_type"]
        # atan(1 / sigma) at every timestep: alpha is its sine, exactly 0 at a zero-terminal end
        self.angles = torch.atan2(abar.sqrt(), (1 - abar).sqrt()).float()

    def __call__(
        self, scheduler: Any, prediction: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor | float
    ) -> torch.Tensor:
        """(B, C, H, W), from what the network answered and the variance-preserving state it was asked about."""
        if scheduler.config is not self.config:
            self.read(scheduler)  # the pipeline was given another scheduler
        if self.prediction_type == "sample":
            return prediction
        device = prediction.device
        self.angles = send(self.angles, device)
        last = len(self.angles) - 1
        t = send(torch.as_tensor(timestep, dtype=torch.float32), device).reshape(-1, 1, 1, 1).clamp(0, last)
        below = t.long().clamp(max=last - 1)
        angle = torch.lerp(self.angles.take(below), self.angles.take(below + 1), t - below)
        x = sample[:, : prediction.shape[1]].to(device).float()  # an inpainting U-Net also gets mask and picture
        if self.prediction_type == "epsilon":
            return x - angle.cos() * prediction  # alpha x0: finite wherever alpha is 0
        return angle.sin() * x - angle.cos() * prediction


def _question(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Sample and timestep out of a U-Net's arguments."""
    asked = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
    if "sample" not in asked or "timestep" not in asked:
        raise UserError("exposure-true guidance is for U-Nets, which are asked about a sample and a timestep")
    return asked["sample"], asked["timestep"]


def _is_running(pipe: DiffusionPipeline) -> bool:
    """True if a method of this pipeline is on the call stack: pipelines that share a U-Net batch differently."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_locals.get("self") is pipe:
            return True
        frame = frame.f_back
    return False


def _hand_over(scheduler: Any, uncond: torch.Tensor) -> None:
    _check_cfg_pp(scheduler)
    scheduler.unconditional_output = uncond


def _check_cfg_pp(scheduler: SchedulerMixin) -> None:
    if not isinstance(scheduler, ZTSNRScheduler):
        raise UserError(
            f"cfg_pp needs a scheduler that takes the unconditional prediction, which {type(scheduler).__name__} does "
            "not: pipe.scheduler = ZTSNRScheduler.from_config(pipe.scheduler.config)"
        )


def _check_shares(exposure: float, contrast: float) -> None:
    nothing = torch.zeros(1, 1, 1, 1)
    exposure_true(nothing, nothing, exposure, contrast)  # raises outside [0, 1]


def _refuse_compiled(unet: torch.nn.Module) -> None:
    if unet._compiled_call_impl is not None:
        raise UserError(
            "this U-Net was compiled in place, by unet.compile(), and no longer calls new hooks: use "
            "pipe.unet = torch.compile(pipe.unet) instead"
        )
