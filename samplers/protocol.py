"""The solver protocol: a run is data, and a solver is a function that takes it one network evaluation further."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Sigmas = tuple[float, ...]
Noise = Callable[[], torch.Tensor]


@dataclass
class Run:
    """All that a run's next steps depend on, besides the state x: to be copied or pickled between any two evaluations.

    Attributes:
        solver: its name.
        sigmas: (steps + 1,) decreasing noise levels; the first may be inf, the last may be 0.
        eta: how much of the removed noise a stochastic solver replaces by fresh noise; 0 is the deterministic flow.
        levels: noise level of every evaluation of the network.
        looks: evaluations a step, 1 or 2.
        index: number of evaluations that are answered.
        history: what the solver has remembered of past evaluations, newest first.
        kept: what it carries on besides.
    """

    solver: str
    sigmas: Sigmas
    eta: float
    levels: Sigmas
    looks: int
    index: int = 0
    history: list[Any] = field(default_factory=list)
    kept: Any = None

    @property
    def done(self) -> bool:
        """Whether the state is the result."""
        return self.index == len(self.levels)

    @property
    def sigma(self) -> float:
        """Noise level of the state that the network is asked about."""
        return self.levels[self.index]

    @property
    def step(self) -> int:
        """Number of the present step."""
        return self.index // self.looks

    @property
    def is_second_look(self) -> bool:
        """Whether this is the second evaluation of the step."""
        return self.index % self.looks == 1

    @property
    def ends(self) -> tuple[float, float]:
        """Noise levels at the present step's beginning and end."""
        return self.sigmas[self.step], self.sigmas[self.step + 1]

    def remember(self, value: Any, count: int) -> list[Any]:
        """The last ``count`` values, newest first, this one included."""
        self.history = [value, *self.history[: count - 1]]
        return self.history


# solver(run, x, x0, noise) -> x
Solver = Callable[[Run, torch.Tensor, torch.Tensor, Noise], torch.Tensor]
