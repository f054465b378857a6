"""Aspect-ratio buckets, checked against slow code that was written without looking at them."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztsnr.canvas import area_buckets, assign_buckets, length_ratio, nearest_bucket, novelai_buckets

SDXL = area_buckets((1024, 1024))

# Podell et al. (arXiv 2307.01952), appendix I: height x width of the 40 sizes SDXL was trained in.
SDXL_TRAINED = """
    512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344
    768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896
    1152x896 1152x832 1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576
    1856x512 1920x512 1984x512 2048x512
"""


def on_its_side(sizes):
    return [(height, width) for width, height in sizes]


# ----------------------------------------------------------------------------------------------------------------------
# Buckets


def test_novelai_buckets():
    assert novelai_buckets() == [
        (256, 1024),
        (320, 1024),
        (384, 1024),
        (384, 960),
        (384, 896),
        (448, 832),
        (512, 768),
        (512, 704),
        (512, 512),
        (576, 640),
        (640, 576),
        (704, 512),
        (768, 512),
        (832, 448),
        (896, 384),
        (960, 384),
        (1024, 384),
        (1024, 320),
        (1024, 256),
    ]


def test_sdxl_buckets():
    trained = {tuple(int(side) for side in size.split("x")) for size in SDXL_TRAINED.split()}
    assert len(trained) == 40
    assert len(SDXL) == 33
    assert set(SDXL) < trained
    for height, width in trained - set(SDXL):
        assert min((height + 64) * width, height * (width + 64)) <= 1024 * 1024


def grown_buckets(area, step, limit):
    """From each width and each height, grow the other side a step at a time."""
    found = set()
    for first in range(step, limit + 1, step):
        second = 0
        while first * (second + step) <= area and second + step <= limit:
            second += step
        if second and Fraction(1, 4) <= Fraction(first, second) <= 4:
            found.add((first, second))
            found.add((second, first))
    square = step
    while (square + step) ** 2 <= area:
        square += step
    return found | {(square, square)}


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from([1, 8, 32, 64]), st.integers(0, 3000))
def test_area_buckets(columns, rows, step, room):
    size = columns * step, rows * step
    limit = max(size) + room
    buckets = area_buckets(size, step, limit)
    assert set(buckets) == grown_buckets(math.prod(size), step, limit)
    assert buckets == sorted(set(buckets), key=lambda bucket: (bucket[0], -bucket[1]))
    assert set(on_its_side(buckets)) == set(buckets)
    assert (size in buckets) == (max(size) <= 4 * min(size))
    for width, height in buckets:
        assert width % step == height % step == 0
        assert width * height <= math.prod(size)
        assert max(width, height) <= limit


def test_area_buckets_takes_numpy_numbers_and_answers_in_its_own():
    assert area_buckets(tuple(np.array([1024, 1024])), np.int64(64), np.int32(2048)) == SDXL
    assert all(type(side) is int for bucket in SDXL for side in bucket)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (((1000, 1024),), "size must be a multiple of step = 64 on both sides, not 1000 x 1024"),
        (((1024, 0),), "at least 1 x 1, not"),
        (((-64, -64),), "at least 1 x 1, not"),
        (((1024.0, 1024),), "in whole pixels"),
        (((True, 64), 1), "in whole pixels"),
        ((1024,), r"size must be \(width, height\)"),
        (((64, 64, 64),), r"size must be \(width, height\)"),
        (((1024, 1024), 0), "step must be a whole number of at least 1, not 0"),
        (((1024, 1024), 64.0), "step must be a whole number"),
        (((1024, 1024), 64, 960), "limit must be a whole number, at least the longer side of 1024 x 1024, not 960"),
        (((512, 768), 64, 704), "at least the longer side of 512 x 768, not 704"),
        (((1024, 1024), 64, 2048.0), "limit must be a whole number"),
    ],
)
def test_area_buckets_mistakes(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        area_buckets(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def exact_choice(size, buckets):
    """The rule of assign_buckets in fractions, one picture and one bucket at a time."""

    def distance(a, b):  # of two positive numbers, by their logarithm
        return max(a, b) / min(a, b)

    def preference(bucket):
        ratio = Fraction(bucket[0], bucket[1])
        return (
            distance(Fraction(size[0], size[1]), ratio),
            distance(ratio, Fraction(1)),  # the nearer to the square
            ratio,  # the tall one
            distance(Fraction(size[0] * size[1]), Fraction(bucket[0] * bucket[1])),
            bucket[0] * bucket[1],  # the smaller
        )

    return min(range(len(buckets)), key=lambda index: preference(buckets[index]))


small_sizes = st.tuples(st.integers(1, 200), st.integers(1, 200))
# few different sides, so that shared ratios, ties and several areas are common
tied_sizes = st.tuples(st.sampled_from([1, 2, 3, 4, 6, 8, 9, 12, 16]), st.sampled_from([1, 2, 3, 4, 6, 8, 9, 12, 16]))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_assignment_follows_its_rule_exactly(data):
    sides = data.draw(st.sampled_from([small_sizes, tied_sizes]))
    sizes = data.draw(st.lists(sides, max_size=12))
    buckets = data.draw(st.lists(sides, min_size=1, max_size=12, unique=True))
    assignment = assign_buckets(sizes, buckets)
    assert assignment.shape == (len(sizes),)
    assert assignment.dtype == np.int64
    assert assignment.tolist() == [exact_choice(size, buckets) for size in sizes]
    assert [nearest_bucket(*size, buckets) for size in sizes] == [buckets[index] for index in assignment]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100_000), st.integers(1, 100_000)), min_size=1, max_size=50),
    st.sampled_from([SDXL, novelai_buckets(), SDXL + area_buckets((512, 768))]),
    st.floats(0, 2),
)
def test_no_bucket_is_nearer_and_the_cutoff_keeps_its_word(sizes, buckets, cutoff):
    assignment = assign_buckets(sizes, buckets)
    kept = assign_buckets(sizes, buckets, max_aspect_error=cutoff)
    for (width, height), index, kept_index in zip(sizes, assignment, kept, strict=True):
        errors = [abs(math.log(width / height) - math.log(w / h)) for w, h in buckets]
        assert errors[index] <= min(errors) + 1e-11
        if abs(min(errors) - cutoff) > 1e-11:
            assert kept_index == (index if errors[index] <= cutoff else -1)


@settings(deadline=None)
@given(
    st.lists(small_sizes, min_size=1, max_size=50),
    st.lists(small_sizes, min_size=1, max_size=12, unique=True),
    st.floats(0, 2),
)
def test_wide_and_tall_are_treated_alike(sizes, buckets, cutoff):
    buckets = [*buckets, (211, 211)]  # with a square no picture lies between one tall and one wide bucket
    upright = assign_buckets(sizes, buckets, max_aspect_error=cutoff)
    lying = assign_buckets(on_its_side(sizes), on_its_side(buckets), max_aspect_error=cutoff)
    assert (upright == lying).all()


def test_ties():
    assert nearest_bucket(2, 1, [(4, 1), (1, 1)]) == (1, 1)
    assert nearest_bucket(1, 2, [(1, 4), (1, 1)]) == (1, 1)
    assert nearest_bucket(5, 5, [(3, 2), (2, 3)]) == (2, 3)
    assert nearest_bucket(5, 5, [(6, 4), (2, 3)]) == (2, 3)
    assert nearest_bucket(2, 2, [(4, 4), (1, 1)]) == (1, 1)


def test_one_aspect_ratio_in_several_areas():
    buckets = [*SDXL, *[(width // 2, height // 2) for width, height in SDXL]]
    assert nearest_bucket(400, 600, buckets) == (416, 608)
    assert nearest_bucket(4000, 6000, buckets) == (832, 1216)
    # 512 and 1024 are equally far from 724.1
    assert nearest_bucket(724, 724, buckets) == (512, 512)
    assert nearest_bucket(725, 725, buckets) == (1024, 1024)


def test_cutoff_is_the_share_that_a_crop_loses():
    # cut to 1:1, a picture of 2:1 or 1:2 loses exactly half, one of 201:100 a little more
    sizes = [(200, 100), (100, 200), (201, 100), (100, 201), (7, 7)]
    assert assign_buckets(sizes, [(64, 64)], max_aspect_error=math.log(2)).tolist() == [0, 0, -1, -1, 0]
    assert assign_buckets(sizes, [(64, 64)], max_aspect_error=0).tolist() == [-1, -1, -1, -1, 0]


@pytest.mark.parametrize("nothing", [[], np.empty((0, 2), np.int32)])
def test_no_pictures(nothing):
    assignment = assign_buckets(nothing, SDXL, max_aspect_error=1)
    assert assignment.shape == (0,)
    assert assignment.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, np.float32, np.float64])
def test_every_number_type_is_computed_in_full_precision(dtype):
    sizes = np.random.default_rng(0).integers(1, 256, (5000, 2))
    assert (assign_buckets(sizes.astype(dtype), SDXL) == assign_buckets(sizes, SDXL)).all()


def test_nearest_bucket_of_a_ratio():
    assert nearest_bucket(16, 9, SDXL) == (1344, 768)
    assert nearest_bucket(2.35, 1, SDXL) == (1536, 640)
    assert nearest_bucket(1, 100, np.array(SDXL)) == (512, 2048)
    assert all(type(side) is int for side in nearest_bucket(1, 1, np.array(SDXL)))


@pytest.mark.parametrize(
    ("sizes", "buckets", "sentence"),
    [
        ([(3, 4), (0, 4)], SDXL, r"not 0 x 4 \(picture 1\)"),
        ([(3, -4)], SDXL, "must be positive numbers, not 3 x -4$"),
        ([(math.nan, 4)], SDXL, "not nan x 4"),
        ([(4, math.inf)], SDXL, "not 4.0 x inf"),
        ([3, 4], SDXL, r"shape \(N, 2\), not int64 of shape \(2,\)"),
        ([("3", "4")], SDXL, r"numbers of shape \(N, 2\)"),
        ([(None, 4)], SDXL, r"numbers of shape \(N, 2\)"),
        ([(3, 4)], [], "no buckets to choose from"),
        ([(3, 4)], [(64, 64), (64, 128), (64, 64)], "bucket 64 x 64 is listed twice"),
        ([(3, 4)], [(64, 0)], "a bucket must be"),
        ([(3, 4)], [(64, 64.5)], "a bucket must be"),
    ],
)
def test_assignment_mistakes(sizes, buckets, sentence):
    with pytest.raises(ValueError, match=sentence):
        assign_buckets(sizes, buckets)


@pytest.mark.parametrize("cutoff", [-0.1, math.nan])
def test_cutoff_mistakes(cutoff):
    with pytest.raises(ValueError, match="max_aspect_error must be at least 0"):
        assign_buckets([(3, 4)], SDXL, max_aspect_error=cutoff)


# ----------------------------------------------------------------------------------------------------------------------


def test_length_ratio():
    assert length_ratio(1024, 1024) == 1
    assert length_ratio(2048, 2048) == 2
    assert length_ratio(4096, 1024) == 2
    assert length_ratio(512, 768, trained=(512, 768)) == 1
    assert length_ratio(832, 1216) == pytest.approx(0.98226, abs=1e-5)  # sqrt(1011712 / 1048576)


@pytest.mark.parametrize("arguments", [(0, 5), (5, -1), (5, 5, (0, 5)), (5, math.nan)])
def test_length_ratio_mistakes(arguments):
    with pytest.raises(ValueError, match="width and height must be positive numbers"):
        length_ratio(*arguments)
