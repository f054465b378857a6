"""How far do samplers end from the exact answer under guidance, on a real canvas?  Ours, ComfyUI's and diffusers'.

Every solver and spacing gets the same noise and the same ideal model (``guided_problems``), and its pictures are
compared with those of the exact guided flow.

    python benchmarks/guided_accuracy.py [--comfyui PATH] [--cfg 1,3,5,5r,7.5] [--steps 8,10,14,20,28] [--write]

prints, for every guidance and number of steps, the most accurate pairs and where the default stands among all.
"""

import csv
import datetime
import importlib.util
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click
import diffusers
import torch
from comfyui_peer import pack, save
from guided_peer import SPACINGS, Pair, Record, find_res4lyf, latents
from guided_problems import REFERENCE_STEPS, Guidance, GuidedProblem, problems
from results import RESULTS, machine, markdown, write_section
from sampler_accuracy import is_deterministic, parse_steps
from tqdm import tqdm

from ztsnr.diagnostics import v_network
from ztsnr.samplers import DEFAULT_SOLVER, DEFAULT_SPACING, SOLVERS, NoiseSchedule, sample, step_schedule
from ztsnr.samplers.sampling import Denoise

HEADING = "Guidance: accuracy at canvas scale"
BEST = 10  # rows of a table
RESCALE = 0.7
SCORES = ("error", "off", "brightness", "median")
SCHEDULE = NoiseSchedule.sdxl()
RANGES = ("karras", "exponential", "kl_optimal")  # spacings that both have and that start where they like


# ----------------------------------------------------------------------------------------------------------------------
# This package.


def our_pairs() -> list[Pair]:
    """The default, told the guidance scale and not told, and every deterministic solver with every spacing."""

    def pair(solver: str, spacing: str, told: bool = False) -> Pair:
        def run(problem: GuidedProblem, guidance: Guidance, denoise: Denoise, steps: int) -> torch.Tensor:
            known = {"guidance": guidance.scale} if told else {}
            sigmas = step_schedule(SCHEDULE, steps, spacing, latent_size=problem.latent_size, **known)
            return sample(denoise, latents(problem), sigmas, solver)

        return Pair("ztsnr", solver, f"{spacing}, told the scale" if told else spacing, run)

    pairs = [pair(solver, spacing) for solver in SOLVERS if is_deterministic(solver) for spacing in SPACINGS]
    if "guidance" in inspect.signature(step_schedule).parameters:
        pairs.append(pair(DEFAULT_SOLVER, DEFAULT_SPACING, told=True))
    return sorted(pairs, key=lambda pair: not is_default(vars(pair)))


def is_default(about: Mapping) -> bool:
    """True for a row of the default solver on the default spacing."""
    spacing = about["spacing"].partition(",")[0]
    return (about["program"], about["solver"], spacing) == ("ztsnr", DEFAULT_SOLVER, DEFAULT_SPACING)


# ----------------------------------------------------------------------------------------------------------------------
# diffusers.

_TRAILING = {"timestep_spacing": "trailing"}  # the range of the others' sigmas
_SPACED = {spacing: {"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")}
_ALL = _SPACED | {name: _TRAILING | {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}
_LU = {"lu_lambdas": _TRAILING | {"use_lu_lambdas": True}}
_DPMPP, _UNIPC = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler


def diffusers_pairs() -> list[Pair]:
    """The deterministic schedulers that take ``rescale_betas_zero_snr``, with every spacing that they have."""
    common = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    common |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    ddim = {"clip_sample": False, "set_alpha_to_one": False}  # as in Stable Diffusion's configs

    def pair(name: str, scheduler_class: type, own: Mapping, spacing: str, options: Mapping) -> Pair:
        def run(problem: GuidedProblem, guidance: Guidance, denoise: Denoise, steps: int) -> torch.Tensor:
            return run_diffusers(scheduler_class(**common, **own, **options), problem, denoise, steps)

        return Pair("diffusers", name, spacing, run)

    schedulers = [
        ("Euler", diffusers.EulerDiscreteScheduler, {}, _ALL),
        ("DDIM", diffusers.DDIMScheduler, ddim, _SPACED),
        ("DPM++ 2M", _DPMPP, {}, _ALL | _LU),
        ("DPM++ 3M", _DPMPP, {"solver_order": 3}, _ALL | _LU),
        ("UniPC", _UNIPC, {}, _ALL),
        ("UniPC, order 3", _UNIPC, {"solver_order": 3}, _ALL),
    ]
    return [pair(*one, spacing, options) for *one, spacings in schedulers for spacing, options in spacings.items()]


def run_diffusers(scheduler, problem: GuidedProblem, denoise: Denoise, steps: int) -> torch.Tensor:
    """The loop of a pipeline; its network is told the timestep."""
    network = v_network(denoise, SCHEDULE)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # DDIM keeps no index
        scheduler.set_begin_index(0)
    x = latents(problem) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        v = network(scheduler.scale_model_input(x, t).double(), t).to(x.dtype)
        x = scheduler.step(v, t, x).prev_sample
    return x


# ----------------------------------------------------------------------------------------------------------------------
# ComfyUI.


def comfyui_records(
    comfyui: Path, canvases: Sequence[GuidedProblem], guidances: Sequence[Guidance], steps: Sequence[int], rows: str
) -> list[Record]:
    """What its own Python measures, from 4518.76 and from infinity.

    Raises:
        click.ClickException: the worker failed; it has said why.
    """
    own_python = comfyui / ".venv" / "bin" / "python"
    worker = Path(__file__).with_name("guided_peer.py")
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder)
        save(exchange / "problems.npz", pack({problem.name: problem.to_arrays() for problem in canvases}))
        columns = {"guidances": [(g.scale, g.rescale) for g in guidances], "steps": steps, "rows": rows}
        (exchange / "columns.json").write_text(json.dumps(columns))
        done = subprocess.run(
            [own_python if own_python.exists() else sys.executable, worker, comfyui.resolve(), exchange],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise click.ClickException(f"the ComfyUI worker failed (exit {done.returncode})")
        return json.loads((exchange / "records.json").read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Tables.


def means(records: Iterable[Record]) -> list[Record]:
    """One record a pair and column: its scores' means over the problems."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        key = tuple(record[name] for name in ("program", "solver", "spacing", "guidance", "steps"))
        groups.setdefault(key, []).append(record)
    return [
        group[0] | {"problem": "mean"} | {score: statistics.fmean(one[score] for one in group) for score in SCORES}
        for group in groups.values()
    ]


def columns_of(rows: Iterable[Record]) -> dict[tuple[str, int], list[Record]]:
    """(guidance, steps) -> the rows of that column, the most accurate first."""
    columns: dict[tuple[str, int], list[Record]] = {}
    for row in sorted(rows, key=lambda row: row["error"]):
        columns.setdefault((row["guidance"], row["steps"]), []).append(row)
    return columns


def rank(row: Record, column: Iterable[Record]) -> int:
    """Its place among all pairs; the default, told the scale and not told, does not compete with itself."""
    rivals = (other for other in column if not (is_default(row) and is_default(other)))
    return 1 + sum(other["error"] < row["error"] for other in rivals)


def once_a_step(column: Iterable[Record]) -> list[Record]:
    """The pairs of a column that call the network once a step."""
    return [row for row in column if row["calls"] <= row["steps"] + 1]


def no_more_calls(row: Record, rows: Iterable[Record]) -> list[Record]:
    """Runs under the same guidance, of any number of steps, that call the network no more often, the best first."""
    rivals = [other for other in rows if other["guidance"] == row["guidance"] and other["calls"] <= row["steps"] + 1]
    return sorted(rivals, key=lambda rival: rival["error"])


def standing_table(rows: Sequence[Record]) -> list[list[str]]:
    """The default against the best of all others at as many steps, and at no more network calls."""
    columns, table = columns_of(rows), [["guidance", "steps", "default", "error", "rank", "rank at no more calls",
                                         "best other pair", "error", "best at no more calls", "error"]]  # fmt: skip
    for guidance, steps in dict.fromkeys((row["guidance"], row["steps"]) for row in rows):
        column = columns[guidance, steps]
        for row in filter(is_default, column):
            fair = no_more_calls(row, rows)
            others = [[one for one in rivals if not is_default(one)][:1] for rivals in (column, fair)]
            table.append(
                [guidance, str(steps), row["spacing"], f"{row['error']:.4f}"]
                + [f"{rank(row, rivals)} of {len(rivals)}" for rivals in (column, fair)]
                + [cell for one in others for cell in ((at(*one), f"{one[0]['error']:.4f}") if one else ("none", ""))]
            )
    return table


def best_table(rows: Sequence[Record], guidance: str) -> list[list[str]]:
    """The ten most accurate pairs of each number of steps, the ten at one call a step, and the default."""
    table = [["steps", "rank", "at one call", "pair", "calls", *SCORES]]
    for (found, steps), column in sorted(columns_of(rows).items()):
        if found == guidance:
            once = once_a_step(column)
            for row in column:
                if row in column[:BEST] or row in once[:BEST] or is_default(row):
                    mark = "**" if is_default(row) else ""
                    ranks = [str(rank(row, column)), str(rank(row, once)) if row in once else ""]
                    scores = [f"{row['error']:.4f}", f"{row['off']:.0%}", f"{row['brightness']:.1f}"]
                    cells = [str(steps), *ranks, f"{mark}{name(row)}{mark}", str(row["calls"])]
                    table.append([*cells, *scores, f"{row['median']:.4f}"])
    return table


def against_stock(rows: Sequence[Record]) -> tuple[str, list[list[str]]]:
    """Spacings of a range of sigmas from infinity, and the same sampler and scheduler in ComfyUI as it is.

    Returns:
        What was compared, and a table of where the start from infinity is behind.
    """
    keys = ("program", "solver", "spacing", "guidance", "steps")
    errors = {tuple(row[key] for key in keys): row["error"] for row in rows}
    counts, table = {}, [["spacing", "sampler", "guidance", "steps", "from infinity", "ComfyUI"]]
    for (program, solver, spacing, guidance, steps), error in errors.items():
        stock = errors.get(("ComfyUI", solver, spacing, guidance, steps))
        if program == "ComfyUI" or spacing not in RANGES or stock is None:
            continue
        behind = error > stock
        counts.setdefault(spacing, []).append(behind)
        if behind:
            table.append([spacing, solver, guidance, str(steps), f"{error:.4f}", f"{stock:.4f}"])
    compared = ", ".join(f"`{spacing}` {len(found) - sum(found)} of {len(found)}" for spacing, found in counts.items())
    return f"No worse from infinity than the same sampler and scheduler in ComfyUI: {compared} columns.  Behind:", table


def name(row: Record) -> str:
    return f"{row['program']} {row['solver']} / {row['spacing']}"


def at(row: Record) -> str:
    return f"{name(row)}, {row['calls']} calls"


# ----------------------------------------------------------------------------------------------------------------------
# The report.

EXPLANATION = """\
{problems}: {samples} samples each with a class of its own, on canvases of {canvases} latent pixels. The exact guided
flow is RK4 in the angle in {reference_steps} steps. `error`: mean of min(error, 1), where an error is a picture's
distance from the exact one over the rms norm of the exact ones; `off`: share of pictures off by more than 10 %;
`brightness`: rms error in levels of 255; `median`: error of a typical picture; all of them means over the problems.
`calls`: network calls a run; `at one call`: rank among the pairs that make one a step; `at no more calls`: among runs
of any number of steps with no more calls than the default's. ztsnr's pairs and those "from
infinity" begin with the exact first step, ComfyUI's own at sigma 4518.76. Samplers that add noise or that guide
otherwise (CFG++) follow another flow and are left out, as are diffusers' schedulers without `rescale_betas_zero_snr`.
{pairs} pairs. {res4lyf}"""


def describe(canvases: Sequence[GuidedProblem], rows: Sequence[Record], comfyui: Path | None) -> str:
    sizes = dict.fromkeys(" x ".join(map(str, problem.latent_size)) for problem in canvases)
    found = comfyui is not None and find_res4lyf(comfyui) is not None
    text = EXPLANATION.format(
        problems=", ".join(problem.name for problem in canvases).capitalize(),
        samples=len(canvases[0].noise),
        canvases=" and ".join(sizes),
        reference_steps=REFERENCE_STEPS,
        pairs=len({name(row) for row in rows}),
        res4lyf="" if found else "RES4LYF's res_2m and res_3m were not measured: there is no ComfyUI that has it.",
    )
    return textwrap.fill(text, 120, break_on_hyphens=False)


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Every record, as CSV or, if the name ends so, as JSON."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":
            json.dump(records, file, indent=1)
        else:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)


def parse_guidances(context: click.Context, parameter: click.Parameter, value: str) -> list[Guidance]:
    try:
        return [Guidance(float(one.removesuffix("r")), RESCALE * one.endswith("r")) for one in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of scales such as 1,5,5r") from None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--comfyui",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="PATH",
    help="A ComfyUI folder whose samplers to measure too, run by the Python of its .venv if it has one.",
)
@click.option("--cfg", default="1,3,5,5r,7.5", show_default=True, callback=parse_guidances,
              help=f"Guidance scales; an r behind one rescales by {RESCALE}.")  # fmt: skip
@click.option("--steps", default="8,10,14,20,28", show_default=True, callback=parse_steps, help="Numbers of steps.")
@click.option("--rows", default="", metavar="REGEX", help="Measure only pairs whose name matches, and the default.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Put everything into a .csv or .json.")
@click.option("--write/--no-write", default=False, show_default=True, help="Put the tables into RESULTS.md.")
def main(
    comfyui: Path | None, cfg: list[Guidance], steps: tuple[int, ...], rows: str, out: Path | None, write: bool
) -> None:
    """Measure how far samplers end from the exact answer under guidance, on a real canvas."""
    if importlib.util.find_spec("skimage") is None:
        raise click.ClickException("two problems are made of scikit-image's pictures: pip install scikit-image")
    began = time.perf_counter()
    torch.set_num_threads(1)  # the tensors are small: more threads are slower
    with torch.inference_mode():
        canvases = problems()
        for problem in tqdm(canvases, desc="exact flows", leave=False):
            for guidance in cfg:
                problem.reference(guidance)
        records = []
        pairs = [
            pair for pair in our_pairs() + diffusers_pairs() if re.search(rows, pair.name) or is_default(vars(pair))
        ]
        for pair in tqdm(pairs, desc="samplers", leave=False):
            records += pair.measure(canvases, cfg, steps)
        if comfyui is not None:
            records += comfyui_records(comfyui, canvases, cfg, steps, rows)

    averages = means(records)
    if out is not None:
        write_records(out, records + averages)
    command = f"python benchmarks/{Path(__file__).name}{' --comfyui PATH' if comfyui else ''}"
    command += f" --cfg {','.join(f'{g.scale:g}' + 'r' * (g.rescale > 0) for g in cfg)}"
    command += f" --steps {','.join(map(str, steps))}" + (f" --rows {rows!r}" if rows else "")
    seconds = time.perf_counter() - began
    parts = [f"`{command}`, {datetime.date.today().isoformat()}, {seconds:.0f} s.\n{machine(comfyui)}."]
    parts += [describe(canvases, averages, comfyui), "### Where the default stands", markdown(standing_table(averages))]
    if comfyui is not None:
        compared, table = against_stock(averages)
        parts += ["### Stock spacings from infinity", compared, markdown(table)]
    for guidance in map(str, cfg):
        parts += [f"### {guidance}", markdown(best_table(averages, guidance))]
    text = "\n\n".join(parts)
    click.echo(text)
    if write:
        write_section(RESULTS, HEADING, text)


if __name__ == "__main__":
    main()
