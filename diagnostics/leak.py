"""The mean-leak test: does a network, or a sampler, mistake the mean of the noise for the picture's brightness?

The mean of N values of unit noise is about 1/sqrt(N), never 0.  Set it to a known offset, and to the opposite, with the
rest of the noise the same, and see what follows.  Two questions are answered, and a third on request:

**The checkpoint.**  At t = T the input of a zero-SNR network is noise and nothing else, so its prediction x0 must not
follow the offset.  A network trained on a schedule that ends at sigma 14.6 has learned that some signal is left in
there.  It mistakes the mean of the noise for the picture's, and so pulls pictures toward the mean of noise: grey.  For
a Gaussian canvas whose average varies by tau, x0 follows the mean of a pure-noise input at sigma with slope

    alpha V / (alpha^2 V + s^2),    V = tau^2 N,

which is 0 at infinity and peaks near sigma = sqrt(V).  So the slope at t = T is judged as a share of the peak.

**The sampler.**  The exact flow carries the mean of the noise into the mean of the picture with slope tau sqrt(N).
That is the variety of the prompt, not a leak.  What a sampler adds is its departure from the exact flow of the same
network from the same noise: a bias toward grey, or another slope.

**The guidance.**  How far it moves brightness from what the same noise gives without it: see ``guidance_shift``.

**The table.**  The noise levels that a network was trained with can be read from its response to the finest noise, of
which no picture has much: v follows it with 1 / sigma(t), whatever the prompt.
"""

import math
from collections.abc import Callable, Sequence

import torch

from ..errors import UserError
from ..samplers import NoiseSchedule, sample, step_schedule
from .checkpoint_verdict import judge_network
from .estimates import at_least_two
from .guidance_shift import EXPOSURE_TRUE, judge_guidance
from .ideal_models import Model
from .latent_stats import LatentMeanRecorder, LatentStatistics
from .leak_probes import Run, SamplerProbe, ToRGB, noise_pair, probe_network, probe_sampler, probed_sigmas
from .sampler_verdict import judge_sampler
from .verdict import LeakReport


def mean_leak(
    denoise: Model | None,
    run: Run | None,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule | None,
    sigmas: Sequence[float] | None = None,
    reference: Run | None = None,
    reference_name: str = "the exact flow",
    unguided: Run | None = None,
    exposure_true: Run | None = None,
    guidance_name: str = "guidance",
    start_sigma: float = math.inf,
    seeds: Sequence[int] = range(8),
    offset: float = 1.0,
    to_rgb: ToRGB | None = None,
    brightness_through: str | None = None,
    target: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[], None] | None = None,
) -> LeakReport:
    """Test a network and a sampler for mean leakage.

    Args:
        denoise: ``denoise(x_vp, sigma) -> x0``, the network without guidance; None skips the checkpoint.
        run: ``run(noise) -> (latents, LatentStatistics)``, the sampler; None skips it.
        shape: (C, H, W) of the latents, or (C, F, H, W); any number of channels.
        schedule: the network's, as the checkpoint's marks say; None for flow matching, which has no such table.
        sigmas: noise levels at which the network is probed, increasing up to that of t = T; by default those of
            ``probed_sigmas``, which need a schedule.
        reference: like ``run``, the exact flow of the same network with the same guidance (``exact_flow``).
        reference_name: its name, for the report.
        unguided: like ``reference``, with the prompt alone; None skips guidance, which needs a reference.
        exposure_true: like ``reference``, with exposure-true guidance of the same scale, for comparison.
        guidance_name: name of the reference's guidance, such as "CFG 5".
        start_sigma: noise level that the sampler starts at.
        seeds: K different seeds, at least 2.
        offset: offset of the noise means, in standard deviations of such a mean.
        to_rgb: latents (B, C, ...) to pictures (B, 3, H, W), 0 to 1 and beyond; brightness is then in levels.
        brightness_through: how, in words, such as "through the VAE".
        target: the colour that the prompt asks for, 0 to 255.
        device: device of the noise.
        progress: called after each of the up to five probes of a seed.

    Raises:
        UserError: fewer than two seeds, repeated seeds, an offset of 0, or results that are not finite.
    """
    seeds = check_seeds(seeds)
    if denoise is None and run is None:
        raise UserError("nothing to test: pass denoise, run, or both")
    if target is not None and to_rgb is None:
        raise UserError("target needs to_rgb, because colours are compared in pictures")
    if denoise is None:
        sigmas = []
    elif sigmas is None:
        if schedule is None:
            raise UserError("sigmas must be given if there is no schedule")
        sigmas = probed_sigmas(schedule)
    if unguided is not None and (run is None or reference is None):
        raise UserError("unguided needs run and reference, the exact flow with guidance, to compare with")
    tell = progress or (lambda: None)
    asked = {} if run is None else {"sampler": run, "reference": reference}
    asked |= {} if unguided is None else {"unguided": unguided, "exposure-true": exposure_true}
    runs = {kind: each for kind, each in asked.items() if each is not None}
    network_probes = []
    probes: dict[str, list[SamplerProbe]] = {kind: [] for kind in runs}
    for index, seed in enumerate(seeds):
        noise = noise_pair(seed, index, shape, offset).to(device)
        if denoise is not None:
            network_probes.append(probe_network(denoise, noise, sigmas, seed))
            tell()
        for kind, each in runs.items():
            probes[kind].append(probe_sampler(each, noise, to_rgb, target, seed))
            tell()
    references = probes.get("reference")
    guidance = None
    if "unguided" in probes:
        guided = {guidance_name: probes["reference"]}
        if "exposure-true" in probes:
            guided[EXPOSURE_TRUE] = probes["exposure-true"]
        guidance = judge_guidance(probes["unguided"], guided)
    return LeakReport(
        checkpoint=judge_network(network_probes, schedule) if denoise is not None else None,
        sampler=judge_sampler(probes["sampler"], references, start_sigma, reference_name) if run is not None else None,
        seeds=seeds,
        offset=offset,
        brightness_through=brightness_through if to_rgb is not None else None,
        network_probes=network_probes,
        sampler_probes=probes.get("sampler", []),
        reference_probes=references,
        guidance=guidance,
    )


def exact_flow(denoise: Model, schedule: NoiseSchedule, latent_size: tuple[int, int], steps: int = 50) -> Run:
    """The reference: this package's default solver in many steps, from the schedule's own end.

    At 50 steps it departs from the exact flow by far less than the limits that samplers are judged by.
    """
    sigmas = step_schedule(schedule, steps, latent_size=latent_size)

    def run(noise: torch.Tensor) -> tuple[torch.Tensor, LatentStatistics]:
        recorder = LatentMeanRecorder(steps)
        latents = sample(denoise, noise, sigmas, callback=recorder)
        return latents, recorder.read()

    return run


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as integers: at least two, all different."""
    seeds = [int(seed) for seed in seeds]
    at_least_two(seeds)
    if len(set(seeds)) < len(seeds):
        raise UserError("seeds must all be different; the same seed twice adds nothing")
    return seeds
