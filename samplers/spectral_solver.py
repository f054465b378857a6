"""The default solver: exact for Gaussian modes, careful where x0 jumps, stable where guidance makes the flow stiff.

Each sample mixes its step from three, by what its last x0 tell (docs/mathematics.md derives them):

    bold      four values of x0 in the span of Gaussian modes: the most accurate while x0 moves as modes do
    cautious  two values, fitted to jumps of x0 as well: a longer memory amplifies a jump
    secant    where x0 turns back.  Guidance of scale w makes x0 = J x along some direction, with J as low as 1 - w, and
              extrapolation diverges there.  J is measured along the last change of x0 and its step taken exactly

All that the choice needs are inner products of a few thousand values of each sample; nothing is read on the host.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .multistep import inverse_sigmas, noise_ratios
from .protocol import Evaluations, Noise, Sigmas
from .spectral import MEMORY, SMALLEST_MODE, decision_table, finish_table, mode_x0, spectral_table

KEPT = MEMORY + 1  # values of x0 that a step looks at: a prediction's, and the one that its correction goes back to
GLIMPSE = 4096  # values of a sample, about, that its inner products are taken of
STIFFEST = 5.0  # largest -J that is believed
# Disagreement of the bold and the cautious step, over what a plain Gaussian latent shows: up to the first number a step
# is bold, from the second on cautious.  A sample whose x0 has bent once is wary, and trusts less from then on.
BOLD_UP_TO, CAUTIOUS_FROM, CAUTIOUS_FROM_WHEN_WARY = 2.0, 6.0, 3.0
TRUSTED = 0.25  # disagreement, as a share of the step, that is usual for a sample that is not wary,
LEAST_USUAL = 0.02  # and for one that is


def spectral(x: torch.Tensor, sigmas: Sigmas, eta: float, noise: Noise) -> Evaluations:
    """Predictor-corrector in the span of Gaussian modes (``spectral``), with a secant step where x0 turns back."""
    history, run = [], _Run(x)
    predicted = x.new_zeros(len(x), KEPT)  # weights of the last prediction, in terms of today's history
    for step in _steps(sigmas, x.dtype, x.device):
        x, x0 = yield x, step.sigma
        history = [x0, *history[: KEPT - 1]]
        run.see(x, x0, step.alpha)
        bold, turn = run.boldness(step), run.turn
        # Corrector of the last step, folded into this one: it takes back what was predicted.
        correction = (1 - turn / 2) * (torch.lerp(step.correct_cautious, step.correct_bold, bold) - predicted)
        # Predictor.
        prediction = (1 - turn) * torch.lerp(step.cautious, step.bold, bold)
        prediction[:, :1] += turn * step.held
        if run.knows_slope and step.sigma_ratio > 0:
            secant = turn * run.secant(step, correction, prediction)
            prediction[:, :1] += secant
            prediction[:, 1:2] -= secant
        predicted = torch.nn.functional.pad(prediction[:, :-1], (1, 0))
        x = step.ratio * x
        for weight, past in zip((step.ratio * correction + prediction).unbind(1), history, strict=False):
            x.addcmul_(past, weight.reshape(-1, *[1] * (x.ndim - 1)))
    return x


class _Run:
    """What a run has seen, in inner products: the changes of x0, and of X = x / alpha, the state without its scale.

    In X the flow is dX / dlog u = x0 - X.  d_0, d_1, ... are the changes of x0 from one question to the next, newest
    first, and all is (B, 1) or (B, ...), one sample apart from the others.

    Attributes:
        changes: (B, k, k) <d_i, d_j>.
        state_change: <dX, d_0>, where two states are known that are not at infinity (``knows_slope``).
        state: <X - x0, d_0>, likewise.
        turn: 0 while x0 goes on, 1 where it turns back by 120 degrees or more, -2 cos(d_0, d_1) in between.
        wary: 0 while x0 has not bent by more than 73 degrees, 1 once it bent by 100.
    """

    def __init__(self, x: torch.Tensor):
        self._x0, self._states = [], []
        self.knows_slope = False
        self.turn = self.wary = x.new_zeros(len(x), 1)

    def see(self, x: torch.Tensor, x0: torch.Tensor, alpha: float) -> None:
        self._x0 = [_glimpse(x0), *self._x0[: KEPT - 1]]
        self._states = [_glimpse(x) / alpha, *self._states[:1]] if alpha > 0 else []
        self.knows_slope = len(self._states) > 1
        rows = [new - old for new, old in itertools.pairwise(self._x0)]
        if not rows:
            return
        if self.knows_slope:
            rows += [self._states[0] - self._states[1], self._states[0] - self._x0[0]]
        rows = torch.stack(rows, dim=1)
        products = rows @ rows.mT
        known = len(self._x0) - 1
        self.changes = products[:, :known, :known]
        self._newest = self.changes[:, 0, 0, None] + torch.finfo(x.dtype).tiny
        if self.knows_slope:
            self.state_change, self.state = products[:, 0, -2, None], products[:, 0, -1, None]
        if known > 1:
            lengths = (self._newest * self.changes[:, 1, 1, None]).sqrt()
            bend = -2 * self.changes[:, 0, 1, None] / lengths.clamp_(min=1e-30)
            self.turn = bend.clamp(0, 1)
            self.wary = torch.maximum(self.wary, (bend + 0.6).clamp_(0, 1))

    def boldness(self, step: "_Step") -> torch.Tensor | float:
        """1 while the bold and the cautious step differ no more than in a plain Gaussian latent, 0 far beyond."""
        if len(self._x0) < 3:
            return 1.0
        weights = step.disagreement[: len(self._x0) - 1]
        apart = ((weights @ self.changes) @ weights).clamp_(min=0)[:, None].sqrt()
        usual = ((1 - self.wary) * (TRUSTED * step.held)).clamp_(min=step.usual_disagreement) * self._newest.sqrt()
        cautious_from = CAUTIOUS_FROM - (CAUTIOUS_FROM - CAUTIOUS_FROM_WHEN_WARY) * self.wary
        return ((cautious_from - apart / usual) / (cautious_from - BOLD_UP_TO)).clamp_(0, 1)

    def secant(self, step: "_Step", correction: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """What to add to the weight of the newest x0, and take from the last, so that the step along d = d_0 is exact.

        Along d, x0 = J X + const, with J = <d, d> / <dX, d>.  (The quotient <dX, d> / <dX, dX> would drown in the noise
        of all other directions.)  The flow then goes, in a step of sigma by the ratio r, from X to

            X + f (x0 - X),   f = (1 - r^(1 - J)) / (1 - J)

        and the correction e of the state moves x0 by J e: a Newton step without a second network call.  J > 0, the
        slope of a decision, counts as 0.
        """
        newest = self._newest
        slope = -newest / torch.maximum(-self.state_change, newest / STIFFEST)
        slope = torch.where(self.state_change < 0, slope, 0.0)
        held = 1 - step.sigma_ratio  # f for J = 0
        exact = (1 - step.sigma_ratio ** (1 - slope)) / (1 - slope)
        corrected = self._along(correction) / step.alpha
        wanted = (held - exact) * self.state + (held - exact * (1 - slope)) * corrected
        prediction = torch.cat([prediction[:, :1] - step.held, prediction[:, 1:]], dim=1)  # beyond the held x0
        return (step.alpha_next * wanted - self._along(prediction)) / newest

    def _along(self, weights: torch.Tensor) -> torch.Tensor:
        """<weights . x0, d> for weights (B, KEPT) whose sum is 0."""
        changes = self.changes.shape[-1]
        return (weights.cumsum(1)[:, :changes] * self.changes[:, 0]).sum(1, keepdim=True)


def _glimpse(x: torch.Tensor) -> torch.Tensor:
    """(B, about GLIMPSE): every so-many-th row of each sample."""
    every = x[0].numel() // GLIMPSE | 1
    return x.reshape(len(x), -1, x.shape[-1])[:, ::every].flatten(1)


# ----------------------------------------------------------------------------------------------------------------------
# What depends on the sigmas alone: computed once, in float64.


@dataclass(frozen=True)
class _Step:
    """Floats, and weights of x0 (KEPT,) on the device, newest first."""

    sigma: float
    ratio: float  # s_next / s
    sigma_ratio: float  # sigma_next / sigma
    alpha: float
    alpha_next: float
    held: float  # sum of a prediction's weights
    usual_disagreement: float  # of the bold and the cautious step in a plain Gaussian latent, over the change of x0
    bold: torch.Tensor
    cautious: torch.Tensor
    correct_bold: torch.Tensor  # of the last step
    correct_cautious: torch.Tensor
    disagreement: torch.Tensor  # bold - cautious, as weights of the changes of x0


def _steps(sigmas: Sigmas, dtype: torch.dtype, device: torch.device) -> Iterator[_Step]:
    floats, tables = _tables(sigmas)
    on_device = torch.from_numpy(tables).to(dtype).to(device, non_blocking=True)
    return (_Step(*numbers, *rows) for numbers, rows in zip(floats, on_device.unbind(0), strict=True))


@lru_cache(maxsize=64)
def _tables(sigmas: Sigmas) -> tuple[list[tuple[float, ...]], np.ndarray]:
    """Of each step the floats of ``_Step``, and its five rows of weights (N, 5, KEPT)."""
    u, ratios = inverse_sigmas(sigmas), noise_ratios(sigmas)
    modes_only, correct_bold = spectral_table(sigmas)
    cautious, correct_cautious = decision_table(sigmas)
    bold = finish_table(np.array(sigmas), modes_only, correct_bold)
    nothing = [np.zeros(1)]
    modes_only, bold, cautious, correct_bold, correct_cautious = (
        np.stack([np.pad(weights, (0, KEPT - len(weights))) for weights in table])
        for table in (modes_only, bold, cautious, nothing + correct_bold, nothing + correct_cautious)
    )
    # sum_j w_j D_j = sum_j (w_0 + ... + w_j) (D_j - D_{j+1}) where the w add up to 0
    disagreement = np.cumsum(modes_only - cautious, axis=1)
    tables = np.stack([bold, cautious, correct_bold, correct_cautious, disagreement], axis=1)
    alphas = np.append(u[:-1] / np.hypot(1, u[:-1]), 1.0 if np.isinf(u[-1]) else u[-1] / math.hypot(1, u[-1]))
    sigma_ratios = [0.0 if math.isinf(start) else end / start for start, end in itertools.pairwise(sigmas)]
    held = bold.sum(1)
    usual = np.maximum(_usual_disagreement(u, disagreement), LEAST_USUAL * held)
    columns = (ratios, sigma_ratios, alphas[:-1], alphas[1:], held, usual)
    floats = zip(sigmas, *(np.asarray(column).tolist() for column in columns), strict=False)
    return list(floats), tables


def _usual_disagreement(u: np.ndarray, disagreement: np.ndarray) -> np.ndarray:
    """(N,) |sum_j weight_j d_j| / |d_0| of a plain Gaussian latent, on its exact way.

    It has a^(-1/2) modes per log a: more of the fine ones, as a picture has, but fewer of them than white noise.
    """
    finite = u[(u > 0) & np.isfinite(u)]
    largest = max(1 / finite.min() / 2.5, 2 * SMALLEST_MODE) if len(finite) else 1.0
    modes = np.geomspace(SMALLEST_MODE, largest, 200)
    x0 = mode_x0(modes, u[:-1, None])
    found = np.zeros(len(disagreement))
    for i in range(2, len(found)):
        changes = -np.diff(x0[max(i - KEPT + 1, 0) : i + 1][::-1], axis=0) / modes**0.25
        apart = disagreement[i, : len(changes)] @ changes
        found[i] = np.linalg.norm(apart) / np.linalg.norm(changes[0])
    return found
