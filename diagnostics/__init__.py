"""Tools that measure a sampler or a model: closed-form models with known answers, plots, and the demo."""

from .ideal_models import (
    GaussianCanvas,
    GaussianMixture,
    GaussianModes,
    PictureSet,
    reference_flow,
    v_network,
)

__all__ = ["GaussianCanvas", "GaussianMixture", "GaussianModes", "PictureSet", "reference_flow", "v_network"]
