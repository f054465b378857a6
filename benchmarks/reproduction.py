"""The claims about zero terminal SNR, on networks trained here: one epsilon base, four fine-tunes of it, several seeds.

    python benchmarks/reproduction.py [--out FOLDER] [--size cpu|gpu] [--shipped-base] [--quick] [--seeds N]
        [--first-seed N] [--no-write]

What is finished in FOLDER stays, so a run that was stopped resumes.  What was measured of a seed is kept in
benchmarks/reproduction, without the pictures, so that seeds add up over days and machines: the claims are judged on all
that were trained by the same recipe.  Prints the tables and puts them into benchmarks/RESULTS.md.  As a control, a
network with random weights is asked the same as the trained ones.
"""

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import torch
from results import RESULTS, machine, write_section
from tabulate import tabulate

from ztsnr.checkpoints.diffusers_folder import set_scheduler
from ztsnr.checkpoints.schedule_shift import set_shift
from ztsnr.demo.claims import Run, judge_claims
from ztsnr.demo.evaluation import NOISES, STEPS, Evaluation
from ztsnr.demo.networks import DemoNetwork
from ztsnr.demo.objectives import BASE, EPSILON, OBJECTIVES, OURS, shift_of
from ztsnr.demo.report import BOUND_HEADERS, bound_rows, claims_text, summary_table, write_report
from ztsnr.demo.reproduction import measure, open_trainings, write_sheet
from ztsnr.demo.trainings import Trainings
from ztsnr.files import atomic_write

HEADING = "Reproduction: what zero terminal SNR does"
KEPT = Path(__file__).with_name("reproduction")
ABOUT, MINUTES, APART = "recipe", "minutes", "|"  # names in a kept file: "training|measurement" besides


def minutes_of(trainings: Trainings, name: str, seed: int) -> float:
    """How long a training took: pictures / pictures a second, from its metrics."""
    lines = (trainings.folder(name, seed) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "pictures a second" in row]
    steps = [row["step"] - before for row, before in zip(rows, [0, *(row["step"] for row in rows)], strict=False)]
    batch = trainings.recipe.batch_size
    return sum(batch * n / row["pictures a second"] for n, row in zip(steps, rows, strict=True)) / 60


def keep(folder: Path, seed: int, trainings: Trainings, run: Run) -> None:
    """Put the numbers of a seed into seed-N.npz, with its recipe and how long its trainings took."""
    numbers = {
        f"{name}{APART}{key}": value.astype(np.float32) if value.dtype == np.float64 else value
        for name, found in run.items()
        for key, value in found.items()
        if "/pictures" not in key
    }
    took = [minutes_of(trainings, name, seed) for name in OBJECTIVES]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"seed-{seed}.npz") as file:
        np.savez_compressed(file, **numbers, **{ABOUT: recipe_of(trainings), MINUTES: took})


def kept(folder: Path, trainings: Trainings) -> dict[int, tuple[Run, list[float]]]:
    """Of each kept seed of this recipe, in order: its numbers, and the minutes of its trainings."""
    seeds = {}
    for path in folder.glob("seed-*.npz"):
        content = dict(np.load(path))
        if str(content.pop(ABOUT)) != recipe_of(trainings):
            continue
        took, run = content.pop(MINUTES).tolist(), {}
        for name, value in content.items():
            training, _, key = name.partition(APART)
            run.setdefault(training, {})[key] = value
        seeds[int(path.stem.partition("-")[2])] = (run, took)
    return dict(sorted(seeds.items()))


def recipe_of(trainings: Trainings) -> str:
    """What has to be the same for seeds to be comparable."""
    return json.dumps({**asdict(trainings.recipe), "from the shipped base": trainings.base is not None})


def untrained(trainings: Trainings) -> Run:
    """The measurements of the network before any training, in the place of each of the four."""
    found = {}
    for name in OBJECTIVES:
        network = DemoNetwork(trainings.out / "random", dtype=torch.bfloat16)
        zero, kind = OBJECTIVES[name].get("zero_terminal_snr", True), "epsilon" if name == EPSILON else "v_prediction"
        set_scheduler(network.pipe, kind, zero)
        set_shift(network.pipe, shift_of(network.shape[-1]))
        network.know_schedule(kind)
        path = trainings.out / "untrained" / f"{trainings.folder(name, 0).name}.npz"
        path.parent.mkdir(exist_ok=True)
        found[name] = Evaluation(network, trainings.composer, path).all(long=name == OURS)
    return found


def answers_of(runs: Sequence[Run]) -> str:
    """The answers to the claims, in one line."""
    return ", ".join(f"{claim.number}: {claim.answer}" for claim in judge_claims(runs))


@click.command(help=__doc__.split("\n")[0])
@click.option("--out", type=click.Path(path_type=Path), default=Path("ztsnr_reproduction"), show_default=True)
@click.option("--size", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many to train.")
@click.option("--first-seed", type=click.IntRange(0), default=0, show_default=True, help="The others follow it.")
@click.option("--write/--no-write", default=True, show_default=True, help="Put the tables into RESULTS.md.")
@click.option("--shipped-base", is_flag=True, help="Fine-tune the base that comes with the package.")
@click.option("--quick", is_flag=True, help="Short fine-tunes of the base that comes with the package.")
def main(out: Path, size: str, seeds: int, first_seed: int, write: bool, shipped_base: bool, quick: bool) -> None:
    trainings = open_trainings(out, size, quick, click.echo, shipped_base)
    asked, runs = range(first_seed, first_seed + seeds), []
    folder = KEPT / f"{size}{'-shipped-base' * shipped_base}{'-quick' * quick}"  # no recipe writes over another's
    for seed in asked:
        trainings.run(seed)
        runs.append(measure(trainings, seed))
        keep(folder, seed, trainings, runs[-1])
    write_report(out, trainings.recipe, runs, asked)
    sheet = write_sheet(trainings, first_seed, out / "sheet.png")
    recipe, found = trainings.recipe, kept(folder, trainings)
    runs, took = [run for run, _ in found.values()], [minutes for _, every in found.values() for minutes in every]
    claims = judge_claims(runs)
    control = answers_of([untrained(trainings)])
    alone = "; ".join(f"seed {seed}: {answers_of([run])}" for seed, (run, _) in found.items())
    lines = re.sub("^ +", "    ", claims_text(claims), flags=re.MULTILINE)
    flags = " --shipped-base" * shipped_base + " --quick" * quick
    command = f"python benchmarks/{Path(__file__).name} --size {size}{flags} --seeds {seeds} --first-seed {first_seed}"
    base = f"{recipe.base_steps} steps of {recipe.batch_size} pictures"
    base += ", as it comes with the package" if trainings.base else f" ({minutes_of(trainings, BASE, 0):.0f} minutes)"
    text = f"""`{command}`, {datetime.date.today().isoformat()}.
{machine(None)}.

One epsilon base, {base}, and fine-tunes of it, {recipe.steps} steps each ({min(took):.0f} to {max(took):.0f} minutes on
one core, beside other work), seeds {", ".join(map(str, found))}: other orders of the pictures, other noise. Each number
of a training is the mean of {NOISES} noises or more; {STEPS} Euler steps.

{lines}

Each training by itself, with the interval over its noise alone. {alone}.

Control: the same network with random weights in the place of all four: {control}.

Mean and standard deviation over trainings, without guidance. Black ... light: mean brightness. CIEDE2000: from seven
colours, of the pictures' means and of the first prediction's. Uneven ground: standard deviation along the frame of
pictures with a thing, in levels. Explained: share of such a picture that the thing accounts for, 1 in pictures of
training.

```
{summary_table(runs)}
```

What no training can change: the exact flow of the solid pictures of each caption, mean brightness.

```
{tabulate(bound_rows(), BOUND_HEADERS, disable_numparse=True, colalign=["left", "right", "right", "right"])}
```
"""
    print(text, f"\nSheet: {sheet}")
    if write:
        write_section(RESULTS, HEADING + ", short fine-tunes" * quick, text)


if __name__ == "__main__":
    main()
