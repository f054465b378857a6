"""Stochastic multistep solvers: a table of steps x <- keep x + weights . x0 + fresh z.

Between two noise levels a reverse SDE with x0 given as a polynomial is linear, so its exact step is a linear
combination of the state, the last x0 and one Gaussian z.  All coefficients depend on the sigmas and eta alone: they are
computed once, in float64, before the first network call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .protocol import Noise, Run


class Step(NamedTuple):
    """One step.  At sigma = 0, ``Step(0.0, (1.0,), 0.0)``: the result is x0.

    Attributes:
        keep: factor of the state.
        weights: factors of the last x0, newest first.
        fresh: standard deviation of the fresh noise.
    """

    keep: float
    weights: tuple[float, ...]
    fresh: float


def take_step(run: Run, x: torch.Tensor, x0: torch.Tensor, steps: Sequence[Step], noise: Noise) -> torch.Tensor:
    """Take the run's current step; draws noise only where the step has some."""
    step = steps[run.step]
    history = run.remember(x0, max(len(step.weights) for step in steps))
    x = step.keep * x
    for weight, past in zip(step.weights, history, strict=False):
        x.add_(past, alpha=weight)
    return x.add_(noise(), alpha=step.fresh) if step.fresh > 0 else x
