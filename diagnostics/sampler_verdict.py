"""The mean-leak test's verdict on a sampler: what does it add to the exact flow of the same network?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .estimates import CONFIDENCE, Estimate, at_least_two, mean_over_seeds, over_seeds, spread_of
from .leak_probes import SamplerProbe

PULL_LEVELS = 1.0  # of 255: the smallest bias that counts
PULL_LATENT = 0.02  # the same in latent units: about one level in SDXL's first channel
SLOPE_DEPARTURE = 0.1  # of the exact flow's slope: the smallest departure that counts


@dataclass(frozen=True)
class ChannelFit:
    """One channel's line of the picture's mean on the noise's: mean = intercept + slope * noise mean.

    Attributes:
        r_squared: share of the variance of the pictures' means that the line explains.
        reference_slope, reference_intercept: those of the exact flow; None without a reference.
    """

    slope: Estimate
    intercept: Estimate
    r_squared: float
    reference_slope: Estimate | None
    reference_intercept: Estimate | None

    @property
    def expected(self) -> tuple[Estimate, Estimate]:
        """Intercept and slope of the exact flow; without a reference, of the sampler itself."""
        if self.reference_intercept is None or self.reference_slope is None:
            return self.intercept, self.slope
        return self.reference_intercept, self.reference_slope


@dataclass(frozen=True)
class SamplerAnswer:
    """The verdict on a sampler: what it adds to the exact flow of the same network.

    Attributes:
        verdict: "exact", "biased", "coarse" (another slope than the flow's), "cannot tell", or "no reference".
        pull: toward grey, against the reference; in ``unit``.
        slope_ratio: slope as a share of the reference's; None if the prompt leaves no brightness open.
        spread, reference_spread: standard deviation of the brightness over all pictures, in ``unit``.
        clipped, reference_clipped: share of clipped pixels; None without RGB.
        brightness, colour_error: means of the pictures, over seeds; None without RGB, colour_error also if no target.
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
    """The verdict on a sampler, from one probe per seed of it and of the exact flow.

    Args:
        start_sigma: the noise level that the sampler starts at, inf allowed.
        reference: name of the exact flow, for the report.

    Raises:
        UserError: fewer than two probes, or references with different seeds.
    """
    at_least_two(probes)
    if references is not None and [p.seed for p in references] != [p.seed for p in probes]:
        raise UserError("probes and references must have the same seeds")
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
    verdict, sentence, needed = _verdict(pull, ratio, start_sigma, unit, limit, len(probes))
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


def _verdict(
    pull: Estimate, ratio: Estimate | None, start_sigma: float, unit: str, limit: float, seeds: int
) -> tuple[str, str, int | None]:
    """The verdict, its sentence, and the number of seeds needed if these are too few."""
    infinite = math.isinf(start_sigma)
    starts = "starts at infinity" if infinite else f"starts at sigma {start_sigma:.6g}"
    bias, departure = pull.side(limit), _departure(ratio)
    evidence = f"pull toward grey {pull} {unit}"
    if ratio is not None:
        evidence += f", slope {ratio} of the exact flow's"
    # A finite start explains a bias; from infinity the steps do, if the slope departs as well.
    if bias > 0 and (departure <= 0 or not infinite):
        reason = "adds a bias of its own" if infinite else starts
        return "biased", f"the sampler {reason}: {evidence}", None
    if departure > 0:
        return "coarse", f"the sampler's steps are too coarse for the brightness (it {starts}): {evidence}", None
    if bias == 0 or departure == 0:
        needed = max(
            pull.seeds_to_tell(limit) if bias == 0 else 0,
            _departure_estimate(ratio).seeds_to_tell(SLOPE_DEPARTURE) if ratio is not None and departure == 0 else 0,
        )
        sentence = f"cannot tell about the sampler: {seeds} seeds are too few, use {needed} ({evidence})"
        return "cannot tell", sentence, needed
    if infinite:
        return "exact", f"sampled exactly: {evidence}", None
    return "exact", f"the sampler {starts}, without visible effect: {evidence}", None


def _channel_fits(probes: Sequence[SamplerProbe], references: Sequence[SamplerProbe] | None) -> list[ChannelFit]:
    from scipy import stats

    slopes, intercepts = _lines(probes)
    exact = _lines(references) if references is not None else None
    fits = []
    for channel in range(slopes.shape[1]):
        x = np.concatenate([probe.noise_mean[:, channel] for probe in probes])
        y = np.concatenate([probe.picture_mean[:, channel] for probe in probes])
        line: Any = stats.linregress(x, y)
        r_squared = line.rvalue**2 if np.ptp(y) > 0 else 0.0
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
        line: Any = stats.linregress(x, y)
        slope = Estimate(float(line.slope), float(quantile * line.stderr), len(x))
        intercept = Estimate(float(line.intercept), float(quantile * line.intercept_stderr), len(x))
        r_squared = float(line.rvalue**2) if np.ptp(y) > 0 else 0.0
        fits.append(ChannelFit(slope, intercept, r_squared, None, None))
    return fits


def _lines(probes: Sequence[SamplerProbe]) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts of each seed's pair, (K, C) both; the noises' means are opposite."""
    return np.stack([probe.slopes for probe in probes]), np.stack([probe.picture_mean.mean(0) for probe in probes])


def _pull(probe: SamplerProbe, reference: SamplerProbe) -> float:
    """Distance of one seed's picture from the reference's in the direction of grey (of 0, in latent units)."""
    if probe.rgb_mean is not None and reference.rgb_mean is not None:
        own, exact, grey = probe.rgb_mean.mean(0), reference.rgb_mean.mean(0), 127.5
    else:
        own, exact, grey = probe.picture_mean.mean(0), reference.picture_mean.mean(0), 0.0
    direction = grey - exact
    length = np.linalg.norm(direction)
    # The channels of a colour move together; this gives levels of one channel, as for black and white.
    scale = math.sqrt(len(direction)) if probe.rgb_mean is not None else 1.0
    return float((own - exact) @ direction / length / scale) if length > 0 else 0.0


def _slope_ratio(probes: Sequence[SamplerProbe], references: Sequence[SamplerProbe]) -> Estimate | None:
    """Slope as a share of the reference's, over all channels; None if the reference hardly follows the noise.

    Taken seed by seed, because slopes differ far more between seeds than between the two runs of one seed.
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
    """1 if the slope departs from the exact flow's, -1 if not, 0 if these seeds cannot tell."""
    return -1 if ratio is None else _departure_estimate(ratio).side(SLOPE_DEPARTURE)
