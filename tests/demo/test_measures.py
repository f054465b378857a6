"""Measures against closed forms, against loops over pixels, and on composed pictures of which the answer is known."""

import numpy as np
import pytest

from ztsnr.demo.composed import FEW, LONG, Asked, Composer
from ztsnr.demo.measures import (
    WHOLE,
    brightness,
    coarse_contrast,
    colour_distance,
    explained,
    explained_by_asked,
    frame,
    tint,
    unevenness,
)
from ztsnr.diagnostics.leak_probes import LUMA


@pytest.fixture(scope="module")
def composer():
    return Composer()


def composed_pictures(composer, asked, seed=0):
    random = np.random.default_rng(seed)
    return np.stack([composer.picture(one, random) for one in asked]).astype(float)


# ----------------------------------------------------------------------------------------------------------------------
# Brightness, colour and contrast


def test_brightness_is_luma():
    pictures = np.zeros((4, 3, 5, 3))
    pictures[0] = 100
    for channel in range(3):
        pictures[channel + 1, ..., channel] = 100
    np.testing.assert_allclose(brightness(pictures), [100, 21.26, 71.52, 7.22])


def test_the_frame_is_counted_out():
    numbers = np.arange(5 * 7 * 3.0).reshape(1, 5, 7, 3)
    for width in (1, 2):
        expected = [
            numbers[0, row, column]
            for row in range(5)
            for column in range(7)
            if min(row, 4 - row) < width or min(column, 6 - column) < width
        ]
        assert frame(numbers, width)[0].tolist() == np.array(expected).tolist()
    assert len(frame(np.zeros((1, 32, 32, 3)))[0]) == 32**2 - 28**2


def test_unevenness_is_of_the_frame_alone():
    picture = np.full((1, 32, 32, 3), 60.0)
    picture[:, 2:-2, 2:-2] = np.random.default_rng(0).uniform(0, 255, (28, 28, 3))
    assert unevenness(picture)[0] == pytest.approx(0, abs=1e-12)
    # a ramp of one level a column: the 32 columns hold 4 pixels of the frame each, and the two outer pairs 28 more
    ramp = np.tile(np.arange(32.0)[None, None, :, None], (1, 32, 1, 3))
    weights = np.where(np.isin(np.arange(32), (0, 1, 30, 31)), 32, 4)
    mean = np.average(np.arange(32), weights=weights)
    assert unevenness(ramp)[0] == pytest.approx(np.average((np.arange(32) - mean) ** 2, weights=weights) ** 0.5)
    assert unevenness(np.concatenate([picture, 3 * ramp])).shape == (2,)


def test_tint_is_of_the_mean_of_the_frame():
    colours = np.array([[0.0, 0, 0], [90, 90, 90], [10, 40, 25], [200, 30, 90]])
    pictures = np.tile(colours[:, None, None], (1, 32, 32, 1))
    pictures[:, 2:-2, 2:-2] = (255, 0, 0)  # a red thing
    np.testing.assert_allclose(tint(pictures), [0, 0, 30, 170])
    chequered = np.indices((32, 32)).sum(0)[None, ..., None] % 2 * np.full(3, 60.0)
    assert unevenness(chequered)[0] == pytest.approx(30)
    assert tint(chequered)[0] == 0
    halves = np.zeros((1, 32, 32, 3))
    halves[:, :, :16, 0] = 80
    halves[:, :, 16:, 2] = 80
    assert tint(halves)[0] == pytest.approx(40)  # of purple, which red and blue are on average


def test_coarse_contrast_sees_blocks_and_not_grain():
    halves = np.repeat([0.0, 200.0], 16)[None, None, :, None] * np.ones((1, 32, 1, 3))
    chequered = (np.indices((32, 32)).sum(0) % 2 * 200.0)[None, ..., None] * np.ones(3)
    quarters = np.zeros((1, 32, 32, 3))
    quarters[:, :8, 8:16] = 160.0  # one of 16 blocks
    found = coarse_contrast(np.concatenate([halves, chequered, quarters]))
    np.testing.assert_allclose(found, [100, 0, 160 * (1 / 16 * 15 / 16) ** 0.5], atol=1e-9)


def test_colour_distance_is_ciede2000():
    assert colour_distance(np.zeros((2, 3, 3)), (0, 0, 0)).max() == 0
    # of black and white only the lightness differs, and about their middle, L = 50, its weight S_L is 1
    assert colour_distance(np.full((1, 3), 255), (0, 0, 0))[0] == pytest.approx(100, rel=1e-3)
    colours = np.array([[200.0, 30, 30], [40, 70, 200]])
    assert colour_distance(colours, colours[0])[0] == pytest.approx(0, abs=1e-9)
    there, back = colour_distance(colours, colours[0])[1], colour_distance(colours, colours[1])[0]
    assert there == pytest.approx(back)
    assert there > 40


# ----------------------------------------------------------------------------------------------------------------------
# Whether a thing is whole


def brute_force(picture, sprites, name, sizes):
    """The share that a thing explains, by painting it at every place over the ground."""
    edge = np.ones(picture.shape[:2], bool)
    edge[2:-2, 2:-2] = False
    ground = np.median(picture[edge], axis=0)
    least = np.inf
    for width, height in sizes:
        sprite = sprites(name, (width, height)).astype(float)
        for top in range(picture.shape[0] - height + 1):
            for left in range(picture.shape[1] - width + 1):
                painted = np.tile(ground, (*picture.shape[:2], 1))
                part = painted[top : top + height, left : left + width]
                part[:] = part * (1 - sprite[..., 3:]) + sprite[..., :3]
                least = min(least, np.square(picture - painted).sum())
    return max(-1, 1 - least / np.square(picture - ground).sum())


def test_explained_against_a_loop_over_all_places(composer):
    random = np.random.default_rng(1)
    sizes, names = ((7, 9), (10, 6)), ("fox", "bee")
    pictures = random.uniform(0, 255, (3, 14, 13, 3))
    pictures[1] = 40
    pictures[1, 3:12, 4:11] = composer.sprites("fox", (7, 9))[..., :3]  # over black, in a picture that is not black
    pictures[2] = 200
    sprite = composer.sprites("bee", (10, 6))
    pictures[2, 5:11, 2:12] = 200 * (1 - sprite[..., 3:]) + sprite[..., :3]
    found = explained(pictures, names, composer.sprites, sizes)
    expected = [[brute_force(picture, composer.sprites, name, sizes) for name in names] for picture in pictures]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found[2, 1] == pytest.approx(1, abs=1e-4)
    assert np.ptp(found) > 0.5


EVEN = ("black", "white", "red", "dark", "light")


def test_a_thing_on_an_even_ground_is_all_that_there_is(composer):
    asked = [Asked(ground, emoji) for ground in EVEN for emoji in FEW[:12]]
    asked += [Asked(ground, emoji, True) for ground in EVEN for emoji in LONG]
    pictures = composed_pictures(composer, asked)
    # but for the rounding to levels, whose square is 1/12
    np.testing.assert_allclose(explained_by_asked(pictures, asked, composer.sprites), 1, atol=2e-3)


def test_a_wrong_thing_explains_little(composer):
    asked = [Asked(ground, emoji) for ground in EVEN for emoji in FEW[:12]]
    others = [Asked(one.ground, FEW[(FEW.index(one.emoji) + 5) % len(FEW)]) for one in asked]
    found = explained_by_asked(composed_pictures(composer, asked), others, composer.sprites)
    assert found.mean() < 0.3
    assert (found > WHOLE).mean() < 0.05
    # none of the long things, of which whole ones are counted, passes for another
    long = [(ground, drawn, asked) for ground in ("black", "white", "blue", "red") for drawn in LONG for asked in LONG]
    pictures = composed_pictures(composer, [Asked(ground, drawn, True) for ground, drawn, _ in long])
    found = explained_by_asked(pictures, [Asked(ground, asked, True) for ground, _, asked in long], composer.sprites)
    assert [share > WHOLE for share in found] == [drawn == asked for _, drawn, asked in long]


def long_ones(composer):
    asked = [Asked(ground, emoji, True) for ground in ("black", "white", "blue", "red") for emoji in LONG]
    return composed_pictures(composer, asked), asked


def test_a_torn_thing_is_not_whole(composer):
    pictures, asked = long_ones(composer)
    torn = np.roll(pictures, 16, axis=2)  # its halves change sides
    assert explained_by_asked(torn, asked, composer.sprites).max() < WHOLE


def test_half_a_thing_is_not_whole(composer):
    pictures, asked = long_ones(composer)
    grounds = np.median(frame(pictures), axis=1)
    pictures[:, :, 16:] = grounds[:, None, None]
    found = explained_by_asked(pictures, asked, composer.sprites)
    assert found.mean() < 0.2
    assert found.max() < WHOLE


def test_two_things_are_not_one(composer):
    random = np.random.default_rng(3)
    sprite = composer.sprites("frog", (14, 14))
    pictures = np.zeros((6, 32, 32, 3))
    for i, ground in enumerate(random.uniform(0, 255, (6, 3))):
        pictures[i] = ground
        for left in (2, 16):
            part = pictures[i, 9:23, left : left + 14]
            part[:] = part * (1 - sprite[..., 3:]) + sprite[..., :3]
    one = explained(pictures, ("frog",), composer.sprites, [(14, 14)])[:, 0]
    assert one == pytest.approx(0.5, abs=0.02)  # each of the two is half of what there is
    assert (one < WHOLE).all()
    alone = pictures.copy()
    alone[:, :, 16:] = pictures[:, :1, :1]
    assert explained(alone, ("frog",), composer.sprites, [(14, 14)])[:, 0] == pytest.approx(1, abs=1e-4)


def test_a_picture_without_a_thing_is_at_the_lower_limit(composer):
    flat = np.full((1, 32, 32, 3), 50.0)
    assert explained(flat, ("frog",), composer.sprites, composer.sprites.sizes())[0, 0] == -1


def test_a_ground_of_another_colour_does_not_matter(composer):
    """What is measured of a thing is not what is measured of the ground: a black that is too grey keeps its frog."""
    asked = [Asked("black", "frog")]
    for level in (0.0, 60.0):
        picture = np.full((1, 32, 32, 3), level)
        sprite = composer.sprites("frog", (24, 24))
        part = picture[0, 4:28, 4:28]
        part[:] = part * (1 - sprite[..., 3:]) + sprite[..., :3]
        assert explained_by_asked(picture, asked, composer.sprites)[0] == pytest.approx(1, abs=1e-4)


def test_each_picture_is_asked_for_its_own_thing(composer):
    asked = [Asked("black", "frog"), Asked("red", "train", True), Asked("white", "bee"), Asked("white", "frog")]
    pictures = composed_pictures(composer, asked)
    together = explained_by_asked(pictures, asked, composer.sprites)
    alone = [explained_by_asked(pictures[i : i + 1], [one], composer.sprites)[0] for i, one in enumerate(asked)]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    mixed = explained_by_asked(pictures, asked[::-1], composer.sprites)
    assert (mixed[[1, 2]] < WHOLE).all()
    # in another size than those that are tried
    small = explained_by_asked(pictures, asked, composer.sprites, sizes=[(8, 8)])
    assert small.max() < WHOLE


def test_luma_is_rec_709():
    assert LUMA.tolist() == [0.2126, 0.7152, 0.0722]
