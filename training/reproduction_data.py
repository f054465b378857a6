"""Pictures whose answer is known, drawn by the program, to train small models on: the data of the reproduction.

Four kinds, after the prompts by which the absence of a zero-terminal-SNR step is seen (Lin et al., arXiv 2305.08891;
NovelAI V3, arXiv 2409.15997): solid colours, a coloured shape on a coloured background, dark and light scenes, and one
long band that crosses the canvas, which shows whether a picture hangs together.

A colour comes in shades, as it does in photographs: without a spread of brightness among the pictures of one caption, a
network would have nothing to read in the mean of the noise.
"""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..canvas import Size
from ..checkpoints.atomic import atomic_folder
from ..diagnostics.leak_report import COLOURS

SHAPES = ("circle", "square", "triangle")
SIZES: tuple[Size, ...] = ((48, 48), (48, 48), (64, 32), (32, 64))  # of the pictures, in turn
SHADE = 16.0  # standard deviation of a colour's brightness, in levels of 255, before it is clipped
TINT = 4.0  # the same of each channel alone
KINDS = {"solid": 0.3, "shape": 0.3, "scene": 0.2, "band": 0.2}  # share of the pictures
_FINER = 2  # times, at which edges are drawn


@dataclass(frozen=True)
class KnownPicture:
    """A picture and its answer.

    Attributes:
        pixels: (H, W, 3) uint8.
        kind: of KINDS.
        background: name of a colour; of a scene, dark or light.
        subject: name of the shape's or the band's colour; empty where there is none.
    """

    pixels: np.ndarray
    caption: str
    kind: str
    background: str
    subject: str = ""


def vocabulary() -> list[str]:
    """Every word that the captions have, a comma among them."""
    return [*COLOURS, *SHAPES, "solid", "background", "dark", "light", "scene", "texture", "long", "band", ","]


def solid_caption(colour: str) -> str:
    """The same words as the prompts of the mean-leak test."""
    return f"solid {colour} background"


def shape_caption(background: str, colour: str, shape: str) -> str:
    return f"{background} background, {colour} {shape}"


def scene_caption(brightness: str) -> str:
    return f"{brightness} scene, texture"


def band_caption(background: str, colour: str) -> str:
    return f"{background} background, long {colour} band"


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def draw_picture(number: int, seed: int, size: Size) -> KnownPicture:
    """A picture (width, height), a pure function of its arguments; the kinds come in their shares."""
    random = np.random.default_rng((seed, number))
    kind = str(random.choice(list(KINDS), p=list(KINDS.values())))
    names = list(COLOURS)
    background, subject = (names[i] for i in random.permutation(len(names))[:2])
    if kind == "solid":
        pixels = np.broadcast_to(_shade(background, random), (size[1], size[0], 3))
        return KnownPicture(_levels(pixels), solid_caption(background), kind, background)
    if kind == "scene":
        brightness = ("dark", "light")[int(random.integers(2))]
        return KnownPicture(_scene(brightness, size, random), scene_caption(brightness), kind, brightness)
    if kind == "shape":
        shape = SHAPES[int(random.integers(len(SHAPES)))]
        mask, caption = _shape(shape, size, random), shape_caption(background, subject, shape)
    else:
        mask, caption = _band(size, random), band_caption(background, subject)
    pixels = _shade(background, random) * (1 - mask) + _shade(subject, random) * mask
    return KnownPicture(_levels(pixels), caption, kind, background, subject)


def _shade(colour: str, random: np.random.Generator) -> np.ndarray:
    """(3,) levels."""
    levels = np.array(COLOURS[colour]) + SHADE * random.standard_normal() + TINT * random.standard_normal(3)
    return levels.clip(0, 255)


def _levels(pixels: np.ndarray) -> np.ndarray:
    return pixels.round().clip(0, 255).astype(np.uint8)


def _scene(brightness: str, size: Size, random: np.random.Generator) -> np.ndarray:
    """Soft blotches of one tint and grain, about a dark or a light level."""
    width, height = size
    level = (48, 207)[brightness == "light"] + 20 * random.standard_normal()
    coarse = Image.fromarray(random.standard_normal((height // 12, width // 12)).astype(np.float32))
    blotches = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))[..., None]
    tint = 1 + 0.3 * random.standard_normal(3)
    return _levels(level + 22 * blotches * tint + 5 * random.standard_normal((height, width, 1)))


def _shape(shape: str, size: Size, random: np.random.Generator) -> np.ndarray:
    """(H, W, 1) from 0 to 1: a shape that lies within the canvas."""
    width, height = size
    radius = min(size) * random.uniform(0.12, 0.35)
    x, y = random.uniform(radius, width - radius), random.uniform(radius, height - radius)
    canvas = Image.new("L", (_FINER * width, _FINER * height))
    draw = ImageDraw.Draw(canvas)
    corners = [_FINER * value for value in (x - radius, y - radius, x + radius, y + radius)]
    if shape == "circle":
        draw.ellipse(corners, fill=255)
    elif shape == "square":
        draw.rectangle(corners, fill=255)
    else:
        left, top, right, bottom = corners
        draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=255)
    return _mask(canvas, size)


def _band(size: Size, random: np.random.Generator) -> np.ndarray:
    """(H, W, 1) from 0 to 1: a wave of one thickness, from one side of the canvas to the other, along its length."""
    width, height = size
    along, across = max(size), min(size)
    places = np.linspace(-4, along + 4, 2 * along)
    wave = 0.14 * across * np.sin(2 * math.pi * (places / along * random.uniform(0.5, 1.2) + random.uniform()))
    middle = across * random.uniform(0.35, 0.65) + wave
    upright = height > width or (height == width and random.random() < 0.5)
    points = np.stack([middle, places] if upright else [places, middle], 1) * _FINER
    canvas = Image.new("L", (_FINER * width, _FINER * height))
    draw, radius = ImageDraw.Draw(canvas), _FINER * across * 0.085
    for x, y in points.tolist():
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return _mask(canvas, size)


def _mask(canvas: Image.Image, size: Size) -> np.ndarray:
    return np.asarray(canvas.resize(size, Image.Resampling.BOX), dtype=float)[..., None] / 255


# ----------------------------------------------------------------------------------------------------------------------
# As files


def write_pictures(folder: Path, count: int, seed: int = 0, scale: int = 1) -> Path:
    """A folder of PNGs, each with its caption in a .txt of its name, and answers.csv; it is there whole or not at all.

    Args:
        scale: the pictures are so many times as large as SIZES.

    Raises:
        ValueError: the folder is there already, or cannot be written.
    """
    answers = io.StringIO()
    table = csv.writer(answers)
    table.writerow(("picture", "kind", "background", "subject", "caption"))
    with atomic_folder(folder) as place:
        for number in range(count):
            width, height = SIZES[number % len(SIZES)]
            known = draw_picture(number, seed, (scale * width, scale * height))
            name = f"{number:05d}.png"
            Image.fromarray(known.pixels).save(place / name)
            (place / f"{number:05d}.txt").write_text(known.caption, encoding="utf-8")
            table.writerow((name, known.kind, known.background, known.subject, known.caption))
        (place / "answers.csv").write_text(answers.getvalue(), encoding="utf-8")
    return folder
