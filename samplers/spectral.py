"""The default solver and spacing: exact for what a latent is made of.

A latent is a sum of modes whose standard deviations run from about 0.05 (fine texture) to the side length of the canvas
(its brightness).  For a Gaussian mode of standard deviation a everything is known in closed form.  On its way from
infinity it is x proportional to s sqrt(1 + a^2 u^2), with u = 1/sigma, and what the network predicts along that way is

    x0(u) = a * a u / sqrt(1 + a^2 u^2)

In log sigma these curves are copies of each other, shifted by log a.  Hence the spacing: even in log sigma, from a
noise level that hides the largest mode to one that leaves the smallest alone.  And hence the solver: it interpolates x0
not by a polynomial but in the span of these curves, by least squares over all a.  docs/mathematics.md has the
derivation, and what else was tried.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .multistep import Weights, inverse_sigmas, noise_ratios, predict_and_correct

MEMORY = 4  # x0 values that a step looks at while x0 moves smoothly,
CAUTIOUS_MEMORY = 2  # and where it jumps:
CAUTION = (0.5, 1.0)  # the disagreement of both up to which the first is used, and that from which the second is
RIDGE = 7e-5  # share of the change of x0 that no Gaussian mode explains: keeps the weights moderate
SHORT_STEP = 0.03  # mean square change of the state in a step (about 0.5 in log sigma) below which that share shrinks
MODE_RANGE = (1.25, 0.4)  # modes fitted: from this times the smallest finite sigma to this times the largest
SMALLEST_MODE = 0.1  # the spacing serves modes from here to the canvas length
START = 5.0  # first finite sigma over the canvas length: there brightness is undecided, under guidance as well
STEPS_PER_START = 3  # of which fewer steps span less: one canvas length for so many


def spectral_weights(sigmas: Sequence[float] | np.ndarray, memory: int = MEMORY) -> Weights:
    """Predictor-corrector through the last x0, interpolated in the span of Gaussian modes: a linear multistep solver.

    Args:
        sigmas: (..., N + 1), the first may be inf and the last 0; leading dimensions run over schedules.
        memory: how many x0 a step looks at.

    Returns:
        N arrays (..., k), weights of x0, newest first.
    """
    return predict_and_correct(noise_ratios(sigmas), *spectral_table(sigmas, memory))


def spectral_table(sigmas: Sequence[float] | np.ndarray, memory: int) -> tuple[Weights, Weights]:
    """Weights of x0 in each of the N steps, and in all but the last once more when x0 at their end is known too."""
    u = inverse_sigmas(sigmas)
    steps = u.shape[-1] - 1
    inner = np.where((u > 0) & np.isfinite(u), u, np.nan)
    if np.isnan(inner).all():  # from infinity to 0 at once
        return [np.ones((*u.shape[:-1], 1))], []
    low, high = MODE_RANGE[0] / np.nanmax(inner, axis=-1), MODE_RANGE[1] / np.nanmin(inner, axis=-1)
    modes = np.geomspace(low, np.maximum(high, 2 * low), 64, axis=-1)

    def fitted(step: int, newest: int) -> np.ndarray:
        nodes = u[..., max(newest - memory + 1, 0) : newest + 1][..., ::-1]
        return _fit(modes, nodes, u[..., step], u[..., step + 1])

    return [fitted(i, newest=i) for i in range(steps)], [fitted(i, newest=i + 1) for i in range(steps - 1)]


def _fit(modes: np.ndarray, nodes: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Weights of x0 at the nodes that best carry all modes from start to end.

    Least squares of the relative error over log a, under the constraint that a constant x0 is carried exactly (so the
    mean of a picture has no bias whatever the steps are), with a small ridge.

    Args:
        modes: (..., M) standard deviations, evenly spaced in their logarithm.
        nodes: (..., k) u of the known x0, newest first.
        start, end: (...) u of the step's ends; end = inf stands for sigma = 0.

    Returns:
        (..., k)
    """
    if np.isinf(end).all():
        state, gain, held = modes, modes, np.ones(end.shape)
    else:
        s = 1 / np.hypot(1, end)
        state = s[..., None] * np.hypot(1, modes * end[..., None])
        gain = state - s[..., None] * np.hypot(1, modes * start[..., None])
        held = s * (end - start)
    x0 = _mode_x0(modes[..., None, :], nodes[..., None])
    # the sum of the weights is ``held``, so only the differences to the newest x0 are free
    design = (x0[..., 1:, :] - x0[..., :1, :]) / state[..., None, :]
    target = (gain - held[..., None] * x0[..., 0, :]) / state
    normal = design @ design.swapaxes(-1, -2)
    mean_square = np.trace(normal, axis1=-2, axis2=-1) / max(normal.shape[-1], 1)
    change = held**2 * mean_square * np.log(modes[..., 1] / modes[..., 0])
    # shrinking with the step, the ridge leaves the second order intact; what remains keeps the matrix regular
    ridge = mean_square * (RIDGE * np.minimum(1, change / SHORT_STEP) + 1e-12)
    normal = normal + ridge[..., None, None] * np.eye(normal.shape[-1])
    free = np.linalg.solve(normal, design @ target[..., None])[..., 0]
    return np.concatenate([held[..., None] - free.sum(-1, keepdims=True), free], axis=-1)


def _mode_x0(modes: np.ndarray, u: np.ndarray) -> np.ndarray:
    """What the network predicts for a mode on its exact way, per unit of the noise it began with."""
    with np.errstate(divide="ignore"):
        return modes / np.hypot(1, 1 / (modes * u))


def mode_errors(sigmas: np.ndarray, weights: Weights, modes: np.ndarray) -> np.ndarray:
    """Relative error with which a multistep solver reproduces Gaussian modes: a product in closed form.

    For a mode of standard deviation a the network is linear, x0 = alpha a^2 / (alpha^2 a^2 + s^2) x, so the whole run
    multiplies the noise by a number; exactly it would be a.

    Args:
        sigmas: (..., N + 1) from infinity to 0.
        weights: of the solver, see ``Weights``.
        modes: (M,) standard deviations.

    Returns:
        (..., M); 0 is exact, -1 has lost the mode.
    """
    u, ratios = inverse_sigmas(sigmas), noise_ratios(sigmas)
    x = np.ones((*u.shape[:-1], len(modes)))
    history = []
    for i, step_weights in enumerate(weights):
        # alpha a^2 / (alpha^2 a^2 + s^2), divided by s^2 above and below
        gain = modes**2 * u[..., i, None] / (1 + (modes * u[..., i, None]) ** 2)
        history = [x * gain * np.hypot(1, u[..., i, None]), *history[: step_weights.shape[-1] - 1]]
        x = ratios[..., i, None] * x + sum(
            step_weights[..., j, None] * past for j, past in enumerate(history[: step_weights.shape[-1]])
        )
    return x / modes - 1


@lru_cache(maxsize=256)
def spectral_sigmas(steps: int, canvas: float | None, start: float | None, sigma_min: float) -> tuple[float, ...]:
    """Finite sigmas of the spectral spacing: even in log sigma, with ends that minimise the worst mode error.

    The first sigma is START times the canvas length, or less where there are fewer steps to span the range; the last
    one is searched for, and below eight steps a nearer first one too.  Past forty steps the end no longer matters
    and is sigma_min.

    Args:
        steps: how many, at least 1; infinity before and 0 behind them are not counted.
        canvas: sqrt(height * width) of the latent, the standard deviation of a mode of unit brightness spread; None
            takes it from start.
        start: first sigma, if it is to be another than the default.
        sigma_min: least noise the model knows.

    Returns:
        (steps,) descending.
    """
    reach = min(START, steps / STEPS_PER_START)
    canvas = start / reach if canvas is None else canvas
    starts = np.array([reach * canvas if start is None else start])
    if start is None and steps < 8:
        starts = np.maximum(starts * 2.0 ** -np.arange(8), 2 * sigma_min)
    first, last = np.meshgrid(starts, np.geomspace(sigma_min, 0.25, 12) if steps < 40 else [sigma_min])
    last = np.maximum(np.minimum(last, first / 2), sigma_min)
    candidates = np.geomspace(first.ravel(), last.ravel(), steps, axis=-1)
    if steps == 1:
        candidates = np.geomspace(sigma_min, starts[0], 48)[:, None]
    if len(candidates) == 1:
        return tuple(candidates[0].tolist())
    ends = np.ones((len(candidates), 1))
    sigmas = np.concatenate([ends * math.inf, candidates, ends * 0], axis=-1)
    modes = np.geomspace(SMALLEST_MODE, max(canvas, 2 * SMALLEST_MODE), 48)
    errors = np.abs(mode_errors(sigmas, spectral_weights(sigmas), modes)).max(-1)
    return tuple(candidates[errors.argmin()].tolist())
