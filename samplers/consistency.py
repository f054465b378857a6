"""Multistep consistency sampling, for models distilled for it.  It runs with any model."""

import torch

from .protocol import Noise, Run, solver
from .steps import add_noise


@solver(stochastic=True)
def lcm(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Multistep consistency sampling (Song et al., arXiv 2303.01469, Alg. 1): denoise, then draw all the noise anew."""
    _, end = run.ends
    return add_noise(x0, 0.0, end, noise()) if end > 0 else x0
