"""How far does guidance move a picture's brightness from what the same noise gives without it?

From infinity the first step decides brightness, and there classifier-free guidance extrapolates it: for a Gaussian
canvas whose average spreads by the same tau with and without the prompt, the picture's average moves by exactly

    (w - 1) (mu_c - mu_u),

mu_c and mu_u being the averages with and without the prompt.  So the same noise is sampled exactly with the guidance
and with the prompt alone, and each picture is compared with its own twin: a spread between noises, which is the
variety of the prompt, cancels.  Exposure-true guidance (``samplers.exposure_true_guidance``) is measured beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .estimates import Estimate, at_least_two, mean_over_seeds, over_seeds, spread_of
from .leak_probes import SamplerProbe

EXPOSURE_TRUE = "exposure-true guidance"


@dataclass(frozen=True)
class BrightnessShift:
    """How one kind of guidance moves the brightness of K seeds' pictures.

    Attributes:
        guidance: its name.
        changes: (K, 2) each picture's brightness minus that of its twin without guidance; in the answer's unit.
        mean, rms: mean and rms of the changes, over seeds.
        brightness: brightness of the pictures, over seeds; None without RGB.
        spread: standard deviation of the brightness over all pictures.
        clipped: share of clipped pixels; None without RGB.
    """

    guidance: str
    changes: list[list[float]]
    mean: Estimate
    rms: Estimate
    brightness: Estimate | None
    spread: float
    clipped: float | None


@dataclass(frozen=True)
class GuidanceAnswer:
    """How far guidance moves brightness.

    Attributes:
        sentence: the answer in words.
        unguided: (K, 2) brightness of the prompt alone; without RGB, the mean of the latents' first channel.
        unguided_brightness, unguided_spread, unguided_clipped: as in ``BrightnessShift``.
        shifts: one per kind of guidance; the first is the one in question.
        unit: "levels of 255" or "latent units".
    """

    sentence: str
    unguided: list[list[float]]
    unguided_brightness: Estimate | None
    unguided_spread: float
    unguided_clipped: float | None
    shifts: list[BrightnessShift]
    unit: str

    def details(self) -> list[str]:
        """A line for the prompt alone and one for each kind of guidance."""
        alone = _pictures(self.unguided_brightness, self.unguided_spread, self.unguided_clipped)
        return [f"The prompt alone: {alone}."] + [
            f"{shift.guidance[0].upper()}{shift.guidance[1:]}: brightness moves by {shift.mean} {self.unit} on "
            f"average, {shift.rms} rms; {_pictures(shift.brightness, shift.spread, shift.clipped)}."
            for shift in self.shifts
        ]


def judge_guidance(unguided: Sequence[SamplerProbe], guided: Mapping[str, Sequence[SamplerProbe]]) -> GuidanceAnswer:
    """The answer, from one probe per seed of the prompt alone and of each kind of guidance.

    Args:
        unguided: the exact flow at guidance scale 1.
        guided: by name, the exact flow from the same noise with guidance; the one in question comes first.

    Raises:
        UserError: fewer than two seeds, or different seeds with and without guidance.
    """
    if any([p.seed for p in probes] != [p.seed for p in unguided] for probes in guided.values()):
        raise UserError("unguided and guided need the same seeds, because brightness is compared noise by noise")
    at_least_two(unguided)
    unit = "latent units" if unguided[0].rgb_mean is None else "levels of 255"
    shifts = [_shift(name, probes, unguided) for name, probes in guided.items()]
    asked, *others = shifts
    spread = spread_of(unguided)
    beside = "".join(f" ({other.guidance}: {other.rms})" for other in others)
    return GuidanceAnswer(
        sentence=f"{asked.guidance} moves brightness by {asked.rms} {unit.removesuffix(' of 255')} rms from what the "
        f"same noise gives without it{beside}; pictures without it spread by {spread:.3g}",
        unguided=[probe.tone.tolist() for probe in unguided],
        unguided_brightness=over_seeds(unguided, "brightness"),
        unguided_spread=spread,
        unguided_clipped=mean_over_seeds(unguided, "clipped"),
        shifts=shifts,
        unit=unit,
    )


def moved_most(answers: Sequence[GuidanceAnswer]) -> int:
    """Index of the prompt that the guidance in question moves most."""
    return max(range(len(answers)), key=lambda i: answers[i].shifts[0].rms.value)


def _shift(name: str, probes: Sequence[SamplerProbe], unguided: Sequence[SamplerProbe]) -> BrightnessShift:
    changes = np.stack([probe.tone - alone.tone for probe, alone in zip(probes, unguided, strict=True)])
    return BrightnessShift(
        guidance=name,
        changes=changes.tolist(),
        mean=Estimate.over_seeds(changes.mean(1)),
        rms=Estimate.rms_over_seeds((changes**2).mean(1)),
        brightness=over_seeds(probes, "brightness"),
        spread=spread_of(probes),
        clipped=mean_over_seeds(probes, "clipped"),
    )


def _pictures(brightness: Estimate | None, spread: float, clipped: float | None) -> str:
    """Brightness, spread and clipping of pictures, for a sentence."""
    if brightness is None:
        return f"spread {spread:.3g}"
    return f"brightness {brightness}, spread {spread:.3g}, {clipped:.1%} of the pixels clipped"
