"""Mean and standard deviation of each channel of a data set's latents, accumulated in parts and in any order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..samplers.devices import to_float64


@dataclass(frozen=True)
class ChannelStatistics:
    """Count, mean and sum of squared deviations of C channels.

    Attributes:
        count: number of values of each channel.
        mean: (C,) float64.
        squares: (C,) float64, the sum of the squared deviations from the mean.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, mean: torch.Tensor, std: torch.Tensor) -> "ChannelStatistics":
        """Statistics over all samples of a VAE's posterior for one picture: its variance adds to that of the mean.

        Args:
            mean, std: (C, h, w).
        """
        means, stds = (to_float64(tensor.flatten(1)).numpy(force=True) for tensor in (mean, std))
        center = means.mean(axis=1)
        squares = ((means - center[:, None]) ** 2 + stds**2).sum(axis=1)
        return cls(means.shape[1], center, squares)

    def merged(self, other: "ChannelStatistics") -> "ChannelStatistics":
        """Statistics of both sets of values together.

        This is the pairwise update of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for
        computing sample variances", 1979), which avoids the difference of large sums.
        """
        count = self.count + other.count
        distance, share = other.mean - self.mean, other.count / count
        return ChannelStatistics(
            count,
            self.mean + share * distance,
            self.squares + other.squares + self.count * share * distance**2,
        )

    @property
    def std(self) -> np.ndarray:
        """(C,) float64."""
        return np.sqrt(self.squares / self.count)

    def to_json(self) -> dict[str, Any]:
        """The statistics as plain values for JSON, without rounding."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ChannelStatistics":
        return cls(content["count"], np.array(content["mean"]), np.array(content["squares"]))


def merge(parts: Sequence[ChannelStatistics]) -> ChannelStatistics:
    """Statistics of all parts, at least one, merged by halves so that rounding errors hardly grow with their number."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return merge(parts[:middle]).merged(merge(parts[middle:]))
