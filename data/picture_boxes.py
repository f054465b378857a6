"""Crops of pictures, and the boxes in them that matter most: eyes, faces, hands.

A box is given in pixels of the upright original picture.  It is resized, mirrored and moved together with its pixels.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..canvas import Size
from ..errors import UserError
from .dataset import Numbers
from .keyed_random import CROP, FLIP
from .picture_index import PictureIndex
from .pictures import WHITE, Color, MicroConditioning, cover_size, height_first, open_picture, resize_picture

Boxes = Mapping[int, np.ndarray]  # picture -> (K, 4) float64: left, top, right, bottom


def read_boxes(path: str | Path, index: PictureIndex) -> dict[int, np.ndarray]:
    """Read boxes from a JSONL file of lines like {"picture": KEY, "boxes": [[left, top, right, bottom]]}.

    Parts of a box outside of its picture are cut off.  Lines for pictures that are not in the index are skipped, so one
    file can serve several data sets.

    Args:
        path: path of the file.
        index: index whose keys name the pictures.

    Returns:
        Number of each picture with boxes -> (K, 4) float64.

    Raises:
        UserError: the file cannot be read, a line has another form, a box is empty or outside of its picture, or no
            line names a picture in the index.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    numbers = {key: number for number, key in enumerate(index.table["key"].to_pylist())}
    found = {}
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            key, boxes = record["picture"], np.array(record["boxes"], np.float64).reshape(-1, 4)
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'line {place} of {path} is not {{"picture": KEY, "boxes": [[left, top, right, bottom], ...]}}'
            ) from None
        if key in numbers and len(boxes):
            inside = boxes.clip(0, np.tile(index.sizes[numbers[key]], 2))
            if not (inside[:, :2] < inside[:, 2:]).all():  # also false for NaN
                raise UserError(f"line {place} of {path} has a box that is empty or outside of {key}: correct it")
            found[numbers[key]] = np.concatenate([found.get(numbers[key], np.empty((0, 4))), inside])
    if not found:
        raise UserError(f"{path} names none of the {len(index)} pictures: use their keys, such as {index.key(0)!r}")
    return found


def place_boxes(
    boxes: np.ndarray, original: Size, scaled: Size, corner: tuple[int, int], mirrored: bool = False
) -> np.ndarray:
    """Convert boxes of a picture to pixels of a crop of it; they may extend beyond the crop.

    Args:
        boxes: (K, 4) left, top, right, bottom in pixels of the original.
        original, scaled: (width, height) of the picture before and after resizing.
        corner: (left, top) of the crop, in pixels of the picture after resizing and mirroring.
        mirrored: True if the picture was mirrored left and right.

    Returns:
        (K, 4) float64 in pixels of the crop.
    """
    left, top, right, bottom = (boxes * np.tile(np.divide(scaled, original), 2)).T
    if mirrored:
        left, right = scaled[0] - right, scaled[0] - left
    return np.stack([left, top, right, bottom], axis=1) - np.tile(corner, 2)


def mark_boxes(boxes: np.ndarray, size: Size) -> torch.Tensor:
    """(1, height, width) float32: 1 where the centre of a pixel is in a box, else 0."""
    x, y = (np.arange(side) + 0.5 for side in size)
    left, top, right, bottom = boxes.T[..., None]
    across, down = (left <= x) & (x < right), (top <= y) & (y < bottom)
    return torch.from_numpy((down[:, :, None] & across[:, None, :]).any(axis=0)[None]).float()


def load_crop(
    picture: int,
    bucket: Size,
    numbers: Numbers,
    *,
    index: PictureIndex,
    shorter_side: int,
    flip: float = 0.0,
    boxes: Boxes | None = None,
    box_crops: float = 0.0,
    background: Color = WHITE,
) -> tuple[torch.Tensor, MicroConditioning]:
    """Read a crop of a picture and mark its pixels in boxes; ``partial`` with the options makes this a ``Load``.

    Args:
        picture: number of the picture in the index; no side may be shorter than the crop's.
        bucket: (width, height) of the crop in pixels.
        numbers: random numbers for the crop and for mirroring.
        index: index of the files.
        shorter_side: length in pixels to which the picture's shorter side is reduced before cropping; never enlarged.
        flip: probability of mirroring left and right.
        boxes: boxes of those pictures that have any.
        box_crops: probability that the crop of a picture with boxes contains the centre of one of them.
        background: sRGB colour behind transparent pixels.

    Returns:
        (4, height, width) float32, three channels of pixels in [-1, 1] and one that is 1 in boxes and 0 elsewhere; and
        the micro-conditioning.

    Raises:
        PictureError: the picture cannot be used.
    """
    original = tuple(index.sizes[picture].tolist())
    shorter_side = max(*bucket, min(shorter_side, *original))
    scaled = cover_size(original, (shorter_side, shorter_side))
    image = resize_picture(open_picture(index.read(picture), background, at_least=scaled), scaled, original)
    mirrored = bool(numbers(FLIP).random() < flip)
    pixels = np.asarray(image)[:, ::-1] if mirrored else np.asarray(image)
    here = np.empty((0, 4))
    if boxes is not None and picture in boxes:
        here = place_boxes(boxes[picture], original, scaled, (0, 0), mirrored)

    generator, room = numbers(CROP), np.subtract(scaled, bucket)
    left, top = generator.integers(room, endpoint=True).tolist()
    if len(here) and generator.random() < box_crops:
        box = here[generator.integers(len(here))]
        middle = (box[:2] + box[2:]) / 2
        left, top = np.floor(middle - generator.random(2) * bucket).astype(int).clip(0, room).tolist()
    crop = pixels[top : top + bucket[1], left : left + bucket[0]].transpose(2, 0, 1)
    data = torch.from_numpy(np.ascontiguousarray(crop)).float().div_(127.5).sub_(1)
    marks = mark_boxes(here - np.tile((left, top), 2), bucket)
    return torch.cat([data, marks]), MicroConditioning(height_first(original), (top, left), height_first(bucket))
