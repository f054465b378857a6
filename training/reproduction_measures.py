"""What is measured of a model that was trained on ``reproduction_data``: how far its pictures are from the answer.

A prompt is sampled by Euler steps, even in t, from several noise levels down, with the same noise: only the start
differs (NovelAI V3, arXiv 2409.15997, figure 2).  Besides there is the sampler that SDXL is published with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler

from ..checkpoints.pipeline import load_pipeline
from ..diagnostics.leak import LeakReport, mean_leak
from ..diagnostics.leak_probes import LUMA
from ..diagnostics.leak_report import COLOURS
from ..diagnostics.leak_run import steps_from
from ..diagnostics.pipelines import encode, network, vae_to_rgb
from ..samplers import NoiseSchedule, sample, to_denoised
from ..samplers.sampling import Denoise
from .networks import predict
from .reproduction_data import band_caption, shape_caption, solid_caption

LEADING = "leading"  # the start of SDXL's own sampler
STARTS = (math.inf, 20000.0, 4096.0, 56.0, 14.6, LEADING)
STEPS = (10, 20, 28)
NEAR = 10.0  # CIEDE2000 within which a pixel has the colour that was asked for
BLOCKS = 4  # along each side of the canvas, of whose means the coarse contrast is taken
BATCH = 64

Start = float | str


@dataclass(frozen=True)
class KnownPrompt:
    """A prompt and the colours, by name, that it asks for."""

    text: str
    background: str
    subject: str = ""


SOLIDS = tuple(KnownPrompt(solid_caption(name), name) for name in COLOURS)
SHAPES = tuple(
    KnownPrompt(shape_caption(background, subject, shape), background, subject)
    for background, subject, shape in (
        ("black", "white", "circle"),
        ("white", "black", "circle"),
        ("black", "red", "square"),
        ("white", "blue", "triangle"),
    )
)
BANDS = tuple(
    KnownPrompt(band_caption(background, subject), background, subject)
    for background, subject in (("black", "white"), ("white", "black"), ("blue", "red"), ("grey", "green"))
)


@dataclass(frozen=True)
class Row:
    """The pictures of one prompt from one start in so many steps; means over the seeds.

    Attributes:
        start: a sigma, or LEADING.
        brightness: mean luma (Rec. 709), 0 to 255.
        brightness_error: how far it is from the background's, without sign; of a prompt with a subject it is only to be
            compared with that of pictures it was trained with.
        colour_error: mean CIEDE2000 between the pixels and the background's colour.
        background_share: share of the pixels that are nearer than NEAR to it.
        coarse_contrast: standard deviation of the luma of 4 x 4 blocks, in levels.
        first_colour_error: CIEDE2000 between the background's colour and the mean of the first prediction of x0; NaN
            from LEADING.
        pictures: (K, H, W, 3) uint8.
    """

    prompt: KnownPrompt
    start: Start
    steps: int
    brightness: float
    brightness_error: float
    colour_error: float
    background_share: float
    coarse_contrast: float
    first_colour_error: float
    pictures: np.ndarray


class TrainedModel:
    """A model as it was exported.

    Args:
        folder: of diffusers, or a single file.
        size: (width, height) of its pictures; by default what it is made for.

    Attributes:
        schedule, prediction_type: what the files say.
        shape: (C, h, w) of its latents.
    """

    def __init__(self, folder: Path, size: tuple[int, int] | None = None, device: str | torch.device = "cpu"):
        loaded = load_pipeline(folder, device=device)
        self.pipe = loaded.pipeline
        self.prediction_type = loaded.prediction_type
        self.schedule = NoiseSchedule.from_config(self.pipe.scheduler.config)
        factor, own = self.pipe.vae_scale_factor, self.pipe.unet.config.sample_size
        width, height = (own, own) if size is None else (side // factor for side in size)
        self.shape = (self.pipe.unet.config.in_channels, height, width)
        self._to_rgb = vae_to_rgb(self.pipe)

    def noise(self, seeds: Sequence[int]) -> torch.Tensor:
        """(K, C, h, w) unit noise."""
        rows = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.pipe.device)

    def denoise(self, texts: Sequence[str]) -> Denoise:
        """``denoise(x_vp, sigma) -> x0`` of states (B, C, h, w), each with its own text; without guidance."""
        known = {text: encode(self.pipe, text) for text in dict.fromkeys(texts)}
        hidden = torch.cat([known[text]["prompt_embeds"] for text in texts])
        pooled = torch.cat([known[text]["pooled_prompt_embeds"] for text in texts])
        height, width = (side * self.pipe.vae_scale_factor for side in self.shape[1:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self.pipe.device)

        @torch.no_grad()
        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            t = torch.full((len(x),), self.schedule.timestep(sigma), device=x.device)
            parts = [
                predict(self.pipe.unet, *part, sizes.expand(len(part[0]), -1))
                for part in zip(*(rows.split(BATCH) for rows in (x, t, hidden, pooled)), strict=True)
            ]
            return to_denoised(torch.cat(parts), x, sigma, self.prediction_type)

        return denoise

    def sample(
        self, texts: Sequence[str], noise: torch.Tensor, start: Start, steps: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents (B, C, h, w), and the first prediction of x0; None from LEADING."""
        if start == LEADING:
            return self._sample_as_published(texts, noise, steps), None
        seen = []
        keep = lambda number, sigma, x, x0: seen.append(x0) if number == 0 else None  # noqa: E731
        latents = sample(self.denoise(texts), noise, steps_from(self.schedule, start, steps), "euler", callback=keep)
        return latents, seen[0]

    @torch.no_grad()
    def _sample_as_published(self, texts: Sequence[str], noise: torch.Tensor, steps: int) -> torch.Tensor:
        config = self.pipe.scheduler.config
        self.pipe.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="leading", steps_offset=1)
        try:
            height, width = (side * self.pipe.vae_scale_factor for side in self.shape[1:])
            return self.pipe(
                list(texts),
                latents=noise,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=1.0,
                output_type="latent",
            ).images
        finally:
            self.pipe.scheduler = type(self.pipe.scheduler).from_config(config)

    def pictures(self, latents: torch.Tensor) -> np.ndarray:
        """(B, H, W, 3) from 0 to 1."""
        return self._to_rgb(latents).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()

    def leak(self, seeds: Sequence[int] = range(8)) -> LeakReport:
        """Whether it follows the mean of the noise at t = T, asked without a prompt."""
        denoise = network(self.pipe, encode(self.pipe, ""), self.schedule, self.prediction_type)
        return mean_leak(denoise, None, self.shape, schedule=self.schedule, seeds=seeds, device=self.pipe.device)

    def can_start(self, start: Start) -> bool:
        """Epsilon says nothing of pure noise, so such a model has no first step from infinity."""
        return not (start == math.inf and self.prediction_type == "epsilon")


def measure_prompts(
    model: TrainedModel,
    prompts: Sequence[KnownPrompt],
    starts: Sequence[Start] = STARTS,
    steps: Sequence[int] = STEPS,
    seeds: Sequence[int] = range(4),
) -> list[Row]:
    """All prompts from all starts in each number of steps, where the model can start there.

    A model of a plain schedule is asked beyond its end too, as if for its last timestep.
    """
    texts = [prompt.text for prompt in prompts for _ in seeds]
    noise = model.noise(seeds).repeat(len(prompts), 1, 1, 1)
    rows = []
    for start in starts:
        for count in steps if model.can_start(start) else ():
            latents, first = model.sample(texts, noise, start, count)
            pictures = np.split(model.pictures(latents), len(prompts))
            firsts = [None] * len(prompts) if first is None else np.split(model.pictures(first), len(prompts))
            rows += [_row(prompt, start, count, *both) for prompt, *both in zip(prompts, pictures, firsts, strict=True)]
    return rows


def _row(prompt: KnownPrompt, start: Start, steps: int, pictures: np.ndarray, first: np.ndarray | None) -> Row:
    wanted = np.array(COLOURS[prompt.background], dtype=float)
    luma = 255 * pictures @ LUMA
    distances = colour_distance(pictures, wanted)
    return Row(
        prompt=prompt,
        start=start,
        steps=steps,
        brightness=float(luma.mean()),
        brightness_error=float(np.abs(luma.mean((1, 2)) - wanted @ LUMA).mean()),
        colour_error=float(distances.mean()),
        background_share=float((distances < NEAR).mean()),
        coarse_contrast=float(np.mean([coarse_contrast(row) for row in luma])),
        first_colour_error=(
            math.nan if first is None else float(colour_distance(first.mean((1, 2), keepdims=True), wanted).mean())
        ),
        pictures=(255 * pictures).round().astype(np.uint8),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Of pictures


def colour_distance(pictures: np.ndarray, colour: Sequence[float]) -> np.ndarray:
    """CIEDE2000 between pixels (..., 3) from 0 to 1, sRGB, and a colour in levels of 255."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    wanted = rgb2lab(np.asarray(colour, dtype=float) / 255)
    return deltaE_ciede2000(rgb2lab(pictures), np.broadcast_to(wanted, pictures.shape))


def coarse_contrast(luma: np.ndarray) -> float:
    """Standard deviation of the means of 4 x 4 blocks of a canvas (H, W)."""
    blocks = [np.array_split(band, BLOCKS, axis=1) for band in np.array_split(luma, BLOCKS, axis=0)]
    return float(np.std([[block.mean() for block in row] for row in blocks]))


def is_whole(picture: np.ndarray, prompt: KnownPrompt) -> bool:
    """Whether a band (H, W, 3 uint8) is one piece that reaches from one side of the canvas to the other.

    What is nearer to the subject's colour than to the background's is taken for the band; pieces smaller than a
    hundredth of the canvas do not count.
    """
    from scipy.ndimage import label

    background, subject = (
        np.square(picture.astype(float) - COLOURS[name]).sum(-1) for name in (prompt.background, prompt.subject)
    )
    pieces, count = label(subject < background, np.ones((3, 3)))
    large = [piece for piece in range(1, count + 1) if (pieces == piece).mean() > 0.01]
    if len(large) != 1:
        return False
    band = pieces == large[0]
    return bool((band[0].any() and band[-1].any()) or (band[:, 0].any() and band[:, -1].any()))


def pixel_statistics(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """(K, 9) of pictures (H, W, 3) uint8: mean, standard deviation and mean step between neighbours, by channel."""
    rows = []
    for picture in pictures:
        levels = picture.astype(float)
        steps = np.abs(np.diff(levels, axis=0)).mean((0, 1)) + np.abs(np.diff(levels, axis=1)).mean((0, 1))
        rows.append(np.concatenate([levels.mean((0, 1)), levels.std((0, 1)), steps]))
    return np.array(rows)


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians with the mean and covariance of rows (K, D): FID's formula.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al., arXiv 1706.08500); on ``pixel_statistics`` it is no FID.
    """
    means = one.mean(0) - other.mean(0)
    first, second = np.cov(one.T), np.cov(other.T)
    # the eigenvalues of C1 C2 are those of a symmetric positive matrix
    overlap = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0)).sum()
    return float(means @ means + np.trace(first) + np.trace(second) - 2 * overlap)
