"""Deterministic solvers of the flow, each written as the algorithm it is; ``protocol`` says what a solver is.

Most are tables of weights of the last x0 (``multistep``), registered by ``@multistep_solver``.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch

from .multistep import (
    Weights,
    angle,
    gauss_legendre,
    integral_weights,
    inverse_sigmas,
    lagrange,
    log_sigma,
    noise_ratios,
    predict_and_correct,
    predictor,
)
from .prediction import alpha_s
from .protocol import Noise, Run, Sigmas, solver
from .steps import combine, ddim, held_weight, log_length, slope_2m

Rule = Callable[[Sigmas], Weights]


def multistep_solver(rule: Rule) -> Rule:
    """Decorator: register the rule ``NAME_weights(sigmas) -> weights of x0`` as the deterministic solver ``NAME``."""

    def step(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
        table = multistep_table(rule, run.sigmas)
        ratio, weights = table[run.step]
        return combine(ratio, x, weights, run.remember(x0, max(len(weights) for _, weights in table)))

    step.__module__, step.__qualname__, step.__doc__ = rule.__module__, rule.__qualname__, rule.__doc__
    solver(rule.__name__.removesuffix("_weights"))(step)
    return rule


@lru_cache(maxsize=64)
def multistep_table(rule: Callable[[Sigmas], Weights], sigmas: Sigmas) -> tuple[tuple[float, tuple[float, ...]], ...]:
    """(s_{i+1}/s_i, weights of x0, newest first) of every step, as Python floats."""
    return tuple(
        (float(ratio), tuple(float(w) for w in weights))
        for ratio, weights in zip(noise_ratios(sigmas), rule(sigmas), strict=True)
    )


@multistep_solver
def angle_weights(sigmas: Sequence[float]) -> Weights:
    """Second order: x0 linear in the angle phi = atan(sigma), in which infinity and 0 are ordinary points.

    A slope is extrapolated no further than the length it was measured over: where a step is longer in the angle than
    the one before, the rest of it sees a constant x0.
    """
    u = inverse_sigmas(sigmas)
    lengths = -np.diff(angle(u))
    weights = predictor(u, 2, angle)
    for i in range(1, len(weights)):
        # The weight of the older x0 is the slope's share: shrink it, and keep the sum of the weights.
        slope = weights[i][1] * min(1, lengths[i - 1] / lengths[i])
        weights[i] = np.array([weights[i].sum() - slope, slope])
    return weights


@multistep_solver
def euler_weights(sigmas: Sequence[float]) -> Weights:
    """DDIM (Song et al., arXiv 2010.02502): first order, x0 is held over the step."""
    return predictor(inverse_sigmas(sigmas), 1, angle)


@solver(evaluations=2)
def heun(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Heun's method (Karras et al., arXiv 2206.00364, Alg. 1), in the angle atan(sigma) instead of sigma."""
    start, end = run.ends
    if end == 0:
        return x0
    if not run.is_second_look:
        # Predictor: an Euler step to the end.
        run.kept = x, x0
        return ddim(x, x0, start, end)
    # Corrector: the step again from its beginning, with x0 linear in the angle between both ends.
    x, x0_start = run.kept
    u = inverse_sigmas(run.ends)
    weights = integral_weights(u, u[0], u[1], angle)
    return combine(alpha_s(end)[1] / alpha_s(start)[1], x, weights.tolist(), [x0_start, x0])


@multistep_solver
def dpmpp_2m_weights(sigmas: Sequence[float]) -> Weights:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Alg. 2): second order in log sigma.

    First order in the steps from infinity and to 0, which are infinitely long in log sigma.
    """
    # D = (1 + h / (2 h_last)) x0 - h / (2 h_last) x0_last, held over the step.
    slopes = [slope_2m(sigmas, i) for i in range(len(sigmas) - 1)]
    steps = itertools.pairwise(sigmas)
    return [held_weight(*step) * np.array([1 + slope, -slope]) for step, slope in zip(steps, slopes, strict=True)]


@multistep_solver
def unipc_weights(sigmas: Sequence[float]) -> Weights:
    """UniPC (Zhao et al., arXiv 2302.04867): second order with a corrector, B(h) = e^h - 1 (``bh2``).

    Predictor of order 2, first order at the start and at sigma = 0, then a corrector of order 2 whose two weights solve
    the paper's moment equations.  Across infinity the corrector becomes the trapezoid rule in u.
    """
    predict, correct = [], []
    for i in range(len(sigmas) - 1):
        held, h, slope = held_weight(sigmas[i], sigmas[i + 1]), log_length(sigmas, i), slope_2m(sigmas, i)
        predict.append(held * np.array([1 + slope, -slope]))  # UniP-2, which is DPM-Solver++(2M)
        if i == 0 or math.isinf(h):
            correct.append(held * np.array([0.5, 0.5]))
            continue
        # UniC-2 in data prediction: B(-h) = -b, and the weights reproduce the moments phi_2 and phi_3.
        h_last = log_length(sigmas, i - 1)
        b = -math.expm1(-h)
        phi_2 = 1 - b / h
        phi_3 = 0.5 - phi_2 / h
        # [[1, 1], [r, 1]] rho = [phi_2, 2 phi_3] / b with r = -h_last / h, solved by hand to allow h_last = inf
        old_over_r = (phi_2 - 2 * phi_3) / b / ((1 + h_last / h) * (-h_last / h)) if math.isfinite(h_last) else 0.0
        new = phi_2 / b + old_over_r * h_last / h if math.isfinite(h_last) else phi_2 / b
        correct.append(held * np.array([new, 1 - new - old_over_r, old_over_r]))
    return predict_and_correct(noise_ratios(sigmas), predict, correct[:-1])


@solver()
def deis(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """DEIS (Zhang and Chen, arXiv 2204.13902): third order, eps a polynomial in log sigma.

    Dividing the flow by alpha instead of s gives x(b) = alpha_b/alpha_a x(a) + alpha_b * integral of eps dsigma.  The
    steps from infinity and to 0, where log sigma has no end, are DDIM's.
    """
    start, end = run.ends
    weights = _deis_table(run.sigmas)[run.step]
    if not weights:
        return ddim(x, x0, start, end)
    (alpha, s), (alpha_end, _) = alpha_s(start), alpha_s(end)
    eps = torch.add(x, x0, alpha=-alpha).div_(s)  # what x holds besides alpha x0
    return combine(alpha_end / alpha, x, weights, run.remember(eps, 3))


@lru_cache(maxsize=64)
def _deis_table(sigmas: Sigmas) -> tuple[tuple[float, ...], ...]:
    """Weights of eps, newest first; none where a step begins at infinity or ends at 0."""
    table = []
    for i in range(len(sigmas) - 1):
        if math.isinf(log_length(sigmas, i)):
            table.append(())
            continue
        nodes = np.log([sigma for sigma in sigmas[max(i - 2, 0) : i + 1][::-1] if math.isfinite(sigma)])
        sigma, dsigma = gauss_legendre(sigmas[i], sigmas[i + 1])
        # Each eps weighs the integral over sigma of its Lagrange polynomial in log sigma.
        integral = lagrange(nodes, np.log(sigma)) @ dsigma
        table.append(tuple(float(w) for w in integral * alpha_s(sigmas[i + 1])[0]))
    return tuple(table)


@multistep_solver
def res_multistep_weights(sigmas: Sequence[float]) -> Weights:
    """RES multistep (Zhang et al., arXiv 2308.02157): second order, x0 linear in log sigma, integrated exactly."""
    # Log sigma has no value at infinity or 0: no slope uses the x0 from infinity, and the step to 0 holds x0.
    positive = sigmas if sigmas[-1] > 0 else sigmas[:-1]
    weights = predictor(inverse_sigmas(positive), 2, log_sigma, first=1 if math.isinf(sigmas[0]) else 0)
    return weights if positive is sigmas else [*weights, np.array([held_weight(*sigmas[-2:])])]
