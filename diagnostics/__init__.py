"""What measures a sampler or a model: models in closed form, a recorder of latent statistics, the mean-leak test."""

from .ideal_models import (
    GaussianCanvas,
    GaussianMixture,
    GaussianModes,
    PictureSet,
    reference_flow,
    v_network,
)
from .latent_stats import LatentMeanRecorder, LatentStatistics
from .leak import exact_flow, mean_leak
from .verdict import LeakReport

__all__ = [
    "GaussianCanvas",
    "GaussianMixture",
    "GaussianModes",
    "LatentMeanRecorder",
    "LatentStatistics",
    "LeakReport",
    "PictureSet",
    "exact_flow",
    "mean_leak",
    "reference_flow",
    "v_network",
]
