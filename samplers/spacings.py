"""Spacings: functions that choose the noise levels of a run, by name.

A new spacing is one function with ``@spacing`` over it; docs/extending.md has an example.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch

from ..errors import UserError
from .noise_schedule import NoiseSchedule
from .protocol import check_free
from .spectral import spectral_sigmas

DEFAULT_SPACING = "spectral"

# Align Your Steps (Sabour et al., arXiv 2404.14507): the ten steps its authors publish for SDXL, as timesteps.
_AYS_TIMESTEPS = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0)


# ----------------------------------------------------------------------------------------------------------------------
# The registry

Of = Literal["timesteps", "sigmas", "canvas"]


@dataclass(frozen=True)
class SpacingEntry:
    """A spacing, and what ``step_schedule`` needs to know about it.

    Attributes:
        name: name by which users choose it.
        function: see ``spacing``.
        of: what the function chooses.
        rho: default of its exponent; None if it has none.
        start: number of steps -> first finite sigma after infinity, over the canvas length.
    """

    name: str
    function: Callable[..., np.ndarray]
    of: Of
    rho: float | None = None
    start: Callable[[int], float] = lambda steps: 1.0

    @property
    def description(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


_ENTRIES: dict[str, SpacingEntry] = {}
_Function = TypeVar("_Function", bound=Callable[..., np.ndarray])


def spacing(
    name: str | None = None, *, of: Of, rho: float | None = None, start: Callable[[int], float] | None = None
) -> Callable[[_Function], _Function]:
    """Decorator: register a spacing under a name, by default that of the function.

    What ``of`` says decides how the function is called:

        timesteps   (last_timestep T, steps) -> (steps,) descending timesteps, fractional or whole, the first one T
        sigmas      (steps, sigma_min, sigma_max) -> (steps,) descending finite sigmas, both ends included; with
                    ``rho`` the exponent is a fourth argument
        canvas      (steps, canvas length or None, first sigma or None, sigma_min, guidance) -> as sigmas, for spacings
                    that choose their ends themselves

    Args:
        name: name by which users choose it.
        of: "timesteps", "sigmas" or "canvas".
        rho: default exponent of a spacing of sigmas.
        start: ``start(steps)``: first finite sigma of a spacing of sigmas under a zero-terminal schedule, over the
            canvas length; by default 1.

    Raises:
        UserError: a name that another function has, an unknown ``of``, rho or start for another kind than "sigmas".
    """
    if of not in get_args(Of):
        raise UserError(f"of must be one of {', '.join(get_args(Of))}, not {of!r}")
    if of != "sigmas" and not (rho is None and start is None):
        raise UserError(f"rho and start are for of='sigmas', not for of={of!r}")

    def register(function: _Function) -> _Function:
        entry = SpacingEntry(name or function.__name__, function, of, rho, start or SpacingEntry.start)
        check_free(entry.name, function, _ENTRIES, "spacing")
        _ENTRIES[entry.name] = entry
        return function

    return register


def spacing_names() -> tuple[str, ...]:
    """Names of all registered spacings, in the order of registration."""
    return tuple(_ENTRIES)


def find_spacing(name: str) -> SpacingEntry:
    """The entry of a registered spacing.

    Raises:
        UserError: an unknown name.
    """
    if name not in _ENTRIES:
        raise UserError(f"unknown spacing {name!r}; choose one of {', '.join(_ENTRIES)}")
    return _ENTRIES[name]


# ----------------------------------------------------------------------------------------------------------------------
# The default spacing


@spacing(of="canvas")
def spectral(steps: int, canvas: float | None, start: float | None, sigma_min: float, guidance: float) -> np.ndarray:
    """Even in log sigma between ends fitted to the canvas, denser where guidance makes the flow stiff (the default)."""
    return np.array(spectral_sigmas(steps, canvas, start, sigma_min, guidance))


# ----------------------------------------------------------------------------------------------------------------------
# Spacings of timesteps


@spacing(of="timesteps")
def trailing(last: int, steps: int) -> np.ndarray:
    """Even in time from T: T, T - (T+1)/steps, ... (Lin et al., arXiv 2305.08891, section 3.3, without rounding)."""
    return np.linspace(last, max((last + 1) / steps - 1, 0), steps) if steps > 1 else np.array([last], dtype=float)


@spacing(of="timesteps")
def linspace(last: int, steps: int) -> np.ndarray:
    """Even in time from T to 0, both included."""
    return np.linspace(last, 0, steps) if steps > 1 else np.array([last], dtype=float)


@spacing(of="timesteps")
def leading(last: int, steps: int) -> np.ndarray:
    """What SDXL ships with: multiples of (T+1)//steps, plus one; begins well below T, so it warns."""
    stride = (last + 1) // steps if steps <= last + 1 else last / (steps - 1)
    offset = min(1, last - stride * (steps - 1))
    return (np.arange(steps) * stride + offset)[::-1].astype(float)


@spacing(of="timesteps")
def beta(last: int, steps: int) -> np.ndarray:
    """Quantiles of the Beta(0.6, 0.6) distribution (Lee et al., arXiv 2407.12173): dense at both ends of T."""
    # With t = sin^2(x) the density sin^0.2(x) cos^0.2(x) has no poles, and a fine midpoint rule integrates it.
    edges = np.linspace(0, np.pi / 2, 100_001)
    middles = (edges[1:] + edges[:-1]) / 2
    cumulative = np.concatenate([[0], np.cumsum((np.sin(middles) * np.cos(middles)) ** 0.2)])
    quantiles = 1 - np.arange(steps) / steps
    return last * np.sin(np.interp(quantiles, cumulative / cumulative[-1], edges)) ** 2


@spacing(of="timesteps")
def ays(last: int, steps: int) -> np.ndarray:
    """Align Your Steps (arXiv 2404.14507): its ten timesteps for SDXL, interpolated log-linearly to any number."""
    original = NoiseSchedule.sdxl(zero_terminal_snr=False)
    log_sigmas = np.log([original.sigma(float(t)) for t in _AYS_TIMESTEPS])
    position = np.linspace(0, len(log_sigmas) - 1, steps + 1)[:-1]
    sigmas = np.exp(np.interp(position, np.arange(len(log_sigmas)), log_sigmas))
    timesteps = original.timestep(torch.from_numpy(sigmas)).numpy() * (last / original.last_timestep)
    timesteps[0] = last  # not a rounding error short of it: there lies infinity
    return timesteps


# ----------------------------------------------------------------------------------------------------------------------
# Spacings of a finite range of sigmas


def _log_even_start(steps: int) -> float:
    """First finite sigma over the canvas length, for spacings that are about even in log sigma.

    Measured: from one canvas length the step from infinity decides brightness too early, with mixtures of pictures and
    under guidance; from five it is free, if there are steps to span the range.  Other spacings have hardly a step
    there: ``kl_optimal``, even in the angle, leaps from its start to the noise of a few pixels, and a higher start
    makes the leap longer.
    """
    return min(max((steps - 5) / 3, 1.0), 5.0)


@spacing(of="sigmas", rho=7.0, start=_log_even_start)
def karras(steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """Even in sigma^(1/rho) (Karras et al., arXiv 2206.00364, eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.linspace(high, low, steps) ** rho


@spacing(of="sigmas", start=_log_even_start)
def exponential(steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Even in log sigma."""
    return np.geomspace(sigma_max, sigma_min, steps)


@spacing(of="sigmas", rho=1.0, start=_log_even_start)
def polyexponential(steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """k-diffusion's: log sigma falls as the power rho of the share of steps left; rho = 1 is ``exponential``."""
    return sigma_min * (sigma_max / sigma_min) ** (np.linspace(1, 0, steps) ** rho)


@spacing(of="sigmas")
def kl_optimal(steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Even in the angle atan(sigma) (Align Your Steps, arXiv 2404.14507, section 3.1: optimal for a unit Gaussian)."""
    return np.tan(np.linspace(math.atan(sigma_max), math.atan(sigma_min), steps))
