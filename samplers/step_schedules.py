"""Which noise levels a sampler visits, and in how many steps.

Under a zero-terminal schedule a step schedule begins at infinity, the only noise level at which the model has been
taught that it knows nothing of the picture, and ends at 0.  ``spacings`` has the spacings.
"""

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import UserError
from .noise_schedule import NoiseSchedule
from .spacings import DEFAULT_SPACING, SpacingEntry, find_spacing, spacing_names

DEFAULT_GUIDANCE = 5.0  # scale that a step schedule is made for where it is not told one
MOST_STEPS = 100_000  # of a whole schedule: beyond any use, and short of filling the memory

if TYPE_CHECKING:
    SPACINGS: tuple[str, ...]


def __getattr__(name: str):
    # made anew at each access, so that it has the spacings that users register
    if name == "SPACINGS":
        return spacing_names()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class ZTSNRWarning(UserWarning):
    """The run will work, but not do what you want."""


def step_schedule(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str = DEFAULT_SPACING,
    *,
    latent_size: tuple[int, int] | None = None,
    sigma_start: float | None = None,
    rho: float | None = None,
    denoise: float = 1.0,
    guidance: float = DEFAULT_GUIDANCE,
) -> torch.Tensor:
    """The sigmas of a sampling run.

    Args:
        schedule: the noise schedule of the model.
        steps: number of steps, at least 1; it need not divide 1000.
        spacing: one of ``SPACINGS``.  ``trailing``, ``linspace``, ``leading``, ``beta`` and ``ays`` choose timesteps;
            ``karras``, ``exponential``, ``polyexponential``, ``kl_optimal`` and ``spectral`` choose sigmas.
        latent_size: (height, width) of the latent.  The spacings that choose sigmas need it under a zero-terminal
            schedule, unless sigma_start is given: the mean of a canvas of N values is hidden from the network only by
            noise above about sqrt(N), so that is where their finite sigmas start.
        sigma_start: first finite sigma of those spacings; by default, from 20 steps on, 5 times sqrt(height * width),
            so that brightness is decided behind it, and less with fewer steps (``kl_optimal``: once that length).
        rho: exponent of ``karras`` (7) and ``polyexponential`` (1).
        denoise: image-to-image strength in (0, 1]: the last ``steps`` of the steps / denoise that the whole way takes.
            Below 1 the noisiest step is always dropped, so that the result never starts at infinity.
        guidance: scale of classifier-free guidance of the run, 1 for none.  ``spectral`` is denser where guidance makes
            the flow stiff; the others do not use it.

    Returns:
        (steps + 1,) float64 on the CPU, decreasing; begins with inf (zero-terminal schedule, denoise = 1), ends with 0.

    Raises:
        UserError: arguments out of range, an unknown spacing, a missing latent_size.

    Warns:
        ZTSNRWarning: the spacing never visits the last timestep of a zero-terminal schedule.
    """
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise UserError(f"steps must be a whole number of at least 1, not {steps!r}")
    entry = find_spacing(spacing)
    if not 0 < denoise <= 1:
        raise UserError(f"denoise must lie in (0, 1], not {denoise}")
    if not (math.isfinite(guidance) and guidance >= 0):
        raise UserError(f"guidance must be a finite number of at least 0, not {guidance}")
    if rho is not None and entry.rho is None:
        takers = " and ".join(name for name in spacing_names() if find_spacing(name).rho is not None)
        raise UserError(f"spacing {spacing!r} takes no rho; leave it out, or choose {takers}")
    if rho is not None and not (math.isfinite(rho) and rho > 0):
        raise UserError(f"rho must be a positive number, not {rho}")

    whole = steps if denoise == 1 else max(math.ceil(steps / denoise - 1e-9), steps + 1)
    if whole > MOST_STEPS:
        raise UserError(f"{steps} steps at denoise {denoise} are the end of {whole} steps, more than {MOST_STEPS}")
    if entry.of == "timesteps":
        if sigma_start is not None:
            raise UserError(f"spacing {spacing!r} chooses timesteps and takes no sigma_start")
        timesteps = torch.from_numpy(entry.function(schedule.last_timestep, whole))
        sigmas = schedule.sigma(timesteps).numpy()
        if denoise == 1:
            warn_of_finite_start(schedule, sigmas[0], f"spacing {spacing!r}")
    else:
        sigmas = _sigmas_of_range(schedule, whole, entry, latent_size, sigma_start, rho, guidance)
    return torch.from_numpy(np.concatenate([sigmas, [0.0]])[-(steps + 1) :])


def warn_of_finite_start(schedule: NoiseSchedule, sigma: float, chooser: str) -> None:
    """Warn of a run that begins below infinity though the model has learned to begin there."""
    if schedule.zero_terminal_snr and math.isfinite(sigma):
        warnings.warn(
            f"{chooser} starts at t = {schedule.timestep(sigma):.0f} (sigma {sigma:.4g}) and never runs "
            f"t = {schedule.last_timestep}, the only step that a zero-terminal model learned to start from: expect "
            "greyish pictures; use spacing trailing, or let sigmas begin with inf",
            ZTSNRWarning,
            stacklevel=3,
        )


def _sigmas_of_range(
    schedule: NoiseSchedule,
    steps: int,
    entry: SpacingEntry,
    latent_size: tuple[int, int] | None,
    sigma_start: float | None,
    rho: float | None,
    guidance: float,
) -> np.ndarray:
    """(steps,) sigmas: infinity and then the range, or the whole range of a schedule without infinity."""
    infinite = schedule.zero_terminal_snr
    if infinite and steps == 1:
        return np.array([math.inf])
    canvas = _canvas_length(latent_size) if latent_size is not None else None
    if sigma_start is not None and not (
        schedule.sigma_min < sigma_start < math.inf and sigma_start <= schedule.sigma_max
    ):
        raise UserError(
            f"sigma_start must be finite and in ({schedule.sigma_min:.4g}, {schedule.sigma_max:.4g}], not {sigma_start}"
        )
    finite_steps = steps - 1 if infinite else steps
    start = sigma_start or (None if infinite else schedule.sigma_max)
    if start is not None:
        first = start
    elif canvas is not None:
        first = entry.start(steps) * canvas
    else:
        raise UserError(
            f"spacing {entry.name!r} needs latent_size=(height, width), because the noise that hides a canvas's mean "
            "grows with its size; or give sigma_start"
        )
    if entry.of == "canvas":
        sigmas = entry.function(finite_steps, canvas, start, schedule.sigma_min, guidance)
    else:
        exponent = () if entry.rho is None else (entry.rho if rho is None else rho,)
        sigmas = entry.function(finite_steps, schedule.sigma_min, first, *exponent)
    return np.concatenate([[math.inf], sigmas]) if infinite else sigmas


def range_start(spacing: str, steps: int) -> float:
    """First finite sigma over the canvas length, for a spacing of a finite range that follows infinity.

    ComfyUI asks for its own schedulers too: those that have no name here start at the canvas length.
    """
    return find_spacing(spacing).start(steps) if spacing in spacing_names() else 1.0


def _canvas_length(latent_size: tuple[int, int]) -> float:
    """sqrt(height * width) of a latent: the noise level whose mean over the canvas has the size of one pixel value."""
    try:
        height, width = (int(side) for side in latent_size)
    except (TypeError, ValueError):
        raise UserError(f"latent_size must be (height, width) in latent pixels, not {latent_size!r}") from None
    if height < 1 or width < 1:
        raise UserError(f"latent_size must be at least 1 x 1, not {height} x {width}")
    return math.sqrt(height * width)
