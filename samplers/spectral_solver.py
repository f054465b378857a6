"""The default solver: exact for Gaussian modes, careful where x0 jumps, stable where guidance makes the flow stiff.

Each sample mixes its step from three, by what its last x0 tell (docs/mathematics.md derives them):

    bold      four values of x0 in the span of Gaussian modes: the most accurate while x0 moves as modes do
    cautious  two values, fitted to jumps of x0 as well: a longer memory amplifies a jump
    secant    where x0 turns back.  Guidance of scale w makes x0 = J x along some direction, with J as low as 1 - w, and
              extrapolation diverges there.  J is measured along the last change of x0 and its step taken exactly

All that the choice needs are inner products of the coarse part of each sample; nothing is read on the host.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .devices import send
from .multistep import inverse_sigmas, noise_ratios
from .protocol import Noise, Run, Sigmas
from .spectral import MEMORY, SMALLEST_MODE, decision_table, finish_table, mode_x0, spectral_table

KEPT = MEMORY + 1  # values of x0 that a step looks at: a prediction's, and the one that its correction goes back to
BLOCKS = 12  # along the shorter side of the latent: what is coarser decides how a step is taken
STIFFEST = 5.0  # largest -J that is believed
SMALL = 1e-30  # where x0 does not change at all
# Disagreement of the bold and the cautious step, over what a plain Gaussian latent shows: up to the first number a step
# is bold, from the second on cautious.  A sample whose x0 has bent once is wary, and trusts less from then on.
BOLD_UP_TO, CAUTIOUS_FROM, CAUTIOUS_FROM_WHEN_WARY = 2.0, 6.0, 3.0
TRUSTED = 0.25  # disagreement, as a share of the step, that is usual for a sample that is not wary,
LEAST_USUAL = 0.02  # and for one that is


def spectral(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Predictor-corrector in the span of Gaussian modes (``spectral``), with a secant step where x0 turns back."""
    if run.index == 0:
        run.kept = _Seen(x, run.sigmas)
    seen, history = run.kept, run.remember(x0, KEPT)
    step = seen.step(run.step)
    seen.see(x, x0, step.alpha)
    bold, turn = seen.boldness(step), seen.turn
    # Corrector of the last step, folded into this one: it takes back what was predicted.
    correction = (1 - turn / 2) * (torch.lerp(step.correct_cautious, step.correct_bold, bold) - seen.predicted)
    # Predictor: between extrapolating, and holding x0 but for its change along d_0.
    prediction = (1 - turn) * torch.lerp(step.cautious, step.bold, bold)
    can_tell = seen.slope is not None and step.sigma_ratio > 0
    beyond = seen.secant(step, correction, prediction) if can_tell else 0.0
    prediction[:, :1] += turn * (step.held + beyond)
    prediction[:, 1:2] -= turn * beyond
    seen.predicted = torch.nn.functional.pad(prediction[:, :-1], (1, 0))
    x = step.ratio * x
    for weight, past in zip((step.ratio * correction + prediction).unbind(1), history, strict=False):
        x.addcmul_(past, weight.reshape(-1, *[1] * (x.ndim - 1)))
    return x


class _Seen:
    """What a run has seen, in inner products: the changes of x0, and of X = x / alpha, the state without its scale.

    In X the flow is dX / dlog u = x0 - X.  d_0, d_1, ... are the changes of x0 from one question to the next, newest
    first; everything is (B, 1) or (B, ...), each sample by itself.

    Attributes:
        known: number of changes, k, up to MEMORY.
        changes: (B, k, k) <d_i, d_j>.
        slope: J, if x0 = J X + const along d_0; None before it can be measured.
        distance: <X - x0, d_0> / <d_0, d_0>.
        turn: 0 while x0 goes on, 1 where it turns back by 120 degrees or more, -2 cos(d_0, d_1) in between.
        wary: 0 while x0 has not bent by more than 73 degrees, 1 once it bent by 100.
        predicted: (B, KEPT) weights of the last prediction, in terms of today's history.
    """

    def __init__(self, x: torch.Tensor, sigmas: Sigmas):
        self.known, self.slope = -1, None
        self.predicted = x.new_zeros(len(x), KEPT)
        self._floats, tables = _tables(sigmas)
        self._weights = send(torch.from_numpy(tables).to(x.dtype), x.device)
        self.turn = self.wary = x.new_zeros(len(x), 1)
        self._answers: tuple[torch.Tensor, ...] = ()
        self._state: torch.Tensor | None = None

    def step(self, number: int) -> "_Step":
        """One of the run's steps."""
        return _Step(*self._floats[number], *self._weights[number].unbind(0))

    def see(self, x: torch.Tensor, x0: torch.Tensor, alpha: float) -> None:
        """The state that the network was asked about, its answer, and alpha of the noise level."""
        self._answers = (_coarse(x0), *self._answers[:MEMORY])
        before, self._state = self._state, _coarse(x) / alpha if alpha > 0 else None  # at infinity X has no value
        rows = [new - old for new, old in itertools.pairwise(self._answers)]
        self.known = len(rows)
        if self.known == 0:
            return
        if before is not None:
            rows += [self._state - before, self._state - self._answers[0]]
        rows = torch.stack(rows, dim=1)
        products = rows @ rows.mT
        self.changes = products[:, : self.known, : self.known]
        self._length = products[:, 0, :1].clamp(min=SMALL)
        if self.known > 1:
            lengths = (self._length * products[:, 1, 1:2]).sqrt_().clamp_(min=SMALL)
            bend = -2 * products[:, 0, 1:2] / lengths
            self.turn = bend.clamp(0, 1)
            self.wary = torch.maximum(self.wary, bend.add_(0.6).clamp_(0, 1))
        if before is not None:
            # J = <d, d> / <dX, d>; the quotient <dX, d> / <dX, dX> would drown in the noise of all other directions
            moved, self.distance = (products[:, 0, -2:] / self._length).split(1, dim=1)
            # J > 0 is the slope of a decision, and counts as 0
            self.slope = torch.where(moved < 0, moved.clamp(max=-1 / STIFFEST).reciprocal_(), 0.0)

    def boldness(self, step: "_Step") -> torch.Tensor | float:
        """1 while the bold and the cautious step differ no more than in a plain Gaussian latent, 0 far beyond."""
        if self.known < 2:
            return 1.0
        weights = step.disagreement[: self.known]
        apart = ((weights @ self.changes) @ weights / self._length[:, 0]).clamp_(min=0).sqrt_()[:, None]
        usual = ((1 - self.wary) * (TRUSTED * step.held)).clamp_(min=step.usual_disagreement)
        cautious_from = CAUTIOUS_FROM - (CAUTIOUS_FROM - CAUTIOUS_FROM_WHEN_WARY) * self.wary
        return ((cautious_from - apart / usual) / (cautious_from - BOLD_UP_TO)).clamp_(0, 1)

    def secant(self, step: "_Step", correction: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """What to add to the weight of the newest x0, and take from the last, so that the step along d_0 is exact.

        With x0 = J X + const along d_0 the flow goes, in a step of sigma by the ratio r, from X to

            X + f (x0 - X),   f = (1 - r^(1 - J)) / (1 - J)

        and the correction e of the state moves x0 by J e: a Newton step without a second network call.
        """
        held, power = 1 - step.sigma_ratio, 1 - self.slope  # held is f for J = 0
        decayed = 1 - step.sigma_ratio**power  # f (1 - J)
        corrected = self._along(correction) / step.alpha
        wanted = (held - decayed / power) * self.distance + (held - decayed) * corrected
        return step.alpha_next * wanted - self._along(prediction)

    def _along(self, weights: torch.Tensor) -> torch.Tensor:
        """<weights . x0, d_0> / <d_0, d_0> for weights (B, KEPT), beyond what their sum times the newest x0 gives."""
        older = weights.sum(1, keepdim=True) - weights.cumsum(1)[:, : self.known]  # x0_j = x0_0 - d_0 - ... - d_{j-1}
        return -(older * self.changes[:, 0]).sum(1, keepdim=True) / self._length


def _coarse(x: torch.Tensor) -> torch.Tensor:
    """(B, values): sums over square blocks, about BLOCKS of them along the shorter side.

    What guidance makes stiff is coarse, brightness first, and so are the decisions.  Among all values of a large latent
    it would drown: X is mostly noise, and x0 mostly fine texture.
    """
    block = min(x.shape[-2:]) // BLOCKS if x.ndim > 2 else 1
    if block < 2:
        return x.flatten(1)
    height, width = (side // block * block for side in x.shape[-2:])
    rows = x[..., :height, :].unflatten(-2, (-1, block)).sum(-2)
    return rows[..., :width].unflatten(-1, (-1, block)).sum(-1).flatten(1)


# ----------------------------------------------------------------------------------------------------------------------
# What depends on the sigmas alone: computed once, in float64.


@dataclass(frozen=True)
class _Step:
    """Floats, and weights of x0 (KEPT,) on the device, newest first."""

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
    return list(zip(*(np.asarray(column).tolist() for column in columns), strict=True)), tables


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
