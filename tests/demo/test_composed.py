"""The pictures are what their captions say, the same for the same seed, and go the way of any folder of pictures."""

import csv
import math

import numpy as np
import pytest
from PIL import Image

from ztsnr.data.sources import Source, build_index
from ztsnr.demo import composed
from ztsnr.demo.composed import (
    BRIGHTNESS,
    COLOURS,
    DIAGONAL,
    FEW,
    FRAME,
    GROUNDS,
    LONG,
    LONG_SHAPE,
    PHOTOGRAPHS,
    SHADE,
    SIDES,
    TINT,
    Asked,
    Composer,
    Sprites,
    ground_colour,
    write_pictures,
)
from ztsnr.diagnostics.leak_probes import LUMA

COUNT = 4000


@pytest.fixture(scope="module")
def composer():
    return Composer()


@pytest.fixture(scope="module")
def drawn(composer):
    """What so many pictures of training show."""
    random = np.random.default_rng(0)
    return [composer.draw(random) for _ in range(COUNT)]


def share_error(share):
    """Five standard errors of a share of COUNT."""
    return 5 * math.sqrt(share * (1 - share) / COUNT)


# ----------------------------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize(
    ("asked", "captions"),
    [
        (Asked("black"), ("completely black", "black background")),
        (Asked("dark"), ("darkness",)),
        (Asked("light"), ("bright light",)),
        (Asked("stars"), ("stars background",)),
        (Asked("red", "owl"), ("an owl on a red background", "an owl on red")),
        (Asked("dark", "fox"), ("a fox on a dark background",)),
        (Asked("grass", "apple"), ("an apple on grass",)),
        (Asked("stars", "guitar"), ("a guitar among stars",)),
        (Asked("blue", "snake", True), ("a long snake on a blue background", "a long snake on blue")),
    ],
)
def test_captions(asked, captions):
    assert asked.captions == captions
    assert asked.caption == captions[0]


def test_every_caption_stands_for_one_picture(composer):
    captions = composer.captions()
    assert len(set(captions)) == len(captions)
    # grounds alone, each with every emoji, and with every long one; colours by two captions, the others by one
    assert len(captions) == (2 * len(COLOURS) + len(BRIGHTNESS) + len(PHOTOGRAPHS)) * (1 + len(FEW) + len(LONG))


def test_all_that_is_drawn_has_a_caption_that_is_known(composer, drawn):
    known = set(composer.captions())
    assert all(set(asked.captions) <= known for asked in drawn)


def test_emoji_are_named_once_and_there():
    names = Sprites().names
    assert len(set(names)) == len(names) > 300
    assert set(FEW) | set(LONG) <= set(names)
    assert len(set(FEW)) == 48


# ----------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_pairs_that_are_held_out_are_never_drawn_for_training(composer, drawn):
    assert not any(composer.held_out(asked) for asked in drawn)
    random = np.random.default_rng(1)
    others = [composer.draw(random, held_out=True) for _ in range(200)]
    assert all(composer.held_out(asked) and asked.emoji and not asked.long for asked in others)
    assert set(others).isdisjoint(drawn)


def test_a_fifth_is_held_out_of_every_ground_and_every_emoji(composer):
    held = np.array([[composer.held_out(Asked(ground, emoji)) for emoji in FEW] for ground in GROUNDS])
    assert held.mean() == pytest.approx(0.2, abs=0.01)
    assert np.abs(held.mean(1) - 0.2).max() < 0.02  # 48 emoji
    assert held.sum(0).min() >= 2  # of 13 grounds
    assert held.sum(0).max() <= 3
    assert not any(composer.held_out(Asked(ground)) for ground in GROUNDS)
    assert not any(composer.held_out(Asked(ground, emoji, True)) for ground in GROUNDS for emoji in LONG)


def test_everything_is_drawn_in_its_share(composer, drawn):
    # Of the pictures that are drawn, a fifth of those with an emoji is drawn again
    ordinary = 1 - composed.EMPTY_SHARE - composed.LONG_SHARE
    kept = 1 - 0.2 * ordinary
    for share, found in (
        (composed.EMPTY_SHARE, [not asked.emoji for asked in drawn]),
        (composed.LONG_SHARE, [asked.long for asked in drawn]),
    ):
        assert np.mean(found) == pytest.approx(share / kept, abs=share_error(share / kept) + 0.003)
    own = composed.BLACK_OR_WHITE_SHARE + (1 - composed.BLACK_OR_WHITE_SHARE) * 2 / len(GROUNDS)
    assert np.mean([asked.ground in ("black", "white") for asked in drawn]) == pytest.approx(own, abs=share_error(own))
    assert {asked.ground for asked in drawn} == set(GROUNDS)
    assert {asked.emoji for asked in drawn if asked.long} == set(LONG)
    assert {asked.emoji for asked in drawn if not asked.long} == {"", *FEW}


# ----------------------------------------------------------------------------------------------------------------------
# Grounds


@pytest.mark.parametrize("name", COLOURS)
def test_a_colour_comes_in_shades(name):
    random = np.random.default_rng(2)
    colours = np.array([ground_colour(name, random) for _ in range(4000)])
    for channel, level in enumerate(COLOURS[name]):
        values = colours[:, channel]
        if min(level, 255 - level) == 0:  # half of a Gaussian is clipped away
            mean = math.hypot(SHADE, TINT) / math.sqrt(2 * math.pi)
            assert abs(level - values.mean()) == pytest.approx(mean, rel=0.06)
            assert (values == level).mean() == pytest.approx(0.5, abs=0.04)
        elif min(level, 255 - level) > 3 * SHADE:
            assert values.mean() == pytest.approx(level, abs=5 * SHADE / 4000**0.5)
            assert values.std() == pytest.approx(math.hypot(SHADE, TINT), rel=0.06)
            assert (values - colours[:, (channel + 1) % 3]).std() < 2 * SHADE  # the shade is of all channels


def test_channels_of_grey_differ_by_their_tints_alone():
    random = np.random.default_rng(3)
    colours = np.array([ground_colour("grey", random) for _ in range(4000)])
    assert (colours[:, 0] - colours[:, 1]).std() == pytest.approx(math.sqrt(2) * TINT, rel=0.06)


@pytest.mark.parametrize("name", BRIGHTNESS)
def test_dark_and_light_are_even_in_brightness(name):
    random = np.random.default_rng(4)
    colours = np.array([ground_colour(name, random) for _ in range(4000)])
    low, high = BRIGHTNESS[name]
    if name == "dark":  # nothing of it is clipped above, and hardly anything below
        assert colours.mean() == pytest.approx((low + high) / 2, rel=0.03)
        # of a product of an even draw and 1 + hue
        squares = (high**2 + high * low + low**2) / 3 * (1 + composed.HUE**2)
        assert np.square(colours).mean() == pytest.approx(squares, rel=0.05)
    assert (colours.mean(1) > 128).mean() == pytest.approx(float(name == "light"), abs=0.03)
    assert colours.max() <= 255
    assert np.ptp(colours, axis=1).mean() > 10  # in any hue


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_cut_at_any_place(composer, name):
    random = np.random.default_rng(5)
    pieces = [composer.ground(name, random) for _ in range(8)]
    assert all(piece.shape == (32, 32, 3) for piece in pieces)
    assert len({piece.tobytes() for piece in pieces}) == 8
    assert np.mean([(piece @ LUMA).std() for piece in pieces]) > 10
    pieces[0][:] = 0  # a canvas to draw on, and not the photograph itself
    assert all(composer.ground(name, random).any() for _ in range(8))


# ----------------------------------------------------------------------------------------------------------------------
# Things


def test_sprites_are_premultiplied():
    sprites = Sprites(FEW)
    for name in FEW:
        for size in sprites.sizes():
            sprite = sprites(name, size)
            assert sprite.shape == (size[1], size[0], 4)
            assert sprite.min() >= 0
            assert sprite[..., 3].max() <= 1 + 1e-6
            assert (sprite[..., :3] <= 255 * sprite[..., 3:] + 1e-3).all()  # no colour where there is nothing
    # at the full size it is the sheet's own cell
    row, column = divmod(Sprites().names.index("frog"), composed.COLUMNS)
    with Image.open(composed.PICTURES / "emoji.webp") as sheet:
        left, top = column * composed.CELL, row * composed.CELL
        cell = np.asarray(sheet.convert("RGBA").crop((left, top, left + composed.CELL, top + composed.CELL)), float)
    whole = sprites("frog", (composed.CELL, composed.CELL))
    np.testing.assert_allclose(whole[..., 3], cell[..., 3] / 255, atol=1e-5)
    np.testing.assert_allclose(whole[..., :3], cell[..., :3] * cell[..., 3:] / 255, atol=0.01)


def test_a_smaller_sprite_has_the_means_of_a_larger_one():
    sprites = Sprites(("frog",))
    large, small = sprites("frog", (64, 64)), sprites("frog", (16, 16))
    blocks = large.reshape(16, 4, 16, 4, 4).mean((1, 3))
    np.testing.assert_allclose(small, blocks, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", LONG)
def test_a_long_thing_spans_its_shape(name):
    opacity = Sprites((name,))(name, LONG_SHAPE)[..., 3]
    assert opacity.shape == LONG_SHAPE[::-1]
    assert opacity.max(0).min() > 0.05  # from end to end and without a gap,
    assert opacity.max(1).min() > 0.05  # and as high


def test_the_pencil_is_turned_before_it_is_cropped():
    assert DIAGONAL == ("pencil",)
    opacity = Sprites(DIAGONAL)("pencil", LONG_SHAPE)[..., 3]
    # straight along its shape it fills most of it, and from corner to corner it would fill little
    assert opacity.mean() > 0.7
    opacity = Sprites(DIAGONAL)("pencil", (32, 32))[..., 3]
    assert opacity.mean() < 0.5


def test_pictures_are_the_same_for_the_same_seed(composer):
    for asked in (Asked("dark", "fox"), Asked("red", "train", True), Asked("brick"), Asked("white", "bee")):
        one, again, other = (composer.picture(asked, np.random.default_rng(seed)) for seed in (6, 6, 7))
        assert one.dtype == np.uint8
        assert one.shape == (32, 32, 3)
        assert (one == again).all()
        assert (one != other).any()


@pytest.mark.parametrize("scale", [1, 2])
def test_the_frame_is_ground_alone_and_the_thing_is_blended_over_it(scale):
    composer = Composer(("frog", "fox"), scale)
    frame, side = scale * FRAME, composer.side
    assert side == 32 * scale
    random = np.random.default_rng(8)
    corners = set()
    for number in range(120):
        asked = Asked("blue", LONG[number % 3], True) if number % 2 else Asked("blue", "frog")
        picture = composer.picture(asked, random).astype(int)
        inside = picture[frame:-frame, frame:-frame]
        ground = picture[0, 0]
        edge = np.ones((side, side), bool)
        edge[frame:-frame, frame:-frame] = False
        assert (picture[edge] == ground).all()
        rows, columns = (np.flatnonzero((inside != ground).any((2, axis))) for axis in (1, 0))
        corners.add((rows[0], columns[0], rows[-1], columns[-1]))
    assert len(corners) > 20  # at any place, and in several sizes
    assert min(corner[0] for corner in corners) == 0  # up to the frame
    assert max(corner[2] for corner in corners) == side - 2 * frame - 1


def test_the_thing_is_blended_by_its_opacity(composer, monkeypatch):
    """Against a loop over the pixels, with a place and a ground that are known."""
    monkeypatch.setattr(composed, "SIDES", (20,))
    random = np.random.default_rng(9)
    picture = composer.picture(Asked("green", "tulip"), random)
    random = np.random.default_rng(9)
    ground = ground_colour("green", random)
    random.integers(1)  # the size
    x, y = (int(random.integers(FRAME, 32 - FRAME - 20 + 1)) for _ in range(2))
    sprite = composer.sprites("tulip", (20, 20))
    for row in range(32):
        for column in range(32):
            expected = ground.astype(np.float32)
            if 0 <= row - y < 20 and 0 <= column - x < 20:
                *colour, opacity = sprite[row - y, column - x]
                expected = ground * (1 - opacity) + colour
            assert np.abs(picture[row, column] - expected).max() < 0.51


def test_sizes_fit_between_the_frames():
    for scale in (1, 2):
        sprites = Sprites(("frog",), scale)
        assert sprites.sizes() == tuple((scale * side, scale * side) for side in SIDES)
        assert all(max(size) <= scale * (32 - 2 * FRAME) for long in (False, True) for size in sprites.sizes(long))


# ----------------------------------------------------------------------------------------------------------------------
# A folder of them


def test_files_are_read_as_any_folder_of_pictures(composer, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 20, composer, seed=3)
    index, refused = build_index([Source(folder)])
    assert (len(index), len(refused)) == (20, 0)
    with (folder / "answers.csv").open() as file:
        answers = list(csv.DictReader(file))
    assert len(answers) == 20
    for number, answer in enumerate(answers):
        assert answer["picture"] == f"{number:05d}.png"
        random = np.random.default_rng((3, number))
        asked = composer.draw(random)
        assert answer["caption"] in asked.captions
        assert (answer["ground"], answer["emoji"], answer["long"]) == (asked.ground, asked.emoji, str(asked.long))
        assert (folder / f"{number:05d}.txt").read_text() == answer["caption"]
        assert (np.asarray(Image.open(folder / answer["picture"])) == composer.picture(asked, random)).all()
    assert len(list(folder.iterdir())) == 41


def test_another_seed_gives_other_pictures(composer, tmp_path):
    folders = [write_pictures(tmp_path / str(seed), 3, composer, seed) for seed in (0, 1)]
    contents = [[(folder / f"{number:05d}.png").read_bytes() for number in range(3)] for folder in folders]
    assert contents[0] != contents[1]


def test_a_folder_is_there_whole_or_not_at_all(composer, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="already exists"):
        write_pictures(tmp_path / "pictures", 1, composer)

    pictures = iter([np.zeros((32, 32, 3), np.uint8)] * 2)
    monkeypatch.setattr(Composer, "picture", lambda *_: next(pictures))
    with pytest.raises(StopIteration):  # at the third of five
        write_pictures(tmp_path / "new", 5, composer)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
