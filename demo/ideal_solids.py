"""A limit that no training can overcome: the output of a perfect network for a caption that names a colour.

The pictures of a caption are solid, with known colours c_1 ... c_K.  Of such a picture with noise, x = alpha c + s n
on N pixels, the mean of x is a sufficient statistic, so the exact denoiser is the posterior mean

    D(x) = sum_k w_k c_k,    w_k ~ exp(-N |mean(x) / alpha - c_k|^2 / (2 sigma^2)),

and the flow has three dimensions.  Started at a finite sigma from pure noise, whose mean is near 0, the exact denoiser
sees a grey canvas, and grey is the right prediction for that input.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..diagnostics.leak_run import steps_from
from ..samplers import NoiseSchedule
from ..samplers.prediction import alpha_s
from .composed import CANVAS, GROUNDS, ground_colour
from .evaluation import SOLIDS, START, STEPS, canvas_sigma
from .measures import brightness
from .objectives import shift_of
from .small_model import SCALING_FACTOR

SHADES = 3000
NOISES = 64


@dataclass(frozen=True)
class Bound:
    """Mean luma in levels: of a caption's pictures, and of the exact flow from pure noise."""

    caption: str
    data: float
    from_finite: float
    from_infinity: float


def bounds() -> list[Bound]:
    """The bounds of each solid ground, and of the empty caption."""
    shades = {ground: _shades(ground) for ground in SOLIDS}
    shades["no caption"] = np.concatenate(list(shades.values()))
    zero = NoiseSchedule.sdxl().shifted(shift_of(CANVAS))
    plain = NoiseSchedule.sdxl(zero_terminal_snr=False).shifted(shift_of(CANVAS))
    finite = steps_from(plain, min(canvas_sigma(START, CANVAS), plain.sigma_max), STEPS)
    infinite = steps_from(zero, math.inf, STEPS)
    return [
        Bound(caption, _luma(colours), _luma(flow(colours, finite)), _luma(flow(colours, infinite)))
        for caption, colours in shades.items()
    ]


def flow(colours: np.ndarray, sigmas: Sequence[float], pixels: int = CANVAS**2) -> np.ndarray:
    """(NOISES, 3) levels at the end of Euler steps along the exact flow.

    Args:
        colours: (K, 3) levels of the pictures.
        sigmas: Descending to 0; the first may be infinite.
        pixels: Number of pixels N of the canvas.
    """
    known = (colours / 127.5 - 1) * SCALING_FACTOR
    noise = np.random.default_rng(1).standard_normal((NOISES, 3)) / math.sqrt(pixels)
    alpha, s = alpha_s(sigmas[0])
    x = s * noise
    for sigma, after in pairwise(sigmas):
        if math.isinf(sigma):
            denoised = np.broadcast_to(known.mean(0), x.shape)
        else:
            exponent = -pixels * np.square(x[:, None] / alpha - known).sum(-1) / (2 * sigma**2)
            weights = np.exp(exponent - exponent.max(1, keepdims=True))
            denoised = weights @ known / weights.sum(1, keepdims=True)
        epsilon = (x - alpha * denoised) / s
        alpha, s = alpha_s(after)
        x = alpha * denoised + s * epsilon
    return ((x / SCALING_FACTOR + 1) * 127.5).clip(0, 255)


def _shades(ground: str) -> np.ndarray:
    random = np.random.default_rng((1, GROUNDS.index(ground)))
    return np.array([ground_colour(ground, random) for _ in range(SHADES)])


def _luma(colours: np.ndarray) -> float:
    return float(brightness(colours[:, None, None]).mean())
