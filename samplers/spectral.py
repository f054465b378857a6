"""The default spacing, and the tables of the default solver: exact for what a latent is made of.

A latent is a sum of modes whose standard deviations run from about 0.05 (fine texture) to the side length of the canvas
(its brightness).  For a Gaussian mode of standard deviation a everything is known in closed form.  On its way from
infinity it is x proportional to s sqrt(1 + a^2 u^2), with u = 1/sigma, and what the network predicts along that way is

    x0(u) = a * a u / sqrt(1 + a^2 u^2)

In log sigma these curves are copies of each other, shifted by log a.  Hence the spacing: even in log sigma, from a
noise level that hides the largest mode to one that leaves the smallest alone, and denser where guidance makes the flow
stiff.  And hence the solver: it interpolates x0 not by a polynomial but in the span of these curves, by least squares
over all a.  docs/mathematics.md has the derivation, and what else was tried.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..errors import UserError
from .multistep import Weights, gauss_legendre, inverse_sigmas, noise_ratios, predict_and_correct

MEMORY = 4  # values of x0 that a step uses while x0 moves smoothly
RIDGE = 7e-5  # share of the change of x0 that no Gaussian mode explains: keeps the weights moderate
SHORT_STEP = 0.03  # mean square change of the state in a step (about 0.5 in log sigma) below which RIDGE shrinks
MODE_RANGE = (1.25, 0.4)  # modes fitted: from this times the smallest finite sigma to this times the largest

SMALLEST_MODE = 0.1  # the spacing serves modes from here to the canvas length
START = 5.0  # first finite sigma over the canvas length: there brightness is undecided, under guidance as well
STEPS_PER_START = (3, 6)  # with few steps, steps per canvas length of START: without guidance, and from CFG 4 on
# Guidance makes the flow stiff around the noise that decides a prompt's brightness: there steps are denser.
STIFF_AT = 0.45  # times the canvas length
STIFF_WIDTH = (0.65, 2.2)  # in log sigma, above and below,
STIFF_WIDTH_PER_STEP = 0.22  # and below no more than this for each step
STIFFNESS, MOST_STIFFNESS = 2.0, 3.0  # additional steps there, over those elsewhere: per unit of guidance, at most

FINISH_FROM = 10  # steps from which the last one is fitted to what the run carries
DECISION_WIDTH = 0.2  # of a jump of x0, in log sigma
BEYOND = 1.0  # how far beyond the last sigma jumps are still expected, in log sigma


def spectral_weights(sigmas: Sequence[float] | np.ndarray, memory: int = MEMORY) -> Weights:
    """Predictor-corrector through the last x0, interpolated in the span of Gaussian modes: a linear multistep solver.

    Args:
        sigmas: (..., N + 1), the first may be inf and the last 0; leading dimensions run over schedules.
        memory: values of x0 that a step uses.

    Returns:
        N arrays (..., k), weights of x0, newest first.
    """
    return predict_and_correct(noise_ratios(sigmas), *spectral_table(sigmas, memory))


def spectral_table(sigmas: Sequence[float] | np.ndarray, memory: int = MEMORY) -> tuple[Weights, Weights]:
    """Predictor weights of x0 in each of the N steps; corrector weights, x0 at the end known, in all but the last."""
    u = inverse_sigmas(sigmas)
    steps = u.shape[-1] - 1
    modes = fitted_modes(u)
    if modes is None:  # from infinity to 0 at once
        return [np.ones((*u.shape[:-1], 1))], []

    def fitted(step: int, newest: int) -> np.ndarray:
        nodes = u[..., max(newest - memory + 1, 0) : newest + 1][..., ::-1]
        return _fit(modes, nodes, u[..., step], u[..., step + 1])

    return [fitted(i, newest=i) for i in range(steps)], [fitted(i, newest=i + 1) for i in range(steps - 1)]


def fitted_modes(u: np.ndarray) -> np.ndarray | None:
    """(..., 64) standard deviations of the modes that a schedule is fitted to; None if no sigma is finite."""
    inner = np.where((u > 0) & np.isfinite(u), u, np.nan)
    if np.isnan(inner).all():
        return None
    low, high = MODE_RANGE[0] / np.nanmax(inner, axis=-1), MODE_RANGE[1] / np.nanmin(inner, axis=-1)
    return np.geomspace(low, np.maximum(high, 2 * low), 64, axis=-1)


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
    state, gain, held = mode_step(modes, start, end)
    x0 = mode_x0(modes[..., None, :], nodes[..., None])
    # The weights sum to ``held`` (a constant x0 is exact), so only the differences to the newest x0 are free.
    design = (x0[..., 1:, :] - x0[..., :1, :]) / state[..., None, :]
    target = (gain - held[..., None] * x0[..., 0, :]) / state
    spread = np.log(modes[..., 1] / modes[..., 0])
    change = held**2 * _mean_square(design) * spread
    # The ridge shrinks with the step, which keeps the second order; the last term keeps the matrix regular.
    return _least_squares(design, target, held, RIDGE * np.minimum(1, change / SHORT_STEP) + 1e-12)


def _mean_square(design: np.ndarray) -> np.ndarray:
    """(...) of the rows of a design (..., k, M)."""
    return (design**2).sum((-1, -2)) / max(design.shape[-2], 1)


def _least_squares(design: np.ndarray, target: np.ndarray, held: np.ndarray, ridge: np.ndarray | float) -> np.ndarray:
    """Weights (..., k) with sum ``held`` whose last k - 1, times the design (..., k - 1, M), are near the target."""
    normal = design @ design.swapaxes(-1, -2)
    ridge = _mean_square(design) * ridge
    normal = normal + (ridge + 1e-300)[..., None, None] * np.eye(normal.shape[-1])
    free = np.linalg.solve(normal, design @ target[..., None])[..., 0]
    return np.concatenate([held[..., None] - free.sum(-1, keepdims=True), free], axis=-1)


# ----------------------------------------------------------------------------------------------------------------------
# A Gaussian mode of standard deviation a: its exact way, and its way through a solver.


def mode_x0(modes: np.ndarray, u: np.ndarray) -> np.ndarray:
    """What the network predicts for a mode on its exact way, per unit of the noise it began with."""
    with np.errstate(divide="ignore"):
        return modes / np.hypot(1, 1 / (modes * u))


def mode_step(modes: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The state (..., M) at a step's end, what the step adds to it (..., M), and the weight of a held x0 (...)."""
    if np.isinf(end).all():
        return modes, modes, np.ones(end.shape)
    s = 1 / np.hypot(1, end)
    state = s[..., None] * np.hypot(1, modes * end[..., None])
    return state, state - s[..., None] * np.hypot(1, modes * start[..., None]), s * (end - start)


def carry_modes(sigmas: np.ndarray, weights: Weights, modes: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Run Gaussian modes through a multistep solver: the last state (..., M), and every x0 asked for, newest first.

    For a mode of standard deviation a the network is linear, x0 = alpha a^2 / (alpha^2 a^2 + s^2) x, so the whole run
    multiplies the noise by a number.
    """
    u, ratios = inverse_sigmas(sigmas)[..., None], noise_ratios(sigmas)[..., None]
    x = np.hypot(1, modes * u[..., 0, :]) / np.hypot(1, u[..., 0, :])
    history = []
    for i, step_weights in enumerate(weights):
        # alpha a^2 / (alpha^2 a^2 + s^2), divided by s^2 above and below
        gain = modes**2 * u[..., i, :] / (1 + (modes * u[..., i, :]) ** 2)
        history = [x * gain * np.hypot(1, u[..., i, :]), *history]
        added = zip(np.moveaxis(step_weights, -1, 0), history, strict=False)
        x = ratios[..., i, :] * x + sum(weight[..., None] * x0 for weight, x0 in added)
    return x, history


def mode_errors(sigmas: np.ndarray, weights: Weights, modes: np.ndarray) -> np.ndarray:
    """Relative error with which a multistep solver reproduces Gaussian modes: a product in closed form.

    Args:
        sigmas: (..., N + 1) from infinity to 0.
        weights: weights of the solver, see ``Weights``.
        modes: (M,) standard deviations.

    Returns:
        (..., M); 0 is exact, -1 has lost the mode.
    """
    return carry_modes(sigmas, weights, modes)[0] / modes - 1


def finish_table(sigmas: np.ndarray, predict: Weights, correct: Weights) -> Weights:
    """``predict`` with the step to 0 fitted to the x0 that a run through the other steps really carries.

    The last step adds x0 alone, so its weights can make up for what the modes have lost on the way: least squares over
    the relative error of all modes, weighted again and again toward the worst ones (a sixth-power fit).  Shorter runs
    than FINISH_FROM steps, whose losses do not fit into four weights, keep the table.
    """
    if len(predict) < FINISH_FROM or (np.asarray(sigmas)[..., -1] > 0).any():
        return predict
    finite = np.where(np.isfinite(sigmas), sigmas, 0).max(-1)
    modes = np.geomspace(0.9 * SMALLEST_MODE, np.maximum(MODE_RANGE[1] * finite, 2 * SMALLEST_MODE), 96, axis=-1)
    fused = predict_and_correct(noise_ratios(sigmas), predict, correct)
    _, history = carry_modes(sigmas, [*fused[:-1], np.zeros_like(fused[-1])], modes)
    x0 = np.stack(history[:MEMORY], axis=-2) / modes[..., None, :]
    design, target, held = x0[..., 1:, :] - x0[..., :1, :], 1 - x0[..., 0, :], np.ones(modes.shape[:-1])
    importance, last = np.ones_like(target), predict[-1]
    for _ in range(30):
        # Fit, then weigh each mode by its residual: the weights tend to those of a sixth-power fit.
        last = _least_squares(design * importance[..., None, :], target * importance, held, 1e-5)
        residual = np.abs(target - (last[..., None, 1:] @ design)[..., 0, :])
        importance = importance / 2 + ((residual / residual.max(-1, keepdims=True) + 1e-3) ** 2) / 2
        importance = importance / np.sqrt((importance**2).mean(-1, keepdims=True))
    return [*predict[:-1], last]


# ----------------------------------------------------------------------------------------------------------------------
# Decisions.


def decision_table(sigmas: Sequence[float]) -> tuple[Weights, Weights]:
    """As ``spectral_table`` with two values of x0, fitted to decisions as well as to modes.

    While a picture decides between two of its kind, x0 goes from one to the other in a jump, a logistic curve in
    log sigma.  Where the jump will be is not known, so the fit is over all places.
    """
    u = inverse_sigmas(sigmas)
    modes = fitted_modes(u)
    if modes is None:
        return [np.ones(1)], []
    steps = len(u) - 1

    def fitted(step: int, newest: int) -> np.ndarray:
        return _fit_decisions(modes, u[max(newest - 1, 0) : newest + 1][::-1], u[step], u[step + 1])

    return [fitted(i, newest=i) for i in range(steps)], [fitted(i, newest=i + 1) for i in range(steps - 1)]


def _fit_decisions(modes: np.ndarray, nodes: np.ndarray, start: float, end: float) -> np.ndarray:
    """(k,) weights of x0 at the nodes; see ``_fit`` for the arguments."""
    with np.errstate(divide="ignore"):
        log_u = np.log(nodes)
    known = log_u[np.isfinite(log_u)]
    first = known.min() if len(known) else math.log(end if np.isfinite(end) else 1.0)
    last = math.log(end) if np.isfinite(end) else log_u[0] + BEYOND
    places = np.linspace(first - 6 * DECISION_WIDTH, last + 6 * DECISION_WIDTH, 160)

    def x0_at(log_u: np.ndarray) -> np.ndarray:
        """(k, 160): 0 before the jump, 1 behind it."""
        return 0.5 * (1 + np.tanh((log_u[:, None] - places) / (2 * DECISION_WIDTH)))

    state, gain, held = mode_step(modes, np.array(start), np.array(end))
    if np.isfinite(end):
        u, du = gauss_legendre(start, end)
        jump = (x0_at(np.log(u)) * du[:, None]).sum(0) / math.hypot(1, end)
        whole = end / math.hypot(1, end)  # what a constant x0 of 1 adds to the state by the end of the step
    else:
        jump, whole = x0_at(np.array([last]))[0], 1.0
    mode, decision = mode_x0(modes, nodes[:, None]), x0_at(log_u)
    # both errors relative to the state, per unit of log a and of the place
    per_mode = math.sqrt(math.log(modes[1] / modes[0])) / state
    per_place = math.sqrt(places[1] - places[0]) / whole
    design = np.concatenate([(mode[1:] - mode[:1]) * per_mode, (decision[1:] - decision[:1]) * per_place], axis=1)
    target = np.concatenate([(gain - held * mode[0]) * per_mode, (jump - held * decision[0]) * per_place])
    return _least_squares(design, target, held, RIDGE)


# ----------------------------------------------------------------------------------------------------------------------
# The spacing.


@lru_cache(maxsize=256)
def spectral_sigmas(
    steps: int, canvas: float | None, start: float | None, sigma_min: float, guidance: float
) -> tuple[float, ...]:
    """Finite sigmas of the spectral spacing: even in log sigma, denser where guidance makes the flow stiff.

    The ends minimise the worst mode error.  The last sigma is searched for; past forty steps it no longer matters and
    is sigma_min.  The first is START times the canvas length, or less where there are fewer steps to span the range.
    Without guidance a nearer first one is searched for too where steps are few.

    Args:
        steps: number of finite sigmas, at least 1; infinity before them and 0 after them are not counted.
        canvas: sqrt(height * width) of the latent, the standard deviation of a mode of unit brightness spread; None
            takes it from start.
        start: first sigma, instead of the default.
        sigma_min: least noise the model knows.
        guidance: scale of classifier-free guidance.

    Returns:
        (steps,) descending.
    """
    if guidance > 1:
        reach = min(max((steps + 1) / min(STEPS_PER_START[0] + guidance - 1, STEPS_PER_START[1]), 1), START)
    else:
        reach = min(steps / STEPS_PER_START[0], START)
    if canvas is None:
        if start is None:
            raise UserError("the spectral spacing needs the canvas length or the first sigma")
        canvas = start / reach
    starts = np.array([reach * canvas if start is None else start])
    if start is None and steps < 8 and guidance <= 1:
        starts = starts * 2.0 ** -np.arange(8)
    starts = np.maximum(starts, 2 * sigma_min)
    first, last = np.meshgrid(starts, np.geomspace(sigma_min, 0.25, 12) if steps < 40 else [sigma_min])
    last = np.maximum(np.minimum(last, first / 2), sigma_min)
    if steps == 1:
        candidates = np.geomspace(sigma_min, starts[0], 48)[:, None]
    else:
        candidates = _spaced(steps, first.ravel(), last.ravel(), canvas, guidance)
    if len(candidates) == 1:
        return tuple(candidates[0].tolist())
    # Run the modes through the solver on every candidate at once; the least worst error wins.
    ends = np.ones((len(candidates), 1))
    sigmas = np.concatenate([ends * math.inf, candidates, ends * 0], axis=-1)
    modes = np.geomspace(SMALLEST_MODE, max(canvas, 2 * SMALLEST_MODE), 48)
    predict, correct = spectral_table(sigmas)
    weights = predict_and_correct(noise_ratios(sigmas), finish_table(sigmas, predict, correct), correct)
    errors = np.abs(mode_errors(sigmas, weights, modes)).max(-1)
    return tuple(candidates[errors.argmin()].tolist())


def _spaced(steps: int, first: np.ndarray, last: np.ndarray, canvas: float, guidance: float) -> np.ndarray:
    """(n, steps) sigmas from first (n,) to last (n,), of density 1 + h exp(-z^2 / 2) in log sigma."""
    height = min(STIFFNESS * max(guidance - 1, 0), MOST_STIFFNESS)
    if height == 0:
        return np.geomspace(first, last, steps, axis=-1)
    grid = np.linspace(np.log(first), np.log(last), 1000, axis=-1)
    z = grid - math.log(STIFF_AT * canvas)
    above, below = STIFF_WIDTH[0], min(STIFF_WIDTH[1], STIFF_WIDTH_PER_STEP * (steps + 1))
    density = 1 + height * np.exp(-((z / np.where(z > 0, above, below)) ** 2) / 2)
    cumulative = np.cumsum((density[:, 1:] + density[:, :-1]) / 2, axis=-1)
    cumulative = np.pad(cumulative, [(0, 0), (1, 0)]) / cumulative[:, -1:]
    shares = np.linspace(0, 1, steps)
    sigmas = [np.exp(np.interp(shares, share, log_sigma)) for share, log_sigma in zip(cumulative, grid, strict=True)]
    return np.clip(sigmas, last[:, None], first[:, None])  # rounding must not leave the range
