"""The mean-leak test: does a network, or a sampler, take the mean of the noise for the picture's brightness?

The mean of N values of unit noise is about 1/sqrt(N), never 0.  Set it to a known offset, and to the opposite, with the
rest of the noise the same, and see what follows.  Two questions, two answers, and a third if asked:

**The checkpoint.**  At t = T the input of a zero-SNR network is noise and nothing else, so its prediction x0 must not
follow the offset.  A network trained on a schedule that ends at sigma 14.6 has learned that some signal is left in
there.  It takes the mean of the noise for the picture's, and so pulls pictures toward the mean of noise, which is grey.
For a Gaussian canvas whose average varies by tau, x0 follows the mean of a pure-noise input at sigma with slope

    alpha V / (alpha^2 V + s^2),    V = tau^2 N,

which is 0 at infinity and peaks near sigma = sqrt(V).  So the slope at t = T is judged as a share of the peak's.

**The sampler.**  The exact flow carries the mean of the noise into the mean of the picture with slope tau sqrt(N).
That is the variety of the prompt and no leak.  What a sampler adds is its departure from the exact flow of the same
network from the same noise: a bias toward grey, or another slope.

**The guidance.**  How far it moves brightness from what the same noise gives without it: see ``guidance_shift``.

**The table.**  Which noise levels a network was trained with can be read from its answer to the finest noise, of which
no picture has much: v follows it with 1 / sigma(t), whatever the prompt.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass

import numpy as np
import torch

from ..errors import UserError
from ..samplers import NoiseSchedule, sample, step_schedule
from ..samplers.prediction import alpha_s
from ..samplers.sampling import Denoise
from .estimates import CONFIDENCE, Estimate, mean_over_seeds, over_seeds, spread_of
from .guidance_shift import EXPOSURE_TRUE, GuidanceAnswer, judge_guidance
from .latent_stats import LatentMeanRecorder, LatentStatistics
from .leak_probes import (
    NetworkProbe,
    Run,
    SamplerProbe,
    ToRGB,
    noise_pair,
    probe_network,
    probe_sampler,
    probed_sigmas,
)

TABLE_UP_TO = 0.8  # share of T up to which every network learns how much noise there is, whatever the loss weights
LEAK_SHARE = 0.2  # of the peak's slope: a network that follows the noise this much at t = T leaks
LEAST_PEAK = 1.5  # slope below which a prompt leaves too little open: V of 9, of which sigma 14.6 would show little
PULL_LEVELS = 1.0  # of 255, from which on a bias counts
PULL_LATENT = 0.02  # the same in latent units: of SDXL's first channel, about one level
SLOPE_DEPARTURE = 0.1  # of the exact flow's slope


# ----------------------------------------------------------------------------------------------------------------------
# What a Gaussian canvas would do


def expected_slope(sigma: float, variance: float) -> float:
    """How x0's mean follows that of a pure-noise input: alpha V / (alpha^2 V + s^2), 0 at infinity.

    Args:
        variance: V = tau^2 N, tau being the spread of the pictures' averages and N the values of the canvas.
    """
    alpha, s = alpha_s(sigma)
    return alpha * variance / (alpha**2 * variance + s**2)


def expected_denoised_mean(sigma: float, mean: float, slope: float, noise_mean: float) -> float:
    """x0's mean on the exact flow that carries a noise of mean ``noise_mean`` to mean + slope * noise_mean.

    The flow keeps every mode at its quantile: with slope tau sqrt(N), the mean of the state is
    alpha mean + noise_mean sqrt(alpha^2 slope^2 + s^2), and x0's the posterior mean of that.
    """
    alpha, s = alpha_s(sigma)
    scale = math.hypot(alpha * slope, s)
    return mean + (noise_mean * alpha * slope * abs(slope) / scale if scale > 0 else 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Judging the checkpoint


@dataclass(frozen=True)
class CheckpointAnswer:
    """Whether the network follows the mean of the noise at t = T.

    Attributes:
        verdict: "zero SNR", "starved" (the schedule is zero-SNR, but t = T was not learned), "not zero SNR", or
            "cannot tell".
        sentence: the verdict in words, with its evidence.
        timesteps, sigmas: (T,) where the network was asked; sigmas as the file says.
        slopes: T x C, of x0's channel means on the noise's.
        share: slope at t = T, as a share of the peak's.
        slope: the channel that follows most at t = T.
        marked: whether the schedule that the file states has zero terminal SNR.
        table: name of the table of noise levels that the network's answers fit, or None.
        believed_sigma: noise level that the network takes its input at t = T for; None if beyond measure.
        seeds_needed: how many seeds would tell, where these cannot; None where more do not help.
    """

    verdict: str
    sentence: str
    timesteps: list[float]
    sigmas: list[float]
    slopes: list[list[Estimate]]
    share: Estimate
    slope: Estimate
    table: str | None
    believed_sigma: float | None
    marked: bool
    seeds_needed: int | None = None


def judge_network(
    probes: Sequence[NetworkProbe], schedule: NoiseSchedule | None, tables: Mapping[str, NoiseSchedule] | None = None
) -> CheckpointAnswer:
    """The checkpoint's answer, from one probe a seed.

    Args:
        schedule: the one the file says, with which the probes were made; None for flow matching, whose noise levels
            end at infinity by construction.
        tables: the candidates by name, "zero SNR" among them; by default Stable Diffusion's two if the schedule is one
            of them.

    Raises:
        UserError: fewer than two probes.
    """
    _at_least_two(probes)
    slopes = np.stack([probe.slopes for probe in probes])  # (K, T, C)
    sigmas = probes[0].sigmas.tolist()
    timesteps = [alpha_s(sigma)[1] if schedule is None else schedule.timestep(sigma) for sigma in sigmas]
    by_level = [[Estimate.over_seeds(channel) for channel in level.T] for level in slopes.swapaxes(0, 1)]
    peak = max(slopes.mean(0), key=np.linalg.norm)  # (C,)
    share = Estimate.over_seeds(slopes[:, -1] @ peak / (peak @ peak))
    slope = max(by_level[-1], key=lambda estimate: abs(estimate.value))
    fine = np.stack([probe.fine_response for probe in probes])
    response = Estimate.over_seeds(fine[:, -1])
    tables = _candidates(schedule) if tables is None else tables
    last = timesteps[-1]
    table, variance = closest_table(timesteps, fine.mean(0), tables, TABLE_UP_TO * last)
    believed = (1 - variance) / response.value if table is not None and response.low > 0 else None

    follows = f"x0 at t = T follows the noise mean (slope {slope}, {share.value:.0%} of its peak)"
    takes = "" if believed is None else f" and takes its input for one of sigma {believed:.3g}"
    side, needed = share.side(LEAK_SHARE), None
    if np.abs(peak).max() < LEAST_PEAK:
        verdict = "cannot tell"
        sentence = (
            f"cannot tell: this prompt fixes the brightness (x0 follows the noise mean with slope "
            f"{np.abs(peak).max():.2g} at most); ask with one that leaves it open, such as the empty prompt"
        )
    elif side < 0:
        verdict = "zero SNR"
        sentence = (
            f"zero-SNR trained: x0 at t = T does not follow the noise mean (slope {slope}, {share.value:.0%} of its "
            "peak)"
        )
    elif side > 0 and table == "zero SNR":
        verdict = "starved"
        sentence = (
            f"trained on a zero-SNR schedule, but its last timestep was not learned, as with Min-SNR weights without a "
            f"floor: {follows}"
        )
    elif side > 0:
        verdict = "not zero SNR"
        sentence = f"not zero-SNR trained: {follows}{takes}"
    else:
        verdict, needed = "cannot tell", share.seeds_to_tell(LEAK_SHARE)
        sentence = (
            f"cannot tell: {len(probes)} seeds are too few, use {needed} (x0 at t = T follows the noise mean by "
            f"{share} of its peak; the limit is {LEAK_SHARE})"
        )
    return CheckpointAnswer(
        verdict,
        sentence,
        timesteps,
        sigmas,
        by_level,
        share,
        slope,
        table,
        believed,
        math.isinf(sigmas[-1]),
        needed,
    )


def closest_table(
    timesteps: Sequence[float], responses: Sequence[float], tables: Mapping[str, NoiseSchedule], up_to: float
) -> tuple[str | None, float]:
    """The table of noise levels that a network's answers to the finest noise fit.

    If the finest detail of pictures has variance V, v follows it with alpha s (1 - V) / (alpha^2 V + s^2), which is
    1 / sigma(t) for small V.  V is fitted for each table.

    Returns:
        A name, or None if two tables fit about as well; and V.
    """
    from scipy.optimize import minimize_scalar

    asked = [(t, q) for t, q in zip(timesteps, responses, strict=True) if t <= up_to]
    if len(tables) < 2 or len(asked) < 2 or any(q <= 0 for _, q in asked):
        return None, 0.0
    measured = np.log([q for _, q in asked])

    def fit(table: NoiseSchedule) -> tuple[float, float]:
        scales = [alpha_s(table.sigma(t)) for t, _ in asked]

        def squares(variance: float) -> float:
            expected = [alpha * s * (1 - variance) / (alpha**2 * variance + s**2) for alpha, s in scales]
            return float(((measured - np.log(expected)) ** 2).sum())

        best = minimize_scalar(squares, bounds=(0, 0.99), method="bounded")
        return float(best.fun), float(best.x)

    (misfit, variance, name), (next_misfit, *_), *_ = sorted((*fit(table), name) for name, table in tables.items())
    return (name if misfit < next_misfit / 4 else None), variance


def _candidates(schedule: NoiseSchedule | None) -> dict[str, NoiseSchedule]:
    """Stable Diffusion's plain and zero-SNR tables, if the schedule is one of them."""
    if schedule is None:
        return {}
    tables = {"zero SNR": NoiseSchedule.sdxl(), "plain": NoiseSchedule.sdxl(zero_terminal_snr=False)}
    own = schedule.alphas_cumprod
    known = any(len(own) == len(t.alphas_cumprod) and torch.allclose(own, t.alphas_cumprod, rtol=1e-3, atol=1e-6)
                for t in tables.values())  # fmt: skip
    return tables if known else {}


# ----------------------------------------------------------------------------------------------------------------------
# Judging the sampler


@dataclass(frozen=True)
class ChannelFit:
    """How the picture's mean of one channel depends on the noise's: mean = intercept + slope * noise mean.

    Attributes:
        r_squared: share of the variation of the pictures' means that this line explains.
        reference_slope, reference_intercept: those of the exact flow; None without a reference.
    """

    slope: Estimate
    intercept: Estimate
    r_squared: float
    reference_slope: Estimate | None
    reference_intercept: Estimate | None


@dataclass(frozen=True)
class SamplerAnswer:
    """What a sampler adds to the exact flow of the same network.

    Attributes:
        verdict: "exact", "biased", "coarse" (another slope than the flow's), "cannot tell", or "no reference".
        pull: toward grey, against the reference; in ``unit``.
        slope_ratio: slope as a share of the reference's; None if the prompt leaves no brightness open.
        spread, reference_spread: standard deviation of the brightness over all pictures, in ``unit``.
        clipped, reference_clipped: share of clipped pixels; None without a way to RGB.
        brightness, colour_error: of the pictures, over seeds; None likewise, or without a colour asked for.
        unit: "levels of 255" or "latent units".
    """

    verdict: str
    sentence: str
    start_sigma: float
    reference: str | None
    channels: list[ChannelFit]
    pull: Estimate | None
    slope_ratio: Estimate | None
    spread: float
    reference_spread: float | None
    clipped: float | None
    reference_clipped: float | None
    brightness: Estimate | None
    reference_brightness: Estimate | None
    colour_error: Estimate | None
    reference_colour_error: Estimate | None
    unit: str
    seeds_needed: int | None = None


def judge_sampler(
    probes: Sequence[SamplerProbe],
    references: Sequence[SamplerProbe] | None,
    start_sigma: float,
    reference: str = "the exact flow",
) -> SamplerAnswer:
    """The sampler's answer, from one probe a seed of it and of the exact flow.

    Args:
        start_sigma: the noise level that the sampler starts at, inf allowed.
        reference: what the references were made with, in words.

    Raises:
        UserError: fewer than two probes, or references of other seeds.
    """
    _at_least_two(probes)
    if references is not None and [p.seed for p in references] != [p.seed for p in probes]:
        raise UserError("the sampler's and the reference's seeds differ")
    levels = probes[0].rgb_mean is not None
    unit, limit = ("levels of 255", PULL_LEVELS) if levels else ("latent units", PULL_LATENT)
    shared = {
        "start_sigma": start_sigma,
        "channels": _channel_fits(probes, references),
        "spread": spread_of(probes),
        "clipped": mean_over_seeds(probes, "clipped"),
        "brightness": over_seeds(probes, "brightness"),
        "colour_error": over_seeds(probes, "colour_error"),
        "unit": unit,
    }
    if references is None:
        return SamplerAnswer(
            verdict="no reference", sentence="the sampler was not compared with the exact flow", reference=None,
            pull=None, slope_ratio=None, reference_spread=None, reference_clipped=None, reference_brightness=None,
            reference_colour_error=None, **shared,
        )  # fmt: skip
    pull = Estimate.over_seeds([_pull(*pair) for pair in zip(probes, references, strict=True)])
    ratio = _slope_ratio(probes, references)
    infinite = math.isinf(start_sigma)
    starts = "starts at infinity" if infinite else f"starts at sigma {start_sigma:.6g}"
    bias, departure = pull.side(limit), _departure(ratio)
    evidence = f"pull toward grey {pull} {unit}"
    if ratio is not None:
        evidence += f", slope {ratio} of the exact flow's"
    needed = None
    if bias > 0 and (departure <= 0 or not infinite):
        verdict = "biased"
        sentence = f"the sampler {'adds a bias of its own' if infinite else starts}: {evidence}"
    elif departure > 0:
        verdict = "coarse"
        sentence = f"the sampler's steps are too coarse for the brightness (it {starts}): {evidence}"
    elif bias == 0 or departure == 0:
        verdict = "cannot tell"
        needed = max(
            pull.seeds_to_tell(limit) if bias == 0 else 0,
            _departure_estimate(ratio).seeds_to_tell(SLOPE_DEPARTURE) if ratio is not None and departure == 0 else 0,
        )
        sentence = f"cannot tell about the sampler: {len(probes)} seeds are too few, use {needed} ({evidence})"
    else:
        verdict = "exact"
        sentence = (
            f"sampled exactly: {evidence}" if infinite else f"the sampler {starts}, which does not show: {evidence}"
        )
    return SamplerAnswer(
        verdict=verdict,
        sentence=sentence,
        reference=reference,
        pull=pull,
        slope_ratio=ratio,
        reference_spread=spread_of(references),
        reference_clipped=mean_over_seeds(references, "clipped"),
        reference_brightness=over_seeds(references, "brightness"),
        reference_colour_error=over_seeds(references, "colour_error"),
        seeds_needed=needed,
        **shared,
    )


def _channel_fits(probes: Sequence[SamplerProbe], references: Sequence[SamplerProbe] | None) -> list[ChannelFit]:
    from scipy import stats

    slopes, intercepts = _lines(probes)
    exact = _lines(references) if references is not None else None
    fits = []
    for channel in range(slopes.shape[1]):
        x = np.concatenate([probe.noise_mean[:, channel] for probe in probes])
        y = np.concatenate([probe.picture_mean[:, channel] for probe in probes])
        r_squared = stats.linregress(x, y).rvalue ** 2 if np.ptp(y) > 0 else 0.0
        fits.append(
            ChannelFit(
                Estimate.over_seeds(slopes[:, channel]),
                Estimate.over_seeds(intercepts[:, channel]),
                float(r_squared),
                None if exact is None else Estimate.over_seeds(exact[0][:, channel]),
                None if exact is None else Estimate.over_seeds(exact[1][:, channel]),
            )
        )
    return fits


def fit_pictures(noise_mean: np.ndarray, picture_mean: np.ndarray) -> list[ChannelFit]:
    """Least-squares lines of pictures' channel means on their noises', (B, C) both, at least 3 that are finite."""
    from scipy import stats

    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(noise_mean) - 2)
    fits = []
    for x, y in zip(noise_mean.T, picture_mean.T, strict=True):
        line = stats.linregress(x, y)
        slope = Estimate(float(line.slope), float(quantile * line.stderr), len(x))
        intercept = Estimate(float(line.intercept), float(quantile * line.intercept_stderr), len(x))
        r_squared = float(line.rvalue**2) if np.ptp(y) > 0 else 0.0
        fits.append(ChannelFit(slope, intercept, r_squared, None, None))
    return fits


def _lines(probes: Sequence[SamplerProbe]) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts of each seed's pair, (K, C) both; the noises' means are opposite."""
    return np.stack([probe.slopes for probe in probes]), np.stack([probe.picture_mean.mean(0) for probe in probes])


def _pull(probe: SamplerProbe, reference: SamplerProbe) -> float:
    """How far one seed's picture lies from the reference's in the direction of grey (of 0, in latent units)."""
    if probe.rgb_mean is not None:
        own, exact, grey = probe.rgb_mean.mean(0), reference.rgb_mean.mean(0), 127.5
    else:
        own, exact, grey = probe.picture_mean.mean(0), reference.picture_mean.mean(0), 0.0
    direction = grey - exact
    length = np.linalg.norm(direction)
    # of a colour the channels move together; in levels of one channel, as for black and white
    scale = math.sqrt(len(direction)) if probe.rgb_mean is not None else 1.0
    return float((own - exact) @ direction / length / scale) if length > 0 else 0.0


def _slope_ratio(probes: Sequence[SamplerProbe], references: Sequence[SamplerProbe]) -> Estimate | None:
    """Slope as a share of the reference's, over all channels; None if the reference hardly follows the noise.

    Seed by seed, because slopes differ between seeds by far more than between the two runs of one seed.
    """
    slopes, exact = (np.stack([probe.slopes for probe in each]) for each in (probes, references))
    mean = exact.mean(0)
    offset = np.abs(probes[0].noise_mean[0] - probes[0].noise_mean[1]).max() / 2
    if np.linalg.norm(mean) * offset < 2 * PULL_LATENT:
        return None
    return Estimate.over_seeds(1 + (slopes - exact) @ mean / (mean @ mean))


def _departure_estimate(ratio: Estimate) -> Estimate:
    return Estimate(abs(ratio.value - 1), ratio.error, ratio.seeds)


def _departure(ratio: Estimate | None) -> int:
    """1 if the slope certainly is another than the exact flow's, -1 if not, 0 if these seeds cannot tell."""
    return -1 if ratio is None else _departure_estimate(ratio).side(SLOPE_DEPARTURE)


def _at_least_two(probes: Sequence) -> None:
    if len(probes) < 2:
        raise UserError(f"a slope with an interval needs at least 2 seeds, not {len(probes)}; 8 are a good beginning")


# ----------------------------------------------------------------------------------------------------------------------
# The test


@dataclass(frozen=True)
class LeakReport:
    """The answers, and what they were judged from.

    Attributes:
        checkpoint, sampler, guidance: the answers; None where the question was not asked.
        offset: of the noise means, in their standard deviations.
        brightness_through: how latents became levels, in words; None if they did not.
        network_probes, sampler_probes, reference_probes: the measurements, one a seed.
    """

    checkpoint: CheckpointAnswer | None
    sampler: SamplerAnswer | None
    seeds: list[int]
    offset: float
    brightness_through: str | None
    network_probes: list[NetworkProbe]
    sampler_probes: list[SamplerProbe]
    reference_probes: list[SamplerProbe] | None
    guidance: GuidanceAnswer | None = None

    @property
    def verdict(self) -> str:
        """One sentence about the checkpoint and the sampler."""
        return join_verdicts(self.checkpoint, self.sampler)

    def __str__(self) -> str:
        lines = [self.verdict[0].upper() + self.verdict[1:] + "."]
        if self.checkpoint is not None and self.sampler is not None:
            lines += ["", f"Checkpoint: {self.checkpoint.sentence}.", "", f"Sampler: {self.sampler.sentence}."]
        if self.sampler is not None:
            lines += _details(self.sampler)
        if self.guidance is not None:
            lines += ["", f"Guidance: {self.guidance.sentence}.", *self.guidance.details()]
        through = f" Brightness {self.brightness_through}." if self.brightness_through else ""
        deviations = "1 standard deviation" if self.offset == 1 else f"{self.offset:g} standard deviations"
        lines += [
            "",
            f"{len(self.seeds)} seeds, each with noise means of plus and minus {deviations}. Intervals hold "
            f"{CONFIDENCE:.0%}.{through}",
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """For JSON: no NaN, infinity as a word."""
        kept = ("checkpoint", "sampler", "guidance", "seeds", "offset", "brightness_through")
        return {"verdict": self.verdict, "confidence": CONFIDENCE} | {k: plain(getattr(self, k)) for k in kept}


def mean_leak(
    denoise: Denoise | None,
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
        denoise: ``denoise(x_vp, sigma) -> x0``, the network without guidance; None leaves the checkpoint's question.
        run: ``run(noise) -> (latents, LatentStatistics)``, the sampler; None leaves its question.
        shape: (C, H, W) of the latents, or (C, F, H, W); any number of channels.
        schedule: the network's, as the checkpoint's marks say; None for flow matching, which has no such table.
        sigmas: noise levels at which the network is asked, increasing up to that of t = T; by default those of
            ``probed_sigmas``, which need a schedule.
        reference: like ``run``, the exact flow of the same network with the same guidance (``exact_flow``).
        reference_name: what it is, in words.
        unguided: like ``reference``, with the prompt alone; None leaves the question about guidance, which needs a
            reference.
        exposure_true: like ``reference``, with exposure-true guidance of the same scale, to compare.
        guidance_name: what the reference's guidance is called: "CFG 5".
        start_sigma: noise level that the sampler starts at.
        seeds: K different seeds, at least 2.
        offset: of the noise means, in standard deviations of such a mean.
        to_rgb: latents (B, C, ...) to pictures (B, 3, H, W), 0 to 1 and beyond; brightness then is in levels.
        brightness_through: how, in words: "through the VAE".
        target: the colour that the prompt asks for, 0 to 255.
        device: where the noise goes.
        progress: called after each of the up to five probes of a seed.

    Raises:
        UserError: fewer than two seeds, equal ones, an offset of 0, or values that are not finite.
    """
    seeds = check_seeds(seeds)
    if denoise is None and run is None:
        raise UserError("give a network to ask, a sampler to run, or both")
    if target is not None and to_rgb is None:
        raise UserError("a colour can only be compared in pictures: give to_rgb as well")
    if denoise is not None and sigmas is None:
        sigmas = probed_sigmas(schedule)
    if unguided is not None and reference is None:
        raise UserError("what guidance does is seen beside the exact flow without it: give a reference as well")
    tell = progress or (lambda: None)
    runs = {} if run is None else {"sampler": run, "reference": reference}
    runs |= {} if unguided is None else {"unguided": unguided, "exposure-true": exposure_true}
    runs = {kind: each for kind, each in runs.items() if each is not None}
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
    guided = {guidance_name: references}
    if "exposure-true" in probes:
        guided[EXPOSURE_TRUE] = probes["exposure-true"]
    return LeakReport(
        checkpoint=judge_network(network_probes, schedule) if denoise is not None else None,
        sampler=judge_sampler(probes["sampler"], references, start_sigma, reference_name) if run is not None else None,
        seeds=seeds,
        offset=offset,
        brightness_through=brightness_through if to_rgb is not None else None,
        network_probes=network_probes,
        sampler_probes=probes.get("sampler", []),
        reference_probes=references,
        guidance=judge_guidance(probes["unguided"], guided) if "unguided" in probes else None,
    )


def exact_flow(denoise: Denoise, schedule: NoiseSchedule, latent_size: tuple[int, int], steps: int = 50) -> Run:
    """The reference: this package's default solver in many steps, from the schedule's own end.

    At 50 steps its departure from the exact flow is far below the limits that samplers are judged by.
    """
    sigmas = step_schedule(schedule, steps, latent_size=latent_size)

    def run(noise: torch.Tensor) -> tuple[torch.Tensor, LatentStatistics]:
        recorder = LatentMeanRecorder(steps)
        latents = sample(denoise, noise, sigmas, callback=recorder)
        return latents, recorder.read()

    return run


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """At least two seeds, all different."""
    seeds = [int(seed) for seed in seeds]
    _at_least_two(seeds)
    if len(set(seeds)) < len(seeds):
        raise UserError("the same seed twice says nothing new; give different seeds")
    return seeds


def join_verdicts(checkpoint: CheckpointAnswer | None, sampler: SamplerAnswer | None) -> str:
    """Both answers in one sentence."""
    if checkpoint is None or sampler is None:
        return (checkpoint or sampler).sentence
    if checkpoint.verdict != "zero SNR":
        return checkpoint.sentence
    if not checkpoint.marked:
        end = checkpoint.sigmas[-1]
        return f"zero-SNR trained, but sampled on a schedule that ends at sigma {end:.6g}, as the file does not say so"
    if sampler.verdict == "exact" and math.isinf(sampler.start_sigma):
        return "zero-SNR trained and sampled exactly"
    if sampler.verdict in ("exact", "no reference"):
        return f"zero-SNR trained; {sampler.sentence}"
    return f"zero-SNR model, but {sampler.sentence}"


def _details(sampler: SamplerAnswer) -> list[str]:
    lines = [] if sampler.reference is None else [f"Reference: {sampler.reference}."]
    for i, fit in enumerate(sampler.channels):
        exact = "" if fit.reference_slope is None else f" (exact flow {fit.reference_slope})"
        lines.append(f"Channel {i + 1}: slope {fit.slope}{exact}, intercept {fit.intercept}, R^2 {fit.r_squared:.2f}.")
    spread = f"Spread of brightness between seeds: {sampler.spread:.3g} {sampler.unit}"
    if sampler.reference_spread is not None:
        spread += f" (exact flow {sampler.reference_spread:.3g})"
    lines.append(spread + ".")
    if sampler.brightness is not None:
        lines.append(f"Brightness {sampler.brightness} of 255; {sampler.clipped:.1%} of the pixels are clipped.")
    if sampler.colour_error is not None:
        lines.append(f"Distance from the colour asked for: CIEDE2000 {sampler.colour_error}.")
    return lines


def plain(value):
    """Dataclasses, arrays and numbers as what JSON can hold: infinity as a word, NaN as null."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float | np.floating):
        if math.isnan(value):
            return None
        return float(value) if math.isfinite(value) else ("infinity" if value > 0 else "-infinity")
    return value.item() if isinstance(value, np.generic) else value
