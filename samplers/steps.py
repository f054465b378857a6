"""Building blocks that several solvers share: a step with x0 held, fresh noise, and lengths in log sigma.

All but ``add_noise`` take infinity and 0 like any other noise level.
"""

import math
from collections.abc import Sequence

import torch

from .prediction import alpha_s


def held_weight(sigma: float, sigma_next: float) -> float:
    """Weight of an x0 held over a step: alpha_next - alpha s_next/s."""
    (alpha, s), (alpha_next, s_next) = alpha_s(sigma), alpha_s(sigma_next)
    return alpha_next - alpha * s_next / s


def ddim(x: torch.Tensor, x0: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """x at noise level ``end`` when x0 is held over the step."""
    ratio = alpha_s(end)[1] / alpha_s(start)[1]
    return torch.add(ratio * x, x0, alpha=held_weight(start, end))


def combine(ratio: float, x: torch.Tensor, weights: Sequence[float], history: Sequence[torch.Tensor]) -> torch.Tensor:
    """ratio x + weights . history, both newest first."""
    x = ratio * x
    for weight, x0 in zip(weights, history, strict=False):
        x.add_(x0, alpha=weight)
    return x


def midpoint(start: float, end: float) -> float:
    """Where a step's second evaluation goes: the geometric mean, or from infinity halfway in u = 1/sigma."""
    return 2 * end if math.isinf(start) else math.sqrt(start * end)


def log_length(sigmas: Sequence[float], i: int) -> float:
    """Length of step i in log(alpha/s); infinite if it starts at infinity or ends at 0."""
    return math.inf if math.isinf(sigmas[i]) or sigmas[i + 1] == 0 else math.log(sigmas[i] / sigmas[i + 1])


def slope_2m(sigmas: Sequence[float], i: int) -> float:
    """h / (2 h_last) of DPM-Solver++(2M): 0 across infinity, and first order in steps to 0 and at the start."""
    return log_length(sigmas, i) / (2 * log_length(sigmas, i - 1)) if i > 0 and sigmas[i + 1] > 0 else 0.0


def fresh_share(sigma: float, sigma_next: float, eta: float) -> float:
    """Share c of the noise at sigma_next that an ancestral step draws anew; the rest, sqrt(1 - c^2), is kept."""
    return min(1.0, eta * math.sqrt(1 - (sigma_next / sigma) ** 2))


def add_noise(x: torch.Tensor, start: float, end: float, fresh: torch.Tensor) -> torch.Tensor:
    """Raise x from noise level ``start`` to ``end`` > start, variance-preserving."""
    (alpha, _), (alpha_end, _) = alpha_s(start), alpha_s(end)
    return torch.add((alpha_end / alpha) * x, fresh, alpha=alpha_end * math.sqrt(end**2 - start**2))
