"""Measures of pictures with a known answer: brightness, colour, contrast, and whether an object is whole."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..canvas import Size
from ..diagnostics.leak_probes import LUMA
from .composed import FRAME, Asked, Sprites

BLOCKS = 4  # per side of the canvas, for the coarse contrast
WHOLE = 0.75  # smallest share explained of a whole object: midway between one of two equal objects and 1


def brightness(pictures: np.ndarray) -> np.ndarray:
    """(B,) mean luma (Rec. 709) of pictures (B, H, W, 3), in the unit of the pictures."""
    return (pictures @ LUMA).mean((1, 2))


def frame(pictures: np.ndarray, width: int = FRAME) -> np.ndarray:
    """(B, K, 3) pixels at the edge of pictures (B, H, W, 3), which show only ground."""
    edge = np.ones(pictures.shape[1:3], bool)
    edge[width:-width, width:-width] = False
    return pictures[:, edge]


def unevenness(pictures: np.ndarray, width: int = FRAME) -> np.ndarray:
    """(B,) standard deviation of the luma along the frame; 0 for a ground of one colour."""
    return (frame(pictures, width) @ LUMA).std(1)


def tint(pictures: np.ndarray, width: int = FRAME) -> np.ndarray:
    """(B,) largest minus smallest channel of the frame's mean colour; 0 for black, grey and white."""
    return np.ptp(frame(pictures, width).mean(1), axis=1)


def coarse_contrast(pictures: np.ndarray) -> np.ndarray:
    """(B,) standard deviation of the mean luma of 4 x 4 blocks of pictures (B, H, W, 3)."""
    bands = [band for rows in np.array_split(pictures @ LUMA, BLOCKS, 1) for band in np.array_split(rows, BLOCKS, 2)]
    return np.std([band.mean((1, 2)) for band in bands], axis=0)


def colour_distance(colours: np.ndarray, wanted: Sequence[float]) -> np.ndarray:
    """CIEDE2000 between sRGB colours (..., 3) and one colour, all in levels of 255."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    target = rgb2lab(np.asarray(wanted, dtype=float) / 255)
    return deltaE_ciede2000(rgb2lab(np.asarray(colours, dtype=float) / 255), np.broadcast_to(target, np.shape(colours)))


def explained(pictures: np.ndarray, names: Sequence[str], sprites: Sprites, sizes: Sequence[Size]) -> np.ndarray:
    """The share of each picture that each object explains, alone on an even ground.

    The ground is the median colour of the frame.  The share is the part of the picture's variation about that ground
    that the object accounts for at its best place and in its best size: 1 for a picture that shows the object and
    nothing else, below 0 if the object makes the fit worse.  A torn or doubled object explains little.

    Args:
        pictures: (B, H, W, 3) in levels of 255.
        names: K names of objects.
        sizes: Sizes (w, h) to try.

    Returns:
        (B, K), at least -1.
    """
    levels = torch.from_numpy(np.ascontiguousarray(pictures)).float().movedim(-1, 1)
    ground = torch.from_numpy(np.median(frame(pictures), axis=1)).float()
    about = levels - ground[:, :, None, None]
    total = about.square().sum((1, 2, 3))
    least = torch.full((len(pictures), len(names)), float("inf"))
    for size in sizes:
        drawn = torch.stack([torch.from_numpy(sprites(name, size)).movedim(-1, 0) for name in names])
        colour, opacity = drawn[:, :3], drawn[:, 3:]
        # About the ground g a sprite is m = colour - opacity g, and |q - m|^2 = |q|^2 - 2 q m + |m|^2 at each place.
        with_colour = F.conv2d(about, colour)
        with_opacity = torch.stack([F.conv2d(about[:, c : c + 1], opacity) for c in range(3)], 1)
        product = with_colour - torch.einsum("bckyx,bc->bkyx", with_opacity, ground)
        square = (
            colour.square().sum((1, 2, 3))
            - 2 * ground @ (colour * opacity).sum((2, 3)).T
            + ground.square().sum(1, keepdim=True) * opacity.square().sum((1, 2, 3))
        )
        least = torch.minimum(least, total[:, None] + square - 2 * product.amax((2, 3)))
    return (1 - least / total[:, None].clamp(min=1e-3)).clamp(min=-1).numpy()


def explained_by_asked(
    pictures: np.ndarray, asked: Sequence[Asked], sprites: Sprites, sizes: Sequence[Size] | None = None
) -> np.ndarray:
    """(B,) share of each picture that the object in its caption explains.

    Args:
        sizes: Sizes (w, h) to try.  Default: the sizes in which it is drawn.
    """
    shares = np.empty(len(asked))
    for long in {one.long for one in asked}:
        rows = [i for i, one in enumerate(asked) if one.long == long]
        names = sorted({asked[i].emoji for i in rows})
        found = explained(pictures[rows], names, sprites, sizes or sprites.sizes(long))
        shares[rows] = [share[names.index(asked[i].emoji)] for share, i in zip(found, rows, strict=True)]
    return shares
