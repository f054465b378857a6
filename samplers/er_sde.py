"""ER-SDE-Solver (Cui et al., arXiv 2309.06169), its noise scaled by eta."""

import itertools
import math
from functools import lru_cache

import numpy as np
import torch

from .multistep import gauss_legendre
from .prediction import alpha_s
from .protocol import Noise, Run, Sigmas, solver
from .stochastic_multistep import Step, take_step

ORDER = 3


@solver(stochastic=True)
def er_sde(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise, order: int = ORDER) -> torch.Tensor:
    """ER-SDE-Solver (Cui et al., arXiv 2309.06169): third order; eta = 0 is its solver of the flow.

    ``order`` is 1, 2 or 3; a run begins at order 1 and rises to it.
    """
    return take_step(run, x, x0, er_sde_steps(run.sigmas, run.eta, order), noise)


@lru_cache(maxsize=64)
def er_sde_steps(sigmas: Sigmas, eta: float, order: int = ORDER) -> tuple[Step, ...]:
    """The paper's solvers of first to third order, in variance-preserving coordinates.

    With the noise scale phi(sigma) = sigma psi(sigma)^eta, a step from a to b = sigma_{i+1} takes x/alpha to

        phi_b/phi_a x/alpha + (1 - phi_b/phi_a) x0 + c_1 x0' + c_2 x0'' + sqrt(b^2 - a^2 (phi_b/phi_a)^2) z
        c_1 = b - a + integral of phi_b/phi(sigma) from b to a
        c_2 = (b - a)^2/2 + integral of (sigma - a) phi_b/phi(sigma) from b to a

    with derivatives by sigma from divided differences.  psi grows with sigma, so from infinity phi_b/phi_a is 0: all of
    the noise is drawn anew (for eta = 0 none of it), and no later difference reaches back there.
    """
    steps = []
    for i, (start, end) in enumerate(itertools.pairwise(sigmas)):
        if end == 0:
            steps.append(Step(0.0, (1.0,), 0.0))
            continue
        (_, s), (alpha_end, s_end) = alpha_s(start), alpha_s(end)
        # First order: phi_end/phi_start is end/start times this.
        keep = float(_psi_ratio(end, start, eta))
        weights = np.zeros(3)
        weights[0] = 1 - end / start * keep
        if order >= 2 and i >= 1:
            sigma, dsigma = gauss_legendre(end, start)
            scale = end / sigma * _psi_ratio(end, sigma, eta) * dsigma
            # Second order: x0' from the last two x0, times c_1.
            slope = np.array([1, -1, 0]) / (start - sigmas[i - 1])
            weights += (end - start + scale.sum()) * slope
            if order >= 3 and i >= 2:
                # Third order: x0'' from the last three, times c_2.
                slope_before = np.array([0, 1, -1]) / (sigmas[i - 1] - sigmas[i - 2])
                bend = (slope - slope_before) / ((start - sigmas[i - 2]) / 2)
                weights += ((end - start) ** 2 / 2 + (sigma - start) @ scale) * bend
        weights = (alpha_end * weights[: min(i + 1, order)]).tolist()
        steps.append(Step(s_end / s * keep, tuple(weights), s_end * math.sqrt(1 - keep**2)))
    return tuple(steps)


def _psi_ratio(end: float, sigma: float | np.ndarray, eta: float) -> float | np.ndarray:
    """(psi(end) / psi(sigma))^eta; the authors' choice of psi is exp(sigma^0.3) + 10."""
    log_psi = np.logaddexp(np.power([end, *np.atleast_1d(sigma)], 0.3), math.log(10))
    return np.exp(eta * (log_psi[0] - log_psi[1:])).squeeze() if eta > 0 else np.ones_like(sigma)
