"""One-step update rules, each written as the algorithm it is.

A solver is a generator function ``solver(x, sigmas, eta, noise)``.  Where the paper calls the network, it yields
``(x, sigma)`` and is sent back ``(x, x0)``: the state (an inpainting pipeline may have changed it meanwhile) and the
denoised picture.  Its return value is the state at the last sigma.  Whoever drives it (``sample``, the diffusers
scheduler, a ComfyUI sampler) only answers questions, so every door takes exactly the same steps.

    x       (B, C, H, W) float32, variance-preserving: x = alpha x0 + s eps, alpha^2 + s^2 = 1
    sigmas  decreasing floats; the first may be inf, the last may be 0
    eta     how much of the removed noise a stochastic solver replaces by fresh noise; 0 is the deterministic flow
    noise   function without arguments: a fresh unit Gaussian like x

The exact flow in these coordinates (docs/mathematics.md) is, with u = 1/sigma = alpha/s,

    x(b) = s_b/s_a x(a) + s_b * integral of x0 du from u_a to u_b

and nothing in it is singular at sigma = infinity (u = 0, s = 1).  Deterministic multistep solvers replace x0 by a
polynomial through its last values, so one step is a linear combination with weights that depend on the sigmas alone.
They are computed once, in float64, before the first network call.
"""

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache

import numpy as np
import torch

from .prediction import alpha_s

Sigmas = tuple[float, ...]
Evaluations = Generator[tuple[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor], torch.Tensor]
Coordinate = Callable[[np.ndarray], np.ndarray]

# ----------------------------------------------------------------------------------------------------------------------
# Interpolation of x0 and its exact integral.  Noise levels are given as u = 1/sigma: 0 at infinity, inf at sigma = 0.

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(20)


def angle(u: np.ndarray) -> np.ndarray:
    """phi = atan(sigma): pi/2 at infinity, 0 at sigma = 0."""
    return np.arctan2(1, u)


def log_sigma(u: np.ndarray) -> np.ndarray:
    """log sigma, minus half the logSNR: infinite at both ends."""
    with np.errstate(divide="ignore"):
        return -np.log(u)


def bounded_log_sigma(largest: np.ndarray, smallest: np.ndarray) -> Coordinate:
    """log sigma between the largest and smallest finite sigma of a schedule, levelling off beyond them.

    sqrt(sigma^2 + smallest^2) / (1 + sigma/largest), in logarithm.  It is analytic in 1/sigma at infinity and in
    sigma^2 at 0, as x0 itself is there, so both ends are ordinary points about one step away from their neighbours.
    """

    def coordinate(u: np.ndarray) -> np.ndarray:
        at_zero = np.isinf(u)
        u = np.where(at_zero, 1.0, u)
        return np.where(at_zero, np.log(smallest), 0.5 * np.log1p((smallest * u) ** 2) - np.log(u + 1 / largest))

    return coordinate


def lagrange(nodes: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Lagrange polynomials of nodes (..., k) at z (..., m): (..., k, m)."""
    k = nodes.shape[-1]
    basis = []
    for j in range(k):
        others = [m for m in range(k) if m != j]
        factors = [(z - nodes[..., m, None]) / (nodes[..., j, None] - nodes[..., m, None]) for m in others]
        basis.append(math.prod(factors, start=np.ones_like(z)))
    return np.stack(basis, axis=-2)


def integral_weights(nodes: np.ndarray, start: np.ndarray, end: np.ndarray, coordinate: Coordinate) -> np.ndarray:
    """Weights of x0 at the nodes in a step: s_end times the integral of their Lagrange polynomials over u.

    The polynomials are in ``coordinate``; the integral is Gauss-Legendre in asinh(u), which is u near infinity and log u
    near sigma = 0.  At sigma = 0 the integral's limit is the polynomial's value there.

    Args:
        nodes: (..., k) u of the known x0.
        start, end: (...) u of the step's ends, start < end.  Leading dimensions run over schedules.

    Returns:
        (..., k)
    """
    if np.isinf(end).all():
        return lagrange(coordinate(nodes), coordinate(end[..., None]))[..., 0]
    low, high = np.arcsinh(start)[..., None], np.arcsinh(end)[..., None]
    v = low + (high - low) * (_NODES + 1) / 2
    polynomials = lagrange(coordinate(nodes), coordinate(np.sinh(v)))
    integral = (polynomials * (np.cosh(v) * _NODE_WEIGHTS * (high - low) / 2)[..., None, :]).sum(-1)
    return integral / np.sqrt(1 + end**2)[..., None]


def inverse_sigmas(sigmas: Sequence[float] | np.ndarray) -> np.ndarray:
    """u = 1/sigma."""
    with np.errstate(divide="ignore"):
        return 1 / np.asarray(sigmas, dtype=np.float64)


def noise_ratios(sigmas: Sequence[float] | np.ndarray) -> np.ndarray:
    """s_{i+1} / s_i of every step, (..., N)."""
    u = inverse_sigmas(sigmas)
    s = np.where(np.isinf(u), 0, 1 / np.sqrt(1 + np.where(np.isinf(u), 0, u) ** 2))
    return s[..., 1:] / s[..., :-1]


# ----------------------------------------------------------------------------------------------------------------------
# Deterministic multistep solvers: a table of weights each.

Weights = list[np.ndarray]  # one a step, newest x0 first


def predictor(u: np.ndarray, order: int, coordinate: Coordinate, first: int = 0) -> Weights:
    """Adams-Bashforth: step i extrapolates x0 from its last ``order`` values; values before ``first`` are not used.

    Args:
        u: (..., N + 1)
    """
    steps = u.shape[-1] - 1
    weights = []
    for i in range(steps):
        oldest = max(i - order + 1, min(first, i), 0)
        nodes = u[..., oldest : i + 1][..., ::-1]
        weights.append(integral_weights(nodes, u[..., i], u[..., i + 1], coordinate))
    return weights


def corrector(u: np.ndarray, order: int, coordinate: Coordinate) -> Weights:
    """Adams-Moulton: step i once more, now that x0 at its end is known; one entry less than the predictor."""
    steps = u.shape[-1] - 1
    weights = []
    for i in range(steps - 1):
        nodes = u[..., max(i - order + 2, 0) : i + 2][..., ::-1]
        weights.append(integral_weights(nodes, u[..., i], u[..., i + 1], coordinate))
    return weights


def _pad(weights: np.ndarray, before: int, length: int) -> np.ndarray:
    after = length - before - weights.shape[-1]
    return np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(before, after)])


def predict_and_correct(ratios: np.ndarray, predict: Weights, correct: Weights) -> Weights:
    """Fold the correction of each step into the next one.

    Predicted and corrected state differ by (correct - predict) . x0 alone, so "correct x, then predict from it" is one
    linear combination: the corrector costs neither a network call nor a pass over the latent, and a state that was
    edited between two steps keeps its edit.
    """
    fused = [predict[0]]
    for i in range(1, len(predict)):
        length = max(predict[i].shape[-1], correct[i - 1].shape[-1], predict[i - 1].shape[-1] + 1)
        correction = _pad(correct[i - 1], 0, length) - _pad(predict[i - 1], 1, length)
        fused.append(ratios[..., i, None] * correction + _pad(predict[i], 0, length))
    return fused


def euler_weights(sigmas: Sequence[float]) -> Weights:
    """DDIM (Song et al., arXiv 2010.02502): x0 is held over the step."""
    return predictor(inverse_sigmas(sigmas), 1, angle)


def angle_weights(sigmas: Sequence[float]) -> Weights:
    """Second order, x0 linear in the angle phi = atan(sigma); infinity and 0 are ordinary points of it."""
    return predictor(inverse_sigmas(sigmas), 2, angle)


def adams_weights(sigmas: Sequence[float] | np.ndarray, order: int = 3) -> Weights:
    """Adams predictor-corrector, x0 a parabola in the bounded log sigma: the default solver.

    Args:
        sigmas: (..., N + 1), the first may be inf and the last 0.
    """
    u = inverse_sigmas(sigmas)
    inner = np.where((u > 0) & np.isfinite(u), u, np.nan)
    if np.isnan(inner).all():
        return predictor(u, 1, angle)
    largest, smallest = 1 / np.nanmin(inner, axis=-1)[..., None], 1 / np.nanmax(inner, axis=-1)[..., None]
    coordinate = bounded_log_sigma(largest, smallest)
    return predict_and_correct(
        noise_ratios(sigmas), predictor(u, order, coordinate), corrector(u, order, coordinate)
    )


def _log_step(sigmas: Sequence[float], i: int) -> float:
    """Length of step i in log(alpha/s); infinite if it starts at infinity or ends at 0."""
    return math.inf if math.isinf(sigmas[i]) or sigmas[i + 1] == 0 else math.log(sigmas[i] / sigmas[i + 1])


def _held(sigmas: Sequence[float], i: int) -> float:
    """Weight of an x0 held over step i: alpha_{i+1} - alpha_i s_{i+1}/s_i."""
    (alpha, s), (alpha_next, s_next) = alpha_s(sigmas[i]), alpha_s(sigmas[i + 1])
    return alpha_next - alpha * s_next / s


def dpmpp_2m_weights(sigmas: Sequence[float]) -> Weights:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095), first order where the log step is infinite, as usual."""
    weights = []
    for i in range(len(sigmas) - 1):
        slope = 0.0
        if i > 0 and sigmas[i + 1] > 0:
            slope = _log_step(sigmas, i) / (2 * _log_step(sigmas, i - 1))  # h / (2 h_last): 0 across infinity
        weights.append(_held(sigmas, i) * np.array([1 + slope, -slope]))
    return weights


def res_multistep_weights(sigmas: Sequence[float]) -> Weights:
    """RES multistep (Zhang et al., arXiv 2308.02157): x0 linear in log sigma, integrated exactly."""
    positive = sigmas if sigmas[-1] > 0 else sigmas[:-1]
    weights = predictor(inverse_sigmas(positive), 2, log_sigma, first=1 if math.isinf(sigmas[0]) else 0)
    return weights if positive is sigmas else [*weights, np.array([_held(sigmas, len(sigmas) - 2)])]


def unipc_weights(sigmas: Sequence[float]) -> Weights:
    """UniPC (Zhao et al., arXiv 2302.04867), second order, B(h) = e^h - 1 (its authors' ``bh2``).

    Predictor of order 2, first order at the start and at sigma = 0, then a corrector of order 2 whose two weights solve
    the paper's moment equations.  Across infinity the corrector becomes the trapezoid rule in u.
    """
    predict, correct = [], []
    for i in range(len(sigmas) - 1):
        held, h = _held(sigmas, i), _log_step(sigmas, i)
        h_last = _log_step(sigmas, i - 1) if i > 0 else math.inf
        slope = 0.0 if math.isinf(h) else h / (2 * h_last)
        predict.append(held * np.array([1 + slope, -slope]))
        if i == 0 or math.isinf(h):
            correct.append(held * np.array([0.5, 0.5]))
            continue
        b = -math.expm1(-h)
        phi_2 = 1 - b / h
        phi_3 = 0.5 - phi_2 / h
        # [[1, 1], [r, 1]] rho = [phi_2, 2 phi_3] / b with r = -h_last / h, solved by hand to allow h_last = inf
        old_over_r = (phi_2 - 2 * phi_3) / b / ((1 + h_last / h) * (-h_last / h)) if math.isfinite(h_last) else 0.0
        new = phi_2 / b + old_over_r * h_last / h if math.isfinite(h_last) else phi_2 / b
        correct.append(held * np.array([new, 1 - new - old_over_r, old_over_r]))
    return predict_and_correct(noise_ratios(sigmas), predict, correct[:-1])


@lru_cache(maxsize=64)
def multistep_table(rule: Callable[[Sigmas], Weights], sigmas: Sigmas) -> tuple[tuple[float, tuple[float, ...]], ...]:
    """(s_{i+1}/s_i, weights of x0, newest first) of every step, as Python floats."""
    return tuple(
        (float(ratio), tuple(float(w) for w in weights))
        for ratio, weights in zip(noise_ratios(sigmas), rule(sigmas), strict=True)
    )


def _combine(ratio: float, x: torch.Tensor, weights: Sequence[float], history: Sequence[torch.Tensor]) -> torch.Tensor:
    x = ratio * x
    for weight, x0 in zip(weights, history, strict=False):
        x.add_(x0, alpha=weight)
    return x


def _multistep(rule: Callable[[Sigmas], Weights]) -> Callable[..., Evaluations]:
    def solver(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Callable[[], torch.Tensor]) -> Evaluations:
        history = []
        for sigma, (ratio, weights) in zip(sigmas, multistep_table(rule, sigmas), strict=False):
            x, x0 = yield x, sigma
            history = [x0, *history[:3]]
            x = _combine(ratio, x, weights, history)
        return x

    solver.__name__ = rule.__name__.removesuffix("_weights")
    solver.__doc__ = rule.__doc__
    return solver


# ----------------------------------------------------------------------------------------------------------------------
# Other solvers.


def deis(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Callable[[], torch.Tensor]) -> Evaluations:
    """DEIS (Zhang and Chen, arXiv 2204.13902), tAB of order 3: eps a polynomial in the angle, integrated over sigma.

    Dividing the flow by alpha instead of s gives x(b) = alpha_b/alpha_a x(a) + alpha_b * integral of eps dsigma, whose
    weights are those of x0 with signal and noise exchanged, that is with 1/u for u.
    """
    table = _deis_table(sigmas)
    history = []
    for i, weights in enumerate(table):
        x, x0 = yield x, sigmas[i]
        alpha, s = alpha_s(sigmas[i])
        alpha_next, s_next = alpha_s(sigmas[i + 1])
        eps = torch.add(x, x0, alpha=-alpha).div_(s)
        history = [eps, *history[:2]]
        if alpha == 0:  # the step from infinity is DDIM's: eps is the state itself
            x = torch.add(alpha_next * x0, eps, alpha=s_next)
        else:
            x = _combine(alpha_next / alpha, x, weights, history)
    return x


@lru_cache(maxsize=64)
def _deis_table(sigmas: Sigmas) -> tuple[tuple[float, ...], ...]:
    mirrored = [math.pi / 2 - math.atan(sigma) for sigma in sigmas]
    table = []
    for i in range(len(sigmas) - 1):
        if math.isinf(sigmas[i]):
            table.append(())
            continue
        # integral of eps dsigma from sigma_i down to sigma_{i+1}; Gauss-Legendre in asinh(sigma)
        low, high = math.asinh(sigmas[i]), math.asinh(sigmas[i + 1])
        v = low + (high - low) * (_NODES + 1) / 2
        nodes = np.array(mirrored[max(i - 2, 0) : i + 1][::-1])
        polynomials = lagrange(nodes, math.pi / 2 - np.arctan(np.sinh(v)))
        integral = (polynomials * (np.cosh(v) * _NODE_WEIGHTS * (high - low) / 2)).sum(-1)
        table.append(tuple(float(w) for w in integral * alpha_s(sigmas[i + 1])[0]))
    return tuple(table)


def _middle(start: float, end: float) -> float:
    """Where a step's second evaluation goes: the geometric mean, or from infinity halfway in u = 1/sigma."""
    return 2 * end if math.isinf(start) else math.sqrt(start * end)


def _ddim(x: torch.Tensor, x0: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """x at noise level ``end`` when x0 is held over the step."""
    (alpha, s), (alpha_end, s_end) = alpha_s(start), alpha_s(end)
    return torch.add((s_end / s) * x, x0, alpha=alpha_end - alpha * s_end / s)


def _fresh_share(sigma: float, sigma_next: float, eta: float) -> float:
    """Share c of the noise at sigma_next that an ancestral step draws anew; the rest, sqrt(1 - c^2), is kept."""
    return min(1.0, eta * math.sqrt(1 - (sigma_next / sigma) ** 2))


def _add_noise(x: torch.Tensor, start: float, end: float, fresh: torch.Tensor) -> torch.Tensor:
    """Raise x from noise level ``start`` to ``end`` > start, variance-preserving."""
    (alpha, _), (alpha_end, _) = alpha_s(start), alpha_s(end)
    return torch.add((alpha_end / alpha) * x, fresh, alpha=alpha_end * math.sqrt(end**2 - start**2))


def euler_ancestral(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Callable[[], torch.Tensor]) -> Evaluations:
    """DDIM down to less noise than asked for, then fresh noise up to it; eta = 1 is DDPM (arXiv 2010.02502, eq. 16)."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x, x0 = yield x, sigma
        share = _fresh_share(sigma, sigma_next, eta)
        down = sigma_next * math.sqrt(1 - share**2)
        x = _ddim(x, x0, sigma, down)
        if share * sigma_next > 0:
            x = _add_noise(x, down, sigma_next, noise())
    return x


def lcm(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Callable[[], torch.Tensor]) -> Evaluations:
    """Multistep consistency sampling (Song et al., arXiv 2303.01469, Alg. 1): denoise, add all the noise anew."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x, x0 = yield x, sigma
        x = _add_noise(x0, 0.0, sigma_next, noise()) if sigma_next > 0 else x0
    return x


def heun(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Callable[[], torch.Tensor]) -> Evaluations:
    """Euler, a second look at the end, and the step again with x0 linear in the angle between both (two evaluations).

    Heun's method as in Karras et al. (arXiv 2206.00364, Alg. 1), in the angle instead of sigma.
    """
    u = inverse_sigmas(sigmas)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x, x0 = yield x, sigma
        if sigma_next == 0:
            return x0
        _, x0_next = yield _ddim(x, x0, sigma, sigma_next), sigma_next
        weights = integral_weights(u[i : i + 2], u[i], u[i + 1], angle)
        x = _combine(alpha_s(sigma_next)[1] / alpha_s(sigma)[1], x, weights.tolist(), [x0, x0_next])
    return x


def dpmpp_2s_ancestral(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Callable[[], torch.Tensor]) -> Evaluations:
    """DPM-Solver++(2S) (arXiv 2211.01095, Alg. 1) with ancestral noise; eta = 0 is the solver itself (two evaluations)."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x, x0 = yield x, sigma
        if sigma_next == 0:
            return x0
        share = _fresh_share(sigma, sigma_next, eta)
        down = sigma_next * math.sqrt(1 - share**2)
        middle = _middle(sigma, down) if down > 0 else sigma_next
        _, x0_middle = yield _ddim(x, x0, sigma, middle), middle
        x = _ddim(x, x0_middle, sigma, down)
        if share > 0:
            x = _add_noise(x, down, sigma_next, noise())
    return x


def dpmpp_sde(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Callable[[], torch.Tensor]) -> Evaluations:
    """DPM-Solver++ SDE, single step with r = 1/2 (arXiv 2211.01095, as in k-diffusion; two evaluations).

    The noise of the whole step is that of its first half, carried on, plus that of its second half: both halves see one
    Brownian path.
    """
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x, x0 = yield x, sigma
        if sigma_next == 0:
            return x0
        middle = _middle(sigma, sigma_next)
        share = _fresh_share(sigma, middle, eta)
        x_middle = _ddim(x, x0, sigma, middle * math.sqrt(1 - share**2))
        if eta > 0:
            first_half = noise()
            x_middle = _add_noise(x_middle, middle * math.sqrt(1 - share**2), middle, first_half)
        _, x0_middle = yield x_middle, middle

        share = _fresh_share(sigma, sigma_next, eta)
        x = _ddim(x, x0_middle, sigma, sigma_next * math.sqrt(1 - share**2))
        if eta > 0:
            carried = sigma_next / middle * _fresh_share(sigma, middle, 1) / _fresh_share(sigma, sigma_next, 1)
            whole = torch.add(carried * first_half, noise(), alpha=math.sqrt(1 - carried**2))
            x = _add_noise(x, sigma_next * math.sqrt(1 - share**2), sigma_next, whole)
    return x


def dpmpp_2m_sde(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Callable[[], torch.Tensor]) -> Evaluations:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix; k-diffusion's midpoint form)."""
    x0_last = None
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x, x0 = yield x, sigma
        slope = _log_step(sigmas, i) / (2 * _log_step(sigmas, i - 1)) if i > 0 and sigma_next > 0 else 0.0
        target = torch.lerp(x0, x0_last, -slope) if slope else x0
        x = _sde_step(x, target, sigma, sigma_next, eta, noise)
        x0_last = x0
    return x


def dpmpp_3m_sde(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Callable[[], torch.Tensor]) -> Evaluations:
    """SDE-DPM-Solver++(3M) of k-diffusion: exponential integrator of third order in log sigma."""
    history = []
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x, x0 = yield x, sigma
        h = (1 + eta) * _log_step(sigmas, i)
        past = [x_past for x_past, length in history if math.isfinite(length)] if math.isfinite(h) else []
        target = x0
        if past:
            phi_1 = -math.expm1(-h) / h
            phi_2 = 1 - phi_1
            phi_3 = phi_2 / h - 0.5
            r_0 = (1 + eta) * history[0][1] / h
            slope = (x0 - past[0]) / r_0
            if len(past) > 1:
                r_1 = (1 + eta) * history[1][1] / h
                bend = (slope - (past[0] - past[1]) / r_1) / (r_0 + r_1)
                slope = slope + r_0 * bend
                target = torch.add(target, bend, alpha=-phi_3 / (h * phi_1))
            target = torch.add(target, slope, alpha=phi_2 / (h * phi_1))
        x = _sde_step(x, target, sigma, sigma_next, eta, noise)
        history = [(x0, _log_step(sigmas, i)), *history[:1]]
    return x


def _sde_step(
    x: torch.Tensor, x0: torch.Tensor, sigma: float, sigma_next: float, eta: float, noise: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Exact step of the reverse SDE with x0 held; eta = 0 is the flow, eta = 1 the reverse of the forward process."""
    if sigma_next == 0:
        return x0.clone()
    ratio = sigma_next / sigma
    (_, s), (alpha_next, s_next) = alpha_s(sigma), alpha_s(sigma_next)
    x = torch.add((s_next / s * ratio**eta) * x, x0, alpha=alpha_next * (1 - ratio ** (1 + eta)))
    return x.add_(noise(), alpha=s_next * math.sqrt(1 - ratio ** (2 * eta))) if eta > 0 else x


# ----------------------------------------------------------------------------------------------------------------------

SOLVER_FUNCTIONS: dict[str, Callable[..., Evaluations]] = {
    "adams": _multistep(adams_weights),
    "angle": _multistep(angle_weights),
    "euler": _multistep(euler_weights),
    "heun": heun,
    "dpmpp_2m": _multistep(dpmpp_2m_weights),
    "unipc": _multistep(unipc_weights),
    "deis": deis,
    "res_multistep": _multistep(res_multistep_weights),
    "euler_ancestral": euler_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "lcm": lcm,
}
SOLVERS = tuple(SOLVER_FUNCTIONS)
DEFAULT_SOLVER = "adams"
TWO_EVALUATION_SOLVERS = ("heun", "dpmpp_2s_ancestral", "dpmpp_sde")
