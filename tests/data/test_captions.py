"""What of captions is shuffled, left out and kept, and that it is so often as it should be."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztsnr.data.captions import CaptionSettings, caption_text, join_tags, split_tags, unescape
from ztsnr.data.keyed_random import CAPTION, keyed_generator

TAGS = "1girl, solo, long hair, blue eyes, smile"


def rng(picture=0):
    return keyed_generator(7, 0, picture, CAPTION)


def texts(captions, count=4000, **given):
    chosen = CaptionSettings(**given)
    return [caption_text(captions, chosen, rng(picture)) for picture in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# What comes out


def test_without_settings_only_whitespace_changes():
    sentences = "A girl,  who sits\tby 1,000 lamps\r\n(two (2) of them red), , and \\(reads\\). "
    expected = "A girl, who sits by 1,000 lamps (two (2) of them red), , and \\(reads\\)."
    assert caption_text((sentences,), CaptionSettings(), rng()) == expected


@pytest.mark.parametrize("captions", [(), ("",), (" \n",), (" , ,",)])
def test_no_tags_make_an_empty_text(captions):
    assert caption_text(captions, CaptionSettings(shuffle=True), rng()) == ""
    framed = CaptionSettings(shuffle=True, prefix=" masterpiece ", suffix="highres")
    assert caption_text(captions, framed, rng()) == "masterpiece, highres"


def test_tags_are_cleaned():
    settings = CaptionSettings(tag_dropout=1e-12)
    assert caption_text((" 1girl,,long\n hair , ,\tsolo,",), settings, rng()) == "1girl, long hair, solo"


@pytest.mark.parametrize(
    ("separator", "caption", "expected"),
    [
        (",", "a b,c", "a b, c"),
        (" ", "1girl  long_hair\nsolo", "1girl long_hair solo"),
        ("\n", "a  b\nc\r\n", "a b\nc"),
        ("|", "a b | c", "a b| c"),
        ("||", "a | b||c", "a | b|| c"),
    ],
)
def test_separators(separator, caption, expected):
    settings = CaptionSettings(separator=separator, tag_dropout=1e-12)
    assert caption_text((caption,), settings, rng()) == expected


def test_tags_between_spaces():
    assert split_tags("1girl  long_hair\nsolo\t", " ") == ["1girl", "long_hair", "solo"]
    assert split_tags("1girl,  long  hair\nsolo\t", ",") == ["1girl", "long hair solo"]


def test_prefix_and_suffix():
    settings = CaptionSettings(prefix="a photo of", separator=" ", suffix="in the rain")
    assert caption_text(("a cat, wet",), settings, rng()) == "a photo of a cat, wet in the rain"
    every = texts((TAGS,), 100, prefix="masterpiece", suffix="highres", shuffle=True, tag_dropout=0.5, kept_tags=1)
    assert all(text.startswith("masterpiece, 1girl") and text.endswith(", highres") for text in every)


@given(
    st.lists(st.text("ab ,\n(", max_size=12), max_size=4),
    st.booleans(),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_what_is_kept_is_where_it_was_and_nothing_is_new(captions, shuffle, kept, dropout, picture):
    chosen = CaptionSettings(shuffle=shuffle, kept_tags=kept, tag_dropout=dropout)
    text = caption_text(captions, chosen, rng(picture))
    assert text == caption_text(captions, chosen, rng(picture))
    tags = split_tags(text)

    def possible(caption):
        before = split_tags(caption)
        if tags[:kept] != before[:kept]:
            return False
        if not shuffle:
            remaining = iter(before)
            if not all(tag in remaining for tag in tags):  # in their order
                return False
        if not dropout and len(tags) != len(before):
            return False
        return not Counter(tags) - Counter(before) and (dropout < 1 or len(tags) == len(before[:kept]))

    assert any(map(possible, captions or [""]))


# ----------------------------------------------------------------------------------------------------------------------
# How often


def test_every_order_is_as_likely():
    counts = Counter(texts(("x, a, b, c, d",), 4800, shuffle=True, kept_tags=1))
    orders = {", ".join("x" + "".join(order)) for order in permutations("abcd")}
    assert set(counts) == orders
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 23 + 4 * np.sqrt(2 * 23)


def test_tags_are_dropped_each_for_itself():
    seen = texts(("x, a, b",), tag_dropout=0.3, kept_tags=1)
    shares = {text: count / len(seen) for text, count in Counter(seen).items()}
    expected = {"x, a, b": 0.49, "x, a": 0.21, "x, b": 0.21, "x": 0.09}
    assert shares == pytest.approx(expected, abs=0.03)


def test_captions_are_dropped_whole():
    seen = Counter(texts((TAGS,), caption_dropout=0.1, prefix="masterpiece"))
    assert set(seen) == {"", f"masterpiece, {TAGS}"}
    assert seen[""] / seen.total() == pytest.approx(0.1, abs=0.02)
    assert set(texts((TAGS,), 100, caption_dropout=1)) == {""}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        ((1, 2, 5), {"a": 1 / 8, "b": 1 / 4, "c": 5 / 8}),
        ((1, 1, 2, 100), {"a": 1 / 4, "b": 1 / 4, "c": 1 / 2}),  # for pictures of four captions
    ],
)
def test_captions_are_chosen_by_weight(weights, expected):
    seen = Counter(texts(("a", "b", "c"), caption_weights=weights))
    assert {text: count / seen.total() for text, count in seen.items()} == pytest.approx(expected, abs=0.035)


def test_what_one_setting_draws_does_not_depend_on_the_others():
    def which_dropped(**given):
        return [text == "" for text in texts((TAGS,), 300, caption_dropout=0.3, **given)]

    def which_tags(**given):
        return [sorted(split_tags(text)) for text in texts((TAGS,), 300, tag_dropout=0.3, **given)]

    assert which_dropped() == which_dropped(shuffle=True, tag_dropout=0.5, kept_tags=1)
    assert which_tags() == which_tags(shuffle=True)


# ----------------------------------------------------------------------------------------------------------------------
# Tags, and bad settings


@given(st.lists(st.text("ab()\\ \n"), max_size=6))
def test_tags_survive_joining(tags):
    clean = split_tags(",".join(tags))
    assert split_tags(join_tags(tags)) == clean
    assert all(tag and tag == " ".join(tag.split()) for tag in clean)


def test_unescape():
    assert unescape(r"miku \(vocaloid\), :\), (plain), \\(^o^)/, a\b") == r"miku (vocaloid), :), (plain), \(^o^)/, a\b"


@pytest.mark.parametrize(
    "given",
    [
        {"separator": ""},
        {"separator": ", "},
        {"separator": None},
        {"prefix": 1},
        {"suffix": None},
        {"shuffle": 1},
        {"kept_tags": -1},
        {"kept_tags": 1.5},
        {"kept_tags": True},
        {"tag_dropout": 1.1},
        {"tag_dropout": float("nan")},
        {"caption_dropout": -0.1},
        {"caption_dropout": "0.1"},
        {"caption_weights": ()},
        {"caption_weights": (1, 0)},
        {"caption_weights": (1, float("inf"))},
        {"caption_weights": 2},
        {"caption_weights": "12"},
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        CaptionSettings(**given)


def test_bad_captions_are_refused():
    with pytest.raises(ValueError, match="3 captions, but caption_weights has only 2"):
        caption_text(("a", "b", "c"), CaptionSettings(caption_weights=(1, 1)), rng())
    with pytest.raises(ValueError, match="not one text"):
        caption_text("a, b", CaptionSettings(), rng())
