"""Boxes go where their pixels go."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ztsnr.data.keyed_random import keyed_generator
from ztsnr.data.picture_boxes import load_crop, mark_boxes, place_boxes, read_boxes
from ztsnr.data.sources import Source, build_index

BOX = [60, 50, 180, 120]
SIZE = (300, 200)


def marked_picture():
    """Black, with a white rectangle."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """The picture, and the same lying on its side in the file, which its orientation (EXIF 6) sets upright."""
    folder = tmp_path_factory.mktemp("boxes") / "pictures"
    folder.mkdir()
    marked_picture().save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    marked_picture().transpose(Image.Transpose.ROTATE_90).save(folder / "b.jpg", exif=exif, quality=95)
    return build_index([Source(folder)], allow_missing_captions=True)[0]


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.mark.parametrize("picture", [0, 1])
@pytest.mark.parametrize("shorter_side", [200, 96, 131])
def test_marks_are_where_the_white_pixels_are(index, tmp_path, picture, shorter_side):
    records = [{"picture": index.key(i), "boxes": [BOX]} for i in range(2)]
    boxes = read_boxes(write(tmp_path / "boxes.jsonl", *records), index)
    load = partial(load_crop, index=index, shorter_side=shorter_side, flip=0.5, boxes=boxes)
    shares, lefts = [], set()
    for seed in range(40):
        data, conditioning = load(picture, (64, 48), partial(keyed_generator, seed, 0, picture))
        assert data.shape == (4, 48, 64)
        white, marks = data[:3].mean(0) > 0, data[3] > 0
        assert set(data[3].unique().tolist()) <= {0, 1}
        # an edge within a pixel falls to either side
        assert (white != marks).sum() <= 64 + 48
        edge = torch.nn.functional.max_pool2d(marks[None].float(), 3, 1, 1) != -torch.nn.functional.max_pool2d(
            -marks[None].float(), 3, 1, 1
        )
        assert not ((white != marks) & ~edge[0]).any()
        assert conditioning.original_size == SIZE[::-1]
        shares.append(marks.float().mean().item())
        lefts.add(conditioning.crop_top_left)
    assert len(lefts) > 20
    assert np.mean([0 < share < 1 for share in shares]) > 0.3  # an edge is in many of the crops


def test_place_boxes():
    boxes = np.array([[10.0, 20, 30, 60]])
    assert place_boxes(boxes, (100, 200), (50, 100), (3, 4)).tolist() == [[2, 6, 12, 26]]
    assert place_boxes(boxes, (100, 200), (50, 100), (3, 4), mirrored=True).tolist() == [[32, 6, 42, 26]]


def test_mark_boxes():
    marks = mark_boxes(np.array([[1.0, 0, 3, 1], [-5, 1.6, 1.4, 9]]), (4, 3))
    assert marks.tolist() == [[[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]]
    assert mark_boxes(np.empty((0, 4)), (4, 3)).tolist() == np.zeros((1, 3, 4)).tolist()


def test_crops_around_boxes(index):
    box = np.array([[290.0, 10, 298, 16]])  # small, and in a corner
    counts = {}
    for share in (0.0, 0.5, 1.0):
        load = partial(load_crop, index=index, shorter_side=200, flip=0.5, boxes={0: box}, box_crops=share)
        crops = [load(0, (64, 64), partial(keyed_generator, seed, 0, 0))[0] for seed in range(60)]
        counts[share] = sum(bool(crop[3].any()) for crop in crops)
    assert counts[1.0] == 60
    assert counts[0.0] < 12
    assert 20 < counts[0.5] < 50


def test_boxes_are_cut_to_their_picture(index, tmp_path):
    path = write(
        tmp_path / "boxes.jsonl",
        {"picture": index.key(0), "boxes": [[-5, 10, 20, 500]]},
        "",
        {"picture": index.key(0), "boxes": [[1, 2, 3, 4]]},
        {"picture": "of another data set", "boxes": [[1, 2, 3, 4]]},
        {"picture": index.key(1), "boxes": []},
    )
    boxes = read_boxes(path, index)
    assert {number: those.tolist() for number, those in boxes.items()} == {0: [[0, 10, 20, 200], [1, 2, 3, 4]]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("nonsense", "line 1 of .* is not"),
        ({"boxes": []}, "line 1 of .* is not"),
        ({"picture": "pictures/a.png", "boxes": [[1, 2, 3]]}, "line 1 of .* is not"),
        ({"picture": "pictures/a.png", "boxes": [[3, 2, 1, 4]]}, "empty or outside of pictures/a.png"),
        ({"picture": "pictures/a.png", "boxes": [[400, 2, 410, 4]]}, "empty or outside of pictures/a.png"),
        ('{"picture": "pictures/a.png", "boxes": [[NaN, 2, 3, 4]]}', "empty or outside of pictures/a.png"),
        ({"picture": "a.png", "boxes": [[1, 2, 3, 4]]}, "none of the 2 pictures: use their keys, such as 'pictures/a"),
    ],
)
def test_what_is_wrong_with_boxes(index, tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        read_boxes(write(tmp_path / "boxes.jsonl", record), index)


def test_no_such_file(index, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_boxes(tmp_path / "nothing.jsonl", index)
