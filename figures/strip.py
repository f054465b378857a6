"""The denoised prediction of a run as a strip of pictures, with sigma below each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from ..errors import UserError
from .rows import WIDTH, Row, heading
from .sigma_axis import sigma_label
from .themes import Theme

STRIP = 6  # pictures in a row


@dataclass(frozen=True, eq=False)
class Strip:
    """The denoised prediction on its way, as pictures.

    Attributes:
        pictures: (n, H, W, 3) uint8.
        sigmas: (n,) where they were predicted, inf allowed; 0 stands for the finished picture.
    """

    pictures: np.ndarray
    sigmas: Sequence[float] | np.ndarray

    def __post_init__(self):
        shape, kind = np.shape(self.pictures), np.asarray(self.pictures).dtype
        if len(shape) != 4 or shape[-1] != 3 or 0 in shape or kind != np.uint8 or len(self.sigmas) != shape[0]:
            raise UserError(
                f"a strip needs pictures (n, H, W, 3) of dtype uint8 and n sigmas, not {shape} of dtype {kind} and "
                f"{len(self.sigmas)} sigmas"
            )


def strip_rows(strip: Strip | None, look: Theme) -> list[Row]:
    if strip is None:
        return []
    height, width = strip.pictures.shape[1:3]
    columns = min(len(strip.pictures), STRIP)
    tile = min((WIDTH - 0.6) / columns * height / width, 1.7)

    def draw(axes: Axes, first: int) -> None:
        pictures, sigmas = strip.pictures[first : first + STRIP], strip.sigmas[first : first + STRIP]
        for i, picture in enumerate(pictures):
            axes.imshow(picture, extent=(1.05 * width * i, 1.05 * width * i + width, height, 0))
        axes.set(xlim=(0, 1.05 * width * columns), ylim=(height, 0), anchor="NW", yticks=[])
        axes.set_xticks(width * (0.5 + 1.05 * np.arange(len(pictures))), [sigma_label(sigma) for sigma in sigmas])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)

    starts = range(0, len(strip.pictures), STRIP)
    above = heading("The prediction on its way, with sigma below", "", [], look)
    return [above, *(Row(tile + 0.3, partial(draw, first=first)) for first in starts)]
