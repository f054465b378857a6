"""Exact models sampled with diffusers schedulers, and what is measured of the results."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..diagnostics.ideal_models import PictureSet, v_network
from ..samplers import NoiseSchedule
from ..samplers.devices import to_float64
from .exact_prompts import Prompt

LEVEL = 2 / 255  # one step of an 8-bit channel on the scale [-1, 1]


@dataclass(frozen=True)
class Row:
    """One way to sample: a diffusers scheduler, and the noise schedule its network was trained with."""

    name: str
    detail: str
    scheduler: Any
    schedule: NoiseSchedule


def make_rows() -> list[Row]:
    """Exact infinity, and the finite starts in common use."""
    from ..samplers import ZTSNRScheduler
    from ..samplers.diffusers_config import stock_euler

    zero, plain = NoiseSchedule.sdxl(), NoiseSchedule.sdxl(zero_terminal_snr=False)
    ours = ZTSNRScheduler()
    ours_euler = ZTSNRScheduler(solver="euler", spacing="trailing")
    trailing = stock_euler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    leading = stock_euler(rescale_betas_zero_snr=True, timestep_spacing="leading", steps_offset=1)
    no_zero_snr = stock_euler(timestep_spacing="trailing")
    return [
        Row("exact infinity", "ZTSNRScheduler, its defaults", ours, zero),
        Row("exact infinity, Euler", "ZTSNRScheduler, euler, trailing", ours_euler, zero),
        Row("finite start 4096", "EulerDiscrete, trailing, zero SNR", trailing, zero),
        Row("SDXL's leading steps", "EulerDiscrete, leading, zero SNR", leading, zero),
        Row("finite start 14.6", "EulerDiscrete, trailing, no zero SNR", no_zero_snr, plain),
    ]


@dataclass(frozen=True)
class Run:
    """The samples of one row for one prompt.

    Attributes:
        pictures: (B, 3, H, W) in [-1, 1].
        sigmas: noise level of each network evaluation, as the network was given it.
        denoised_means: (evaluations, B, 3) channel averages of the prediction x0.
    """

    pictures: torch.Tensor
    sigmas: list[float]
    denoised_means: torch.Tensor


def sample_with_scheduler(row: Row, model: PictureSet, noise: torch.Tensor, steps: int) -> Run:
    """The loop of a diffusers pipeline around an ideal network."""
    from ..samplers import ZTSNRScheduler

    sigmas, means = [], []

    def recorded(x: torch.Tensor, sigma: float) -> torch.Tensor:
        x0 = model(x, sigma)
        sigmas.append(sigma)
        means.append(x0.mean((-2, -1)))
        return x0

    network = v_network(recorded, row.schedule)
    scheduler = row.scheduler
    size = {"latent_size": tuple(noise.shape[-2:])} if isinstance(scheduler, ZTSNRScheduler) else {}
    scheduler.set_timesteps(steps, **size)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        v = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(v, t, x).prev_sample
    return Run(x, sigmas, torch.stack(means))


def intercept_and_slope(values: torch.Tensor, z: torch.Tensor) -> tuple[float, float]:
    """Least squares of values on z, both of any one shape, in float64."""
    values, z = to_float64(values).flatten(), to_float64(z).flatten()
    deviation = z - z.mean()
    slope = (deviation * values).sum() / (deviation**2).sum()
    return (values.mean() - slope * z.mean()).item(), slope.item()


def canvas_noise(noise: torch.Tensor) -> torch.Tensor:
    """(B, 3): average of each channel of the noise, in units of its own standard deviation."""
    return noise.mean((-2, -1)) * math.sqrt(noise.shape[-2] * noise.shape[-1])


def measure(prompts: list[Prompt], runs: list[Run], noise: torch.Tensor, exact: list[torch.Tensor]) -> dict[str, Any]:
    """One row's numbers.

    Returns:
        brightness_error: levels by prompt, for prompts of one picture, from a noise of average 0.
        mean_leak: levels per standard deviation of the noise's average, over the same prompts.
        right_picture: share of seeds that end at the same picture as the exact flow, for the other prompts.
    """
    errors, leaks, right = {}, [], {}
    for prompt, run, truth in zip(prompts, runs, exact, strict=True):
        if prompt.known:
            difference = (run.pictures - truth).mean((-2, -1)) / LEVEL
            errors[prompt.name], leak = intercept_and_slope(difference, canvas_noise(noise[: prompt.seeds]))
            leaks.append(leak)
        else:
            same = prompt.model.nearest(run.pictures) == prompt.model.nearest(truth)
            right[prompt.name] = to_float64(same).mean().item()
    return {"brightness_error": errors, "mean_leak": sum(leaks) / len(leaks), "right_picture": right}
