"""Captioned pictures with a known answer: Noto emoji on the ground that the caption names.

The grounds are seven colours, each in shades; "dark" and "light", in any hue; and photographs of stars, bricks, grass
and gravel.  On the ground is one emoji at a random place and in one of several sizes, or one stretched across the
canvas, or nothing.  A frame of FRAME pixels stays uncovered, so that the ground can be measured in every picture.

Each colour comes in shades, as in photographs.  If all pictures of a caption had the same brightness, a network would
learn nothing from the mean of the noise, and would paint black from any start.

A fifth of the pairs of emoji and ground is held out of training (``held_out``), to measure more than memory.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ..canvas import Size
from ..files import atomic_folder

PICTURES = Path(__file__).resolve().parent / "pictures"
CELL, COLUMNS = 64, 20  # of the sheet: pixels per side of a picture, pictures per row

COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (200, 30, 30),
    "green": (30, 150, 50),
    "blue": (40, 70, 200),
    "yellow": (235, 205, 50),
}
BRIGHTNESS = {"dark": (0.0, 110.0), "light": (145.0, 255.0)}  # range of luma, uniform
PHOTOGRAPHS = ("stars", "brick", "grass", "gravel")
GROUNDS = (*COLOURS, *BRIGHTNESS, *PHOTOGRAPHS)
SHADE = 16.0  # standard deviation of a colour's brightness, in levels of 255, before it is clipped
TINT = 4.0  # the same of each channel alone
HUE = 0.25  # relative standard deviation of each channel of dark and light

# the emoji that the small network learns; the larger one learns all
FEW = (
    *("frog", "fox", "cat face", "dog face", "panda", "lion", "tiger face", "koala", "penguin", "owl", "duck"),
    *("parrot", "flamingo", "whale", "dolphin", "octopus", "crab", "turtle", "snail", "butterfly", "bee", "ladybird"),
    *("rose", "sunflower", "tulip", "cactus", "palm tree", "mushroom", "grapes", "watermelon", "lemon", "banana"),
    *("apple", "strawberry", "avocado", "carrot", "broccoli", "hamburger", "doughnut", "ice cream", "train", "bus"),
    *("police car", "tractor", "rocket", "guitar", "violin", "trumpet"),
)
LONG = ("snake", "train", "pencil")  # also stretched across the canvas
DIAGONAL = ("pencil",)  # drawn from corner to corner

FRAME = 2  # pixels at the edge that are always ground
SIDES = (18, 20, 22, 24, 26)  # of an emoji, on a canvas of 32
LONG_SHAPE = (28, 12)  # width and height of a stretched emoji, on the same canvas
CANVAS = 32

EMPTY_SHARE, LONG_SHARE = 0.2, 0.12  # of the pictures
BLACK_OR_WHITE_SHARE = 0.25  # of the grounds, in addition to their own share


@dataclass(frozen=True)
class Asked:
    """What a picture shows.

    Attributes:
        ground: One of GROUNDS.
        emoji: Name of the emoji; "" for none.
        long: True if it is stretched across the canvas.
    """

    ground: str
    emoji: str = ""
    long: bool = False

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions for it.  Measurements use the first."""
        if not self.emoji:
            if self.ground in BRIGHTNESS:
                return ({"dark": "darkness", "light": "bright light"}[self.ground],)
            background = f"{self.ground} background"
            return (f"completely {self.ground}", background) if self.ground in COLOURS else (background,)
        thing = f"{'long ' if self.long else ''}{self.emoji}"
        thing = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
        if self.ground in PHOTOGRAPHS:
            return (f"{thing} {'among' if self.ground == 'stars' else 'on'} {self.ground}",)
        background = f"{thing} on a {self.ground} background"
        return (background,) if self.ground in BRIGHTNESS else (background, f"{thing} on {self.ground}")

    @property
    def caption(self) -> str:
        """The first of ``captions``."""
        return self.captions[0]


class Sprites:
    """The emoji, with transparency, in the sizes of a canvas.

    Args:
        names: Names of the emoji.  Default: all.
        scale: Scale of the canvas, in units of CANVAS.
    """

    def __init__(self, names: Sequence[str] | None = None, scale: int = 1):
        listed = json.loads((PICTURES / "emoji.json").read_text(encoding="utf-8"))
        self.names = tuple(listed if names is None else names)
        self.scale = scale
        with Image.open(PICTURES / "emoji.webp") as sheet:
            self._sheet = np.asarray(sheet.convert("RGBA"), dtype=np.float32)
        self._places = {name: divmod(number, COLUMNS) for number, name in enumerate(listed)}
        self._made: dict[tuple[str, Size], np.ndarray] = {}

    def __call__(self, name: str, size: Size) -> np.ndarray:
        """(h, w, 4) float32 of an emoji in a size (w, h): premultiplied colours, 0 to 255, and opacity, 0 to 1."""
        if (name, size) not in self._made:
            sprite = self._whole(name)
            if size[0] != size[1]:
                sprite = _cropped(_rotated(sprite) if name in DIAGONAL else sprite)
            self._made[name, size] = _resized(sprite, size)
        return self._made[name, size]

    def sizes(self, long: bool = False) -> tuple[Size, ...]:
        """Sizes (w, h) in which emoji are drawn."""
        shapes = (LONG_SHAPE,) if long else tuple((side, side) for side in SIDES)
        return tuple((self.scale * w, self.scale * h) for w, h in shapes)

    def _whole(self, name: str) -> np.ndarray:
        row, column = self._places[name]
        cell = self._sheet[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].copy()
        cell[..., 3] /= 255
        cell[..., :3] *= cell[..., 3:]
        return cell


def _channels(sprite: np.ndarray, change) -> np.ndarray:
    return np.stack(
        [np.asarray(change(Image.fromarray(np.ascontiguousarray(c)))) for c in sprite.transpose(2, 0, 1)], -1
    )


def _resized(sprite: np.ndarray, size: Size) -> np.ndarray:
    return _channels(sprite, lambda channel: channel.resize(size, Image.Resampling.BOX))


def _rotated(sprite: np.ndarray) -> np.ndarray:
    return _channels(sprite, lambda channel: channel.rotate(45, Image.Resampling.BILINEAR))


def _cropped(sprite: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero((sprite[..., 3] > 0.1).any(axis)) for axis in (1, 0))
    return sprite[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


class Composer:
    """Composes pictures.

    Args:
        emoji: Names of the emoji to draw.
        scale: Scale of the canvas, in units of CANVAS.
    """

    def __init__(self, emoji: Sequence[str] = FEW, scale: int = 1):
        self.emoji, self.scale = tuple(emoji), scale
        self.sprites = Sprites(tuple(dict.fromkeys((*emoji, *LONG))), scale)

    @cached_property
    def _photographs(self) -> dict[str, np.ndarray]:
        found = {}
        for name in PHOTOGRAPHS:
            with Image.open(PICTURES / f"{name}.webp") as picture:
                size = tuple(self.scale * side for side in picture.size)
                large = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
                found[name] = np.asarray(large, dtype=np.float32)
        return found

    @property
    def side(self) -> int:
        """Side of the canvas, in pixels."""
        return self.scale * CANVAS

    def captions(self) -> list[str]:
        """Captions of everything that can be drawn."""
        asked = [Asked(ground, emoji) for ground in GROUNDS for emoji in ("", *self.emoji)]
        asked += [Asked(ground, emoji, True) for ground in GROUNDS for emoji in LONG]
        return [caption for one in asked for caption in one.captions]

    def held_out(self, asked: Asked) -> bool:
        """True if a pair of emoji and ground is held out of training."""
        if not asked.emoji or asked.long:
            return False
        return (7 * self.emoji.index(asked.emoji) + 3 * GROUNDS.index(asked.ground)) % 5 == 0

    def draw(self, random: np.random.Generator, held_out: bool = False) -> Asked:
        """Draw what a picture shows: a training pair, or a held-out one."""
        while True:
            ground = str(random.choice(GROUNDS))
            if random.random() < BLACK_OR_WHITE_SHARE:
                ground = ("black", "white")[int(random.integers(2))]
            kind = random.random()
            if kind < EMPTY_SHARE:
                asked = Asked(ground)
            elif kind < EMPTY_SHARE + LONG_SHARE:
                asked = Asked(ground, str(random.choice(LONG)), True)
            else:
                asked = Asked(ground, str(random.choice(self.emoji)))
            if self.held_out(asked) == held_out:
                return asked

    def picture(self, asked: Asked, random: np.random.Generator) -> np.ndarray:
        """(side, side, 3) uint8."""
        canvas = self.ground(asked.ground, random)
        if asked.emoji:
            sizes = self.sprites.sizes(asked.long)
            size = sizes[int(random.integers(len(sizes)))]
            sprite, frame = self.sprites(asked.emoji, size), self.scale * FRAME
            x, y = (int(random.integers(frame, self.side - frame - side + 1)) for side in size)
            part = canvas[y : y + size[1], x : x + size[0]]
            part[:] = part * (1 - sprite[..., 3:]) + sprite[..., :3]
        return canvas.round().clip(0, 255).astype(np.uint8)

    def ground(self, name: str, random: np.random.Generator) -> np.ndarray:
        """(side, side, 3) float32, a writable canvas."""
        if name in PHOTOGRAPHS:
            photograph = self._photographs[name]
            y, x = (int(random.integers(length - self.side + 1)) for length in photograph.shape[:2])
            return photograph[y : y + self.side, x : x + self.side].copy()
        return np.tile(ground_colour(name, random).astype(np.float32), (self.side, self.side, 1))


def ground_colour(name: str, random: np.random.Generator) -> np.ndarray:
    """(3,) levels of one ground of COLOURS or BRIGHTNESS."""
    if name in COLOURS:
        colour = np.array(COLOURS[name]) + SHADE * random.standard_normal() + TINT * random.standard_normal(3)
    else:
        colour = random.uniform(*BRIGHTNESS[name]) * (1 + HUE * random.standard_normal(3))
    return colour.clip(0, 255)


def write_pictures(folder: Path, count: int, composer: Composer, seed: int = 0) -> Path:
    """Write a folder of training pictures as PNG, each with its caption in a .txt of the same name, and answers.csv.

    The folder appears complete or not at all.

    Raises:
        UserError: The folder exists already, or cannot be written.
    """
    answers = io.StringIO()
    table = csv.writer(answers)
    table.writerow(("picture", "ground", "emoji", "long", "caption"))
    with atomic_folder(folder) as place:
        for number in range(count):
            random = np.random.default_rng((seed, number))
            asked = composer.draw(random)
            name = f"{number:05d}"
            Image.fromarray(composer.picture(asked, random)).save(place / f"{name}.png")
            caption = str(random.choice(asked.captions))
            (place / f"{name}.txt").write_text(caption, encoding="utf-8")
            table.writerow((f"{name}.png", asked.ground, asked.emoji, asked.long, caption))
        (place / "answers.csv").write_text(answers.getvalue(), encoding="utf-8", newline="")
    return folder
