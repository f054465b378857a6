"""How often tags are, and loss weights by which a training set with more of one thing than of another is evened out.

NovelAI Diffusion V3 (arXiv 2409.15997) was trained with "tag-based loss weighting ... to attenuate overrepresented
concepts", as an author put it.  Our formula, which need not be theirs: a tag's weight is

    (median frequency / frequency)^power

which is median frequency balancing (Eigen and Fergus, arXiv 1411.4734) at power 1, and at 1/2 as strong as the
balancing of hashtags by Mahajan et al. (arXiv 1805.00932).  A picture's weight is the mean of its tags' weights: nearly
every picture has one very rare tag, so that their maximum would tell typing errors rather than concepts.
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
    r"""In how many pictures each tag is.

    Counters of several parts of a dataset can be added.

    Args:
        pictures: the captions of each.  A tag that is in several of them, or twice in one, counts once.
        separator: what stands between tags.
    """
    counts = Counter()
    for captions in pictures:
        counts.update(_tags(captions, separator))
    return counts


def frequency_weights(counts: Mapping[str, int], power: float = 0.5) -> dict[str, float]:
    """The weight of each tag, (median frequency / frequency)^power; at power 0 all are 1.

    Raises:
        UserError: a power below 0, a count below 1.
    """
    if not 0 <= power < math.inf:
        raise UserError(f"power must be at least 0, not {power!r}")
    if counts and min(counts.values()) < 1:
        tag = min(counts, key=counts.__getitem__)
        raise UserError(f"a tag is in at least one picture, and {tag!r} is said to be in {counts[tag]}")
    frequencies = np.array(list(counts.values()), dtype=np.float64)
    weights = (np.median(frequencies) / frequencies) ** power if counts else frequencies
    return dict(zip(counts, weights.tolist(), strict=True))


def write_tags(path: str | Path, table: Mapping[str, float]) -> None:
    """Write a table of tags as JSON, {tag: number}, the largest numbers first; see ``read_tags``.

    Raises:
        UserError: it cannot be written.
    """
    largest_first = dict(sorted(table.items(), key=lambda item: (-item[1], item[0])))
    with atomic_write(path) as file:
        file.write(json.dumps(largest_first, ensure_ascii=False, indent=0).encode())


def read_tags(path: str | Path) -> dict[str, float]:
    """A table of tags, their counts or their weights, from a JSON file {tag: number}.

    Tags are the same however they are spaced and whether or not their parentheses are escaped.

    Raises:
        UserError: a file that cannot be read or is something else, a number below 0, a tag that is there twice.
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
            raise UserError(f"{path} must have a number of at least 0 for each tag, and has {number!r} for {name!r}")
        if tag in table:
            raise UserError(f"{path} has the tag {tag!r} twice")
        table[tag] = number
    return table


def _same_tag(tag: str) -> str:
    return unescape(" ".join(tag.split()))


def _tags(captions: Sequence[str], separator: str) -> set[str]:
    """The tags of a picture, spelled as ``_same_tag`` spells them."""
    if isinstance(captions, str):
        raise UserError("a picture's captions must be a sequence of texts, not one text")
    tags = set().union(*(split_tags(caption, separator) for caption in captions))
    return {unescape(tag) for tag in tags} if any("\\" in caption for caption in captions) else tags


# ----------------------------------------------------------------------------------------------------------------------
# Weights of pictures


@dataclass(frozen=True)
class PictureWeights:
    """Loss weights of a dataset.

    Attributes:
        weights: (N,) float64, with the mean 1.
        scale: what a tag's weight was multiplied with for that.
        low, high: the limits; ``raised`` and ``lowered`` pictures would be beyond them.
        untagged: pictures without a tag, of weight 1.
        tags: (tag, pictures, weight times scale) of every tag of the dataset, the heaviest first.
        unknown: how many of these the table of weights lacks; they count as 1 in it.
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
        """A few lines and the heaviest and lightest tags, to be printed."""
        lines = [
            f"{len(self.weights)} pictures have loss weights from {self.weights.min():.3g} to "
            f"{self.weights.max():.3g}, on average {self.weights.mean():.6g}",
            f"{self.raised} are raised to {self.low:g}, {self.lowered} lowered to {self.high:g}, "
            f"{self.untagged} have no tags and weight 1",
            f"{self.unknown} of {len(self.tags)} tags have no weight of their own and count as 1",
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
        pictures: the captions of each.
        tag_weights: of ``frequency_weights``, or a user's.  Tags that are not in it count as 1.
        low, high: limits of a picture's weight, after scaling.
        separator: what stands between tags.
        repeats: (N,) how often an epoch sees each picture, which is its share in the mean; by default once.

    Raises:
        UserError: limits that do not have 1 between them, no pictures, a weight below 0, weights that cannot have the
            mean 1 within the limits since too many are 0.
    """
    if not 0 <= low <= 1 <= high < math.inf:
        raise UserError(f"low and high must have 1 between them, and not be below 0, not {low!r} and {high!r}")
    if not all(0 <= weight < math.inf for weight in tag_weights.values()):
        raise UserError("weights of tags must be numbers of at least 0")
    weights, counts = [], Counter()
    for captions in pictures:
        tags = _tags(captions, separator)
        counts.update(tags)
        weights.append(sum(map(tag_weights.get, tags, repeat(1.0))) / len(tags) if tags else math.nan)
    weights = np.array(weights, dtype=np.float64)
    shares = np.ones(len(weights)) if repeats is None else np.asarray(repeats, dtype=np.float64)
    if not len(weights):
        raise UserError("there are no pictures to weight")
    if shares.shape != weights.shape or not (shares >= 0).all() or np.isinf(shares).any():
        raise UserError(f"repeats must be a number of at least 0 for each of the {len(weights)} pictures")

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
    """The factor that brings the mean of the weights, clipped after it, to 1; the mean grows with the factor."""
    weights, shares = weights[shares > 0], shares[shares > 0]

    def excess(log_scale: float) -> float:
        return np.average(np.clip(weights * math.exp(log_scale), low, high), weights=shares) - 1

    if not len(weights):
        return 1.0
    positive = weights[weights > 0]
    if len(positive):
        least = math.log(0.5 / positive.max())  # all are below 1, or raised to low
        most = math.log(2.0 * high / positive.min())  # all are lowered to high, except those of 0
    if not len(positive) or excess(most) < 0:
        raise UserError(
            f"{len(weights) - len(positive)} of {len(weights)} pictures have weight 0, and the others would have to be "
            f"above {high:g} for a mean of 1: choose a higher limit, or fewer weights of 0"
        )
    root = brentq(excess, least, most, xtol=1e-15, rtol=np.float64(1e-15), maxiter=1000)
    return math.exp(cast(float, root))
