"""Update rules, each written as the algorithm it is.

A solver is a function ``solver(run, x, x0, noise) -> x``.  The network was asked about x at noise level ``run.sigma``
and has answered x0.  The solver returns the state to ask about next, at ``run.levels[run.index + 1]``; after the last
evaluation, the state at the last sigma.  What it needs to know later it leaves in ``run`` (``protocol``).  Whoever
drives it (``sample``, the diffusers scheduler, a ComfyUI sampler) only asks the network, so every door takes exactly
the same steps.  The state may be changed between two evaluations, as inpainting does.

    x, x0   (B, C, H, W) float32; x is variance-preserving: x = alpha x0 + s eps, alpha^2 + s^2 = 1
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
from .protocol import Noise, Run, Sigmas, Solver
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


def _multistep(rule: Callable[[Sigmas], Weights]) -> Solver:
    def solver(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
        table = multistep_table(rule, run.sigmas)
        ratio, weights = table[run.step]
        return _combine(ratio, x, weights, run.remember(x0, max(len(weights) for _, weights in table)))

    solver.__name__ = rule.__name__.removesuffix("_weights")
    solver.__doc__ = rule.__doc__
    return solver


# ----------------------------------------------------------------------------------------------------------------------
# Other solvers.


def deis(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """DEIS (Zhang and Chen, arXiv 2204.13902), order 3: eps a polynomial in log sigma, integrated over sigma.

    Dividing the flow by alpha instead of s gives x(b) = alpha_b/alpha_a x(a) + alpha_b * integral of eps dsigma.  The
    steps from infinity and to 0, where log sigma has no end, are DDIM's.
    """
    start, end = run.ends
    weights = _deis_table(run.sigmas)[run.step]
    if not weights:
        return _ddim(x, x0, start, end)
    (alpha, s), (alpha_end, _) = alpha_s(start), alpha_s(end)
    eps = torch.add(x, x0, alpha=-alpha).div_(s)
    return _combine(alpha_end / alpha, x, weights, run.remember(eps, 3))


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


def euler_ancestral(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """DDIM down to less noise than asked for, then fresh noise up to it; eta = 1 is DDPM (arXiv 2010.02502, eq. 16)."""
    start, end = run.ends
    share = _fresh_share(start, end, run.eta)
    down = end * math.sqrt(1 - share**2)
    x = _ddim(x, x0, start, down)
    return _add_noise(x, down, end, noise()) if share * end > 0 else x


def lcm(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Multistep consistency sampling (Song et al., arXiv 2303.01469, Alg. 1): denoise, add all the noise anew."""
    _, end = run.ends
    return _add_noise(x0, 0.0, end, noise()) if end > 0 else x0


def heun(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Euler, a second look at the end, and the step again with x0 linear in the angle between both (two evaluations).

    Heun's method as in Karras et al. (arXiv 2206.00364, Alg. 1), in the angle instead of sigma.
    """
    start, end = run.ends
    if end == 0:
        return x0
    if not run.is_second_look:
        run.kept = x, x0
        return _ddim(x, x0, start, end)
    x, x0_start = run.kept
    u = inverse_sigmas(run.ends)
    weights = integral_weights(u, *u, angle)
    return _combine(alpha_s(end)[1] / alpha_s(start)[1], x, weights.tolist(), [x0_start, x0])


def dpmpp_2s_ancestral(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """DPM-Solver++(2S) (arXiv 2211.01095, Alg. 1) with ancestral noise, bare at eta = 0 (two evaluations)."""
    start, end = run.ends
    if end == 0:
        return x0
    if not run.is_second_look:
        run.kept = x
        return _ddim(x, x0, start, run.levels[run.index + 1])
    share = _fresh_share(start, end, run.eta)
    down = end * math.sqrt(1 - share**2)
    x = _ddim(run.kept, x0, start, down)
    return _add_noise(x, down, end, noise()) if share > 0 else x


def _dpmpp_2s_middle(start: float, end: float, eta: float) -> float:
    down = end * math.sqrt(1 - _fresh_share(start, end, eta) ** 2)
    return _middle(start, down) if down > 0 else end


def dpmpp_sde(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """DPM-Solver++ SDE, single step with r = 1/2 (arXiv 2211.01095, as in k-diffusion; two evaluations).

    The noise of the whole step is that of its first half, carried on, plus that of its second half: both halves see one
    Brownian path.
    """
    start, end = run.ends
    if end == 0:
        return x0
    middle = _middle(start, end)
    if not run.is_second_look:
        first_half = noise() if run.eta > 0 else None
        run.kept = x, first_half
        share = _fresh_share(start, middle, run.eta)
        down = middle * math.sqrt(1 - share**2)
        x = _ddim(x, x0, start, down)
        return x if first_half is None else _add_noise(x, down, middle, first_half)

    x, first_half = run.kept
    share = _fresh_share(start, end, run.eta)
    down = end * math.sqrt(1 - share**2)
    x = _ddim(x, x0, start, down)
    if first_half is None:
        return x
    carried = end / middle * _fresh_share(start, middle, 1) / _fresh_share(start, end, 1)
    return _add_noise(x, down, end, torch.add(carried * first_half, noise(), alpha=math.sqrt(1 - carried**2)))


def dpmpp_2m_sde(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix; k-diffusion's midpoint form)."""
    slope = _slope(run.sigmas, run.step)
    history = run.remember(x0, 2)
    target = torch.lerp(x0, history[1], -slope) if slope else x0
    return _sde_step(x, target, *run.ends, run.eta, noise)


def dpmpp_3m_sde(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """SDE-DPM-Solver++(3M) of k-diffusion: exponential integrator of third order in log sigma."""
    h, *lengths = ((1 + run.eta) * _log_step(run.sigmas, i) for i in range(run.step, max(run.step - 3, -1), -1))
    target = x0
    # a difference across infinity, where log sigma has no end, is none
    past = [x0_past for x0_past, length in zip(run.history, lengths, strict=False) if math.isfinite(length)]
    if past and math.isfinite(h):
        phi_1 = -math.expm1(-h) / h
        phi_2 = 1 - phi_1
        phi_3 = phi_2 / h - 0.5
        r_0 = lengths[0] / h
        slope = (x0 - past[0]) / r_0
        if len(past) > 1:
            r_1 = lengths[1] / h
            bend = (slope - (past[0] - past[1]) / r_1) / (r_0 + r_1)
            slope = slope + r_0 * bend
            target = torch.add(target, bend, alpha=-phi_3 / (h * phi_1))
        target = torch.add(target, slope, alpha=phi_2 / (h * phi_1))
    run.remember(x0, 2)
    return _sde_step(x, target, *run.ends, run.eta, noise)


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

SOLVER_FUNCTIONS: dict[str, Solver] = {
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
# Where solvers that evaluate twice a step look a second time: (start, end, eta) -> sigma.
SECOND_LOOKS: dict[str, Callable[[float, float, float], float]] = {
    "heun": lambda start, end, eta: end,
    "dpmpp_2s_ancestral": _dpmpp_2s_middle,
    "dpmpp_sde": lambda start, end, eta: _middle(start, end),
}
