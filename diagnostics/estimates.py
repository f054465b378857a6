"""What a few seeds say of all: a mean, and the interval that holds it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .leak_probes import SamplerProbe

CONFIDENCE = 0.99  # of every interval
MOST_SEEDS = 1000  # that a report advises


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half width of its confidence interval (Student's t)."""

    value: float
    error: float
    seeds: int

    @classmethod
    def over_seeds(cls, values: Sequence[float]) -> "Estimate":
        """The mean of one value a seed, at least two."""
        from scipy import stats

        values = np.asarray(values, dtype=float)
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
        error = quantile * values.std(ddof=1) / math.sqrt(len(values))
        return cls(float(values.mean()), float(error), len(values))

    @classmethod
    def rms_over_seeds(cls, squares: Sequence[float]) -> "Estimate":
        """Root of the mean of one mean square a seed, at least two.

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
        """1 if certainly above the limit, -1 if certainly not, 0 if these seeds cannot tell."""
        return (self.low > limit) - (self.high <= limit)

    def seeds_to_tell(self, limit: float) -> int:
        """About how many seeds it takes until the interval no longer holds the limit; more than were used."""
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
    """Refuse what has no interval."""
    if len(seeds) < 2:
        raise UserError(f"a slope with an interval needs at least 2 seeds, not {len(seeds)}; 8 are a good beginning")


def spread_of(probes: Sequence[SamplerProbe]) -> float:
    """Standard deviation over all pictures of the brightness, or of what stands for it without a way to RGB."""
    return float(np.concatenate([probe.tone for probe in probes]).std(ddof=1))


def over_seeds(probes: Sequence[SamplerProbe], name: str) -> Estimate | None:
    """What probes call ``name``, over seeds; None where they lack it."""
    if getattr(probes[0], name) is None:
        return None
    return Estimate.over_seeds([getattr(probe, name).mean() for probe in probes])


def mean_over_seeds(probes: Sequence[SamplerProbe], name: str) -> float | None:
    """The mean alone."""
    estimate = over_seeds(probes, name)
    return None if estimate is None else estimate.value
