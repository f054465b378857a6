"""Why the default solver and spacing are what they are: everything that was tried, in one table.

A multistep solver is an interpolation of x0 through its last values, a number of values, and a corrector or none; the
default one chooses the number by itself.  All candidates are run on three kinds of models: Gaussian modes from 0.1 to
the canvas length (128), the mixtures of ``sampler_accuracy`` on an 8 x 8 canvas, and the same mixtures under guidance
5.  The seeds are others than those that ``sampler_accuracy`` reports.

    python benchmarks/default_solver.py
"""

import datetime
import math
from collections.abc import Callable
from functools import partial

import click
import numpy as np
import torch
from comfyui_peer import IdealNetwork
from results import RESULTS, machine, markdown, write_section
from sampler_accuracy import CANVAS, mixture_problem, modes_problem
from tqdm import tqdm

from ztsnr.samplers import NoiseSchedule, step_schedule
from ztsnr.samplers.flow_solvers import angle_weights, dpmpp_2m_weights, unipc_weights
from ztsnr.samplers.multistep import (
    Coordinate,
    Weights,
    angle,
    integral_weights,
    inverse_sigmas,
    noise_ratios,
    predict_and_correct,
    predictor,
)
from ztsnr.samplers.sampling import drive, start_run
from ztsnr.samplers.spectral import mode_errors, spectral_weights

SEEDS = (1, 2, 3)
SCHEDULE = NoiseSchedule.sdxl()
Rule = Callable[[np.ndarray], Weights]


def bounded_log_sigma(sigmas: np.ndarray) -> Coordinate:
    """log sigma between the largest and smallest finite sigma, levelling off beyond: finite at infinity and at 0."""
    finite = sigmas[np.isfinite(sigmas) & (sigmas > 0)]
    largest, smallest = finite.max(), finite.min()

    def coordinate(u: np.ndarray) -> np.ndarray:
        at_zero = np.isinf(u)
        u = np.where(at_zero, 1.0, u)
        return np.where(at_zero, np.log(smallest), 0.5 * np.log1p((smallest * u) ** 2) - np.log(u + 1 / largest))

    return coordinate


def polynomial(sigmas: np.ndarray, order: int, coordinate: Coordinate | None = None, correct: bool = True) -> Weights:
    """x0 a polynomial through its last ``order`` values; in the bounded log sigma if no coordinate is given."""
    u, coordinate = inverse_sigmas(sigmas), coordinate or bounded_log_sigma(sigmas)
    predict = predictor(u, order, coordinate)
    if not correct:
        return predict
    corrections = [
        integral_weights(u[max(i - order + 2, 0) : i + 2][::-1], u[i], u[i + 1], coordinate) for i in range(len(u) - 2)
    ]
    return predict_and_correct(noise_ratios(sigmas), predict, corrections)


def tuned_to_modes(rule: Rule, steps: int, side: int) -> np.ndarray:
    """Every sigma chosen freely to minimise the mode errors, from the spectral spacing down the gradient."""
    from scipy.optimize import least_squares

    modes = np.geomspace(0.1, side, 60)
    start = np.log(step_schedule(SCHEDULE, steps, latent_size=(side, side)).numpy()[1:-1])

    def sigmas(x: np.ndarray) -> np.ndarray:
        return np.concatenate([[math.inf], np.exp(x[0] - np.concatenate([[0], np.cumsum(np.exp(x[1:]))])), [0.0]])

    def errors(x: np.ndarray) -> np.ndarray:
        return mode_errors(sigmas(x), rule(sigmas(x)), modes)

    return sigmas(least_squares(errors, np.concatenate([start[:1], np.log(-np.diff(start))]), max_nfev=30).x)


DEFAULT = "span of modes, 4 or 2 values, corrected (`spectral`)"
SOLVERS: dict[str, Rule] = {
    DEFAULT: spectral_weights,  # of which ``solve`` runs the real thing
    "span of modes, 4 values, corrected": spectral_weights,
    "span of modes, 3 values, corrected": partial(spectral_weights, memory=3),
    "span of modes, 2 values, corrected": partial(spectral_weights, memory=2),
    "polynomial in log sigma, 4 values, corrected": partial(polynomial, order=4),
    "polynomial in log sigma, 3 values, corrected": partial(polynomial, order=3),
    "polynomial in log sigma, 2 values, corrected": partial(polynomial, order=2),
    "polynomial in log sigma, 3 values": partial(polynomial, order=3, correct=False),
    "polynomial in the angle, 3 values, corrected": partial(polynomial, order=3, coordinate=angle),
    "polynomial in the angle, 2 values": partial(polynomial, order=2, coordinate=angle, correct=False),
    "the same, its slope carried no further than measured (`angle`)": angle_weights,
    "UniPC, order 2 (`unipc`)": unipc_weights,
    "DPM-Solver++ 2M (`dpmpp_2m`)": dpmpp_2m_weights,
}
SPACINGS: dict[str, Callable[[Rule, int, int], np.ndarray]] = {
    "even in log sigma (`spectral`)": lambda rule, n, side: step_schedule(
        SCHEDULE, n, latent_size=(side, side)
    ).numpy(),
    "`karras` from the canvas length": lambda rule, n, side: step_schedule(
        SCHEDULE, n, "karras", latent_size=(side, side)
    ).numpy(),
    "`trailing`": lambda rule, n, side: step_schedule(SCHEDULE, n, "trailing").numpy(),
    "free sigmas tuned to the modes": tuned_to_modes,
}


def solve(solver: str, sigmas: np.ndarray, denoise: Callable, noise: torch.Tensor) -> torch.Tensor:
    """Run a table of weights, or the default solver, in float64; ``denoise`` and ``noise`` as for ``sample``."""
    if solver == DEFAULT:
        return drive(start_run("spectral", sigmas.tolist()), noise, denoise)
    x, history = noise, []
    for sigma, ratio, weights in zip(sigmas, noise_ratios(sigmas), SOLVERS[solver](sigmas), strict=False):
        history = [denoise(x, float(sigma)), *history[:7]]
        x = ratio * x + sum(w * x0 for w, x0 in zip(weights.tolist(), history, strict=False))
    return x


def rows(steps: int, samples: int) -> list[list[str]]:
    problems = {
        guidance: [mixture_problem([steps], kind, seed, samples, guidance)[0] for kind in range(4) for seed in SEEDS]
        for guidance in (1.0, 5.0)
    }
    table = []
    combinations = [(solver, "even in log sigma (`spectral`)") for solver in SOLVERS]
    combinations += [(DEFAULT, spacing) for spacing in list(SPACINGS)[1:]]
    combinations += [("DPM-Solver++ 2M (`dpmpp_2m`)", "free sigmas tuned to the modes")]
    for solver, spacing in tqdm(combinations, leave=False, desc=f"{steps} steps"):
        rule = SOLVERS[solver]
        modes = modes_problem([steps])
        picture = solve(
            solver, SPACINGS[spacing](rule, steps, CANVAS), IdealNetwork(modes.arrays).denoise, modes.noise.double()
        )
        row = [solver, spacing, *(f"{error:.1%}" for error in modes.score(picture).values())]
        sigmas = SPACINGS[spacing](rule, steps, 8)
        for guidance in problems:
            errors = []
            for problem in problems[guidance]:
                denoise = IdealNetwork(problem.arrays).denoise
                picture = solve(solver, sigmas, denoise, problem.noise.double())
                errors += problem.score(picture).values()
            row.append(f"{np.mean(errors):.4f}")
        table.append(row)
    return table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--samples", type=click.IntRange(2), default=400, show_default=True, help="Samples from each mixture.")
@click.option("--write/--no-write", default=True, show_default=True, help="Put the tables into RESULTS.md.")
def main(samples: int, write: bool) -> None:
    """Compare the default solver and spacing with what else was tried."""
    parts = [
        f"`python benchmarks/default_solver.py --samples {samples}`, {datetime.date.today().isoformat()}.\n"
        f"{machine(None)}.",
        f"Worst error of the Gaussian modes from 0.1 to {CANVAS}; RMSE to the exact flow over 12 mixtures on an 8 x 8 "
        f"canvas, and under guidance 5 (seeds {', '.join(map(str, SEEDS))}).",
    ]
    with torch.inference_mode():
        for steps in (10, 20):
            head = ["interpolation of x0", "spacing", "worst mode", "mixture RMSE", "guided RMSE"]
            parts += [f"### {steps} steps", markdown([head, *rows(steps, samples)])]
    text = "\n\n".join(parts)
    click.echo(text)
    if write:
        write_section(RESULTS, "Choice of the default solver", text)


if __name__ == "__main__":
    main()
