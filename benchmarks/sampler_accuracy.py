"""How far do samplers end from the exact answer?  Ours, diffusers' and ComfyUI's, on models known in closed form.

Every sampler is given the same noise and the same ideal v-prediction network of a zero-terminal-SNR model, and its
picture is compared with the one that the exact probability flow makes of that noise.  The problems:

    canvas       pictures of one brightness: channel mean -2.4 (black), brightness spread tau, white texture of std 0.6;
                 1 latent unit is 127.5 / 2.4 grey levels, so black is -2.4 and mid grey 0
    modes        independent Gaussians of 80 standard deviations from 0.1 (texture) to 128 (brightness of the canvas)
    black_white  nine black pictures to one white: the brightness of a 128 x 128 canvas, a mixture in one dimension
    mixture      5 to 16 separated modes in 192 dimensions, four kinds of them; and under guidance scale 5

    python benchmarks/sampler_accuracy.py --comfyui PATH

prints the tables and puts them into benchmarks/RESULTS.md, with a line for every target of the project.
"""

import datetime
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import diffusers
import numpy as np
import torch
from comfyui_peer import IdealNetwork, pack, save, unpack
from results import RESULTS, machine, markdown, write_section
from tqdm import tqdm

from ztsnr.diagnostics import reference_flow
from ztsnr.samplers import (
    DEFAULT_SOLVER,
    DEFAULT_SPACING,
    SOLVERS,
    SPACINGS,
    NoiseSchedule,
    ZTSNRScheduler,
    ZTSNRWarning,
    sample,
    step_schedule,
    to_denoised,
)

HEADING = "Sampler accuracy"
MEAN = -2.4  # latent channel mean of a black picture
LEVELS = 127.5 / 2.4  # grey levels (of 255) in a latent unit
TEXTURE = 0.6
CANVAS = 128  # latent side of a 1024 x 1024 picture
SEEDS = (31, 32, 33, 34, 35, 36, 37, 38)  # of the mixtures; the default solver was chosen on others
REFERENCE_STEPS = 400  # of the exact flow through a mixture
BIAS_STEPS = (10, 20, 28, 30, 35)
BIAS_TAUS = (0.0, 0.3, 1.0)
BIAS_WIDTHS = (64, 128, 256)

Arrays = dict[str, np.ndarray]
Answer = tuple[torch.Tensor, int]  # the picture, and how often the network was asked for it


# ----------------------------------------------------------------------------------------------------------------------
# Problems.


@dataclass
class Problem:
    """What a sampler is given, and how far its picture is from the exact one.

    Attributes:
        arrays: the model for ``comfyui_peer.ideal_model``, its ``dtype``, ``noise`` (B, C, H, W) and ``steps`` (n,).
        latent_size: (height, width) of the canvas that the problem stands for.
        score: picture (B, C, H, W) -> {name: number}.
    """

    arrays: Arrays
    latent_size: tuple[int, int]
    score: Callable[[torch.Tensor], dict[str, float]]

    @property
    def noise(self) -> torch.Tensor:
        return torch.from_numpy(self.arrays["noise"])

    @property
    def steps(self) -> list[int]:
        return self.arrays["steps"].tolist()


def canvas_problem(steps: Sequence[int], tau: float = 0.3, width: int = CANVAS, dtype: str = "float32") -> Problem:
    """A noise canvas and its negative, so that the offset of the map noise -> brightness is their pictures' average."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((1, 1, width, width))
    noise += 1 / width - noise.mean()  # an average of one standard deviation
    texture = torch.from_numpy(noise - noise.mean())

    def score(picture: torch.Tensor) -> dict[str, float]:
        plus, minus = picture.double()
        brightness = (plus.mean() - minus.mean()) / 2 * width  # of noise whose average is one standard deviation
        response = (texture[0] * (plus - minus) / 2).sum() / (texture**2).sum()
        return {
            "bias": ((plus.mean() + minus.mean()).item() / 2 - MEAN) * LEVELS,
            "gM": brightness.item() / (tau * width) if tau else math.nan,
            "gP": response.item() / TEXTURE,
        }

    arrays = {"kind": "canvas", "mean": MEAN, "brightness_std": tau, "texture_std": TEXTURE, "dtype": dtype}
    return _problem(arrays, np.concatenate([noise, -noise]), steps, (width, width), score)


def modes_problem(steps: Sequence[int]) -> Problem:
    """Gaussian modes between texture and the brightness of the canvas; worst relative error."""
    stds = np.geomspace(0.1, CANVAS, 80)

    def score(picture: torch.Tensor) -> dict[str, float]:
        return {"mode error": (picture.double() / torch.from_numpy(stds) - 1).abs().max().item()}

    return _problem({"kind": "modes", "stds": stds}, np.ones((1, 1, 1, 80)), steps, (CANVAS, CANVAS), score)


def black_white_problem(steps: Sequence[int], tau: float, points: int = 4000) -> Problem:
    """Share of noise that becomes black where nine pictures in ten are.

    The coordinate is brightness times the canvas length, for which the noise is a unit Gaussian: its quantiles.
    """
    means = np.array([MEAN, -MEAN]) * CANVAS
    stds = np.full(2, max(tau * CANVAS, TEXTURE))
    quantiles = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    noise = torch.special.ndtri(quantiles).numpy()

    def score(picture: torch.Tensor) -> dict[str, float]:
        return {"P(black)": (picture < 0).double().mean().item() if picture.isfinite().all() else math.nan}

    arrays = {"kind": "mixture", "means": means.reshape(2, 1, 1, 1), "weights": np.array([0.9, 0.1]), "stds": stds}
    return _problem(arrays, noise.reshape(-1, 1, 1, 1), steps, (CANVAS, CANVAS), score)


def draw_mixture(kind: int, seed: int) -> Arrays:
    """One of the four kinds of mixtures, modes (K, 3, 8, 8)."""
    rng = np.random.default_rng([seed, kind])
    count = (5, 8, 16, 12)[kind]
    if kind == 3:  # solid colours
        means = rng.uniform(-1, 1, (count, 3, 1, 1)) + 0.2 * rng.standard_normal((count, 3, 8, 8))
    else:
        means = (1, 0.5, 1)[kind] * rng.standard_normal((count, 3, 8, 8))
    weights = rng.dirichlet(np.full(count, 3.0)) if kind in (1, 2) else np.full(count, 1 / count)
    return {"kind": "mixture", "means": means, "weights": weights, "stds": np.full(count, (0.1, 0.2, 0.05, 0.1)[kind])}


def mixture_problem(
    steps: Sequence[int], kind: int, seed: int, samples: int, guidance: float = 1.0
) -> tuple[Problem, float]:
    """RMSE per value to the exact flow, and how well that flow is known.

    Returns:
        the problem, and the RMSE between the reference (``reference_flow``, Runge-Kutta of order 4 in the angle,
        float64) and one with half as many steps; the error of the reference itself is about a 16th of that.
    """
    noise = np.random.default_rng([seed, kind, 1]).standard_normal((samples, 3, 8, 8))
    problem = _problem(draw_mixture(kind, seed) | {"guidance": guidance}, noise, steps, (8, 8), score=None)
    denoise, start = IdealNetwork(problem.arrays).denoise, problem.noise.double()
    exact = reference_flow(denoise, start, REFERENCE_STEPS)
    column = "RMSE" if guidance == 1 else "guided RMSE"
    problem.score = lambda picture: {column: _rmse(picture, exact)}
    return problem, _rmse(reference_flow(denoise, start, REFERENCE_STEPS // 2), exact)


def _problem(
    arrays: Mapping[str, object], noise: np.ndarray, steps: Sequence[int], latent_size: tuple[int, int], score: Callable
) -> Problem:
    given = {"dtype": "float32", "guidance": 1.0} | dict(arrays) | {"steps": list(steps)}
    return Problem({key: np.asarray(v) for key, v in given.items()} | {"noise": np.float32(noise)}, latent_size, score)


def _rmse(picture: torch.Tensor, exact: torch.Tensor) -> float:
    return (picture.double() - exact).square().mean().sqrt().item()


# ----------------------------------------------------------------------------------------------------------------------
# Samplers.


@dataclass
class Row:
    """A sampler, and what it was measured to do.

    Attributes:
        run: (problem name, problem, steps) -> answer.
        scores: (name of the problem, name of the score, steps) -> number.
        calls: steps -> network evaluations.
    """

    program: str
    solver: str
    spacing: str
    run: Callable[[str, Problem, int], Answer]
    scores: dict[tuple[str, str, int], float] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.program} {self.solver} / {self.spacing}"

    def measure(self, problems: Mapping[str, Problem]) -> "Row":
        for name, problem in problems.items():
            for steps in problem.steps:
                picture, self.calls[steps] = self.run(name, problem, steps)
                self.scores |= {(name, key, steps): value for key, value in problem.score(picture).items()}
        return self

    def over(self, problem: str, score: str, steps: int) -> np.ndarray:
        """The scores on the problem of this name, or on all whose name continues it after a space."""
        found = [
            v for (p, s, n), v in self.scores.items() if f"{p} ".startswith(f"{problem} ") and (s, n) == (score, steps)
        ]
        return np.array(found or [math.nan])

    def mean(self, problem: str, score: str, steps: int) -> float:
        return self.over(problem, score, steps).mean().item()


def run_ours(problem: Problem, steps: int, solver: str = DEFAULT_SOLVER, spacing: str = DEFAULT_SPACING) -> Answer:
    """``sample``: float32 state whatever the network's dtype."""
    schedule, network = NoiseSchedule.sdxl(), IdealNetwork(problem.arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZTSNRWarning)  # ``leading`` warns, rightly
        guidance = float(problem.arrays["guidance"])  # as the doors that know it tell it
        sigmas = step_schedule(schedule, steps, spacing, latent_size=problem.latent_size, guidance=guidance)

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return to_denoised(network(x, schedule.timestep(sigma)), x, sigma)

    return sample(denoise, problem.noise, sigmas, solver), network.calls


def run_diffusers(problem: Problem, steps: int, scheduler, schedule: NoiseSchedule | None = None) -> Answer:
    """The loop of a diffusers pipeline; latents have the network's dtype there."""
    network = IdealNetwork(problem.arrays, schedule)
    if isinstance(scheduler, ZTSNRScheduler):
        guidance = float(problem.arrays["guidance"])
        scheduler.set_timesteps(steps, latent_size=problem.latent_size, guidance=guidance)
    else:
        scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # DDIM keeps no index
        scheduler.set_begin_index(0)
    x = problem.noise.to(network.dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x.float(), network.calls


def is_deterministic(solver: str) -> bool:
    """True if two generators lead the solver to one result."""
    sigmas = step_schedule(NoiseSchedule.sdxl(), 4, latent_size=(8, 8))
    pictures = [
        sample(
            lambda x, _: 0.5 * x, torch.ones(1, 1, 8, 8), sigmas, solver, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 1)
    ]
    return torch.equal(*pictures)


def our_rows() -> list[Row]:
    """Every deterministic solver with the default spacing; the default one with every spacing, and in diffusers."""

    def row(solver: str, spacing: str) -> Row:
        return Row("ztsnr", solver, spacing, lambda _, problem, steps: run_ours(problem, steps, solver, spacing))

    rows = [row(solver, DEFAULT_SPACING) for solver in SOLVERS if is_deterministic(solver)]
    rows += [row(DEFAULT_SOLVER, spacing) for spacing in SPACINGS if spacing != DEFAULT_SPACING]
    door = Row("ztsnr", "ZTSNRScheduler", "defaults", lambda _, p, steps: run_diffusers(p, steps, ZTSNRScheduler()))
    return [*rows, door]


_SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
_EULER, _DDIM = diffusers.EulerDiscreteScheduler, diffusers.DDIMScheduler
_DPMPP_2M, _UNIPC = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler
_SPACED = {spacing: {"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")}
_SIGMAS = {  # with the range of ``trailing``: Euler takes it from there, the others use the whole schedule anyway
    spacing: {"timestep_spacing": "trailing", f"use_{spacing}_sigmas": True}
    for spacing in ("karras", "exponential", "beta")
}


def diffusers_rows() -> list[Row]:
    """Euler, DDIM, DPM-Solver++(2M) and UniPC (order 2, bh2) with all their spacings, zero-SNR; and plain SDXL."""

    def row(name: str, scheduler_class: type, spacing: str, options: dict, zero_terminal_snr: bool = True) -> Row:
        schedule = NoiseSchedule.sdxl(zero_terminal_snr)
        config = _SDXL | {"steps_offset": 1, "rescale_betas_zero_snr": zero_terminal_snr} | options
        if scheduler_class is _DDIM:
            config |= {"clip_sample": False, "set_alpha_to_one": False}  # as in Stable Diffusion's configs

        def run(_: str, problem: Problem, steps: int) -> Answer:
            return run_diffusers(problem, steps, scheduler_class(**config), schedule)

        return Row("diffusers", name, spacing, run)

    rows = [row("Euler, plain SDXL from 14.6", _EULER, "trailing", _SPACED["trailing"], zero_terminal_snr=False)]
    rows += [row("Euler", _EULER, spacing, options) for spacing, options in (_SPACED | _SIGMAS).items()]
    rows += [row("DDIM", _DDIM, spacing, options) for spacing, options in _SPACED.items()]
    lu = {"lu_lambdas": {"timestep_spacing": "trailing", "use_lu_lambdas": True}}
    rows += [row("DPM++ 2M", _DPMPP_2M, spacing, options) for spacing, options in (_SPACED | _SIGMAS | lu).items()]
    rows += [row("UniPC", _UNIPC, spacing, options) for spacing, options in (_SPACED | _SIGMAS).items()]
    return rows


def comfyui_rows(comfyui: Path, problems: Mapping[str, Problem]) -> Iterator[Row]:
    """ComfyUI's euler and dpmpp_2m with every scheduler it has, from a worker in its own Python, as they are ready.

    Raises:
        click.ClickException: the worker failed; its last words are in the message.
    """
    own_python = comfyui / ".venv" / "bin" / "python"
    worker = Path(__file__).with_name("comfyui_peer.py")
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder)
        save(exchange / "problems.npz", pack({name: problem.arrays for name, problem in problems.items()}))
        command = [own_python if own_python.exists() else sys.executable, worker, comfyui.resolve(), exchange]
        with (
            open(exchange / "log", "wb") as log,
            subprocess.Popen(
                [os.fspath(part) for part in command],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            ) as process,
        ):
            try:
                while True:
                    finished = process.poll() is not None  # asked first, so that no row is missed
                    for path in sorted(exchange.glob("row_*.npz")):
                        yield _comfyui_row(path)
                        path.unlink()
                    if finished:
                        break
                    time.sleep(0.1)
            finally:
                process.kill()
        if process.returncode:
            last_words = (exchange / "log").read_text(errors="replace")[-2000:]
            raise click.ClickException(f"the ComfyUI worker failed (exit {process.returncode}):\n{last_words}")


def _comfyui_row(path: Path) -> Row:
    with np.load(path) as file:
        answers = unpack(file)
    sampler, scheduler = answers["about"]["row"].tolist()

    def run(name: str, problem: Problem, steps: int) -> Answer:
        return torch.from_numpy(answers[name][f"{steps}"]), answers[name][f"{steps} calls"].item()

    return Row("ComfyUI", sampler, scheduler, run)


# ----------------------------------------------------------------------------------------------------------------------
# Cost.


def cost_per_step(repeats: int = 41, steps: int = 20, shape: tuple[int, ...] = (4, 4, 128, 128)) -> dict[str, list]:
    """Milliseconds a step spends outside the network, one number a repeat; the samplers take turns.

    The network returns a stored v.  Schedules are chosen beforehand.
    """
    torch.manual_seed(0)
    noise, v = torch.randn(2, *shape)
    sigmas = step_schedule(NoiseSchedule.sdxl(), steps, latent_size=shape[-2:])

    def ours() -> torch.Tensor:
        return sample(lambda x, sigma: to_denoised(v, x, sigma), noise, sigmas)

    def pipeline(scheduler) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            scheduler.set_begin_index(0)
            x = noise * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                scheduler.scale_model_input(x, t)
                x = scheduler.step(v, t, x, return_dict=False)[0]
            return x

        return run

    config = _SDXL | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedulers = {
        "ztsnr ZTSNRScheduler": ZTSNRScheduler(),
        "diffusers DPM++ 2M": _DPMPP_2M(**config),
        "diffusers UniPC": _UNIPC(**config),
        "diffusers Euler": _EULER(**config),
    }
    runs = {"ztsnr sample": ours} | {name: pipeline(scheduler) for name, scheduler in schedulers.items()}
    times = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if name in schedulers:
                schedulers[name].set_timesteps(steps)  # clears the history of the last run
            start = time.perf_counter()
            run()
            if repeat:  # the first one warms up
                times[name].append((time.perf_counter() - start) / steps * 1e3)
    return times


# ----------------------------------------------------------------------------------------------------------------------
# Tables.


def brightness_table(rows: Sequence[Row], steps: Sequence[int]) -> list[list[str]]:
    last = max(steps)
    header = ["program", "solver", "spacing", f"evals {last}", *(f"bias {n}" for n in steps), f"bias {last} bf16"]
    header += [f"gM {last}", f"gP {last}", *(f"modes {n}" for n in steps)]
    header += [f"P(black) τ={tau}, {n}" for tau in (0, 0.3) for n in steps]
    table = [header]
    for row in rows:
        cells = [signed(row.mean("canvas", "bias", n)) for n in steps]
        cells += [signed(row.mean("bf16 canvas", "bias", last))]
        cells += [f"{row.mean('canvas', score, last):.3f}" for score in ("gM", "gP")]
        cells += [percent(row.mean("modes", "mode error", n)) for n in steps]
        cells += [percent(row.mean(f"black_white {tau}", "P(black)", n)) for tau in (0, 0.3) for n in steps]
        table.append([row.program, row.solver, row.spacing, str(row.calls[last]), *cells])
    return table


def mixture_table(rows: Sequence[Row], steps: Sequence[int]) -> list[list[str]]:
    columns = [("mixture", "RMSE", n) for n in steps] + [("guided", "guided RMSE", n) for n in steps]
    table = [["program", "solver", "spacing", *(f"{score} {n}" for _, score, n in columns)]]
    for row in rows:
        cells = []
        for column in columns:
            values = row.over(*column)
            mean, error = values.mean(), standard_error(values)
            cells.append(f"{mean:.4f} ± {error:.4f}" if not mean > 1e3 else f"{mean:.1e} ± {error:.1e}")
        table.append([row.program, row.solver, row.spacing, *cells])
    return table


@dataclass
class WorstBias:
    """The largest |bias| of a solver over steps, brightness spreads and canvas widths, in levels, and where it was."""

    solver: str
    dtype: str
    levels: float
    steps: int
    tau: float
    width: int

    def __str__(self) -> str:
        return f"{self.levels:.4f} ({self.steps} steps, τ={self.tau:g}, {self.width} wide)"


def worst_biases(
    solvers: Iterable[str], dtype: str, steps: Sequence[int], taus: Sequence[float], widths: Sequence[int]
) -> list[WorstBias]:
    """The mean bias of our solvers with the default spacing, at its worst."""
    problems = {(tau, width): canvas_problem(steps, tau, width, dtype) for tau in taus for width in widths}
    worst = []
    for solver in solvers:
        found = []
        for (tau, width), problem in problems.items():
            for n in steps:
                bias = problem.score(run_ours(problem, n, solver)[0])["bias"]
                found.append(WorstBias(solver, dtype, abs(bias), n, tau, width))
        worst.append(max(found, key=lambda w: math.inf if math.isnan(w.levels) else w.levels))
    return worst


def bias_table(worst: Sequence[WorstBias]) -> list[list[str]]:
    by_solver = {}
    for found in worst:
        by_solver.setdefault(found.solver, {})[found.dtype] = str(found)
    dtypes = list(dict.fromkeys(found.dtype for found in worst))
    return [
        ["solver", *(f"worst bias, {dtype} network" for dtype in dtypes)],
        *([solver, *(cells[dtype] for dtype in dtypes)] for solver, cells in by_solver.items()),
    ]


def cost_table(times: Mapping[str, list[float]]) -> list[list[str]]:
    table = [["sampler", "ms a step, median", "10 % to 90 %"]]
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10)
        table.append([name, f"{statistics.median(values):.3f}", f"{deciles[0]:.3f} to {deciles[-1]:.3f}"])
    return table


def standard_error(values: np.ndarray) -> float:
    return values.std(ddof=1).item() / math.sqrt(len(values))


def signed(levels: float) -> str:
    return f"{round(levels, 2) + 0.0:+.2f}"


def percent(share: float) -> str:
    return f"{share:.2%}" if not share > 10 else f"{share:.1e}"


# ----------------------------------------------------------------------------------------------------------------------
# Targets.


def targets(
    rows: Sequence[Row], steps: Sequence[int], worst: Sequence[WorstBias], times: Mapping[str, list[float]]
) -> list[list[str]]:
    """What the project promised, what was measured, and whether that is enough."""
    table = [["target", "measured", "verdict"]]

    def check(target: str, measured: float, limit: float, text: str) -> None:
        table.append([target, text, "reached" if measured <= limit else "not reached"])  # NaN has reached nothing

    for dtype, limit in (("float32", 0.05), ("bfloat16", 0.6)):
        found = max((w for w in worst if w.dtype == dtype), key=lambda w: w.levels)
        text = f"{found.solver}: {found}"
        check(f"bias of every deterministic solver ≤ {limit}/255, {dtype} network", found.levels, limit, text)

    default = next(row for row in rows if (row.solver, row.spacing) == (DEFAULT_SOLVER, DEFAULT_SPACING))
    if 20 in steps:
        modes = default.mean("modes", "mode error", 20)
        check("default, 20 steps: every Gaussian mode within 2 %", modes, 0.02, percent(modes))
        for tau in (0, 0.3):
            black = default.mean(f"black_white {tau}", "P(black)", 20)
            check(f"default, 20 steps: P(black) within 0.01 of 0.90, τ={tau}", abs(black - 0.9), 0.01, f"{black:.4f}")

        peers = [row for row in rows if row.program != default.program]
        best = min(peers, key=lambda row: np.nan_to_num(row.mean("mixture", "RMSE", 20), nan=math.inf))
        rmse_best = best.over("mixture", "RMSE", 20)
        for n, share in ((20, 0.5), (10, 1)):
            if n in steps:
                rmse = default.over("mixture", "RMSE", n)
                excess = rmse - share * rmse_best  # of each mixture: which one it is matters more than the sampler
                text = (
                    f"{rmse.mean():.4f}, {rmse.mean() / rmse_best.mean():.3f} of {rmse_best.mean():.4f} ({best.name})"
                )
                text += f"; mixture by mixture {excess.mean():+.4f} ± {standard_error(excess):.4f} from the target"
                target = f"default, {n} steps: mixture RMSE ≤ {'half of ' * (share < 1)}the best peer's at 20"
                check(target, rmse.mean(), share * rmse_best.mean(), text)
        if 10 in steps:
            modes, limit = (row.mean("modes", "mode error", n) for row, n in ((default, 10), (best, 20)))
            text = f"{percent(modes)}, {percent(limit)} ({best.name})"
            check("default, 10 steps: worst Gaussian mode ≤ that of the same peer at 20", modes, limit, text)
            for tau in (0, 0.3):
                black, limit = (row.mean(f"black_white {tau}", "P(black)", n) for row, n in ((default, 10), (best, 20)))
                target = f"default, 10 steps: P(black) as near to 0.90 as the same peer's at 20, τ={tau}"
                check(target, abs(black - 0.9), abs(limit - 0.9), f"{black:.4f}, {limit:.4f} ({best.name})")

    medians = {name: statistics.median(values) for name, values in times.items()}
    limit = medians["diffusers DPM++ 2M"]
    for name in ("ztsnr sample", "ztsnr ZTSNRScheduler"):
        text = f"{medians[name]:.3f} ms, {medians[name] / limit:.2f} of {limit:.3f} ms"
        check(f"cost a step of {name} ≤ diffusers' DPM++ 2M", medians[name], limit, text)
    return table


# ----------------------------------------------------------------------------------------------------------------------
# The report.


EXPLANATIONS = {
    "brightness": """\
Numbers in the heads are steps; `evals` is how often the network is called at the last of them. `bias`: by how many of
255 levels the average brightness of a black canvas (128 x 128 latent, τ = 0.3) is pulled toward grey, exact 0; `bf16`
with a network of that dtype, and in diffusers' own schedulers, as in its pipelines, latents of that dtype. `gM`, `gP`:
response of the canvas's brightness and of its texture to the noise over the exact one, exact 1. `modes`: worst error of
80 Gaussian modes with standard deviations from 0.1 to 128. `P(black)`: share of black pictures, exact 90 %, where the
brightness of black and white pictures spreads by τ.""",
    "mixtures": """\
RMSE per value to the exact flow from the same noise, over {count} mixtures (four kinds, seeds {seeds}), {samples}
samples each: mean ± standard error over the mixtures. `guided`: classifier-free guidance of scale 5 toward the first
two modes. The exact flow is RK4 in the angle; halving its number of steps moves it by at most {check:.1e} (guided
{guided_check:.1e}).""",
    "bias": """\
Worst |bias| in levels of our deterministic solvers with the default spacing, over {steps} steps, τ = {taus}, latents
{widths} wide.""",
    "cost": """\
Outside the network, float32 latent (4, 4, 128, 128), 20 steps, the samplers taking turns. A step of the default is
60 operations: six passes over the latent for the weighted sum, two for x0, two reductions to coarse blocks, and
small ones on inner products. What was tried to make it cheaper: batch-last inner products with the constants in the
tables (110 operations before; a fifth less time), one matrix product over a ring buffer instead of the passes (no
faster, and autocast would round it), and the blocks by pooling, convolution, matrix products or strided sums (all
slower than two sums).""",
}


def parse_steps(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        steps = tuple(sorted({int(part) for part in value.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 10,20") from None
    if steps[0] < 2:
        raise click.BadParameter("at least 2 steps: the history of a multistep solver begins with the second")
    return steps


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--comfyui",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="PATH",
    help="A ComfyUI folder whose samplers to measure too, run by the Python of its .venv if it has one.",
)
@click.option("--samples", type=click.IntRange(2), default=400, show_default=True, help="Samples from each mixture.")
@click.option("--steps", default="10,20", show_default=True, callback=parse_steps, help="Numbers of steps.")
@click.option("--write/--no-write", default=True, show_default=True, help="Put the tables into RESULTS.md.")
def main(comfyui: Path | None, samples: int, steps: tuple[int, ...], write: bool) -> None:
    """Measure how far samplers end from the exact answer, on models known in closed form."""
    began = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: more threads are slower
    with torch.inference_mode():
        problems = {
            "canvas": canvas_problem(steps),
            "bf16 canvas": canvas_problem([max(steps)], dtype="bfloat16"),
            "modes": modes_problem(steps),
            "black_white 0": black_white_problem(steps, 0.0),
            "black_white 0.3": black_white_problem(steps, 0.3),
        }
        checks = {"mixture": [], "guided": []}
        draws = [(kind, seed) for kind in range(4) for seed in SEEDS]
        for kind, seed in tqdm(draws, desc="exact flows", leave=False):
            for name, guidance in (("mixture", 1.0), ("guided", 5.0)):
                problem, check = mixture_problem(steps, kind, seed, samples, guidance)
                problems[f"{name} {kind} {seed}"] = problem
                checks[name].append(check)

        rows = [row.measure(problems) for row in tqdm(our_rows() + diffusers_rows(), desc="samplers", leave=False)]
        if comfyui is not None:
            arriving = tqdm(comfyui_rows(comfyui, problems), desc="ComfyUI", leave=False)
            rows += [row.measure(problems) for row in arriving]
        solvers = [solver for solver in SOLVERS if is_deterministic(solver)]
        lists = {"steps": BIAS_STEPS, "taus": BIAS_TAUS, "widths": BIAS_WIDTHS}
        worst = [bias for dtype in ("float32", "bfloat16") for bias in worst_biases(solvers, dtype, **lists)]
        torch.set_num_threads(threads)
        times = cost_per_step()

    command = f"python benchmarks/{Path(__file__).name}{' --comfyui PATH' if comfyui else ''}"
    command += f" --samples {samples} --steps {','.join(map(str, steps))}"
    seconds = time.perf_counter() - began
    text = "\n\n".join(
        [
            f"`{command}`, {datetime.date.today().isoformat()}, {seconds:.0f} s.\n{machine(comfyui)}.",
            "### Targets",
            markdown(targets(rows, steps, worst, times)),
            "### Brightness, texture and modes",
            EXPLANATIONS["brightness"],
            markdown(brightness_table(rows, steps)),
            "### Mixtures",
            EXPLANATIONS["mixtures"].format(
                count=len(draws),
                seeds=", ".join(map(str, SEEDS)),
                samples=samples,
                check=max(checks["mixture"]),
                guided_check=max(checks["guided"]),
            ),
            markdown(mixture_table(rows, steps)),
            "### Bias of our solvers",
            EXPLANATIONS["bias"].format(**{key: ", ".join(f"{v:g}" for v in value) for key, value in lists.items()}),
            markdown(bias_table(worst)),
            "### Cost",
            EXPLANATIONS["cost"],
            markdown(cost_table(times)),
        ]
    )
    click.echo(text)
    if write:
        write_section(RESULTS, HEADING, text)


if __name__ == "__main__":
    main()
