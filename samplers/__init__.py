"""The mathematics: noise schedules, step schedules, solvers, guidance, and the diffusers scheduler."""

from typing import TYPE_CHECKING

from ..extras import extras_named
from .guidance import exposure_true, exposure_true_guidance, guide, rescale_contrast, rescale_guidance
from .noise_schedule import NoiseSchedule, make_betas, min_snr_weight, rescale_zero_terminal_snr
from .prediction import PREDICTION_TYPES, from_denoised, to_denoised
from .protocol import Noise, Run, solver, solver_names
from .sampling import sample
from .solvers import DEFAULT_SOLVER
from .spacings import DEFAULT_SPACING, spacing, spacing_names
from .step_schedules import ZTSNRWarning, step_schedule

if TYPE_CHECKING:
    from .diffusers_guidance import ExposureTrueGuidance, attach
    from .diffusers_scheduler import ZTSNRScheduler
    from .solvers import SOLVERS
    from .step_schedules import SPACINGS

__all__ = [
    "DEFAULT_SOLVER",
    "DEFAULT_SPACING",
    "PREDICTION_TYPES",
    "SOLVERS",
    "SPACINGS",
    "ExposureTrueGuidance",
    "Noise",
    "NoiseSchedule",
    "Run",
    "ZTSNRScheduler",
    "ZTSNRWarning",
    "attach",
    "exposure_true",
    "exposure_true_guidance",
    "from_denoised",
    "guide",
    "make_betas",
    "min_snr_weight",
    "rescale_contrast",
    "rescale_guidance",
    "rescale_zero_terminal_snr",
    "sample",
    "solver",
    "spacing",
    "step_schedule",
    "to_denoised",
]


def __getattr__(name: str):
    if name == "SOLVERS":  # with those that users register
        return solver_names()
    if name == "SPACINGS":
        return spacing_names()
    # These need diffusers: loaded on first use, because ComfyUI runs without it.
    if name == "ZTSNRScheduler":
        with extras_named(name):
            from .diffusers_scheduler import ZTSNRScheduler

        return ZTSNRScheduler
    if name in ("ExposureTrueGuidance", "attach"):
        with extras_named(name):
            from . import diffusers_guidance

        return getattr(diffusers_guidance, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
