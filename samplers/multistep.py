"""Multistep weights: x0 replaced by a polynomial through its last values, and integrated exactly.

In variance-preserving coordinates, with u = 1/sigma = alpha/s, the flow of a diffusion model is (docs/mathematics.md)

    x(b) = s_b/s_a x(a) + s_b * integral of x0 du from u_a to u_b

and nothing in it is singular at sigma = infinity (u = 0, s = 1).  So a step is a linear combination of the state and
the last x0, with weights that depend on the sigmas alone: computed once, in float64, before the first network call.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Coordinate = Callable[[np.ndarray], np.ndarray]  # of u: 0 at infinite sigma, inf at sigma = 0
Weights = list[np.ndarray]  # one array a step: weights of x0, newest first

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(20)


def angle(u: np.ndarray) -> np.ndarray:
    """phi = atan(sigma): pi/2 at infinity, 0 at sigma = 0."""
    return np.arctan2(1, u)


def log_sigma(u: np.ndarray) -> np.ndarray:
    """log sigma, minus half the logSNR: infinite at both ends."""
    with np.errstate(divide="ignore"):
        return -np.log(u)


def inverse_sigmas(sigmas: Sequence[float] | np.ndarray) -> np.ndarray:
    """u = 1/sigma."""
    with np.errstate(divide="ignore"):
        return 1 / np.asarray(sigmas, dtype=np.float64)


def noise_ratios(sigmas: Sequence[float] | np.ndarray) -> np.ndarray:
    """s_{i+1} / s_i of every step, (..., N) for sigmas (..., N + 1)."""
    s = 1 / np.hypot(1, inverse_sigmas(sigmas))
    return s[..., 1:] / s[..., :-1]


def lagrange(nodes: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Lagrange polynomials of the nodes (k,) at z (m,): (k, m)."""
    basis = []
    for j in range(len(nodes)):
        others = np.delete(nodes, j)
        basis.append(np.prod((z - others[:, None]) / (nodes[j] - others[:, None]), axis=0))
    return np.stack(basis)


def gauss_legendre(start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for an integral over [start, end], taken in asinh: linear near 0, logarithmic further out."""
    low, high = np.arcsinh(start), np.arcsinh(end)
    v = low + (high - low) * (_NODES + 1) / 2
    return np.sinh(v), np.cosh(v) * _NODE_WEIGHTS * (high - low) / 2


def integral_weights(nodes: np.ndarray, start: float, end: float, coordinate: Coordinate) -> np.ndarray:
    """Weights of x0 at the nodes in one step: s_end times the integral of their Lagrange polynomials over u.

    Args:
        nodes: (k,) u of the known x0.
        start, end: u of the step's ends, start < end; at end = inf (sigma = 0) the integral's limit is the value of the
            polynomial there.
        coordinate: the variable the polynomials are in.

    Returns:
        (k,)
    """
    if np.isinf(end):
        return lagrange(coordinate(nodes), coordinate(np.array([end])))[:, 0]
    u, du = gauss_legendre(start, end)
    return lagrange(coordinate(nodes), coordinate(u)) @ du / math.hypot(1, end)


def predictor(u: np.ndarray, order: int, coordinate: Coordinate, first: int = 0) -> Weights:
    """Adams-Bashforth: step i extrapolates x0 from its last ``order`` values; values before ``first`` are not used."""
    weights = []
    for i in range(len(u) - 1):
        oldest = max(i - order + 1, min(first, i))
        weights.append(integral_weights(u[oldest : i + 1][::-1], u[i], u[i + 1], coordinate))
    return weights


def predict_and_correct(ratios: np.ndarray, predict: Weights, correct: Weights) -> Weights:
    """Fold the correction of each step into the next one.

    A corrector repeats step i once x0 at its end is known.  Corrected and predicted state differ by
    (correct - predict) . x0 alone, so "correct x, then predict from it" is one linear combination: the corrector costs
    neither a network call nor a pass over the latent, and a state that was edited between two steps keeps its edit.

    Args:
        ratios: (..., N) from ``noise_ratios``.
        predict: N arrays (..., k), newest x0 first.
        correct: N - 1 arrays (..., k), the newest x0 being that at the end of the step.
    """
    fused = [predict[0]]
    for i in range(1, len(predict)):
        length = max(predict[i].shape[-1], correct[i - 1].shape[-1], predict[i - 1].shape[-1] + 1)
        correction = _pad(correct[i - 1], 0, length) - _pad(predict[i - 1], 1, length)
        fused.append(ratios[..., i, None] * correction + _pad(predict[i], 0, length))
    return fused


def _pad(weights: np.ndarray, before: int, length: int) -> np.ndarray:
    after = length - before - weights.shape[-1]
    return np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(before, after)])
