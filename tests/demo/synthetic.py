"""Measurements of networks that were never trained: numbers of which it is known what they say."""

import numpy as np

from ztsnr.demo.evaluation import GUIDED_SOLIDS, SOLIDS, Numbers
from ztsnr.demo.objectives import EPSILON, OURS, PLAIN, STARVED

NOISES = 8
SPREAD = np.linspace(-1, 1, NOISES)  # of the values over the noises
STARTS = {EPSILON: ("14.6",), PLAIN: ("14.6",), STARVED: ("14.6", "infinity"), OURS: ("14.6", "infinity")}
LENGTHS = ("14.6", "29", "58", "infinity")


def numbers_of(
    name: str,
    *,
    grounds: dict[str, dict[str, float]] | None = None,
    uneven: dict[str, float] | None = None,
    seen: dict[str, float] | None = None,
    tint: dict[str, float] | None = None,
    contrast: float = 2.0,
    first: float = 3.0,
    missed: float = 0.1,
    last: float = 0.2,
    whole: dict[str, float] | None = None,
    spread: float = 0.2,
) -> Numbers:
    """What ``Evaluation`` measures of a training.

    Args:
        grounds: start -> brightness of black, white, dark and light; by default those of the pictures themselves.
        uneven, seen, tint: start -> unevenness of the grounds around things, the same as it is seen (by default the
            same), and their tint.
        contrast, first, missed, last: coarse contrast, CIEDE2000 of the first prediction, share missed in the middle
            of the schedule, error at t = T.
        whole: start -> share of the long things that are whole.
        spread: of every value over the noises, in its own unit.
    """
    random = np.random.default_rng(0)
    numbers: Numbers = {"error/done": np.array(True)}

    def over_noises(value: float) -> np.ndarray:
        return value + spread * random.permutation(SPREAD)

    for pairs in ("trained", "held out"):
        numbers[f"error/missed/{pairs}"] = np.array(missed)
        numbers[f"error/last/{pairs}"] = last + 0.02 * random.permutation(SPREAD)
    for start in STARTS[name]:
        shown = {"black": 6.6, "white": 248.4, "dark": 55.0, "light": 194.0} | (grounds or {}).get(start, {})
        for guidance, names in (("1", SOLIDS), ("4", GUIDED_SOLIDS)):
            for ground in names:
                place = f"solids/{start}/{guidance}"
                numbers[f"{place}/brightness/{ground}"] = over_noises(shown.get(ground, 100.0))
                numbers[f"{place}/contrast/{ground}"] = over_noises(contrast)
                numbers[f"{place}/colour/{ground}"] = over_noises(5.0)
                numbers[f"{place}/first/{ground}"] = over_noises(first)
                numbers[f"{place}/pictures/{ground}"] = np.full((4, 32, 32, 3), shown.get(ground, 100.0), np.uint8)
        for guidance in ("1", "4"):
            place = f"things/{start}/{guidance}"
            for ground in ("black", "white"):
                numbers[f"{place}/unevenness/{ground}"] = over_noises((uneven or {}).get(start, 2.0))
                numbers[f"{place}/seen unevenness/{ground}"] = over_noises((seen or uneven or {}).get(start, 2.0))
                numbers[f"{place}/tint/{ground}"] = over_noises((tint or {}).get(start, 3.0))
                numbers[f"{place}/explained/{ground}"] = over_noises(0.9)
                numbers[f"{place}/pictures/{ground}"] = np.full((8, 32, 32, 3), 99, np.uint8)
    if name == OURS:
        for start in LENGTHS:
            share = (whole or {}).get(start, 1.0)
            for kind in ("halved", "literal"):
                explained = np.where(np.arange(48) < round(48 * share), 0.95, 0.2)
                numbers[f"{kind}/{start}/explained"] = random.permutation(explained)
                numbers[f"{kind}/{start}/pictures"] = np.full((12, 32, 32, 3), 50, np.uint8)
    return numbers


GREYISH = {"black": 60.0, "white": 199.0, "dark": 126.0, "light": 128.0}  # what a finite start makes
COHERENT = {"14.6": 0.3, "29": 0.9, "58": 0.95, "infinity": 1.0}


def as_claimed(**changes) -> dict[str, Numbers]:
    """A run that speaks for all claims, with other arguments of ``numbers_of`` for some trainings by name."""
    arguments = {
        EPSILON: {"grounds": {"14.6": GREYISH}},
        PLAIN: {"grounds": {"14.6": GREYISH}, "uneven": {"14.6": 9.0}, "tint": {"14.6": 30.0}, "contrast": 9.0},
        STARVED: {"last": 1.0, "grounds": {"infinity": {"black": 40.0}}},
        OURS: {"grounds": {"14.6": GREYISH}, "whole": COHERENT},
    }
    return {name: numbers_of(name, **made | changes.get(name, {})) for name, made in arguments.items()}


def as_denied() -> dict[str, Numbers]:
    """A run in which no training and no start makes a difference, and first predictions are grey."""
    return {name: numbers_of(name, first=40.0) for name in STARTS}
