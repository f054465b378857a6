"""The sampling loop: joins a model, a schedule of sigmas and a solver."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from ..errors import UserError
from .cfg_pp import cfg_pp_state
from .devices import send
from .protocol import Noise, Run, Solver, find_solver
from .solvers import DEFAULT_SOLVER

Prediction = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # x0, or with CFG++ guided and unconditional x0
Denoise = Callable[[torch.Tensor, float], Prediction]
Generators = torch.Generator | Sequence[torch.Generator] | None


def sample(
    denoise: Denoise,
    noise: torch.Tensor,
    sigmas: torch.Tensor | Sequence[float],
    solver: str | Solver = DEFAULT_SOLVER,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    generator: Generators = None,
    cfg_pp: bool = False,
    callback: Callable[[int, float, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Turn noise into a picture.

    Args:
        denoise: ``denoise(x_vp, sigma) -> x0``: the model, on the variance-preserving state x = alpha x0 + s eps
            (B, C, H, W) float32 at noise level sigma, a float that is inf in the first step.
        noise: (B, C, H, W) the state at sigmas[0]: unit Gaussian noise at infinity; for image to image,
            alpha * picture + s * noise.
        sigmas: (steps + 1,) from ``step_schedule``: decreasing, the first may be inf, the last may be 0.
        solver: one of ``SOLVERS``, or a function that follows the solver protocol (``protocol``).
        eta: share of fresh noise of the stochastic solvers; 0 makes all but ``lcm`` follow the deterministic flow.
        s_noise: standard deviation of that fresh noise, 1 by the theory (Karras et al., arXiv 2206.00364, S_noise).
        generator: source of that noise; a list gives each sample its own, so that a batch equals single runs.
        cfg_pp: guide by CFG++ (``cfg_pp``): ``denoise`` returns a pair, the guided and the unconditional x0.
        callback: called after every evaluation with (evaluation number, sigma, x, x0), x0 being the guided one; if it
            reads a tensor on the host, every step waits for the GPU.

    Returns:
        (B, C, H, W) float32 state at sigmas[-1], the picture if that is 0.

    Raises:
        UserError: an unknown solver, invalid sigmas, NaN in the noise, a model that returns another shape or device,
            or no pair with ``cfg_pp``.
    """
    sigmas = check_sigmas(sigmas)
    if not noise.is_floating_point():
        raise UserError(f"noise must be a floating-point tensor, not {noise.dtype}")
    if noise.isnan().any():
        raise UserError("noise holds NaN")
    check_generators(generator, noise)
    run = start_run(solver, sigmas, eta, s_noise)
    x = noise.float()

    def answer(x: torch.Tensor, sigma: float) -> Prediction:
        answered = denoise(x, sigma)
        predictions = answered if isinstance(answered, tuple) else (answered,)
        if len(predictions) != (2 if cfg_pp else 1):
            raise UserError(
                "with cfg_pp the model must return a pair: the guided and the unconditional x0"
                if cfg_pp
                else "the model returned several predictions: return x0 alone, or set cfg_pp=True for CFG++"
            )
        for x0 in predictions:
            check_answer(x0, x)
        if callback is not None:
            callback(run.index, sigma, x, predictions[0])
        guided, *unconditional = (x0.float() for x0 in predictions)
        return (guided, unconditional[0]) if cfg_pp else guided

    return drive(run, x, answer, lambda: s_noise * randn_like(x, generator))


def drive(run: Run, x: torch.Tensor, denoise: Denoise, noise: Noise | None = None) -> torch.Tensor:
    """Ask and advance until the run is done, in the precision of x; return the last state.

    ``denoise`` may return a pair for CFG++, the guided and the unconditional x0.
    """
    while not run.done:
        answer = denoise(x, run.sigma)
        if isinstance(answer, tuple):
            x, answer = cfg_pp_state(x, run.sigma, *answer), answer[0]
        x = advance(run, x, answer, noise)
    return x


def advance(run: Run, x: torch.Tensor, x0: torch.Tensor, noise: Noise | None = None) -> torch.Tensor:
    """Take the network's answer x0 about x at ``run.sigma``; return what to ask it about next, or the last state."""
    x = find_solver(run.solver).function(run, x, x0, noise or _no_noise)
    run.index += 1
    return x


def _no_noise() -> torch.Tensor:
    raise AssertionError("this run was started without a source of noise, and its solver draws some")


def start_run(solver: str | Solver, sigmas: Sequence[float], eta: float = 1.0, s_noise: float = 1.0) -> Run:
    """A run before its first evaluation; see ``protocol``.

    Raises:
        UserError: an unknown solver, eta or s_noise below 0 or not finite.
    """
    entry = find_solver(solver)
    for name, value in (("eta", eta), ("s_noise", s_noise)):
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name} must be a finite number >= 0, not {value}")
    return Run(solver, tuple(sigmas), eta, tuple(evaluation_sigmas(solver, sigmas, eta)), entry.evaluations)


def evaluation_sigmas(solver: str | Solver, sigmas: Sequence[float], eta: float = 1.0) -> list[float]:
    """The noise level of every network evaluation: once a step, or twice for two-evaluation solvers."""
    second_look, levels = find_solver(solver).second_look, []
    for start, end in itertools.pairwise(sigmas):
        levels.append(start)
        if second_look is not None and end > 0:
            levels.append(second_look(start, end, eta))
    return levels


def randn_like(x: torch.Tensor, generator: Generators = None) -> torch.Tensor:
    """Unit Gaussian noise like x (B, ...) on its device, drawn where the generator lives, per sample for a list."""
    if isinstance(generator, Sequence):
        return torch.cat([randn_like(row, g) for row, g in zip(x.split(1), generator, strict=True)])
    device = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    return send(noise, x.device)


def check_sigmas(sigmas: torch.Tensor | Sequence[float]) -> tuple[float, ...]:
    """Sigmas as floats.

    Raises:
        UserError: fewer than two, NaN, negative, not decreasing, infinite after the first.
    """
    values = tuple(float(s) for s in (sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas))
    if len(values) < 2:
        raise UserError(f"sigmas need at least two values, a beginning and an end, not {len(values)}")
    if any(math.isnan(s) for s in values):
        raise UserError("sigmas hold NaN")
    if any(math.isinf(s) for s in values[1:]):
        raise UserError("only the first sigma may be infinite")
    if any(after >= before for before, after in itertools.pairwise(values)):
        raise UserError("sigmas must decrease from each step to the next")
    if values[-1] < 0:
        raise UserError("sigmas must not be negative")
    return values


def check_timesteps(timesteps: torch.Tensor | Sequence[float], last: int) -> torch.Tensor:
    """Timesteps as float64 on the CPU.

    Raises:
        UserError: not decreasing, or outside [0, last].
    """
    timesteps = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
    if not ((timesteps >= 0) & (timesteps <= last)).all() or not (timesteps.diff() < 0).all():
        raise UserError(f"timesteps must decrease and lie in [0, {last}], not {timesteps.tolist()}")
    return timesteps


def check_generators(generator: Generators, x: torch.Tensor) -> None:
    """Raise unless a list of generators has one per sample."""
    if isinstance(generator, Sequence) and len(generator) != len(x):
        raise UserError(f"{len(generator)} generators for a batch of {len(x)}: give one per sample, or a single one")


def check_answer(answer: torch.Tensor, x: torch.Tensor) -> None:
    """Raise unless the answer has the shape and the device of the state."""
    if answer.shape != x.shape:
        raise UserError(f"the network returned shape {tuple(answer.shape)} for a state of shape {tuple(x.shape)}")
    if answer.device != x.device:
        raise UserError(f"the network's answer is on {answer.device}, the state on {x.device}")
