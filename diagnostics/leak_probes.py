"""One seed's measurements of the mean-leak test: a network's predictions and a sampler's pictures for a pair of noises.

The noises of a pair differ only in their channel means, which are set to an offset and to its opposite, so any
difference between the results comes from the means.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UserError
from ..samplers import NoiseSchedule, from_denoised
from ..samplers.devices import to_float64
from .ideal_models import Model
from .latent_stats import LatentStatistics

PROBED = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)  # timesteps to probe, as shares of T
LUMA = np.array([0.2126, 0.7152, 0.0722])  # Rec. 709

Run = Callable[[torch.Tensor], tuple[torch.Tensor, LatentStatistics]]
ToRGB = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class NetworkProbe:
    """A network's predictions for one seed's pair of noises, at several noise levels.

    Attributes:
        seed: seed of the noise.
        sigmas: (T,) noise levels, increasing; the last is that of t = T, inf if the file says zero SNR.
        noise_mean: (2, C) channel means of the noise, plus and minus the offset.
        denoised_mean: (T, 2, C) channel means of x0.
        fine_response: (T,) slope of v on the finest noise.
    """

    seed: int
    sigmas: np.ndarray
    noise_mean: np.ndarray
    denoised_mean: np.ndarray
    fine_response: np.ndarray

    @property
    def slopes(self) -> np.ndarray:
        """(T, C) slope of x0's mean on the noise's."""
        return (self.denoised_mean[:, 0] - self.denoised_mean[:, 1]) / (self.noise_mean[0] - self.noise_mean[1])


@dataclass(frozen=True)
class SamplerProbe:
    """A sampler's pictures from one seed's pair of noises.

    Attributes:
        noise_mean, picture_mean: (2, C) channel means of the noise and of the finished latents.
        rgb_mean: (2, 3) mean colour of the picture before clipping, in levels of 255; None without RGB.
        clipped: (2,) share of pixels at or beyond 0 or 255 in some channel; None without RGB.
        brightness: (2,) mean luma (Rec. 709) of the picture, 0 to 255; None without RGB.
        colour_error: (2,) mean CIEDE2000 between the pixels and the target colour; None without a target.
        sigmas, denoised_mean: (S,), (S, 2, C) the predictions x0 of the run.
    """

    seed: int
    noise_mean: np.ndarray
    picture_mean: np.ndarray
    rgb_mean: np.ndarray | None
    clipped: np.ndarray | None
    brightness: np.ndarray | None
    colour_error: np.ndarray | None
    sigmas: np.ndarray
    denoised_mean: np.ndarray

    @property
    def slopes(self) -> np.ndarray:
        """(C,) slope of the picture's mean on the noise's."""
        return (self.picture_mean[0] - self.picture_mean[1]) / (self.noise_mean[0] - self.noise_mean[1])

    @property
    def tone(self) -> np.ndarray:
        """(2,) the brightness; without RGB, the mean of the latents' first channel."""
        return self.picture_mean[:, 0] if self.brightness is None else self.brightness


def noise_pair(seed: int, index: int, shape: Sequence[int], offset: float = 1.0) -> torch.Tensor:
    """One seed's noise with the mean of every channel set to plus or minus an offset, and the same with the other sign.

    The signs are a row of a Hadamard matrix: over the seeds the channels' offsets are uncorrelated, so a channel that
    follows its neighbour's offset does not seem to follow its own.

    Args:
        index: index of the seed in the test, 0, 1, ..., which chooses the row.
        shape: (C, H, W), or (C, F, H, W) of a video.
        offset: in standard deviations of such a mean, 1 / sqrt(N).  At 1 the means of all noises together vary as they
            do by themselves.

    Returns:
        (2, C, ...) float32 on the CPU.
    """
    if not 0 < offset < math.inf:
        raise UserError(f"offset must be positive and finite, not {offset}")
    if len(shape) < 3:
        raise UserError(f"shape must be (C, H, W) or (C, F, H, W), not {tuple(shape)}")
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    noise -= _channel_means(noise).view(1, -1, *[1] * (len(shape) - 1))
    signs = torch.tensor([(-1.0) ** (index & channel).bit_count() for channel in range(1, shape[0] + 1)])
    shift = offset / math.sqrt(math.prod(shape[1:])) * signs.view(1, -1, *[1] * (len(shape) - 1))
    return torch.cat([noise + shift, noise - shift])


def probe_network(denoise: Model, noise: torch.Tensor, sigmas: Sequence[float], seed: int = 0) -> NetworkProbe:
    """A network's predictions for pure noise at several noise levels.

    Args:
        denoise: ``denoise(x_vp, sigma) -> x0``, without guidance.
        noise: (2, C, ...) from ``noise_pair``, on the network's device.
        sigmas: (T,) increasing.

    Raises:
        UserError: a prediction is not finite.
    """
    means, responses = [], []
    fine_noise = _finest(noise)
    for sigma in sigmas:
        x0 = denoise(noise, sigma).float()
        fine_v = _finest(from_denoised(x0, noise, sigma))
        means.append(_channel_means(x0))
        responses.append((fine_v * fine_noise).sum() / (fine_noise**2).sum())
    probe = NetworkProbe(
        seed,
        np.asarray(sigmas, dtype=float),
        _numbers(_channel_means(noise)),
        _numbers(torch.stack(means)),
        _numbers(torch.stack(responses)),
    )
    for sigma, mean in zip(sigmas, probe.denoised_mean, strict=True):
        if not np.isfinite(mean).all():
            channel = int(np.argwhere(~np.isfinite(mean))[0][1])
            raise UserError(
                f"the network predicts NaN or infinity for pure noise at sigma {sigma:.4g}, in channel {channel + 1}; "
                "half precision often overflows: try bfloat16 or float32"
            )
    return probe


def probe_sampler(
    run: Run,
    noise: torch.Tensor,
    to_rgb: ToRGB | None = None,
    target: Sequence[float] | None = None,
    seed: int = 0,
) -> SamplerProbe:
    """A sampler's pictures from a pair of noises.

    Args:
        run: ``run(noise) -> (latents, what a LatentMeanRecorder saw)``; noise (2, C, ...) is unit Gaussian.
        to_rgb: latents to pictures (2, 3, H, W), 0 to 1, not clamped.
        target: the colour that the prompt asks for, 0 to 255; needs ``to_rgb`` and scikit-image.

    Raises:
        UserError: the latents are not finite; the message says where that began.
    """
    latents, statistics = run(noise)
    if not latents.isfinite().all():
        raise UserError(
            f"seed {seed}: {statistics.nonfinite() or 'the finished latents contain NaN or infinite values'}"
        )
    pictures = None if to_rgb is None else to_rgb(latents).float().cpu().numpy()
    return SamplerProbe(
        seed,
        _numbers(_channel_means(noise)),
        _numbers(_channel_means(latents)),
        **measure_pictures(pictures, target),
        sigmas=statistics.sigmas,
        denoised_mean=statistics.denoised_mean.astype(float),
    )


def measure_pictures(
    pictures: np.ndarray | None, target: Sequence[float] | None = None
) -> dict[str, np.ndarray | None]:
    """Colour, clipping, brightness and colour error of pictures (B, 3, H, W), 0 to 1 and beyond."""
    if pictures is None:
        return dict.fromkeys(("rgb_mean", "clipped", "brightness", "colour_error"))
    shown = pictures.clip(0, 1)
    return {
        "rgb_mean": 255 * pictures.mean((-2, -1), dtype=float),
        "clipped": ((pictures <= 0) | (pictures >= 1)).any(1).mean((-2, -1)),
        "brightness": 255 * shown.mean((-2, -1), dtype=float) @ LUMA,
        "colour_error": None if target is None else colour_error(shown, target),
    }


def colour_error(pictures: np.ndarray, target: Sequence[float]) -> np.ndarray:
    """Mean CIEDE2000 between the pixels of pictures (B, 3, H, W) in [0, 1], sRGB, and a colour of 0 to 255: (B,)."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    every = math.ceil(max(pictures.shape[-2:]) / 256)  # enough pixels for a mean, and 16 times faster at 1024 x 1024
    lab = rgb2lab(pictures[..., ::every, ::every], channel_axis=1)
    wanted = rgb2lab(np.asarray(target, dtype=float).reshape(1, 1, 1, 3) / 255)
    return deltaE_ciede2000(np.moveaxis(lab, 1, -1), wanted).mean((-2, -1))


def _channel_means(x: torch.Tensor) -> torch.Tensor:
    """(B, C) means over everything but the batch and the channels, in float32."""
    return x.float().flatten(2).mean(2)


def _numbers(x: torch.Tensor) -> np.ndarray:
    """Float64, on the CPU."""
    return to_float64(x).numpy(force=True)


def _finest(x: torch.Tensor) -> torch.Tensor:
    """The finest detail, where noise is most and pictures are least: mixed differences of neighbours."""
    x = x.float()
    x = x[..., 1:, :] - x[..., :-1, :]
    return x[..., 1:] - x[..., :-1]


def probed_sigmas(schedule: NoiseSchedule) -> list[float]:
    """The noise levels at which a network is probed, up to that of t = T."""
    return [schedule.sigma(float(round(share * schedule.last_timestep))) for share in PROBED]
