"""The solver protocol: a run is data, and a solver is a function that takes it one network evaluation further.

    solver(run, x, x0, noise) -> x

The network was asked about x at noise level ``run.sigma`` and answered x0.  The solver returns the state to ask about
next, at ``run.levels[run.index + 1]``; after the last evaluation, the state at the last sigma.  What it needs to know
later it leaves in ``run``.  Whoever drives it (``sample``, the diffusers scheduler, a ComfyUI sampler) only asks the
network, so every door takes exactly the same steps.  The state may be edited between two evaluations, as inpainting
does.

    x, x0   (B, C, H, W) float32; x is variance-preserving: x = alpha x0 + s eps, alpha^2 + s^2 = 1
    noise   function without arguments: a fresh unit Gaussian like x

The first sigma may be infinity, where x is the noise itself, alpha = 0 and s = 1: no rule may divide by alpha or
multiply by sigma there.  docs/extending.md builds a solver from nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..errors import UserError

Sigmas = tuple[float, ...]
Noise = Callable[[], torch.Tensor]


@dataclass
class Run:
    """All that a run's next steps depend on, besides the state x: copy or pickle it between any two evaluations.

    Attributes:
        solver: name of a registered solver, or a function that follows the protocol.
        sigmas: (steps + 1,) decreasing noise levels; the first may be inf, the last may be 0.
        eta: share of the removed noise that a stochastic solver replaces by fresh noise; 0 is the deterministic flow.
        levels: noise level of every evaluation of the network.
        looks: evaluations a step, 1 or 2.
        index: number of evaluations that are answered.
        history: values that the solver keeps from past evaluations, newest first.
        kept: anything else that the solver carries along.
    """

    solver: "str | Solver"
    sigmas: Sigmas
    eta: float
    levels: Sigmas
    looks: int
    index: int = 0
    history: list[Any] = field(default_factory=list)
    kept: Any = None

    @property
    def done(self) -> bool:
        """True if the state is the result."""
        return self.index == len(self.levels)

    @property
    def sigma(self) -> float:
        """Noise level of the state that the network is asked about."""
        return self.levels[self.index]

    @property
    def step(self) -> int:
        """Number of the current step, from 0."""
        return self.index // self.looks

    @property
    def is_second_look(self) -> bool:
        """True in the second evaluation of a step."""
        return self.index % self.looks == 1

    @property
    def ends(self) -> tuple[float, float]:
        """Noise levels at the beginning and the end of the current step."""
        return self.sigmas[self.step], self.sigmas[self.step + 1]

    def remember(self, value: Any, count: int) -> list[Any]:
        """Store a value; return the last ``count`` stored, newest first, this one included."""
        self.history = [value, *self.history[: count - 1]]
        return self.history


# solver(run, x, x0, noise) -> x
Solver = Callable[[Run, torch.Tensor, torch.Tensor, Noise], torch.Tensor]
SecondLook = Callable[[float, float, float], float]  # (start, end, eta) -> sigma

# ----------------------------------------------------------------------------------------------------------------------
# The registry


@dataclass(frozen=True)
class SolverEntry:
    """A solver, and what its drivers need to know about it.

    Attributes:
        name: name by which users choose it.
        function: the solver itself.
        evaluations: network evaluations a step, 1 or 2; a step to sigma = 0 always takes 1.
        stochastic: True if it draws noise, in amounts that ``eta`` scales.
        second_look: noise level of a step's second evaluation, from the step's start, end and eta.
    """

    name: str
    function: Solver
    evaluations: int = 1
    stochastic: bool = False
    second_look: SecondLook | None = None

    @property
    def description(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


_ENTRIES: dict[str, SolverEntry] = {}
_Function = TypeVar("_Function", bound=Callable)


def solver(
    name: str | None = None, *, evaluations: int = 1, stochastic: bool = False, second_look: SecondLook | None = None
) -> Callable[[_Function], _Function]:
    """Decorator: register a solver under a name, by default that of the function.

    Args:
        name: name by which users choose it.
        evaluations: network evaluations a step, 1 or 2.
        stochastic: True if it draws noise.
        second_look: ``second_look(start, end, eta) -> sigma``: noise level of a step's second evaluation; by default
            the end of the step.

    Raises:
        UserError: a name that another function has, evaluations other than 1 or 2, a second look without a second
            evaluation.
    """
    if evaluations not in (1, 2):
        raise UserError(f"evaluations must be 1 or 2, not {evaluations!r}")
    if evaluations == 1 and second_look is not None:
        raise UserError("second_look needs evaluations=2")
    if evaluations == 2 and second_look is None:
        second_look = _end_of_step

    def register(function: _Function) -> _Function:
        entry = SolverEntry(name or function.__name__, function, evaluations, stochastic, second_look)
        check_free(entry.name, function, _ENTRIES, "solver")
        _ENTRIES[entry.name] = entry
        return function

    return register


def _end_of_step(start: float, end: float, eta: float) -> float:
    return end


def check_free(name: str, function: Callable, entries: dict[str, Any], kind: str) -> None:
    """Refuse a name that another function is registered under; the same one may come again, as in a notebook's cell."""
    if name in entries:
        other = entries[name].function
        if (other.__module__, other.__qualname__) != (function.__module__, function.__qualname__):
            raise UserError(f"{kind} {name!r} already exists; choose another name")


def solver_names() -> tuple[str, ...]:
    """Names of all registered solvers, in the order of registration."""
    return tuple(_ENTRIES)


def find_solver(solver: str | Solver) -> SolverEntry:
    """The entry of a registered solver, by its name or function; any other function evaluates once a step.

    Raises:
        UserError: an unknown name.
    """
    if callable(solver):
        unregistered = SolverEntry(getattr(solver, "__name__", repr(solver)), solver)
        return next((entry for entry in _ENTRIES.values() if entry.function is solver), unregistered)
    if solver not in _ENTRIES:
        raise UserError(f"unknown solver {solver!r}; choose one of {', '.join(_ENTRIES)}")
    return _ENTRIES[solver]
