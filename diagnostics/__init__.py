"""Tools that measure a sampler or a model: models in closed form, the mean-leak test, plots, and the demo."""

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
