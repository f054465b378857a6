"""Step schedules: the ZTSNR Scheduler node, and what KSampler's own list of schedulers gains."""

import logging
import warnings
from functools import partial
from types import SimpleNamespace

import comfy.samplers
import numpy as np
import torch
from comfy.samplers import SchedulerHandler
from comfy_api.latest import io, ui

from ..errors import UserError
from ..samplers import DEFAULT_SPACING, SPACINGS, ZTSNRWarning, step_schedule
from ..samplers.step_schedules import DEFAULT_GUIDANCE, range_start
from .messages import refused, show
from .model_patch import UNPATCHED, canvas_length_of, schedule_of, unpatched_zero_snr
from .model_sampling import INFINITE_FROM, INFINITE_SIGMA, ExactSchedule
from .schema import schema, used_for

RANGE_SPACINGS = ("spectral", "karras", "exponential", "polyexponential", "kl_optimal")  # those that take sigma_start


class ZTSNRScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ZTSNRScheduler",
            display_name="ZTSNR Scheduler",
            category="ZTSNR",
            description="The noise levels of a sampling run, from infinity down to 0, drawn in the node.",
            search_aliases=["sigmas", "trailing", "spectral", "timestep spacing", "BasicScheduler"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model from ZTSNR Model: its noise schedule, canvas shift included."
                ),
                io.Int.Input("steps", default=28, min=1, max=10000, tooltip="Number of steps; any number is exact."),
                io.Combo.Input(
                    "spacing",
                    options=list(SPACINGS),
                    default=DEFAULT_SPACING,
                    tooltip="Where the steps lie. spectral: the most accurate at few steps. trailing: evenly in time, "
                    "from the last timestep. leading never starts from pure noise.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="1 for text to image. Below 1, only the last part of the schedule: how much an input "
                    "picture changes.",
                ),
                io.Float.Input(  # optional, like the next: workflows saved before they existed do not have them
                    "cfg",
                    default=DEFAULT_GUIDANCE,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="CFG of the sampling; spectral places its steps for it. 1 without guidance.",
                    extra_dict=used_for(spacing=["spectral"]),
                ),
                io.Float.Input(
                    "sigma_start",
                    default=0.0,
                    min=0.0,
                    max=INFINITE_FROM - 1,
                    step=0.01,
                    optional=True,
                    tooltip="First finite sigma of spectral, karras, exponential, polyexponential and kl_optimal; "
                    "0 is automatic. The others do not use it.",
                    extra_dict=used_for(spacing=RANGE_SPACINGS),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latent to be sampled. Larger canvases need more noise to hide their mean, so spectral,"
                    " karras and others start higher for them. Without it: the size the model was trained on.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        steps: int,
        spacing: str,
        denoise: float,
        cfg: float = DEFAULT_GUIDANCE,
        sigma_start: float = 0.0,
        latent: dict | None = None,
    ) -> io.NodeOutput:
        from ..figures.schedule_picture import schedule_picture

        model_sampling = model.get_model_object("model_sampling")
        try:
            schedule = schedule_of(model_sampling)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ZTSNRWarning)
                sigmas = step_schedule(
                    schedule,
                    steps,
                    spacing,
                    latent_size=_canvas(model, latent),
                    sigma_start=(sigma_start or None) if spacing in RANGE_SPACINGS else None,  # else hidden
                    denoise=denoise,
                    guidance=cfg,
                )
        except UserError as reason:
            return refused(reason, outputs=1)
        sentences = [str(warning.message) for warning in caught if issubclass(warning.category, ZTSNRWarning)]
        if unpatched_zero_snr(model_sampling):
            sentences.append(UNPATCHED)
        if sentences:
            show(" ".join(sentences), logging.WARNING)
        picture = schedule_picture(sigmas.tolist(), schedule.timestep(sigmas[:-1]).tolist())
        picture = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
        return io.NodeOutput(_as_comfyui_writes(sigmas), ui=ui.PreviewImage(picture, cls=cls))


def _canvas(model, latent: dict | None) -> tuple[int, int]:
    """(height, width) of the latent to be sampled, or of the canvas that the model is for."""
    if latent is None:
        side = round(canvas_length_of(model))
        return side, side
    samples = latent["samples"]
    if samples.ndim != 4:
        raise UserError(
            f"The latent has {samples.ndim} dimensions, {tuple(samples.shape)}. ZTSNR nodes are for pictures (batch, "
            "channels, height, width), not for videos."
        )
    return tuple(samples.shape[-2:])


# ----------------------------------------------------------------------------------------------------------------------
# The list of schedulers in KSampler and BasicScheduler, which know the model's schedule, but not the canvas and CFG.


def register_schedulers() -> None:
    """Add ours to the list, and teach stock schedulers of a range of sigmas where it begins after infinity."""
    handlers, names = comfy.samplers.SCHEDULER_HANDLERS, comfy.samplers.SCHEDULER_NAMES
    if "ztsnr_trailing" in handlers:
        return
    for spacing in ("trailing", "spectral"):
        name = f"ztsnr_{spacing}"
        handlers[name] = SchedulerHandler(partial(_our_sigmas, spacing=spacing))
        names.append(name)
    for name in ("karras", "exponential", "kl_optimal", "linear_quadratic"):
        handlers[name] = SchedulerHandler(partial(_after_infinity, handlers[name], name))


def _our_sigmas(model_sampling, steps: int, spacing: str) -> torch.Tensor:
    if unpatched_zero_snr(model_sampling):
        show(UNPATCHED, logging.WARNING)
    side = round(getattr(model_sampling, "canvas_length", 128))
    guidance = getattr(model_sampling, "guidance", DEFAULT_GUIDANCE)
    schedule = schedule_of(model_sampling)
    return _as_comfyui_writes(step_schedule(schedule, steps, spacing, latent_size=(side, side), guidance=guidance))


def _as_comfyui_writes(sigmas: torch.Tensor) -> torch.Tensor:
    """float32, with the number that stands for infinity."""
    return sigmas.float().clamp(max=INFINITE_SIGMA)


def _after_infinity(stock: SchedulerHandler, name: str, model_sampling, steps: int) -> torch.Tensor:
    """A stock scheduler's sigmas; on a schedule that ends at infinity, one step from there and then the stock's, from
    noise that hides the mean of a canvas."""
    infinite = isinstance(model_sampling, ExactSchedule) and model_sampling.zsnr
    if not infinite:
        return _run(stock, model_sampling, steps)
    first = torch.tensor([INFINITE_SIGMA])
    if steps == 1:
        return torch.cat([first, torch.zeros(1)])
    start = torch.tensor(range_start(name, steps) * model_sampling.canvas_length)
    finite = SimpleNamespace(sigma_min=model_sampling.sigma_min, sigma_max=start)
    if steps == 2:  # one stock step: not all stock schedulers can
        return torch.cat([first, start[None], torch.zeros(1)])
    return torch.cat([first, _run(stock, finite, steps - 1)])


def _run(stock: SchedulerHandler, model_sampling, steps: int) -> torch.Tensor:
    """As ``comfy.samplers.calculate_sigmas`` calls a handler."""
    if stock.use_ms:
        return stock.handler(model_sampling, steps)
    sigma_min, sigma_max = float(model_sampling.sigma_min), float(model_sampling.sigma_max)
    return stock.handler(n=steps, sigma_min=sigma_min, sigma_max=sigma_max)
