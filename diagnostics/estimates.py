"""A mean over a few seeds and its confidence interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .leak_probes import SamplerProbe

CONFIDENCE = 0.99  # level of every interval
MOST_SEEDS = 1000  # the most that a report recommends


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half width of its confidence interval (Student's t)."""

    value: float
    error: float
    seeds: int

    @classmethod
    def over_seeds(cls, values: ArrayLike) -> "Estimate":
        """The mean of one value per seed, for at least two seeds."""
        from scipy import stats

        sample = np.asarray(values, dtype=float)
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1)
        error = quantile * sample.std(ddof=1) / math.sqrt(len(sample))
        return cls(float(sample.mean()), float(error), len(sample))

    @classmethod
    def rms_over_seeds(cls, squares: ArrayLike) -> "Estimate":
        """The root of the mean of one mean square per seed, for at least two seeds.

        Squares of few seeds are skewed, so the interval is that of the logarithm, and its wider half stands for both.
        """
        mean = cls.over_seeds(squares)
        rms = math.sqrt(mean.value)
        return cls(rms, rms * math.expm1(mean.error / (2 * mean.value)) if rms > 0 else 0.0, mean.seeds)

    @property
    def low(self) -> float:
        return self.value - self.error

    @property
    def high(self) -> float:
        return self.value + self.error

    def side(self, limit: float) -> int:
        """1 if the interval lies above the limit, -1 if it lies below, 0 if it contains the limit."""
        return (self.low > limit) - (self.high <= limit)

    def seeds_to_tell(self, limit: float) -> int:
        """Estimated number of seeds until the interval excludes the limit; always more than were used."""
        gap = abs(self.value - limit)
        needed = self.seeds * (self.error / gap) ** 2 if gap > 0 else math.inf
        return math.ceil(min(max(1.2 * needed, self.seeds + 2, 6), MOST_SEEDS))

    def __str__(self) -> str:
        # two digits of the error, or four of the value where the error is nothing
        leading = math.floor(math.log10(max(abs(self.value), self.error, 0.01)))
        digits = 3 - leading if self.error < 10 ** (leading - 3) else 1 - math.floor(math.log10(self.error))
        digits = min(max(digits, 0), 4)
        return f"{self.value + 0.0:.{digits}f} ± {self.error:.{digits}f}"


def at_least_two(seeds: Sequence) -> None:
    """Raise UserError for a single seed, which has no interval."""
    if len(seeds) < 2:
        raise UserError(f"a confidence interval needs at least 2 seeds, not {len(seeds)}; 8 is a good start")


def spread_of(probes: Sequence[SamplerProbe]) -> float:
    """Standard deviation of the brightness over all pictures; without RGB, of the first channel's mean."""
    return float(np.concatenate([probe.tone for probe in probes]).std(ddof=1))


def over_seeds(probes: Sequence[SamplerProbe], name: str) -> Estimate | None:
    """The mean over seeds of the attribute ``name``; None if the probes do not have it."""
    if getattr(probes[0], name) is None:
        return None
    return Estimate.over_seeds([getattr(probe, name).mean() for probe in probes])


def mean_over_seeds(probes: Sequence[SamplerProbe], name: str) -> float | None:
    """As ``over_seeds``, without the interval."""
    estimate = over_seeds(probes, name)
    return None if estimate is None else estimate.value
