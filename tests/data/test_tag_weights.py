"""Weights of pictures against closed forms: their mean is 1, within the limits, in proportion to their tags."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztsnr.data.tag_weights import count_tags, frequency_weights, picture_weights, read_tags, write_tags

PICTURES = [
    ("1girl, solo, smile",),
    ("1girl,  solo, miku (vocaloid)", "1girl, hat"),
    (r"1girl, 1girl, miku \(vocaloid\)",),
    ("scenery",),
]
COUNTS = {"1girl": 3, "solo": 2, "smile": 1, "miku (vocaloid)": 2, "hat": 1, "scenery": 1}


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def test_each_picture_counts_once():
    assert count_tags(PICTURES) == COUNTS
    assert count_tags(PICTURES[:2]) + count_tags(PICTURES[2:]) == COUNTS
    assert count_tags([("long_hair solo", "solo")], separator=" ") == {"long_hair": 1, "solo": 1}
    assert count_tags([(), ("",), (" , ",)]) == {}


def test_a_plain_text_is_no_picture():
    with pytest.raises(ValueError, match="not one text"):
        count_tags(["1girl, solo"])


def test_tables_are_read_as_written(tmp_path):
    table = count_tags([*PICTURES, ('"quoted", 初音ミク, 😀, back\\slash',)])
    write_tags(tmp_path / "tags.json", table)
    assert Counter(read_tags(tmp_path / "tags.json")) == table
    assert next(iter(json.loads((tmp_path / "tags.json").read_text(encoding="utf-8")))) == "1girl"
    weights = frequency_weights(table, 0.7)
    write_tags(tmp_path / "tags.json", weights)
    assert read_tags(tmp_path / "tags.json") == weights


def test_a_user_may_escape_and_space(tmp_path):
    (tmp_path / "user.json").write_text(r'{" miku   \\(vocaloid\\)": 3, "1girl": 0}')
    assert read_tags(tmp_path / "user.json") == {"miku (vocaloid)": 3, "1girl": 0}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("\x80", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "one JSON object"),
        ('["ab", "cd"]', "one JSON object"),
        ("3", "one JSON object"),
        ('{"a": -1}', "-1 for 'a'"),
        ('{"a": NaN}', "nan for 'a'"),
        ('{"a": true}', "True for 'a'"),
        ('{"a": "1"}', "'1' for 'a'"),
        ('{"a": {"b": 1}}', "for 'a'"),
        ('{"a": 1, "a ": 2}', "'a' twice"),
    ],
)
def test_bad_tables_are_refused(tmp_path, content, complaint):
    (tmp_path / "bad.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=complaint):
        read_tags(tmp_path / "bad.json")


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json cannot be read: No such file"):
        read_tags(tmp_path / "none.json")


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def test_frequency_weights():
    """The median count is 1.5 of COUNTS."""
    assert frequency_weights(COUNTS, 1) == pytest.approx({tag: 1.5 / count for tag, count in COUNTS.items()})
    assert frequency_weights(COUNTS) == pytest.approx({tag: (1.5 / count) ** 0.5 for tag, count in COUNTS.items()})
    assert set(frequency_weights(COUNTS, 0).values()) == {1.0}
    assert frequency_weights({}) == {}


def test_within_wide_limits_weights_are_means_of_tags():
    """By hand: the means of 1 / count, over their own mean."""
    found = picture_weights(PICTURES, frequency_weights(COUNTS, 1), low=0, high=100)
    means = np.array([(1 / 3 + 1 / 2 + 1) / 3, (1 / 3 + 1 / 2 + 1 / 2 + 1) / 4, (1 / 3 + 1 / 2) / 2, 1])
    assert found.weights == pytest.approx(means / means.mean(), rel=1e-12)
    assert found.scale == pytest.approx(1 / 1.5 / means.mean(), rel=1e-12)
    assert (found.raised, found.lowered, found.untagged, found.unknown) == (0, 0, 0, 0)


def test_clipping_keeps_the_mean():
    """By hand: of raw weights 1, 2, 3, 10 the last is lowered to 2, so the others have the mean 2/3 of 1."""
    pictures = [("a",), ("b",), ("c",), ("d",)]
    found = picture_weights(pictures, {"a": 1, "b": 2, "c": 3, "d": 10}, low=0, high=2)
    assert found.weights == pytest.approx([1 / 3, 2 / 3, 1, 2], rel=1e-12)
    assert (found.raised, found.lowered) == (0, 1)
    found = picture_weights(pictures, {"a": 1, "b": 2, "c": 3, "d": 10}, low=0.6, high=2)
    assert found.weights == pytest.approx([0.6, 0.6, 0.8, 2], rel=1e-12)  # 1.4 remain for 2 and 3, and 0.56 is too low
    assert (found.raised, found.lowered) == (2, 1)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60),
    st.floats(0, 1),
    st.floats(1, 50),
    st.integers(0, 99),
)
def test_the_mean_is_one_within_the_limits(raw, low, high, seed):
    repeats = np.random.default_rng(seed).integers(0, 4, len(raw)) if seed % 2 else None
    table = {str(i): weight for i, weight in enumerate(raw)}
    found = picture_weights([(tag,) for tag in table], table, low=low, high=high, repeats=repeats)
    assert low <= found.weights.min() <= found.weights.max() <= high
    assert found.weights == pytest.approx(np.clip(found.scale * np.array(raw), low, high), rel=1e-12)
    if repeats is None or repeats.any():
        assert np.average(found.weights, weights=repeats) == pytest.approx(1, abs=1e-12)
    assert found.raised == (found.scale * np.array(raw) < low).sum()
    assert found.lowered == (found.scale * np.array(raw) > high).sum()


def test_limits_of_one_turn_weights_off():
    found = picture_weights(PICTURES, frequency_weights(COUNTS), low=1, high=1)
    assert found.weights.tolist() == [1] * 4


def test_pictures_without_tags_weigh_one():
    found = picture_weights([("a",), (), ("b",), (" ,",)], {"a": 1, "b": 3})
    assert found.weights == pytest.approx([0.5, 1, 1.5, 1], rel=1e-12)
    assert found.untagged == 2
    assert picture_weights([(), ()], {}).weights.tolist() == [1, 1]


def test_a_user_table():
    """Tags that it lacks count as 1; the spelling of a caption does not matter."""
    found = picture_weights(PICTURES, {"miku (vocaloid)": 7, "scenery": 0}, low=0, high=10)
    means = np.array([1, 10 / 4, 4, 0])
    assert found.weights == pytest.approx(means / means.mean(), rel=1e-12)
    assert found.unknown == 4
    assert found.tags[0][:2] == ("miku (vocaloid)", 2)
    assert found.tags[0][2] == pytest.approx(7 / means.mean())
    assert found.tags[-1] == ("scenery", 1, 0)


def test_rare_things_gain():
    """What the weights are for: of two kinds of pictures, one nine times as often, both count more evenly."""
    pictures = [("1girl, solo",)] * 900 + [("1girl, solo, armor",)] * 100
    weights = [
        picture_weights(pictures, frequency_weights(count_tags(pictures), power)).weights for power in (0, 0.5, 1)
    ]
    shares = [w[900:].sum() / w.sum() for w in weights]
    assert shares[0] == pytest.approx(0.1)
    assert shares[0] < shares[1] < shares[2] < 0.5


def test_the_report_says_what_happened():
    pictures = [*([("common",)] * 96), ("rare, common",), ("rarest",), (), ()]
    found = picture_weights(pictures, {"common": 1, "rare": 30, "rarest": 1000}, low=0.5, high=5)
    lines = found.report(rows=1).splitlines()
    assert lines[0] == f"100 pictures have loss weights from {found.weights.min():.3g} to 5, mean 1"
    assert lines[1] == "0 were raised to 0.5, 2 lowered to 5; 2 have no tags and get weight 1"
    assert lines[2] == "0 of 3 tags are not in the table of weights and count as 1"
    assert [line.split()[0] for line in lines[-3:]] == ["rarest", "...", "common"]
    assert len(found.report().splitlines()) == 4 + 2 + 3


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"low": 1.1}, "low must be from 0 to 1 and high at least 1"),
        ({"high": 0.9}, "low must be from 0 to 1 and high at least 1"),
        ({"low": -1}, "low must be from 0 to 1 and high at least 1"),
        ({"high": math.inf}, "low must be from 0 to 1 and high at least 1"),
        ({"high": math.nan}, "low must be from 0 to 1 and high at least 1"),
        ({"pictures": []}, "no pictures"),
        ({"tag_weights": {"1girl": -5}}, "at least 0"),
        ({"tag_weights": {"1girl": -0.5, "solo": 2}}, "at least 0"),  # though the mean of both is above 0
        ({"tag_weights": {"1girl": math.inf}}, "at least 0"),
        ({"tag_weights": dict.fromkeys(COUNTS, 0)}, "4 of 4 pictures have weight 0"),
        ({"tag_weights": dict.fromkeys(COUNTS, 0) | {"scenery": 1}, "low": 0, "high": 3}, "3 of 4 pictures"),
        ({"repeats": [1, 2]}, "each of the 4 pictures"),
        ({"repeats": [1, 1, 1, -1]}, "each of the 4 pictures"),
    ],
    ids=str,
)
def test_bad_input_is_refused(given, complaint):
    arguments = {"pictures": PICTURES, "tag_weights": COUNTS} | given
    with pytest.raises(ValueError, match=complaint):
        picture_weights(**arguments)


@pytest.mark.parametrize(("counts", "power"), [(COUNTS, -1), (COUNTS, math.nan), ({"a": 0, "b": 1}, 1)])
def test_bad_frequencies_are_refused(counts, power):
    with pytest.raises(ValueError, match=r"power must be|that of 'a' is 0"):
        frequency_weights(counts, power)
