"""SA-Solver (Xue et al., arXiv 2309.05019): stochastic Adams methods, a predictor and a corrector."""

import itertools
import math
from functools import lru_cache

import numpy as np
import torch

from .multistep import lagrange, predict_and_correct
from .prediction import alpha_s
from .protocol import Noise, Run, Sigmas, solver
from .stochastic_multistep import Step, take_step

PREDICTOR_ORDER = 3
CORRECTOR_ORDER = 4
# Steps that end between these sigmas add noise: t = 0.2 T and t = 0.8 T of SDXL's zero-terminal-SNR schedule, as in the
# authors' code for latent diffusion.
NOISY = (0.5967741660233556, 7.420956162563404)

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)
_LONG = 40.0  # e^-40 is below the rounding of float64


@solver(stochastic=True)
def sa_solver(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """SA-Solver (Xue et al., arXiv 2309.05019): predictor of order 3, corrector of order 4.

    In data prediction; tau is eta for steps that end within ``NOISY``, else 0.
    """
    return take_step(run, x, x0, sa_solver_steps(run.sigmas, run.eta), noise)


@lru_cache(maxsize=64)
def sa_solver_steps(sigmas: Sigmas, eta: float) -> tuple[Step, ...]:
    """The paper's predictor and corrector; order rises at the start, and falls before sigma = 0 for stability.

    The corrector repeats a step with x0 at its end, and with the same noise, so it differs from the predictor in the
    weights of x0 alone and folds into the next step.
    """
    count = len(sigmas) - 1
    # steps before one to 0, which only denoises; without it, enough for every order
    left = count - 1 if sigmas[-1] == 0 else count + CORRECTOR_ORDER
    steps, predict, correct = [], [], []
    for i, (start, end) in enumerate(itertools.pairwise(sigmas)):
        if end == 0:
            steps.append((0.0, 0.0))
            predict.append(np.array([1.0]))
            break
        tau = eta if NOISY[0] <= end <= NOISY[1] else 0.0
        # Share of the noise that the step keeps; the rest of its variance is drawn anew.
        kept = (end / start) ** (tau**2)
        steps.append((alpha_s(end)[1] / alpha_s(start)[1] * kept, alpha_s(end)[1] * math.sqrt(1 - kept**2)))
        past = sigmas[i::-1]
        predict.append(_adams(past[: min(PREDICTOR_ORDER, left - i)], start, end, tau))
        correct.append(_adams((end, *past)[: min(CORRECTOR_ORDER, left - i)], start, end, tau))
    # The corrector of each step folds into the next one.
    keep = np.array([step[0] for step in steps])
    weights = predict_and_correct(keep, predict, correct)
    return tuple(Step(kept, tuple(row.tolist()), fresh) for (kept, fresh), row in zip(steps, weights, strict=True))


def _adams(known: Sigmas, start: float, end: float, tau: float) -> np.ndarray:
    """Weights of x0 known at some sigmas, newest first, in one step (the paper's eqs. 15 and 18).

    With l_j the Lagrange polynomials in log sigma and z = (1 + tau^2) log(sigma/end),

        b_j = alpha_end * integral of e^-z l_j dz from 0 to (1 + tau^2) log(start/end)

    A value at infinity, where log sigma has no end, has weight 0 in the limit if there is another one.
    """
    newest, *older = known
    nodes = np.log([newest, *(sigma for sigma in older if math.isfinite(sigma))])
    rate = 1 + tau**2
    length = min(rate * math.log(start / end), _LONG)  # from infinity, as far as e^-z counts
    z = length * (_NODES + 1) / 2
    basis = lagrange(nodes, math.log(end) + z / rate)
    return alpha_s(end)[0] * basis @ (np.exp(-z) * _NODE_WEIGHTS * length / 2)
