"""The answers of the mean-leak test in one report, and both verdicts in one sentence."""

import math
from dataclasses import dataclass

from .checkpoint_verdict import CheckpointAnswer
from .estimates import CONFIDENCE
from .guidance_shift import GuidanceAnswer
from .leak_probes import NetworkProbe, SamplerProbe
from .plain import plain
from .sampler_verdict import SamplerAnswer


@dataclass(frozen=True)
class LeakReport:
    """The verdicts of the mean-leak test, and the measurements behind them.

    Attributes:
        checkpoint, sampler, guidance: the verdicts; None for what was not tested.
        offset: offset of the noise means, in their standard deviations.
        brightness_through: how latents became pictures, in words; None without RGB.
        network_probes, sampler_probes, reference_probes: the measurements, one per seed.
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
            f"{len(self.seeds)} seeds, each with noise means of plus and minus {deviations}. Intervals: "
            f"{CONFIDENCE:.0%} confidence.{through}",
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """For JSON: no NaN, infinity as a word."""
        kept = ("checkpoint", "sampler", "guidance", "seeds", "offset", "brightness_through")
        return {"verdict": self.verdict, "confidence": CONFIDENCE} | {k: plain(getattr(self, k)) for k in kept}


def join_verdicts(checkpoint: CheckpointAnswer | None, sampler: SamplerAnswer | None) -> str:
    """Both verdicts in one sentence."""
    if checkpoint is None:
        return "nothing was tested" if sampler is None else sampler.sentence
    if sampler is None or checkpoint.verdict != "zero SNR":
        return checkpoint.sentence
    if not checkpoint.marked:
        end = checkpoint.sigmas[-1]
        return (
            f"zero-SNR trained, but sampled on a schedule that ends at sigma {end:.6g}, because the file is not marked "
            "as zero-SNR"
        )
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
        lines.append(f"Distance from the target colour: CIEDE2000 {sampler.colour_error}.")
    return lines
