"""The types of the solver protocol that ``solvers`` describes."""

from collections.abc import Callable, Generator

import torch

Sigmas = tuple[float, ...]
Noise = Callable[[], torch.Tensor]
# yields (x, sigma), is sent (x, x0), returns the last x
Evaluations = Generator[tuple[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor], torch.Tensor]
