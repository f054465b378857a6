"""The text that a picture is trained with in an epoch, made from its captions.

Each epoch chooses anew: the caption, the order of its tags, and the tags that are left out.
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
    """How captions become training text.

    Attributes:
        separator: text between the tags of a caption.
        shuffle: put the tags in random order.
        kept_tags: number of leading tags that stay in place and are never left out.
        tag_dropout: probability of leaving out a tag, drawn for each tag.
        caption_dropout: probability that the text is empty, even of prefix and suffix.  The empty text is the
            unconditional prompt of classifier-free guidance (Ho and Salimans, arXiv 2207.12598), and the empty prompt
            in ComfyUI.
        caption_weights: relative weights of the first, second, ... caption of a picture; a picture with fewer captions
            uses the first weights.  None: all captions are equally likely.
        prefix, suffix: text added before and after the caption as further tags.

    Raises:
        UserError: a number is out of range, or the separator is empty or has spaces around it.
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
                raise UserError(f"{name} must be a probability from 0 to 1, not {getattr(self, name)!r}")
        weights = self.caption_weights
        if weights is not None and not (
            isinstance(weights, Sequence)
            and len(weights)
            and all(isinstance(weight, Real) and 0 < weight < math.inf for weight in weights)
        ):
            raise UserError(f"caption_weights must be positive numbers, one for each caption, not {weights!r}")


def caption_text(captions: Sequence[str], settings: CaptionSettings, rng: np.random.Generator) -> str:
    """The text of a picture, a pure function of the captions, the settings and the state of ``rng``.

    Without shuffle and tag dropout, a caption may also be sentences: each run of whitespace becomes one space, and
    nothing else changes.  Otherwise empty tags are left out too.  The random draws of one setting do not depend on the
    others, so the same captions are dropped whether shuffling is on or off.

    Args:
        captions: captions of the picture; an empty sequence is the same as an empty caption.
        settings: how the text is made.
        rng: ``keyed_generator(seed, epoch, picture, CAPTION)``, so that the text does not depend on the worker.

    Raises:
        UserError: there are more captions than ``caption_weights``.
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
    """Choose one of the captions by a random number in [0, 1)."""
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
    """Split a caption into tags; runs of whitespace become one space, and empty tags are left out."""
    parts = caption.split(None if separator == " " else separator)
    return [tag for part in parts if (tag := _spaced(part))]


def join_tags(tags: Iterable[str], separator: str = ",") -> str:
    """Join tags to a caption, leaving out empty ones."""
    between = separator if separator.isspace() else separator + " "
    return between.join(filter(None, tags))


@lru_cache(2**16)  # the same few tags occur many times
def _spaced(text: str) -> str:
    return " ".join(text.split())


def unescape(text: str) -> str:
    r"""Replace ``\(`` and ``\)`` by plain parentheses, as ComfyUI does.

    In its prompts plain parentheses are syntax, and some taggers escape them for it.  In captions they are not syntax:
    ``(`` and ``\(`` both stand for a parenthesis.
    """
    return re.sub(r"\\([()])", r"\1", text)
