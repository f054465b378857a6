"""Which noise levels a sampler visits, and in how many steps.

Under a zero-terminal schedule a step schedule begins at infinity, the only noise level at which the model has been
taught that it knows nothing of the picture, and ends at 0.
"""

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch

from ..errors import UserError
from .noise_schedule import NoiseSchedule
from .spectral import spectral_sigmas

DEFAULT_SPACING = "spectral"
DEFAULT_GUIDANCE = 5.0  # scale that a step schedule is made for where it is not told one
MOST_STEPS = 100_000  # of a whole schedule: beyond any use, and short of filling the memory
DEFAULT_RHO = {"karras": 7.0, "polyexponential": 1.0}

# Align Your Steps (Sabour et al., arXiv 2404.14507): the ten steps its authors publish for SDXL, as timesteps.
_AYS_TIMESTEPS = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0)


class ZTSNRWarning(UserWarning):
    """This will run, and will not do what you want."""


# ----------------------------------------------------------------------------------------------------------------------
# Spacings in timesteps: (last_timestep T, steps) -> (steps,) timesteps, descending.


def _trailing(last: int, steps: int) -> np.ndarray:
    """T, T - (T+1)/steps, ...: Lin et al. (arXiv 2305.08891), section 3.3, without its rounding."""
    return np.linspace(last, max((last + 1) / steps - 1, 0), steps) if steps > 1 else np.array([last], dtype=float)


def _linspace(last: int, steps: int) -> np.ndarray:
    """From T to 0, both included."""
    return np.linspace(last, 0, steps) if steps > 1 else np.array([last], dtype=float)


def _leading(last: int, steps: int) -> np.ndarray:
    """What SDXL ships with: multiples of (T+1)//steps, plus one.  It stops well short of T."""
    stride = (last + 1) // steps if steps <= last + 1 else last / (steps - 1)
    offset = min(1, last - stride * (steps - 1))
    return (np.arange(steps) * stride + offset)[::-1].astype(float)


def _beta(last: int, steps: int) -> np.ndarray:
    """Quantiles of the Beta(0.6, 0.6) distribution (Lee et al., arXiv 2407.12173): dense at both ends of T."""
    # With t = sin^2(x) the density sin^0.2(x) cos^0.2(x) has no poles, and a fine midpoint rule integrates it.
    edges = np.linspace(0, np.pi / 2, 100_001)
    middles = (edges[1:] + edges[:-1]) / 2
    cumulative = np.concatenate([[0], np.cumsum((np.sin(middles) * np.cos(middles)) ** 0.2)])
    quantiles = 1 - np.arange(steps) / steps
    return last * np.sin(np.interp(quantiles, cumulative / cumulative[-1], edges)) ** 2


def _ays(last: int, steps: int) -> np.ndarray:
    """Align Your Steps, taken over by timestep and stretched to ``steps`` log-linearly in the noise it was made for."""
    original = NoiseSchedule.sdxl(zero_terminal_snr=False)
    log_sigmas = np.log([original.sigma(float(t)) for t in _AYS_TIMESTEPS])
    position = np.linspace(0, len(log_sigmas) - 1, steps + 1)[:-1]
    sigmas = np.exp(np.interp(position, np.arange(len(log_sigmas)), log_sigmas))
    timesteps = original.timestep(torch.from_numpy(sigmas)).numpy() * (last / original.last_timestep)
    timesteps[0] = last  # not a rounding error short of it: there lies infinity
    return timesteps


# ----------------------------------------------------------------------------------------------------------------------
# Spacings of a finite range: (steps, sigma_min, sigma_max, rho) -> (steps,) sigmas, descending, both ends included.


def _karras(steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """Karras et al. (arXiv 2206.00364), eq. 5."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.linspace(high, low, steps) ** rho


def _exponential(steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """Even in log sigma."""
    return np.geomspace(sigma_max, sigma_min, steps)


def _polyexponential(steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """k-diffusion's: log sigma falls as a power of the remaining share of steps; rho = 1 is ``exponential``."""
    return sigma_min * (sigma_max / sigma_min) ** (np.linspace(1, 0, steps) ** rho)


def _kl_optimal(steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """Even in the angle atan(sigma) (Align Your Steps, arXiv 2404.14507, section 3.1: optimal for a unit Gaussian)."""
    return np.tan(np.linspace(math.atan(sigma_max), math.atan(sigma_min), steps))


_TIMESTEP_SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    "trailing": _trailing,
    "linspace": _linspace,
    "leading": _leading,
    "beta": _beta,
    "ays": _ays,
}
_RANGE_SPACINGS: dict[str, Callable[[int, float, float, float], np.ndarray]] = {
    "karras": _karras,
    "exponential": _exponential,
    "polyexponential": _polyexponential,
    "kl_optimal": _kl_optimal,
}
SPACINGS = (DEFAULT_SPACING, *_TIMESTEP_SPACINGS, *_RANGE_SPACINGS)


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
    if spacing not in SPACINGS:
        raise UserError(f"unknown spacing {spacing!r}; choose one of {', '.join(SPACINGS)}")
    if not 0 < denoise <= 1:
        raise UserError(f"denoise must lie in (0, 1], not {denoise}; with nothing to denoise there is nothing to run")
    if not (math.isfinite(guidance) and guidance >= 0):
        raise UserError(f"guidance must be a finite number of at least 0, not {guidance}")
    if rho is not None and spacing not in DEFAULT_RHO:
        raise UserError(f"rho belongs to {' and '.join(DEFAULT_RHO)}, not to spacing {spacing!r}")
    if rho is not None and not (math.isfinite(rho) and rho > 0):
        raise UserError(f"rho must be a positive number, not {rho}")

    whole = steps if denoise == 1 else max(math.ceil(steps / denoise - 1e-9), steps + 1)
    if whole > MOST_STEPS:
        raise UserError(f"{steps} steps at denoise {denoise} are the end of {whole} steps, more than {MOST_STEPS}")
    if spacing in _TIMESTEP_SPACINGS:
        if sigma_start is not None:
            raise UserError(f"spacing {spacing!r} chooses timesteps and takes no sigma_start")
        timesteps = torch.from_numpy(_TIMESTEP_SPACINGS[spacing](schedule.last_timestep, whole))
        sigmas = schedule.sigma(timesteps).numpy()
        if denoise == 1:
            warn_of_finite_start(schedule, sigmas[0], f"spacing {spacing!r}")
    else:
        sigmas = _sigmas_of_range(schedule, whole, spacing, latent_size, sigma_start, rho, guidance)
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
    spacing: str,
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
    if infinite and sigma_start is None and canvas is None:
        raise UserError(
            f"spacing {spacing!r} needs latent_size=(height, width), because the noise that hides a canvas's mean "
            "grows with its size; or give sigma_start"
        )
    finite_steps = steps - 1 if infinite else steps
    if spacing == "spectral":
        start = sigma_start or (None if infinite else schedule.sigma_max)
        sigmas = np.array(spectral_sigmas(finite_steps, canvas, start, schedule.sigma_min, guidance))
    else:
        start = sigma_start or (range_start(spacing, steps) * canvas if infinite else schedule.sigma_max)
        exponent = rho if rho is not None else DEFAULT_RHO.get(spacing, 1.0)
        sigmas = _RANGE_SPACINGS[spacing](finite_steps, schedule.sigma_min, start, exponent)
    return np.concatenate([[math.inf], sigmas]) if infinite else sigmas


def range_start(spacing: str, steps: int) -> float:
    """First finite sigma over the canvas length, for a spacing of a finite range behind infinity.

    Measured: from one canvas length the step from infinity decides brightness too early, with mixtures of pictures and
    under guidance; from five it is free, if there are steps to span the range.  That holds for spacings that are about
    even in log sigma.  Others have hardly a step there: ``kl_optimal``, even in the angle, leaps from its start to the
    noise of a few pixels, and a higher start makes the leap longer.
    """
    if spacing in ("karras", "exponential", "polyexponential"):
        return min(max((steps - 5) / 3, 1.0), 5.0)
    return 1.0


def _canvas_length(latent_size: tuple[int, int]) -> float:
    """sqrt(height * width) of a latent: the noise level whose mean over the canvas has the size of one pixel value."""
    try:
        height, width = (int(side) for side in latent_size)
    except (TypeError, ValueError):
        raise UserError(f"latent_size must be (height, width) in latent pixels, not {latent_size!r}") from None
    if height < 1 or width < 1:
        raise UserError(f"latent_size must be at least 1 x 1, not {height} x {width}")
    return math.sqrt(height * width)
