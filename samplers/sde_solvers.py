"""Solvers with fresh noise in every step; ``protocol`` says what a solver is.

eta is the share of that noise: 0 is the deterministic flow, 1 the reverse of the forward process.
"""

import math

import torch

from .prediction import alpha_s
from .protocol import Noise, Run, solver
from .steps import add_noise, ddim, fresh_share, log_length, midpoint, slope_2m


@solver(stochastic=True)
def euler_ancestral(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """DDIM below the noise level asked for, then fresh noise up to it (arXiv 2010.02502, eq. 16; eta = 1 is DDPM)."""
    start, end = run.ends
    # The noise at the end has variance down^2 + (share end)^2 = end^2: the first part is kept, the second drawn anew.
    share = fresh_share(start, end, run.eta)
    down = end * math.sqrt(1 - share**2)
    x = ddim(x, x0, start, down)
    return add_noise(x, down, end, noise()) if share * end > 0 else x


def _dpmpp_2s_middle(start: float, end: float, eta: float) -> float:
    """Middle of the deterministic part of a step; where that part ends at 0, the end of the step."""
    down = end * math.sqrt(1 - fresh_share(start, end, eta) ** 2)
    return midpoint(start, down) if down > 0 else end


@solver(evaluations=2, stochastic=True, second_look=_dpmpp_2s_middle)
def dpmpp_2s_ancestral(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """DPM-Solver++(2S) (arXiv 2211.01095, Alg. 1) with ancestral noise; none at eta = 0."""
    start, end = run.ends
    if end == 0:
        return x0
    if not run.is_second_look:
        # Half a step, to ask the network in the middle.
        run.kept = x
        return ddim(x, x0, start, run.levels[run.index + 1])
    # The whole step from its beginning, with the middle's x0; then the noise.
    share = fresh_share(start, end, run.eta)
    down = end * math.sqrt(1 - share**2)
    x = ddim(run.kept, x0, start, down)
    return add_noise(x, down, end, noise()) if share > 0 else x


@solver(evaluations=2, stochastic=True, second_look=lambda start, end, eta: midpoint(start, end))
def dpmpp_sde(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """DPM-Solver++ SDE (arXiv 2211.01095), single step with r = 1/2 as in k-diffusion.

    The noise of the whole step is that of its first half, scaled, plus that of its second half: both halves follow one
    Brownian path.
    """
    start, end = run.ends
    if end == 0:
        return x0
    middle = midpoint(start, end)
    if not run.is_second_look:
        # An ancestral step to the middle.
        first_half = noise() if run.eta > 0 else None
        run.kept = x, first_half
        share = fresh_share(start, middle, run.eta)
        down = middle * math.sqrt(1 - share**2)
        x = ddim(x, x0, start, down)
        return x if first_half is None else add_noise(x, down, middle, first_half)

    # The whole step from its beginning, with the middle's x0.
    x, first_half = run.kept
    share = fresh_share(start, end, run.eta)
    down = end * math.sqrt(1 - share**2)
    x = ddim(x, x0, start, down)
    if first_half is None:
        return x
    # Of the whole step's unit noise the first half makes this share, by its variance in the Brownian path; the second
    # half makes the rest.
    carried = end / middle * fresh_share(start, middle, 1) / fresh_share(start, end, 1)
    return add_noise(x, down, end, torch.add(carried * first_half, noise(), alpha=math.sqrt(1 - carried**2)))


@solver(stochastic=True)
def dpmpp_2m_sde(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix), in k-diffusion's midpoint form."""
    # x0 extrapolated to the middle of the step in log sigma, then held.
    slope = slope_2m(run.sigmas, run.step)
    history = run.remember(x0, 2)
    target = torch.lerp(x0, history[1], -slope) if slope else x0
    return _sde_step(x, target, *run.ends, run.eta, noise)


@solver(stochastic=True)
def dpmpp_3m_sde(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """SDE-DPM-Solver++(3M) of k-diffusion: third order, x0 a parabola in log sigma, integrated exactly.

    Lengths are (1 + eta) times those in log sigma, the rate at which the reverse SDE forgets the state.
    """
    h, *lengths = ((1 + run.eta) * log_length(run.sigmas, i) for i in range(run.step, max(run.step - 3, -1), -1))
    target = x0
    # Log sigma has no value at infinity, so no difference reaches back there.
    past = [x0_past for x0_past, length in zip(run.history, lengths, strict=False) if math.isfinite(length)]
    if past and math.isfinite(h):
        # slope and bend are divided differences of x0 in units of h; the phi integrate them against the exponential.
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
