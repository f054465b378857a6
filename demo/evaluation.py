"""The measurements that the claims need, made on a trained network, with the same noise for all networks.

Noise levels are named by their value for SDXL at 1024 x 1024: SDXL's own schedule ends at 14.6, and canvases twice and
four times as wide need 29 and 58.  ``objectives`` converts them to a small canvas.

**A canvas twice as wide.**  The means of 2 x 2 blocks of a 64 x 64 canvas follow the process of a 32 x 32 canvas with
half the noise.  So the composition on the larger canvas can be studied on the canvas that the network knows, by
starting at half the sigma ("halved").  The larger canvas itself, on which the network was not trained, is sampled too
("literal").
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from ..diagnostics.leak_run import steps_from
from ..files import atomic_write
from ..samplers.prediction import alpha_s
from .composed import COLOURS, GROUNDS, LONG, Asked, Composer, ground_colour
from .measures import brightness, coarse_contrast, colour_distance, explained_by_asked, tint, unevenness
from .networks import DemoNetwork
from .objectives import sdxl_sigma

NOISES = 32  # per solid ground
OBJECTS = 64  # pictures with an object, on black and on white each
LONG_PICTURES, LITERAL_PICTURES = 96, 16
ERROR_PICTURES = 512
STEPS = 28
GUIDED = 4.0  # scale of classifier-free guidance; measured besides 1
SOLIDS = (*COLOURS, "dark", "light")
BLACK, WHITE = "black", "white"
ON = (BLACK, WHITE, "blue", "red")  # grounds of long objects
START, TWICE, FOUR_TIMES = 14.6, 29.0, 58.0
SDXL_SIGMA_MAX = 14.614641  # exact value of 14.6
GUIDED_SOLIDS = ("black", "white", "dark", "light")
SEED = 1000  # of the noise

Numbers = dict[str, np.ndarray]


def start_name(start: float) -> str:
    """The name of a starting noise level."""
    return "infinity" if math.isinf(start) else f"{start:g}"


def starts_of(network: DemoNetwork) -> tuple[float, ...]:
    """Noise levels from which a network is sampled: infinity only if it was trained there."""
    return (math.inf, START) if network.schedule.zero_terminal_snr else (START,)


def canvas_sigma(start: float, side: int) -> float:
    """The sigma on a canvas of side x side values that is named ``start``."""
    if math.isinf(start):
        return start
    return sdxl_sigma(SDXL_SIGMA_MAX * start / START if start in (START, TWICE, FOUR_TIMES) else start, side)


class Evaluation:
    """Measurements of one network, kept in a file by name.  Measurements in the file are not repeated.

    Args:
        network: Network to measure.
        composer: Composer of its training pictures.
        path: .npz file of the measurements.
    """

    def __init__(self, network: DemoNetwork, composer: Composer, path: Path):
        self.network, self.composer, self.path = network, composer, path
        self.numbers: Numbers = dict(np.load(path)) if path.exists() else {}

    def all(self, long: bool, tick: Callable[[], None] = lambda: None) -> Numbers:
        """All measurements.

        Args:
            long: Also measure long objects on larger canvases.
            tick: Called after each part.
        """
        parts: dict[str, Callable[[], Numbers]] = {"error": self._errors}
        for start in starts_of(self.network):
            name = start_name(start)
            parts[f"solids/{name}/1"] = partial(self._solids, start, 1.0, SOLIDS)
            parts[f"solids/{name}/{GUIDED:g}"] = partial(self._solids, start, GUIDED, GUIDED_SOLIDS)
            for guidance in (1.0, GUIDED):
                parts[f"things/{name}/{guidance:g}"] = partial(self._things, start, guidance)
        for start in (START, TWICE, FOUR_TIMES, math.inf) if long else ():
            parts[f"halved/{start_name(start)}"] = partial(self._long, start, halved=True)
            parts[f"literal/{start_name(start)}"] = partial(self._long, start, halved=False)
        for name, measure in parts.items():
            self._get(name, measure)
            tick()
        return self.numbers

    def _get(self, name: str, measure: Callable[[], Numbers]) -> None:
        if f"{name}/done" in self.numbers:
            return
        self.numbers |= {f"{name}/{key}": np.asarray(value) for key, value in measure().items()}
        self.numbers[f"{name}/done"] = np.array(True)
        with atomic_write(self.path) as file:
            np.savez(file, **self.numbers)

    # ------------------------------------------------------------------------------------------------------------------

    def _sample(
        self, asked: Sequence[Asked], noise: torch.Tensor, start: float, guidance: float = 1.0, halved: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (B, H, W, 3) and first predictions of them, in levels, not clipped."""
        network, captions = self.network, [one.caption for one in asked]
        side = noise.shape[-1]
        sigma = canvas_sigma(start, side) / (2 if halved else 1)
        sigmas = steps_from(network.schedule, min(sigma, network.schedule.sigma_max), STEPS)
        first = []

        def keep(number: int, sigma: float, x: torch.Tensor, x0: torch.Tensor) -> None:
            if not number:
                first.append(x0.clone())

        latents = network.sample(captions, noise, sigmas, "euler", guidance, keep)
        return network.levels(latents), network.levels(first[0])

    def _solids(self, start: float, guidance: float, grounds: Sequence[str]) -> Numbers:
        asked = [Asked(ground) for ground in grounds for _ in range(NOISES)]
        noise = self.network.noise(range(SEED, SEED + NOISES)).repeat(len(grounds), 1, 1, 1)
        levels, first = self._sample(asked, noise, start, guidance)
        found: Numbers = {}
        for i, ground in enumerate(grounds):
            rows = slice(i * NOISES, (i + 1) * NOISES)
            shown = levels[rows].clip(0, 255)
            found[f"brightness/{ground}"] = brightness(shown)
            found[f"contrast/{ground}"] = coarse_contrast(shown)
            found[f"colour/{ground}"] = colour_distance(shown.mean((1, 2)), mean_colour(ground))
            found[f"pictures/{ground}"] = shown[:4].round().astype(np.uint8)
            means = first[rows].clip(0, 255).mean((1, 2))
            found[f"first/{ground}"] = colour_distance(means, mean_colour(ground))
        return found

    def _things(self, start: float, guidance: float) -> Numbers:
        """Objects on black and white."""
        emoji = self.composer.emoji
        noise = self.network.noise(range(SEED + 100, SEED + 100 + OBJECTS))
        found: Numbers = {}
        for ground in (BLACK, WHITE):
            asked = [Asked(ground, emoji[i % len(emoji)]) for i in range(OBJECTS)]
            levels, _ = self._sample(asked, noise, start, guidance)
            shown = levels.clip(0, 255)
            # not clipped too, because clipping at 0 and 255 hides unevenness in very dark black
            found[f"unevenness/{ground}"] = unevenness(levels)
            found[f"seen unevenness/{ground}"] = unevenness(shown)
            found[f"tint/{ground}"] = tint(shown)
            found[f"explained/{ground}"] = explained_by_asked(shown, asked, self.composer.sprites)
            found[f"pictures/{ground}"] = shown[:8].round().astype(np.uint8)
        return found

    def _long(self, start: float, halved: bool) -> Numbers:
        """Objects that span the canvas, with guidance: the share of the picture that one of them explains."""
        side = self.network.shape[-1] * (1 if halved else 2)
        count = LONG_PICTURES if halved else LITERAL_PICTURES
        shape = (self.network.shape[0], side, side)
        seeds = range(SEED + 300, SEED + 300 + count)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        asked = [Asked(ON[i % len(ON)], LONG[i % len(LONG)], True) for i in range(count)]
        levels, _ = self._sample(asked, noise, start, GUIDED, halved)
        shown = levels.clip(0, 255)
        sizes = self.composer.sprites.sizes(long=True)
        if not halved:  # in their own size, or twice as large
            sizes = (*sizes, *((2 * w, 2 * h) for w, h in sizes))
        return {
            "explained": explained_by_asked(shown, asked, self.composer.sprites, sizes),
            "pictures": shown[:12].round().astype(np.uint8),
        }

    def _errors(self) -> Numbers:
        """Mean square error of the network's output at t = T, and its relative error in the middle of the schedule.

        In the middle the caption hardly matters, and every trained network recognises the picture.
        """
        network, found = self.network, {}
        for name, held_out in (("trained", False), ("held out", True)):
            random = np.random.default_rng((SEED, held_out))
            asked = [self.composer.draw(random, held_out) for _ in range(ERROR_PICTURES)]
            x0 = self._latents(np.stack([self.composer.picture(one, random) for one in asked]))
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED))
            captions = [one.caption for one in asked]
            middle, last = network.schedule.last_timestep // 2, network.schedule.last_timestep
            error, square = self._error(x0, noise, captions, middle)
            found[f"missed/{name}"] = error.sum() / square.sum()
            found[f"last/{name}"], _ = self._error(x0, noise, captions, last)
        return found

    def _error(
        self, x0: torch.Tensor, noise: torch.Tensor, captions: Sequence[str], t: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(B,) mean square error of the network's output at a timestep, and (B,) mean square of its target."""
        network = self.network
        alpha, s = alpha_s(network.schedule.sigma(float(t)))
        output = network.predict(alpha * x0 + s * noise, torch.full((len(x0),), float(t)), captions)
        target = noise if network.prediction_type == "epsilon" else alpha * noise - s * x0
        return tuple(values.square().mean((1, 2, 3)).numpy() for values in (output - target, target))

    @torch.no_grad()
    def _latents(self, pictures: np.ndarray) -> torch.Tensor:
        vae = self.network.pipe.vae
        pixels = torch.from_numpy(pictures).movedim(-1, 1).float() / 127.5 - 1
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(64)])
        return latents * vae.config.scaling_factor


@cache
def mean_colour(ground: str, count: int = 4000) -> np.ndarray:
    """(3,) mean levels of a ground over the training pictures."""
    random = np.random.default_rng(GROUNDS.index(ground))
    return np.mean([ground_colour(ground, random) for _ in range(count)], axis=0)
