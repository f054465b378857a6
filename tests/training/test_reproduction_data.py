"""The pictures are what their captions say, the same for the same seed, and go the way of any folder of pictures."""

import csv

import numpy as np
import pytest
from PIL import Image

from ztsnr.diagnostics.leak_report import COLOURS
from ztsnr.diagnostics.leak_run import PROMPTS
from ztsnr.training.bucketing import bucket_pictures
from ztsnr.training.reproduction_data import KINDS, SIZES, draw_picture, solid_caption, vocabulary, write_pictures
from ztsnr.training.sources import Source, build_index

COUNT = 400


@pytest.fixture(scope="module")
def known():
    return [draw_picture(number, 0, SIZES[number % len(SIZES)]) for number in range(COUNT)]


def nearest_colour(pixels):
    """Names of the colours that pixels (..., 3) are nearest to."""
    distances = [np.square(pixels.astype(float) - colour).sum(-1) for colour in COLOURS.values()]
    return np.array(list(COLOURS))[np.argmin(distances, 0)]


def test_all_kinds_come_in_their_shares(known):
    for kind, share in KINDS.items():
        assert sum(one.kind == kind for one in known) / COUNT == pytest.approx(share, abs=0.08)


def test_solid_pictures_have_one_colour_and_shades_of_it(known):
    solids = [one for one in known if one.kind == "solid"]
    for one in solids:
        assert np.ptp(one.pixels.reshape(-1, 3), axis=0).max() == 0
        assert nearest_colour(one.pixels[0, 0]) == one.background
    greys = [one.pixels.mean() for one in solids if one.background == "grey"]
    assert np.std(greys) == pytest.approx(16, rel=0.5)  # grey is far from the levels where shades are clipped


@pytest.mark.parametrize("kind", ["shape", "band"])
def test_a_subject_lies_before_its_background(known, kind):
    for one in (one for one in known if one.kind == kind):
        names = nearest_colour(one.pixels)
        subject, background = (names == one.subject).mean(), (names == one.background).mean()
        assert 0.01 < subject < 0.55
        assert background > 0.35
        assert subject + background > 0.9  # edges are mixtures, and may be near a third colour
        assert one.subject in one.caption
        assert one.caption.startswith(f"{one.background} background, ")


def test_a_band_is_one_piece_from_side_to_side(known):
    from scipy.ndimage import label

    for one in (one for one in known if one.kind == "band"):
        mask = nearest_colour(one.pixels) == one.subject
        _, pieces = label(mask, np.ones((3, 3)))
        assert pieces == 1
        height, width = mask.shape
        along = (mask[:, 0].any() and mask[:, -1].any()) or (mask[0].any() and mask[-1].any())
        assert along
        if height != width:
            assert (mask[0].any() and mask[-1].any()) == (height > width)


def test_scenes_are_dark_or_light_and_not_flat(known):
    scenes = [one for one in known if one.kind == "scene"]
    for one in scenes:
        assert (one.pixels.mean() < 128) == (one.background == "dark")
        assert one.pixels.mean(-1).std() > 4
    assert {one.background for one in scenes} == {"dark", "light"}


def test_captions_are_of_the_vocabulary(known):
    words = set(vocabulary())
    for one in known:
        assert set(one.caption.replace(",", " ,").split()) <= words


def test_solid_captions_are_the_prompts_of_the_leak_test():
    assert {prompt.text: prompt.target for prompt in PROMPTS if prompt.target} == {
        solid_caption(name): colour for name, colour in COLOURS.items()
    }


def test_a_picture_depends_on_seed_and_number_alone():
    first, again, other = (draw_picture(7, seed, (64, 64)) for seed in (1, 1, 2))
    assert first.caption == again.caption
    assert (first.pixels == again.pixels).all()
    assert any(
        draw_picture(number, 1, (64, 64)).caption != draw_picture(number, 2, (64, 64)).caption for number in range(8)
    )
    assert other.pixels.shape == (64, 64, 3)


def test_files_are_read_as_any_folder_of_pictures(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 12, seed=3)
    index, refused = build_index([Source(folder)])
    assert len(index) == 12
    assert len(refused) == 0
    for number in range(12):
        known = draw_picture(number, 3, SIZES[number % len(SIZES)])
        assert (np.asarray(Image.open(folder / f"{number:05d}.png")) == known.pixels).all()
        assert (folder / f"{number:05d}.txt").read_text() == known.caption
    found = bucket_pictures(index.sizes, [list(dict.fromkeys(SIZES))], batch_size=1)
    assert set(found.assignment.tolist()) == {0, 1, 2}
    with (folder / "answers.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12


def test_a_folder_that_is_there_is_kept(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        write_pictures(tmp_path / "pictures", 1)
