"""The pictures of ``ztsnr demo``'s exact models, and its prompts: subsets of the pictures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from ..data.pictures import DAMAGED
from ..diagnostics.ideal_models import PictureSet
from ..errors import UserError

EXPOSURE = 0.15  # standard deviation of a picture's brightness on the scale [-1, 1], see exact_models
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "hubble_deep_field.jpg")
MOST_PICTURES = 64
COLORS = ((1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, -1), (-1, 1, 1), (1, -1, 1))
KNOWN_SEEDS, PHOTOGRAPH_SEEDS = 8, 64


@dataclass(frozen=True)
class Prompt:
    """A subset of the pictures, and how many samples of it are drawn and shown.

    Attributes:
        model: the exact denoiser of the subset.
        seeds: number of samples to draw.
        shown: number of samples on the contact sheet.
    """

    name: str
    model: PictureSet
    seeds: int
    shown: int

    @property
    def known(self) -> bool:
        """True if the brightness of the result is known, because the subset is a single picture."""
        return len(self.model) == 1


def solid(color: Sequence[float], size: int) -> torch.Tensor:
    """A canvas of one colour in [-1, 1]: (3, size, size)."""
    return torch.tensor(color, dtype=torch.float32).view(3, 1, 1).repeat(1, size, size)


def logo(size: int, ink: int, paper: int) -> torch.Tensor:
    """Line art, (3, size, size): an aperture of six blades in a ring, drawn large and scaled down for smooth edges."""
    large, middle = 512, 256
    image = Image.new("L", (large, large), paper)
    draw = ImageDraw.Draw(image)
    draw.ellipse((56, 56, 456, 456), outline=ink, width=26)
    for blade in range(6):
        angle = blade * math.pi / 3
        start = (middle + 92 * math.cos(angle), middle + 92 * math.sin(angle))
        end = (middle + 190 * math.cos(angle + 1.15), middle + 190 * math.sin(angle + 1.15))
        draw.line((*start, *end), fill=ink, width=22)
    return to_tensor(image.convert("RGB"), size)


def to_tensor(image: Image.Image, size: int) -> torch.Tensor:
    """The middle square of an RGB picture as (3, size, size) float32 in [-1, 1]."""
    pixels = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def open_picture(path: Path, size: int) -> torch.Tensor:
    """A picture file, turned as its EXIF says, transparent parts on white, as (3, size, size) in [-1, 1]."""
    return to_tensor(to_rgb(decode(path, size)), size)


def decode(path: Path, size: int) -> Image.Image:
    """A picture file, turned as its EXIF says, decoded to at least 2 * size pixels a side if it has them.

    Raises:
        One of ``DAMAGED``: the file cannot be read.
    """
    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode no more than is needed
        return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, transparent parts on white."""
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_pictures(folder: Path, size: int, say: Callable[[str], None]) -> torch.Tensor:
    """The pictures in a folder, in order of their names and at most ``MOST_PICTURES``: (K, 3, size, size).

    Files without a picture's suffix are skipped silently, files that cannot be read with a message.

    Raises:
        UserError: no picture is left.
    """
    suffixes = Image.registered_extensions()
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes and file.is_file())
    if len(files) > MOST_PICTURES:
        say(f"{folder} contains {len(files)} pictures; only the first {MOST_PICTURES} by name are used.")
    pictures = []
    for file in files[:MOST_PICTURES]:
        try:
            image = decode(file, size)
        except DAMAGED as error:
            say(f"Skipped {file.name}: {' '.join(str(error).split()) or type(error).__name__}.")
        else:  # outside the try, so that a bug of ours does not count as damage
            pictures.append(to_tensor(to_rgb(image), size))
    if not pictures:
        raise UserError(f"{folder} contains no readable picture; put JPEG, PNG or WebP files directly into it.")
    return torch.stack(pictures)


def library_photographs(size: int) -> torch.Tensor:
    """The photographs that come with scikit-image, all free of copyright restrictions: (K, 3, size, size)."""
    library = find_spec("skimage")
    places = library.submodule_search_locations if library else None
    folder = Path(places[0]) / "data" if places else None
    files = [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()] if folder else []
    if not files:
        raise UserError(
            "the demo uses photographs from scikit-image, which is not installed: pip install scikit-image, or give "
            "your own with --images DIR."
        )
    return torch.stack([open_picture(file, size) for file in files])


def make_prompts(photographs: torch.Tensor, size: int) -> list[Prompt]:
    """The demo's prompts: solid canvases, line art, colours, photographs."""

    def prompt(name: str, pictures: torch.Tensor, seeds: int, shown: int) -> Prompt:
        return Prompt(name, PictureSet(pictures, brightness_std=EXPOSURE), seeds, shown)

    return [
        prompt("solid black", solid((-1, -1, -1), size)[None], KNOWN_SEEDS, 1),
        prompt("solid white", solid((1, 1, 1), size)[None], KNOWN_SEEDS, 1),
        prompt("logo on black", logo(size, ink=255, paper=0)[None], KNOWN_SEEDS, 1),
        prompt("logo on white", logo(size, ink=0, paper=255)[None], KNOWN_SEEDS, 1),
        prompt("solid colour", torch.stack([solid(color, size) for color in COLORS]), KNOWN_SEEDS, 2),
        prompt("photograph", photographs, PHOTOGRAPH_SEEDS, 3),
    ]
