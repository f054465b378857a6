"""One-step update rules, each written as the algorithm it is.

A solver is a generator function ``solver(x, sigmas, eta, noise)``.  Where the paper calls the network, it yields
``(x, sigma)`` and is sent back ``(x, x0)``: the state (an inpainting pipeline may have changed it meanwhile) and the
denoised picture.  Its return value is the state at the last sigma.  Whoever drives it (``sample``, the diffusers
scheduler, a ComfyUI sampler) only answers questions, so every door takes exactly the same steps.

    x       (B, C, H, W) float32, variance-preserving: x = alpha x0 + s eps, alpha^2 + s^2 = 1
    sigmas  decreasing floats; the first may be inf, the last may be 0
    eta     how much of the removed noise a stochastic solver replaces by fresh noise; 0 is the deterministic flow
    noise   function without arguments: a fresh unit Gaussian like x

Infinity is an ordinary point of all of them: x is the noise itself there, and no rule divides by alpha or multiplies by
sigma.  Deterministic multistep solvers are tables of weights (``multistep``); the others are written out below.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch

from .er_sde import er_sde
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
from .protocol import Evaluations, Noise, Sigmas
from .sa_solver import sa_solver
from .spectral_solver import spectral

# ----------------------------------------------------------------------------------------------------------------------
# Deterministic multistep solvers: a table of weights each.


def euler_weights(sigmas: Sequence[float]) -> Weights:
    """DDIM (Song et al., arXiv 2010.02502): x0 is held over the step."""
    return predictor(inverse_sigmas(sigmas), 1, angle)


def angle_weights(sigmas: Sequence[float]) -> Weights:
    """Second order, x0 linear in the angle phi = atan(sigma); infinity and 0 are ordinary points of it.

    A slope is carried no further than it was measured: where a step is longer in the angle than the one before, the
    part of it that is beyond that length sees a constant x0.
    """
    u = inverse_sigmas(sigmas)
    lengths = -np.diff(angle(u))
    weights = predictor(u, 2, angle)
    for i in range(1, len(weights)):
        slope = weights[i][1] * min(1, lengths[i - 1] / lengths[i])
        weights[i] = np.array([weights[i].sum() - slope, slope])
    return weights


def _log_step(sigmas: Sequence[float], i: int) -> float:
    """Length of step i in log(alpha/s); infinite if it starts at infinity or ends at 0."""
    return math.inf if math.isinf(sigmas[i]) or sigmas[i + 1] == 0 else math.log(sigmas[i] / sigmas[i + 1])


def _slope(sigmas: Sequence[float], i: int) -> float:
    """h / (2 h_last) of DPM-Solver++(2M): 0 across infinity, and first order in steps to 0 and at the start."""
    return _log_step(sigmas, i) / (2 * _log_step(sigmas, i - 1)) if i > 0 and sigmas[i + 1] > 0 else 0.0


def _held(sigma: float, sigma_next: float) -> float:
    """Weight of an x0 held over a step: alpha_next - alpha s_next/s."""
    (alpha, s), (alpha_next, s_next) = alpha_s(sigma), alpha_s(sigma_next)
    return alpha_next - alpha * s_next / s


def dpmpp_2m_weights(sigmas: Sequence[float]) -> Weights:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095), first order where the log step is infinite, as usual."""
    slopes = [_slope(sigmas, i) for i in range(len(sigmas) - 1)]
    steps = itertools.pairwise(sigmas)
    return [_held(*step) * np.array([1 + slope, -slope]) for step, slope in zip(steps, slopes, strict=True)]


def res_multistep_weights(sigmas: Sequence[float]) -> Weights:
    """RES multistep (Zhang et al., arXiv 2308.02157): x0 linear in log sigma, integrated exactly."""
    positive = sigmas if sigmas[-1] > 0 else sigmas[:-1]
    weights = predictor(inverse_sigmas(positive), 2, log_sigma, first=1 if math.isinf(sigmas[0]) else 0)
    return weights if positive is sigmas else [*weights, np.array([_held(*sigmas[-2:])])]


def unipc_weights(sigmas: Sequence[float]) -> Weights:
    """UniPC (Zhao et al., arXiv 2302.04867), second order, B(h) = e^h - 1 (its authors' ``bh2``).

    Predictor of order 2, first order at the start and at sigma = 0, then a corrector of order 2 whose two weights solve
    the paper's moment equations.  Across infinity the corrector becomes the trapezoid rule in u.
    """
    predict, correct = [], []
    for i in range(len(sigmas) - 1):
        held, h, slope = _held(sigmas[i], sigmas[i + 1]), _log_step(sigmas, i), _slope(sigmas, i)
        predict.append(held * np.array([1 + slope, -slope]))
        if i == 0 or math.isinf(h):
            correct.append(held * np.array([0.5, 0.5]))
            continue
        h_last = _log_step(sigmas, i - 1)
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
    def solver(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Noise) -> Evaluations:
        table = multistep_table(rule, sigmas)
        memory = max(len(weights) for _, weights in table)
        history = []
        for sigma, (ratio, weights) in zip(sigmas, table, strict=False):
            x, x0 = yield x, sigma
            history = [x0, *history[: memory - 1]]
            x = _combine(ratio, x, weights, history)
        return x

    solver.__name__ = rule.__name__.removesuffix("_weights")
    solver.__doc__ = rule.__doc__
    return solver


# ----------------------------------------------------------------------------------------------------------------------
# Other solvers.


def deis(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Noise) -> Evaluations:
    """DEIS (Zhang and Chen, arXiv 2204.13902), order 3: eps a polynomial in log sigma, integrated over sigma.

    Dividing the flow by alpha instead of s gives x(b) = alpha_b/alpha_a x(a) + alpha_b * integral of eps dsigma.  The
    steps from infinity and to 0, where log sigma has no end, are DDIM's.
    """
    history = []
    for i, weights in enumerate(_deis_table(sigmas)):
        x, x0 = yield x, sigmas[i]
        if not weights:
            x = _ddim(x, x0, sigmas[i], sigmas[i + 1])
            continue
        (alpha, s), (alpha_next, _) = alpha_s(sigmas[i]), alpha_s(sigmas[i + 1])
        history = [torch.add(x, x0, alpha=-alpha).div_(s), *history[:2]]
        x = _combine(alpha_next / alpha, x, weights, history)
    return x


@lru_cache(maxsize=64)
def _deis_table(sigmas: Sigmas) -> tuple[tuple[float, ...], ...]:
    """Weights of eps, newest first; none where a step begins at infinity or ends at 0."""
    table = []
    for i in range(len(sigmas) - 1):
        if math.isinf(_log_step(sigmas, i)):
            table.append(())
            continue
        nodes = np.log([sigma for sigma in sigmas[max(i - 2, 0) : i + 1][::-1] if math.isfinite(sigma)])
        sigma, dsigma = gauss_legendre(sigmas[i], sigmas[i + 1])
        integral = lagrange(nodes, np.log(sigma)) @ dsigma
        table.append(tuple(float(w) for w in integral * alpha_s(sigmas[i + 1])[0]))
    return tuple(table)


def _middle(start: float, end: float) -> float:
    """Where a step's second evaluation goes: the geometric mean, or from infinity halfway in u = 1/sigma."""
    return 2 * end if math.isinf(start) else math.sqrt(start * end)


def _ddim(x: torch.Tensor, x0: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """x at noise level ``end`` when x0 is held over the step."""
    ratio = alpha_s(end)[1] / alpha_s(start)[1]
    return torch.add(ratio * x, x0, alpha=_held(start, end))


def _fresh_share(sigma: float, sigma_next: float, eta: float) -> float:
    """Share c of the noise at sigma_next that an ancestral step draws anew; the rest, sqrt(1 - c^2), is kept."""
    return min(1.0, eta * math.sqrt(1 - (sigma_next / sigma) ** 2))


def _add_noise(x: torch.Tensor, start: float, end: float, fresh: torch.Tensor) -> torch.Tensor:
    """Raise x from noise level ``start`` to ``end`` > start, variance-preserving."""
    (alpha, _), (alpha_end, _) = alpha_s(start), alpha_s(end)
    return torch.add((alpha_end / alpha) * x, fresh, alpha=alpha_end * math.sqrt(end**2 - start**2))


def euler_ancestral(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Noise) -> Evaluations:
    """DDIM down to less noise than asked for, then fresh noise up to it; eta = 1 is DDPM (arXiv 2010.02502, eq. 16)."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x, x0 = yield x, sigma
        share = _fresh_share(sigma, sigma_next, eta)
        down = sigma_next * math.sqrt(1 - share**2)
        x = _ddim(x, x0, sigma, down)
        if share * sigma_next > 0:
            x = _add_noise(x, down, sigma_next, noise())
    return x


def lcm(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Noise) -> Evaluations:
    """Multistep consistency sampling (Song et al., arXiv 2303.01469, Alg. 1): denoise, add all the noise anew."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x, x0 = yield x, sigma
        x = _add_noise(x0, 0.0, sigma_next, noise()) if sigma_next > 0 else x0
    return x


def heun(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Noise) -> Evaluations:
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


def dpmpp_2s_ancestral(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Noise) -> Evaluations:
    """DPM-Solver++(2S) (arXiv 2211.01095, Alg. 1) with ancestral noise, bare at eta = 0 (two evaluations)."""
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


def dpmpp_sde(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Noise) -> Evaluations:
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


def dpmpp_2m_sde(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Noise) -> Evaluations:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix; k-diffusion's midpoint form)."""
    x0_last = None
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x, x0 = yield x, sigma
        slope = _slope(sigmas, i)
        target = torch.lerp(x0, x0_last, -slope) if slope else x0
        x = _sde_step(x, target, sigma, sigma_next, eta, noise)
        x0_last = x0
    return x


def dpmpp_3m_sde(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Noise) -> Evaluations:
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
    x: torch.Tensor, x0: torch.Tensor, sigma: float, sigma_next: float, eta: float, noise: Noise
) -> torch.Tensor:
    """Exact step of the reverse SDE with x0 held; eta = 0 is the flow, eta = 1 the reverse of the forward process."""
    if sigma_next == 0:
        return x0
    ratio = sigma_next / sigma
    (_, s), (alpha_next, s_next) = alpha_s(sigma), alpha_s(sigma_next)
    x = torch.add((s_next / s * ratio**eta) * x, x0, alpha=alpha_next * (1 - ratio ** (1 + eta)))
    return x.add_(noise(), alpha=s_next * math.sqrt(1 - ratio ** (2 * eta))) if eta > 0 else x


# ----------------------------------------------------------------------------------------------------------------------

SOLVER_FUNCTIONS: dict[str, Callable[..., Evaluations]] = {
    "spectral": spectral,
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
    "er_sde": er_sde,
    "sa_solver": sa_solver,
    "lcm": lcm,
}
SOLVERS = tuple(SOLVER_FUNCTIONS)
DEFAULT_SOLVER = "spectral"
TWO_EVALUATION_SOLVERS = ("heun", "dpmpp_2s_ancestral", "dpmpp_sde")
