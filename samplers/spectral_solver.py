"""The default solver: exact for Gaussian modes, careful where x0 jumps, stable where guidance makes the flow stiff.

Each sample mixes its step from three, depending on its last values of x0 (docs/mathematics.md derives them):

    bold      four values of x0 in the span of Gaussian modes: the most accurate while x0 moves as modes do
    cautious  two values, fitted to jumps of x0 as well: a longer memory amplifies a jump
    secant    where x0 turns back.  Guidance of scale w makes x0 = J x along some direction, with J as low as 1 - w, and
              extrapolation diverges there.  J is measured along the last change of x0 and its step taken exactly

The choice needs only inner products of the coarse part of each sample; nothing is read on the host.
"""

import itertools
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from .devices import send
from .multistep import inverse_sigmas, noise_ratios
from .protocol import Noise, Run, Sigmas, solver
from .spectral import MEMORY, SMALLEST_MODE, decision_table, finish_table, mode_x0, spectral_table

KEPT = MEMORY + 1  # values of x0 that a step uses: the prediction's, and the oldest of the last prediction
BLOCKS = 12  # along the shorter side of the latent: what is coarser decides how a step is taken
STIFFEST = 5.0  # bound of the measured -J
SMALL = 1e-30  # where x0 does not change at all
# Disagreement of the bold and the cautious step, over what a plain Gaussian latent shows: up to the first number a step
# is bold, from the second on cautious.  A sample whose x0 has bent in the first half of the steps is wary, because so
# early it is guidance or a decision that bends it.  Late bends do not count: texture makes them as well.
BOLD_UP_TO, CAUTIOUS_FROM = 2.0, 6.0
BOLD_UP_TO_WHEN_WARY, CAUTIOUS_FROM_WHEN_WARY = 0.0, 0.5
TRUSTED = 0.25  # disagreement, as a share of the step, that is usual for a sample that is not wary,
LEAST_USUAL = 0.02  # and for one that is
# A full turn takes back half of the correction and all of the prediction, in the shape of their weights.
SHARE_OF_TURN = torch.tensor([0.5, 1.0]).view(2, 1, 1)
# Of the cosine between two changes of x0, clamped to [0, 1]: the turn -2 cos, and the trust 2 cos - 0.2.
COSINE_OFFSET, COSINE_FACTOR = torch.tensor([0.0, -0.2]).view(2, 1), torch.tensor([-2.0, 2.0]).view(2, 1)


@solver()
def spectral(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Predictor-corrector in the span of Gaussian modes, with a secant step where x0 turns back (the default)."""
    if run.index == 0:
        run.kept = _Seen(x, run.sigmas)
    seen, history = run.kept, run.remember(x0, KEPT)
    step = seen.step(run.step)
    seen.see(x, x0, step)
    # Corrector of the last step, folded into this one, and predictor of this step: two rows of weights of x0, each
    # between the cautious and the bold table.
    weights = torch.lerp(step.cautious, step.bold, seen.boldness(step))
    correction, prediction = weights[0], weights[1]
    # The correction is what the last step would have added with the newest x0 known, minus what it did add.
    correction[1:].sub_(seen.predicted[:-1])
    # Where x0 turns back: half of the correction, and a predictor that holds x0.
    weights.lerp_(step.turned_back, seen.turn * seen.share_of_turn)
    if seen.power is not None and step.sigma_ratio > 0:
        # ... except along its last change d_0, where the step is exact: x0 - x0_last = d_0 gets the missing weight.
        beyond = seen.turn * seen.secant(step, weights)
        prediction[0].add_(beyond)
        prediction[1].sub_(beyond)
    seen.predicted = prediction
    # x(b) = s_b/s_a (x(a) + correction . x0) + prediction . x0
    weights = torch.add(prediction, correction, alpha=step.ratio)
    x = step.ratio * x
    for weight, past in zip(weights.view(KEPT, -1, *[1] * (x.ndim - 1)).unbind(0), history, strict=False):
        x.addcmul_(past, weight)
    return x


class _Seen:
    """What a run has seen, in inner products: the changes of x0, and of X = x / alpha, the state without its scale.

    In X the flow is dX / dlog u = x0 - X.  d_0, d_1, ... are the changes of x0 from one question to the next, newest
    first.  Each sample is judged by itself: the last axis of everything below but ``changes`` is the batch.

    Attributes:
        changes: (k, B, values) d_0, ..., d_{k-1}, MEMORY of them at most; None before the second question.
        size: (B,) |d_0|.
        fallen: (k, B) <x0_0 - x0_j, d_0> / <d_0, d_0> for j = 1, ..., k.
        power: (B,) 1 - J, if x0 = J X + const along d_0; None before it can be measured.
        distance: (B,) <X - x0, d_0> / <d_0, d_0>.
        turn: (B,) 0 while x0 keeps its direction, 1 if it turns by 120 degrees or more, -2 cos(d_0, d_1) in between.
        trust: (B,) 1 while x0 has not bent by more than 53 degrees early on, 0 once it bent by 84.
        predicted: (KEPT, B) weights of the last prediction, the x0 first that was the newest then.
        share_of_turn: (2, 1, 1) SHARE_OF_TURN on the device.
    """

    def __init__(self, x: torch.Tensor, sigmas: Sigmas):
        self._floats, tables = _tables(sigmas)
        self._tables = [send(torch.from_numpy(table).to(x.dtype), x.device).unbind(0) for table in tables]
        constants = (SHARE_OF_TURN, COSINE_OFFSET, COSINE_FACTOR)
        self.share_of_turn, *self._of_cosine = (send(constant.to(x.dtype), x.device) for constant in constants)
        self.predicted = x.new_zeros(KEPT, len(x))
        self.turn, self.trust, self._bold = x.new_zeros(len(x)), x.new_ones(len(x)), x.new_ones(len(x))
        self._rows: list[torch.Tensor] = []
        self.size, self.distance = x.new_zeros(len(x)), x.new_zeros(len(x))
        self.changes: torch.Tensor | None = None
        self.power: torch.Tensor | None = None
        self._x0: torch.Tensor | None = None
        self._state: torch.Tensor | None = None

    def step(self, number: int) -> "_Step":
        """One of the run's steps."""
        fields: tuple[Any, ...] = (*self._floats[number], *(table[number] for table in self._tables))
        return _Step(*fields)

    def see(self, x: torch.Tensor, x0: torch.Tensor, step: "_Step") -> None:
        """The state that the network was asked about, and its answer."""
        coarse = _coarse(x0)
        state = _coarse(x) / step.alpha if step.alpha > 0 else None  # X has no value at infinity
        x0_before, self._x0 = self._x0, coarse
        state_before, self._state = self._state, state
        if x0_before is None:
            return
        newest = coarse - x0_before
        rows = self._rows = [newest, *self._rows[: MEMORY - 1]]
        known = len(rows)
        if state_before is not None and state is not None:
            rows = [*rows, state_before - state, state - coarse]
        stacked = torch.cat(rows).view(len(rows), *newest.shape)
        self.changes = stacked[:known]
        # One reduction gives every inner product with d_0 that the step needs.
        products = (stacked * newest).sum(-1)
        length = products[0].clamp(min=SMALL)
        along = products / length
        self.fallen = along[:known].cumsum(0)
        size_before, self.size = self.size, length.sqrt()
        if known > 1:
            # A turn is a negative cosine between d_0 and d_1; see COSINE_OFFSET.
            cosine = along[1] * (self.size / size_before)
            offset, factor = self._of_cosine
            self.turn, straight = torch.addcmul(offset, cosine, factor).clamp_(0, 1).unbind(0)
            if step.early:
                self.trust = torch.minimum(self.trust, straight)
        if state_before is not None:
            # J = <d, d> / <dX, d>; the quotient <dX, d> / <dX, dX> would drown in the noise of all other directions.
            # J > 0 is the slope of a decision, and counts as 0.
            moved_back, self.distance = along[known:].unbind(0)
            moved_back = torch.threshold(moved_back, 0, torch.inf)
            self.power = moved_back.clamp_(min=1 / STIFFEST).reciprocal_().add_(1)

    def boldness(self, step: "_Step") -> torch.Tensor:
        """1 while the bold and the cautious step differ no more than in a plain Gaussian latent, 0 far beyond."""
        if self.changes is None or len(self.changes) < 2:
            return self._bold
        apart = torch.linalg.vector_norm((self.changes * step.disagreement[: len(self.changes)]).sum(0), dim=-1)
        usual, cautious_from, width = (step.trusted * self.trust + step.wary).unbind(0)
        usual = usual.clamp(min=step.usual_disagreement).mul_(self.size)
        return ((cautious_from - apart / usual) / width).clamp_(0, 1)

    def secant(self, step: "_Step", weights: torch.Tensor) -> torch.Tensor:
        """(B,) what to add to a prediction's weight of the newest x0, and take from the last: an exact step along d_0.

        With x0 = J X + const along d_0 the flow goes, in a step of sigma by the ratio r, from X to

            X + f (x0 - X),   f = (1 - r^(1 - J)) / (1 - J)

        and the correction e of the state moves x0 by J e: a Newton step without a second network call.

        Args:
            weights: (2, KEPT, B) of the correction and the prediction.
        """
        # What both rows move along -d_0 already: <weights . x0, -d_0> / <d_0, d_0>, without the newest x0's part.
        corrected, predicted = (weights[:, 1 : len(self.fallen) + 1] * self.fallen).sum(1).unbind(0)
        # What an exact step adds along d_0 to one that holds x0: (f_0 - f) (X - x0), with f_0 for J = 0; and what the
        # correction e of X adds to that, (f_0 - f (1 - J)) e.
        held = 1 - step.sigma_ratio  # f_0
        assert self.power is not None
        decayed = torch.expm1(self.power * math.log(step.sigma_ratio))  # -f (1 - J)
        wanted = (decayed / self.power).add_(held).mul_(self.distance)
        wanted.addcmul_(decayed.add_(held), corrected, value=-1 / step.alpha)
        return torch.add(predicted, wanted, alpha=step.alpha_next)


def _coarse(x: torch.Tensor) -> torch.Tensor:
    """(B, values): sums over square blocks, about BLOCKS of them along the shorter side.

    What guidance makes stiff is coarse, brightness first, and so are the decisions.  Among all values of a large latent
    it would drown: X is mostly noise, and x0 mostly fine texture.
    """
    block = min(x.shape[-2:]) // BLOCKS if x.ndim > 2 else 1
    if block > 1:
        x = x.unfold(-2, block, block).sum(-1).unfold(-1, block, block).sum(-1)
    return x.flatten(1)


# ----------------------------------------------------------------------------------------------------------------------
# What depends on the sigmas alone: computed once, in float64.


class _Step(NamedTuple):
    """Floats, and weights of x0 on the device, newest first: (2, KEPT, 1) of a corrector and a predictor."""

    ratio: float  # s_next / s
    sigma_ratio: float  # sigma_next / sigma
    early: bool  # whether it is one of the first half
    alpha: float
    alpha_next: float
    held: float  # sum of a prediction's weights
    usual_disagreement: float  # of the bold and the cautious step in a plain Gaussian latent, over the change of x0
    cautious: torch.Tensor
    bold: torch.Tensor
    turned_back: torch.Tensor  # no correction, and x0 held
    disagreement: torch.Tensor  # (MEMORY, 1, 1) bold - cautious prediction, as weights of the changes of x0
    wary: torch.Tensor  # (3, 1) of a wary sample: usual disagreement, where it is cautious, and from bold to there;
    trusted: torch.Tensor  # what to add for one that is not wary


@lru_cache(maxsize=64)
def _tables(sigmas: Sigmas) -> tuple[list[tuple[Any, ...]], list[np.ndarray]]:
    """The floats of ``_Step`` for each step, and arrays (N, ...) of the weights."""
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
    alphas = np.append(u[:-1] / np.hypot(1, u[:-1]), 1.0 if np.isinf(u[-1]) else u[-1] / math.hypot(1, u[-1]))
    sigma_ratios = [0.0 if math.isinf(start) else end / start for start, end in itertools.pairwise(sigmas)]
    held = bold.sum(1)
    hold = np.zeros_like(bold)
    hold[:, 0] = held
    wary = np.array([0.0, CAUTIOUS_FROM_WHEN_WARY, CAUTIOUS_FROM_WHEN_WARY - BOLD_UP_TO_WHEN_WARY])
    trusted = np.array([TRUSTED, CAUTIOUS_FROM, CAUTIOUS_FROM - BOLD_UP_TO]) - wary
    wary, trusted = np.tile(wary, (len(held), 1)), np.tile(trusted, (len(held), 1))
    trusted[:, 0] *= held
    pairs = [(correct_cautious, cautious), (correct_bold, bold), (np.zeros_like(hold), hold)]
    tables = [np.stack(pair, axis=1)[..., None] for pair in pairs]
    tables += [disagreement[:, :MEMORY, None, None], wary[..., None], trusted[..., None]]
    usual = np.maximum(_usual_disagreement(u, disagreement), LEAST_USUAL * held)
    early = np.arange(len(held)) <= len(held) / 2
    columns = (ratios, sigma_ratios, early, alphas[:-1], alphas[1:], held, usual)
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
