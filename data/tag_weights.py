"""Tag frequencies, and loss weights that balance an uneven training set.

NovelAI Diffusion V3 (arXiv 2409.15997) was trained with "tag-based loss weighting ... to attenuate overrepresented
concepts", as one of its authors put it.  The formula was not published; here a tag's weight is

    (median frequency / frequency)^power

At power 1 this is median frequency balancing (Eigen and Fergus, arXiv 1411.4734); at 1/2 it is as strong as the hashtag
balancing of Mahajan et al. (arXiv 1805.00932).  A picture's weight is the mean of its tags' weights.  Their maximum
would not do: nearly every picture has one very rare tag, often a typing error.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import cast

import numpy as np
from scipy.optimize import brentq
from tabulate import tabulate

from ..errors import UserError
from ..files import atomic_write
from .captions import split_tags, unescape

# ----------------------------------------------------------------------------------------------------------------------
# Tables of tags


def count_tags(pictures: Iterable[Sequence[str]], separator: str = ",") -> Counter[str]:
    r"""Count the pictures that have each tag.

    Counters of several parts of a dataset can be added.

    Args:
        pictures: captions of each picture.  A tag that a picture has several times counts once.
        separator: text between tags.
    """
    counts = Counter()
    for captions in pictures:
        counts.update(_tags(captions, separator))
    return counts


def frequency_weights(counts: Mapping[str, int], power: float = 0.5) -> dict[str, float]:
    """The weight of each tag, (median frequency / frequency)^power; at power 0 all weights are 1.

    Raises:
        UserError: power is below 0, or a count is below 1.
    """
    if not 0 <= power < math.inf:
        raise UserError(f"power must be at least 0, not {power!r}")
    if counts and min(counts.values()) < 1:
        tag = min(counts, key=counts.__getitem__)
        raise UserError(f"the count of every tag must be at least 1, but that of {tag!r} is {counts[tag]}")
    frequencies = np.array(list(counts.values()), dtype=np.float64)
    weights = (np.median(frequencies) / frequencies) ** power if counts else frequencies
    return dict(zip(counts, weights.tolist(), strict=True))


def write_tags(path: str | Path, table: Mapping[str, float]) -> None:
    """Write a table of tags as JSON, {tag: number}, the largest numbers first; ``read_tags`` reads it.

    Raises:
        UserError: the file cannot be written.
    """
    largest_first = dict(sorted(table.items(), key=lambda item: (-item[1], item[0])))
    with atomic_write(path) as file:
        file.write(json.dumps(largest_first, ensure_ascii=False, indent=0).encode())


def read_tags(path: str | Path) -> dict[str, float]:
    """Read a table of tags, counts or weights, from a JSON file {tag: number}.

    Tags that differ only in whitespace or in the escaping of parentheses are the same.

    Raises:
        UserError: the file cannot be read or has another form, a number is below 0, or a tag occurs twice.
    """
    try:
        pairs = json.loads(Path(path).read_bytes(), object_pairs_hook=list)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    table = {}
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise UserError(f'{path} must be one JSON object like {{"1girl": 0.5, "long hair": 1}}')
    for name, number in pairs:
        tag = _same_tag(name)
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number < math.inf:
            raise UserError(f"{path} must have a number of at least 0 for each tag, not {number!r} for {name!r}")
        if tag in table:
            raise UserError(f"{path} has the tag {tag!r} twice: remove one")
        table[tag] = number
    return table


def _same_tag(tag: str) -> str:
    return unescape(" ".join(tag.split()))


def _tags(captions: Sequence[str], separator: str) -> set[str]:
    """The set of a picture's tags, in the spelling of ``_same_tag``."""
    if isinstance(captions, str):
        raise UserError("a picture's captions must be a sequence of texts, not one text")
    tags = set().union(*(split_tags(caption, separator) for caption in captions))
    return {unescape(tag) for tag in tags} if any("\\" in caption for caption in captions) else tags


# ----------------------------------------------------------------------------------------------------------------------
# Weights of pictures


@dataclass(frozen=True)
class PictureWeights:
    """Loss weights of the pictures of a dataset.

    Attributes:
        weights: (N,) float64 with mean 1.
        scale: factor applied to the tags' weights to bring the mean to 1.
        low, high: limits of a picture's weight.
        raised, lowered: number of pictures whose weight was raised to ``low`` or lowered to ``high``.
        untagged: number of pictures without a tag; their weight is 1.
        tags: (tag, pictures, weight times scale) of every tag in the dataset, the heaviest first.
        unknown: number of these tags that are missing from the table of weights; their weight is 1 before scaling.
    """

    weights: np.ndarray
    scale: float
    low: float
    high: float
    raised: int
    lowered: int
    untagged: int
    tags: list[tuple[str, int, float]]
    unknown: int

    def report(self, rows: int = 10) -> str:
        """A short report with the heaviest and the lightest tags, as text."""
        lines = [
            f"{len(self.weights)} pictures have loss weights from {self.weights.min():.3g} to "
            f"{self.weights.max():.3g}, mean {self.weights.mean():.6g}",
            f"{self.raised} were raised to {self.low:g}, {self.lowered} lowered to {self.high:g}; "
            f"{self.untagged} have no tags and get weight 1",
            f"{self.unknown} of {len(self.tags)} tags are not in the table of weights and count as 1",
        ]
        shown = self.tags if len(self.tags) <= 2 * rows else [*self.tags[:rows], ("...",), *self.tags[-rows:]]
        return "\n".join([*lines, "", tabulate(shown, headers=("tag", "pictures", "weight"), floatfmt=".3g")])


def picture_weights(
    pictures: Iterable[Sequence[str]],
    tag_weights: Mapping[str, float],
    *,
    low: float = 0.25,
    high: float = 4.0,
    separator: str = ",",
    repeats: np.ndarray | None = None,
) -> PictureWeights:
    """The loss weight of each picture: the mean weight of its tags, scaled and clipped so that the dataset's mean is 1.

    Args:
        pictures: captions of each picture.
        tag_weights: tag -> weight, from ``frequency_weights`` or your own.  Missing tags count as 1.
        low, high: limits of a picture's weight, after scaling.
        separator: text between tags.
        repeats: (N,) number of times that an epoch has each picture, its weight in the mean; by default 1.

    Raises:
        UserError: 1 is not between the limits, there are no pictures, a weight is below 0, or so many weights are 0
            that no scale gives the mean 1 within the limits.
    """
    if not 0 <= low <= 1 <= high < math.inf:
        raise UserError(f"low must be from 0 to 1 and high at least 1, not {low!r} and {high!r}")
    if not all(0 <= weight < math.inf for weight in tag_weights.values()):
        raise UserError("the weights of tags must be finite numbers of at least 0")
    weights, counts = [], Counter()
    for captions in pictures:
        tags = _tags(captions, separator)
        counts.update(tags)
        weights.append(sum(map(tag_weights.get, tags, repeat(1.0))) / len(tags) if tags else math.nan)
    weights = np.array(weights, dtype=np.float64)
    shares = np.ones(len(weights)) if repeats is None else np.asarray(repeats, dtype=np.float64)
    if not len(weights):
        raise UserError("there are no pictures to weight: give the captions of at least one")
    if shares.shape != weights.shape or not (shares >= 0).all() or np.isinf(shares).any():
        raise UserError(f"repeats must have a number of at least 0 for each of the {len(weights)} pictures")

    tagged = ~np.isnan(weights)
    scale = _scale_to_mean_one(weights[tagged], shares[tagged], low, high)
    scaled = np.where(tagged, weights * scale, 1.0)
    by_weight = sorted(
        ((tag, count, tag_weights.get(tag, 1.0) * scale) for tag, count in counts.items()),
        key=lambda row: (-row[2], row[0]),
    )
    return PictureWeights(
        weights=np.clip(scaled, low, high),
        scale=scale,
        low=low,
        high=high,
        raised=int((scaled < low).sum()),
        lowered=int((scaled > high).sum()),
        untagged=int((~tagged).sum()),
        tags=by_weight,
        unknown=len(counts.keys() - tag_weights.keys()),
    )


def _scale_to_mean_one(weights: np.ndarray, shares: np.ndarray, low: float, high: float) -> float:
    """The factor that brings the mean of the scaled and clipped weights to 1; the mean grows with the factor."""
    weights, shares = weights[shares > 0], shares[shares > 0]

    def excess(log_scale: float) -> float:
        return np.average(np.clip(weights * math.exp(log_scale), low, high), weights=shares) - 1

    if not len(weights):
        return 1.0
    positive = weights[weights > 0]
    if len(positive):
        least = math.log(0.5 / positive.max())  # all weights below 1, or raised to low
        most = math.log(2.0 * high / positive.min())  # all weights lowered to high, except those of 0
    if not len(positive) or excess(most) < 0:
        raise UserError(
            f"{len(weights) - len(positive)} of {len(weights)} pictures have weight 0, so the others need more than "
            f"high = {high:g} for a mean of 1: raise high, or give fewer tags the weight 0"
        )
    root = brentq(excess, least, most, xtol=1e-15, rtol=np.float64(1e-15), maxiter=1000)
    return math.exp(cast(float, root))
