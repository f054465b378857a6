"""Draw docs/icon.png: x = cos(phi) x0 + sin(phi) noise, from the picture at phi = 0 to pure noise at infinity."""

from pathlib import Path

import numpy as np
from PIL import Image

SIDE, SCALE = 256, 4  # pixels, and how much finer it is drawn
CELL = 16  # pixels of the noise


def draw() -> Image.Image:
    """A quarter of a ring on black, its upper end noise."""
    y, x = np.mgrid[: SIDE * SCALE, : SIDE * SCALE][:, ::-1] / SCALE - 36  # from the lower left corner
    radius, phi = np.hypot(x, y), np.arctan2(y, x)
    noise = np.random.default_rng(0).standard_normal((SIDE // CELL + 1,) * 2)
    noise = noise.repeat(CELL * SCALE, 0).repeat(CELL * SCALE, 1)[: SIDE * SCALE, : SIDE * SCALE]
    colours = np.array([[1.0, 0.75, 0.3], [0.35, 0.75, 1.0]])  # of the picture, from inside to outside
    share = ((radius - 90) / 100).clip(0, 1)[..., None]
    picture = colours[0] * (1 - share) + colours[1] * share
    state = np.cos(phi)[..., None] * picture + np.sin(phi)[..., None] * (0.5 + 0.35 * noise[..., None])
    ring = (radius > 90) & (radius < 190) & (x > 0) & (y > 0)
    pixels = np.where(ring[..., None], state.clip(0.12, 1), 0)
    image = Image.fromarray((pixels * 255).astype(np.uint8))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).quantize(128, dither=Image.Dither.NONE)


if __name__ == "__main__":
    draw().save(Path(__file__).resolve().parent.parent / "docs" / "icon.png", optimize=True)
