"""The text that a picture is trained with in an epoch, made from its captions.

Every choice is drawn anew each epoch: which caption, in what order its tags, which of them are left out.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real

import numpy as np

from ..errors import UserError


@dataclass(frozen=True)
class CaptionSettings:
    """What becomes of captions.

    Attributes:
        separator: what stands between the tags of a caption.
        shuffle: the tags come in random order.
        kept_tags: so many leading tags stay where they are and are never left out.
        tag_dropout: probability that a tag is left out, each for itself.
        caption_dropout: probability that the text is empty, without prefix and suffix either.  This is the
            unconditional text of classifier-free guidance (Ho and Salimans, arXiv 2207.12598), in ComfyUI a prompt
            without words.
        caption_weights: of the first, second, ... caption of a picture, relative to each other; a picture with fewer
            captions has the first of them.  None: all captions are as likely.
        prefix, suffix: stand before and behind the caption as further tags do.

    Raises:
        UserError: a number out of range, a separator that is empty or has spaces around it.
    """

    separator: str = ","
    shuffle: bool = False
    kept_tags: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    caption_weights: tuple[float, ...] | None = None
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self):
        for name in ("separator", "prefix", "suffix"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} must be text, not {getattr(self, name)!r}")
        if not self.separator or self.separator.strip() not in ("", self.separator):
            raise UserError(f'separator must be like "," or " ", without spaces around it, not {self.separator!r}')
        if not isinstance(self.shuffle, bool):
            raise UserError(f"shuffle must be true or false, not {self.shuffle!r}")
        if not isinstance(self.kept_tags, Integral) or isinstance(self.kept_tags, bool) or self.kept_tags < 0:
            raise UserError(f"kept_tags must be a whole number of at least 0, not {self.kept_tags!r}")
        for name in ("tag_dropout", "caption_dropout"):
            if not isinstance(getattr(self, name), Real) or not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is a probability, from 0 to 1, not {getattr(self, name)!r}")
        weights = self.caption_weights
        if weights is not None and not (
            isinstance(weights, Sequence)
            and len(weights)
            and all(isinstance(weight, Real) and 0 < weight < math.inf for weight in weights)
        ):
            raise UserError(f"caption_weights must be positive numbers, one for each caption, not {weights!r}")


def caption_text(captions: Sequence[str], settings: CaptionSettings, rng: np.random.Generator) -> str:
    """The text of a picture, a pure function of the captions, the settings and the state of ``rng``.

    Without shuffle and tag dropout a caption may also be sentences: nothing is changed but its whitespace, each run of
    which becomes one space.  Otherwise tags that are empty are left out too.  What one setting draws does not depend on
    the others, so that the pictures whose caption is dropped stay the same when shuffling is turned on.

    Args:
        captions: of the picture; none is as good as an empty one.
        settings: see there.
        rng: ``keyed_generator(seed, epoch, picture, CAPTION)``, for a text that does not depend on the worker.

    Raises:
        UserError: more captions than ``caption_weights``.
    """
    if isinstance(captions, str):
        raise UserError("captions must be a sequence of texts, not one text")
    dropping, choosing = rng.random(2)
    if dropping < settings.caption_dropout:
        return ""
    caption = _chosen(captions, settings.caption_weights, choosing)
    if settings.shuffle or settings.tag_dropout:
        caption = join_tags(_vary(split_tags(caption, settings.separator), settings, rng), settings.separator)
    else:
        caption = " ".join(caption.split())
    return join_tags((_spaced(settings.prefix), caption, _spaced(settings.suffix)), settings.separator)


def _chosen(captions: Sequence[str], weights: Sequence[float] | None, number: float) -> str:
    """One of the captions, by a random number in [0, 1)."""
    if not captions:
        return ""
    shares = np.ones(len(captions)) if weights is None else weights
    if len(captions) > len(shares):
        raise UserError(f"a picture has {len(captions)} captions, but caption_weights has only {len(shares)}")
    ends = np.cumsum(shares[: len(captions)])
    return captions[int(np.searchsorted(ends[:-1], number * ends[-1], side="right"))]


def _vary(tags: list[str], settings: CaptionSettings, rng: np.random.Generator) -> list[str]:
    kept, others = tags[: settings.kept_tags], tags[settings.kept_tags :]
    dropping, places = rng.random((2, len(others)))
    order = np.argsort(places, kind="stable") if settings.shuffle else range(len(others))
    return kept + [others[tag] for tag in order if dropping[tag] >= settings.tag_dropout]


# ----------------------------------------------------------------------------------------------------------------------
# Tags


def split_tags(caption: str, separator: str = ",") -> list[str]:
    """The tags of a caption, each run of whitespace in them one space; without those that are empty."""
    parts = caption.split(None if separator == " " else separator)
    return [tag for part in parts if (tag := _spaced(part))]


def join_tags(tags: Iterable[str], separator: str = ",") -> str:
    """The caption of tags, without those that are empty."""
    between = separator if separator.isspace() else separator + " "
    return between.join(filter(None, tags))


@lru_cache(2**16)  # the same few tags come again and again
def _spaced(text: str) -> str:
    return " ".join(text.split())


def unescape(text: str) -> str:
    r"""The text with ``\(`` and ``\)`` as plain parentheses, which is what they mean to ComfyUI.

    There, and in taggers that write captions for it, plain parentheses are syntax.  In captions they are not: ``(`` and
    ``\(`` are both a parenthesis.
    """
    return re.sub(r"\\([()])", r"\1", text)
