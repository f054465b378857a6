"""The five claims, and what the measured pictures say to each: yes, no, or that they cannot tell.

Each is a difference of two numbers that are measured with the same noise, one value a seed of the noise, or, where
there are several trainings, one value a training.  It is a yes if the whole interval of the mean (95 %, Student's t) is
on the side that the claim says, a no if it is on the other side or within what would not matter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..diagnostics.leak import Estimate
from ..diagnostics.leak_probes import LUMA
from ..diagnostics.leak_report import COLOURS
from .reproduction import OURS, PLAIN, STARVED, Measured
from .reproduction_measures import BANDS, SOLIDS, KnownPrompt, Row, Start, coarse_contrast, colour_distance, is_whole

MATTERS = 1.0  # levels of 255, or of CIEDE2000: less is not seen
SHARE_MATTERS = 0.05
ERROR_MATTERS = 0.1  # of v, whose mean square is about 1
LEARNED = 0.25  # share of whole bands
BLACK, WHITE = SOLIDS[0], SOLIDS[1]
JUDGED_STEPS = 20
LARGE_STEPS = 28


@dataclass(frozen=True)
class Evidence:
    """A comparison.

    Attributes:
        text: what is compared, in words.
        one, other: the two numbers, and ``difference`` = one - other.
        expected: 1 if the claim says that it is above 0.
        matters: what the difference has to exceed.
        testable: whether the model has learned what is compared at all.
    """

    text: str
    one: float
    other: float
    difference: Estimate
    expected: int
    matters: float
    testable: bool = True

    @property
    def answer(self) -> str:
        """yes, no, or cannot tell."""
        if not self.testable:
            return "cannot tell"
        side = Estimate(self.expected * self.difference.value, self.difference.error, self.difference.seeds)
        if side.side(self.matters) > 0:
            return "yes"
        return "no" if side.side(self.matters) < 0 else "cannot tell"

    def __str__(self) -> str:
        return f"{self.text}: {self.one:.3g} and {self.other:.3g}, difference {self.difference} ({self.answer})"


@dataclass(frozen=True)
class Claim:
    """A claim and what was measured of it; yes if all of the evidence says so."""

    number: int
    text: str
    evidence: tuple[Evidence, ...]

    @property
    def answer(self) -> str:
        """yes, no, or cannot tell."""
        answers = {one.answer for one in self.evidence}
        return next((answer for answer in ("no", "cannot tell") if answer in answers), "yes")


def judge_claims(runs: Sequence[dict[str, Measured]]) -> list[Claim]:
    """The claims of the trainings of one or several seeds, each by the names of its trainings."""
    return [
        _works_from_infinity(runs),
        _pulled_to_grey(runs),
        _first_prediction(runs),
        _coherence(runs),
        _starved(runs),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The claims


def _works_from_infinity(runs: Sequence[dict[str, Measured]]) -> Claim:
    def error(run: dict[str, Measured], start: Start) -> np.ndarray:
        return _brightness_errors(_row(run[OURS].rows, BLACK, start))

    evidence = _compare(
        runs,
        f'"{BLACK.text}" of the zero-SNR model, brightness off by (levels), from sigma 14.6 and from infinity',
        lambda run: error(run, 14.6),
        lambda run: error(run, float("inf")),
        1,
        MATTERS,
    )
    return Claim(1, '"Completely black" works from infinity and not from finite noise', (evidence,))


def _pulled_to_grey(runs: Sequence[dict[str, Measured]]) -> Claim:
    def pull(name: str, start: Start):
        def of(run: dict[str, Measured]) -> np.ndarray:
            black, white = (_brightness(_row(run[name].rows, prompt, start)) for prompt in (BLACK, WHITE))
            return (black + 255 - white) / 2

        return of

    def contrast(name: str, start: Start):
        def of(run: dict[str, Measured]) -> np.ndarray:
            rows = [_row(run[name].rows, prompt, start) for prompt in (BLACK, WHITE)]
            return np.mean([[coarse_contrast(p @ LUMA) for p in row.pictures] for row in rows], axis=0)

        return of

    infinity = float("inf")
    texts = "plain v from its own 14.6, and the zero-SNR model from infinity"
    evidence = (
        _compare(
            runs,
            f"black and white pulled toward grey by (levels): {texts}",
            pull(PLAIN, 14.6),
            pull(OURS, infinity),
            1,
            MATTERS,
        ),
        _compare(
            runs,
            f"coarse contrast within black and white (levels): {texts}",
            contrast(PLAIN, 14.6),
            contrast(OURS, infinity),
            1,
            MATTERS,
        ),
    )
    return Claim(2, "Without the zero-SNR step the mean is pulled to grey, with false coarse contrast", evidence)


def _first_prediction(runs: Sequence[dict[str, Measured]]) -> Claim:
    """Beside what a prediction of the colours' average would be off by."""
    colours = np.array([COLOURS[prompt.background] for prompt in SOLIDS], dtype=float) / 255
    average = float(np.mean([colour_distance(colours.mean(0), COLOURS[prompt.background]) for prompt in SOLIDS]))

    def first(run: dict[str, Measured]) -> np.ndarray:
        return np.array([_row(run[OURS].rows, prompt, float("inf")).first_colour_error for prompt in SOLIDS])

    evidence = _compare(
        runs,
        "CIEDE2000 from the colour asked for: the average of all colours, and the first prediction at infinity",
        lambda run: np.full(len(SOLIDS), average),
        first,
        1,
        average / 2,
    )
    return Claim(3, "The prediction at sigma = infinity already has the colour that is asked for", (evidence,))


def _coherence(runs: Sequence[dict[str, Measured]]) -> Claim:
    def whole(rows: Sequence[Row]) -> np.ndarray:
        return np.mean([[is_whole(p, row.prompt) for p in row.pictures] for row in rows], axis=0)

    def large(start: Start):
        return lambda run: whole([_row(run[OURS].large, prompt, start, LARGE_STEPS) for prompt in BANDS])

    own = np.mean([whole([_row(run[OURS].rows, prompt, float("inf")) for prompt in BANDS]) for run in runs])
    evidence = _compare(
        runs,
        f"share of whole bands on a canvas of double length, from sigma 29 and from 14.6 (on its own canvas, from "
        f"infinity, {own:.0%} are whole; below {LEARNED:.0%} nothing can be said)",
        large(29.0),
        large(14.6),
        1,
        SHARE_MATTERS,
    )
    claim = "On a larger canvas a larger sigma_max restores coherence"
    return Claim(4, claim, (replace(evidence, testable=bool(own >= LEARNED)),))


def _starved(runs: Sequence[dict[str, Measured]]) -> Claim:
    def error(name: str):
        return lambda run: _brightness_errors(_row(run[name].rows, BLACK, float("inf")))

    evidence = (
        _compare(
            runs,
            "mean square error of v at t = T on held-out pictures, without a floor and with one",
            lambda run: np.array([run[STARVED].last_error]),
            lambda run: np.array([run[OURS].last_error]),
            1,
            ERROR_MATTERS,
            error=0.0,  # of one training: the same pictures and noise
        ),
        _compare(
            runs,
            f'"{BLACK.text}" from infinity, brightness off by (levels), without a floor and with one',
            error(STARVED),
            error(OURS),
            1,
            MATTERS,
        ),
    )
    return Claim(5, "Min-SNR without a floor starves the first step", evidence)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def _compare(
    runs: Sequence[dict[str, Measured]], text: str, one, other, expected: int, matters: float, error: float = math.inf
) -> Evidence:
    """Paired by the noise where there is one training, by trainings where there are several.

    Args:
        one, other: of a run, (K,) values.
        error: half width of the interval where there is one training with one value.
    """
    pairs = [(np.asarray(one(run), dtype=float), np.asarray(other(run), dtype=float)) for run in runs]
    each = [(a - b).mean() for a, b in pairs] if len(pairs) > 1 else pairs[0][0] - pairs[0][1]
    difference = Estimate.over_seeds(each) if len(each) > 1 else Estimate(float(each[0]), error, 1)
    values = [float(np.mean([side.mean() for side in sides])) for sides in zip(*pairs, strict=True)]
    return Evidence(text, *values, difference, expected, matters)


def _row(rows: Sequence[Row], prompt: KnownPrompt, start: Start, steps: int = JUDGED_STEPS) -> Row:
    return next(row for row in rows if (row.prompt, row.start, row.steps) == (prompt, start, steps))


def _brightness(row: Row) -> np.ndarray:
    """(K,) mean luma of each picture, 0 to 255."""
    return (row.pictures @ LUMA).mean((1, 2))


def _brightness_errors(row: Row) -> np.ndarray:
    return np.abs(_brightness(row) - np.array(COLOURS[row.prompt.background]) @ LUMA)
