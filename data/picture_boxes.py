"""Crops of pictures, and the boxes in them that matter most: eyes, faces, hands.

A box is given in pixels of the upright original picture.  It goes where its pixels go: resized, mirrored if the picture
is, and moved by the crop.
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
    """The boxes of pictures from a JSONL file of lines like {"picture": KEY, "boxes": [[left, top, right, bottom]]}.

    What of a box is outside of its picture is cut off.  Lines of pictures that the index does not have are passed over,
    so that one file serves several data sets.

    Args:
        path: of the file.
        index: whose keys name the pictures.

    Returns:
        For each picture with boxes, its number -> (K, 4) float64.

    Raises:
        UserError: the file cannot be read, a line is something else, a box is empty or outside of its picture, or no
            line names a picture of the index.
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
            if not (inside[:, :2] < inside[:, 2:]).all():  # nan is not less either
                raise UserError(f"line {place} of {path} has a box that is empty or outside of {key}")
            found[numbers[key]] = np.concatenate([found.get(numbers[key], np.empty((0, 4))), inside])
    if not found:
        raise UserError(f"{path} has no boxes for any of the {len(index)} pictures; the first is {index.key(0)}")
    return found


def place_boxes(
    boxes: np.ndarray, original: Size, scaled: Size, corner: tuple[int, int], mirrored: bool = False
) -> np.ndarray:
    """Where boxes of a picture are in a crop of it; they may reach out of it.

    Args:
        boxes: (K, 4) left, top, right, bottom in pixels of the original.
        original, scaled: (width, height) of the picture before and after resizing.
        corner: (left, top) of the crop, in pixels of the resized and, if so, mirrored picture.
        mirrored: left and right.

    Returns:
        (K, 4) float64 in pixels of the crop.
    """
    left, top, right, bottom = (boxes * np.tile(np.divide(scaled, original), 2)).T
    if mirrored:
        left, right = scaled[0] - right, scaled[0] - left
    return np.stack([left, top, right, bottom], axis=1) - np.tile(corner, 2)


def mark_boxes(boxes: np.ndarray, size: Size) -> torch.Tensor:
    """(1, height, width) float32: 1 where the middle of a pixel is in a box, else 0."""
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
    """A crop of a picture, and which of its pixels are in boxes.  Given ``index`` and the like, it is a ``Load``.

    Args:
        picture: its number in the index; no side is shorter than the crop's.
        bucket: (width, height) of the crop in pixels.
        numbers: of the crop and of the mirroring.
        index: where the files are.
        shorter_side: to which that of the picture is resized before it is cropped, in pixels; never enlarged.
        flip: probability that it is mirrored left and right.
        boxes: of those pictures that have any.
        box_crops: probability that, of a picture with boxes, the crop has the middle of one of them in it.
        background: sRGB colour behind transparent pixels.

    Returns:
        (4, height, width) float32: the pixels in [-1, 1], and behind them 1 in boxes and 0 elsewhere; and what SDXL
        would be told about it.

    Raises:
        PictureError: it cannot be used.
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
