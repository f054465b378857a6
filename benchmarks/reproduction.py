"""The claims about zero terminal SNR, on models trained here with several seeds.

    python benchmarks/reproduction.py [--out FOLDER] [--size cpu|gpu] [--seeds N] [--no-write]

What is finished in FOLDER stays, so a run that was stopped goes on.  Prints the tables and puts them into
benchmarks/RESULTS.md.
"""

import datetime
import json
import re
from pathlib import Path

import click
from sampler_accuracy import RESULTS, machine, write_section

from ztsnr.training.reproduction import SEEDS, Reproduction
from ztsnr.training.reproduction_report import (
    claims_text,
    leak_shares,
    summary_table,
    write_readme_picture,
    write_report,
)


def seconds_of(reproduction: Reproduction, seed: int) -> list[float]:
    """How long each training took, but for what was not training: steps / pictures a second, from its metrics."""
    found = []
    for path in sorted((reproduction.out / f"seed-{seed}").glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row for row in rows if "pictures a second" in row]
        steps = [row["step"] - before for row, before in zip(rows, [0, *(row["step"] for row in rows)], strict=False)]
        batch = reproduction.recipe.batch_size
        found.append(sum(batch * n / row["pictures a second"] for n, row in zip(steps, rows, strict=True)))
    return found


@click.command(help=__doc__.split("\n")[0])
@click.option("--out", type=click.Path(path_type=Path), default=Path("ztsnr_reproduction"), show_default=True)
@click.option("--size", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="Of the trainings.")
@click.option("--first-seed", type=click.IntRange(0), default=0, help="To share the work among processes.")
@click.option("--report/--no-report", default=True, help="Report, or train and measure alone.")
@click.option("--write/--no-write", default=True, show_default=True, help="Put the tables into RESULTS.md.")
def main(out: Path, size: str, seeds: int, first_seed: int, report: bool, write: bool) -> None:
    reproduction = Reproduction(out, size, say=click.echo)
    runs = []
    for seed in range(first_seed, first_seed + seeds):
        measured = reproduction.run(seed)
        if measured is None:
            raise SystemExit(1)
        runs.append({one.training: one for one in measured})
    if not report:
        return
    claims, rows = write_report(reproduction, runs)
    recipe = reproduction.recipe
    slopes = "\n".join(f"- {name}: {', '.join(shares)}" for name, shares in leak_shares(runs))
    minutes = [second / 60 for run in runs for second in seconds_of(reproduction, run["v, zero SNR"].seed)]
    claims_lines = re.sub("^ +", "    ", claims_text(claims), flags=re.MULTILINE)
    today = datetime.date.today().isoformat()
    text = f"""`python benchmarks/{Path(__file__).name} --size {size} --seeds {seeds}`, {today}.
{machine(None)}.

Four trainings of a small SDXL, {recipe.steps} steps of {recipe.batch_size} pictures, {min(minutes):.1f} to
{max(minutes):.1f} minutes each, {seeds} seeds each; the same weights, pictures and noise for all four. Mean and
standard deviation over trainings, each the mean of {len(SEEDS)} noises; Euler, without guidance.

{claims_lines}

How far x0 at t = T follows the mean of the noise without a prompt, as a share of its peak, a number a training:

{slopes}

20 steps; 10 and 28 are in results.json. Brightness error: of six solid colours, in levels of 255. CIEDE2000: of their
pixels, to the colour asked for. Background: share of the pixels within 10 of it, shapes on a ground. Coarse contrast:
standard deviation of the brightness of 4 x 4 blocks, solid black and white. First prediction: CIEDE2000 of its mean.
Fréchet: of nine pixel statistics, to pictures of training; it is no FID.

```
{summary_table(rows)}
```
"""
    print(text)
    if write:
        write_section(RESULTS, "Reproduction: what zero terminal SNR does", text)
        write_readme_picture(out / "sheet.png", RESULTS.parent.parent / "docs" / "reproduction.jpg")


if __name__ == "__main__":
    main()
