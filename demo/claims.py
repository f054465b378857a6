"""The claims about zero terminal SNR, and the verdict of the measurements on each: yes, no, or cannot tell.

Each is tested by the difference of two numbers measured with the same noise.  Its interval (99 %, Student's t) is taken
over the noises and, with several training runs, over the runs; the wider interval counts.  The verdict is yes if the
whole interval exceeds the threshold on the claimed side, no if the whole interval is below the threshold, and "cannot
tell" otherwise, or if a network has not learned what the claim is about.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..diagnostics.estimates import Estimate
from .composed import COLOURS
from .evaluation import BLACK, FOUR_TIMES, GUIDED, START, TWICE, WHITE, Numbers, mean_colour, start_name
from .measures import WHOLE, brightness, colour_distance
from .objectives import EPSILON, OURS, PLAIN, STARVED

# Thresholds.
LEVELS_MATTER = 10.0  # of 255
UNEVEN_MATTERS = 1.0  # levels of standard deviation, about the least that is visible in a flat ground
SHARE_MATTERS = 0.2  # of pictures
ERROR_MATTERS = 0.1  # of v, whose mean square at t = T is about 1
LEARNED = 0.6  # largest relative error, in the middle of the schedule, of a network that has learned
LEARNED_WHOLE = 0.8  # smallest share of whole pictures on the network's own canvas

INFINITY, FINITE = "infinity", f"{START:g}"
Run = Mapping[str, Numbers]  # the measurements of each training of one seed


@dataclass(frozen=True)
class Evidence:
    """A comparison.

    Attributes:
        text: Description of the two numbers.
        one, other: The two numbers.
        difference: one - other, with its interval.
        matters: Threshold that the difference must exceed.
        testable: False if a network has not learned what the claim is about.
        judged: False for a comparison that does not count toward the verdict.
    """

    text: str
    one: float
    other: float
    difference: Estimate
    matters: float
    testable: bool = True
    judged: bool = True

    @property
    def answer(self) -> str:
        """Yes, no, or cannot tell."""
        side = self.difference.side(self.matters)
        return {1: "yes", -1: "no", 0: "cannot tell"}[side if self.testable else 0]

    def __str__(self) -> str:
        answer = self.answer if self.judged else "shown, not judged"
        return f"{self.text}: {self.one:.3g} and {self.other:.3g}, difference {self.difference} ({answer})"


@dataclass(frozen=True)
class Claim:
    """A claim and its evidence.  The verdict is yes only if all judged evidence says yes."""

    number: str
    text: str
    evidence: tuple[Evidence, ...]

    @property
    def answer(self) -> str:
        """Yes, no, or cannot tell."""
        answers = {one.answer for one in self.evidence if one.judged}
        return next((answer for answer in ("no", "cannot tell") if answer in answers), "yes")


def judge_claims(runs: Sequence[Run]) -> list[Claim]:
    """Judge all claims from the training runs of one or several seeds."""
    return [
        _works_from_infinity(runs),
        _pulled_to_grey(runs),
        _false_contrast(runs),
        _first_prediction(runs),
        _coherence(runs),
        _starved(runs),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The claims


def _works_from_infinity(runs: Sequence[Run]) -> Claim:
    darker = {BLACK: 1, WHITE: -1, "dark": 1, "light": -1}

    def off(ground: str, start: str, guidance: float) -> Callable[[Run], np.ndarray]:
        """Distance from the right brightness toward grey."""
        wanted = _wanted(ground)
        return lambda run: darker[ground] * (_solid(run[OURS], "brightness", ground, start, guidance) - wanted)

    evidence = [
        _compare(
            runs,
            f'"{ground}" of the zero-SNR network, error toward grey in levels, from {START:g} and from infinity, '
            f"{_at(guidance)}",
            off(ground, FINITE, guidance),
            off(ground, INFINITY, guidance),
            LEVELS_MATTER,
            (OURS,),
        )
        for guidance in (1.0, GUIDED)
        for ground in darker
    ]
    return Claim("1", '"Completely black" works from infinity and not from finite noise', tuple(evidence))


def _pulled_to_grey(runs: Sequence[Run]) -> Claim:
    def pull(name: str, start: str, guidance: float) -> Callable[[Run], np.ndarray]:
        def of(run: Run) -> np.ndarray:
            black, white = (_solid(run[name], "brightness", g, start, guidance) for g in (BLACK, WHITE))
            return (black - _wanted(BLACK) + _wanted(WHITE) - white) / 2

        return of

    def tinted(name: str, start: str) -> Callable[[Run], np.ndarray]:
        return lambda run: _of_things(run[name], "tint", start, GUIDED)

    evidence = [
        _compare(
            runs,
            f"pull of black and white toward grey, in levels: {name} from its own {START:g}, and the zero-SNR network "
            f"from infinity, {_at(guidance)}",
            pull(name, FINITE, guidance),
            pull(OURS, INFINITY, guidance),
            LEVELS_MATTER,
            (name, OURS),
        )
        for name in (PLAIN, EPSILON)
        for guidance in (1.0, GUIDED)
    ]
    evidence.append(
        _compare(
            runs,
            f"tint of black and white around an object, in levels between channels: {PLAIN} from {START:g}, and "
            f"the zero-SNR network from infinity, {_at(GUIDED)}",
            tinted(PLAIN, FINITE),
            tinted(OURS, INFINITY),
            LEVELS_MATTER,
            (PLAIN, OURS),
        )
    )
    text = "Without the zero-SNR step black and white are pulled to grey, and tinted"
    return Claim("2", text, tuple(evidence))


def _false_contrast(runs: Sequence[Run]) -> Claim:
    both = f"{PLAIN} from {START:g}, and the zero-SNR network from infinity"

    def around(what: str, guidance: float) -> Callable[[str, str], Callable[[Run], np.ndarray]]:
        return lambda name, start: lambda run: _of_things(run[name], what, start, guidance)

    def blocks(name: str, start: str) -> Callable[[Run], np.ndarray]:
        return lambda run: np.mean([_solid(run[name], "contrast", g, start) for g in (BLACK, WHITE)], axis=0)

    measures = {
        "unevenness of black and white around an object, not clipped, without guidance": around("unevenness", 1.0),
        f"unevenness of black and white around an object, clipped, {_at(GUIDED)}": around("seen unevenness", GUIDED),
        "contrast between blocks of plain black and white, without guidance": blocks,
    }
    evidence = [
        _compare(
            runs, f"{text}, in levels: {both}", of(PLAIN, FINITE), of(OURS, INFINITY), UNEVEN_MATTERS, (PLAIN, OURS)
        )
        for text, of in measures.items()
    ]
    return Claim("2b", "Without the zero-SNR step there is false contrast in flat grounds", tuple(evidence))


def _first_prediction(runs: Sequence[Run]) -> Claim:
    """Compared with the error of the average of all colours."""
    average = np.mean([mean_colour(ground) for ground in COLOURS], axis=0)
    guess = float(np.mean([colour_distance(average, mean_colour(ground)) for ground in COLOURS]))
    evidence = _compare(
        runs,
        "CIEDE2000 to the requested colour: the average of all colours, and the first prediction at infinity",
        lambda run: np.full_like(first(run), guess),
        first := lambda run: np.mean([_solid(run[OURS], "first", ground, INFINITY) for ground in COLOURS], axis=0),
        guess / 2,
        (OURS,),
    )
    return Claim("3", "The prediction at sigma = infinity already has the colour that is asked for", (evidence,))


def _coherence(runs: Sequence[Run]) -> Claim:
    def whole(kind: str, start: float) -> Callable[[Run], np.ndarray]:
        return lambda run: (run[OURS][f"{kind}/{start_name(start)}/explained"] > WHOLE).astype(float)

    def share(kind: str, start: float) -> Callable[[Run], np.ndarray]:
        return lambda run: run[OURS][f"{kind}/{start_name(start)}/explained"].astype(float)

    own = float(np.mean([whole("halved", np.inf)(run).mean() for run in runs]))
    learned = own >= LEARNED_WHOLE
    on_its_own = f"(on its own canvas, from infinity, {own:.0%} are whole; the claim needs {LEARNED_WHOLE:.0%})"
    evidence = [
        _compare(
            runs,
            f"share of whole snakes, trains and pencils on a canvas twice as wide, from {TWICE:g} and from {START:g} "
            f"{on_its_own}",
            whole("halved", TWICE),
            whole("halved", START),
            SHARE_MATTERS,
            (OURS,),
            testable=learned,
        ),
        *(
            _compare(
                runs,
                f"share of such a picture that one object explains, from {larger:g} and from {smaller:g}",
                share("halved", larger),
                share("halved", smaller),
                SHARE_MATTERS,
                (OURS,),
                testable=learned,
                judged=False,
            )
            for larger, smaller in ((TWICE, START), (FOUR_TIMES, TWICE))
        ),
        _compare(
            runs,
            f"the same on pictures of 64 x 64, a size not trained on, from {TWICE:g} and from {START:g}",
            share("literal", TWICE),
            share("literal", START),
            SHARE_MATTERS,
            (OURS,),
            testable=learned,
            judged=False,
        ),
    ]
    return Claim("4", "On a larger canvas a larger sigma_max restores coherence", tuple(evidence))


def _starved(runs: Sequence[Run]) -> Claim:
    def error(name: str, pairs: str) -> Callable[[Run], np.ndarray]:
        return lambda run: run[name][f"error/last/{pairs}"]

    def off(name: str) -> Callable[[Run], np.ndarray]:
        return lambda run: np.abs(_solid(run[name], "brightness", BLACK, INFINITY) - _wanted(BLACK))

    evidence = [
        _compare(
            runs,
            f"mean square error of v at t = T, {pairs} pairs of object and ground, without a floor and with one",
            error(STARVED, pairs),
            error(OURS, pairs),
            ERROR_MATTERS,
            (STARVED, OURS),
        )
        for pairs in ("trained", "held out")
    ]
    evidence.append(
        _compare(
            runs,
            "brightness error of black from infinity, in levels, without a floor and with one",
            off(STARVED),
            off(OURS),
            LEVELS_MATTER,
            (STARVED, OURS),
            judged=False,
        )
    )
    return Claim("5", "Min-SNR without a floor starves the first step", tuple(evidence))


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def _compare(
    runs: Sequence[Run],
    text: str,
    one: Callable[[Run], np.ndarray],
    other: Callable[[Run], np.ndarray],
    matters: float,
    networks: Sequence[str],
    testable: bool = True,
    judged: bool = True,
) -> Evidence:
    """Compare paired values; ``one`` and ``other`` take a run and return (K,) values, one per noise."""
    runs = [run for run in runs if all(name in run for name in networks)]
    pairs = np.array([(one(run), other(run)) for run in runs], dtype=float)  # (runs, 2, K)
    differences = pairs[:, 0] - pairs[:, 1]
    over_noise = Estimate.over_seeds(differences.mean(0))
    error = over_noise.error
    if len(runs) > 1:
        error = max(error, Estimate.over_seeds(differences.mean(1)).error)
    learned = all(_missed(run[name]) < LEARNED for run in runs for name in networks)
    return Evidence(
        text,
        *pairs.mean((0, 2)).tolist(),
        Estimate(over_noise.value, error, over_noise.seeds),
        matters,
        testable and learned,
        judged,
    )


def _missed(numbers: Numbers) -> float:
    return float(numbers["error/missed/held out"])


def _solid(numbers: Numbers, what: str, ground: str, start: str, guidance: float = 1.0) -> np.ndarray:
    return numbers[f"solids/{start}/{guidance:g}/{what}/{ground}"]


def _wanted(ground: str) -> float:
    """Mean luma of the training pictures with a ground."""
    return float(brightness(mean_colour(ground)[None, None, None])[0])


def _of_things(numbers: Numbers, what: str, start: str, guidance: float) -> np.ndarray:
    """(K,) values of pictures with an object, averaged over black and white grounds."""
    return np.mean([numbers[f"things/{start}/{guidance:g}/{what}/{ground}"] for ground in (BLACK, WHITE)], axis=0)


def _at(guidance: float) -> str:
    return "without guidance" if guidance == 1 else f"at CFG {guidance:g}"
