"""What ZTSNR Model costs a step of ComfyUI's KSampler.

    python benchmarks/comfyui_overhead.py [--comfyui PATH]

Runs a free model (a U-Net that returns its input) with and without the node, in interleaved pairs within one process of
ComfyUI's own Python, prints the table and puts it into benchmarks/RESULTS.md.
"""

import datetime
import statistics
import sys
import tempfile
from pathlib import Path

import click
from results import RESULTS, machine, markdown, write_section

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "comfyui"))

from worker import Inside, own_python

LIMIT = 1.02
SHAPE = (1, 4, 128, 128)
STEPS, PAIRS = 100, 120


def comfyui_worker(comfyui: Path) -> Inside:
    """A worker in the ComfyUI of a folder, or a sentence that says why there is none."""
    comfyui = comfyui.expanduser().resolve()
    python = own_python(comfyui)
    if python is None:
        raise click.ClickException(f"no .venv or venv in {comfyui}: give the folder of a ComfyUI that has one")
    return Inside(python, comfyui, Path(tempfile.mkdtemp()) / "comfyui.log")


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval, by order statistics."""
    values, half = sorted(values), 0.98 * len(values) ** 0.5
    return statistics.median(values), values[int(len(values) / 2 - half)], values[int(len(values) / 2 + half)]


@click.command(help=__doc__.split("\n")[0])
@click.option(
    "--comfyui", type=click.Path(path_type=Path), default="~/comfy/ComfyUI", show_default=True, help="Its folder."
)
def main(comfyui: Path) -> None:
    inside = comfyui_worker(comfyui)
    rows, reached = [], True
    for sampler in ("euler", "dpmpp_2m"):
        pairs = inside("overhead", timeout=600, sampler=sampler, pairs=PAIRS, steps=STEPS, shape=SHAPE)
        without, ours = (1e6 * statistics.median(column) for column in zip(*pairs, strict=True))
        ratio, low, high = median_interval([ours / plain for plain, ours in pairs])
        rows.append([sampler, f"{without:.0f}", f"{ours:.0f}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}"])
        reached &= ratio <= LIMIT
    inside.close()
    table = markdown([["sampler", "µs a step without", "µs a step with", "ratio", "95 % interval"], *rows])
    text = (
        f"`python benchmarks/{Path(__file__).name}`, {datetime.date.today().isoformat()}.\n"
        f"{machine(comfyui.expanduser())}.\n\n"
        f"Processor time of KSampler's `simple` schedule on a free model at {SHAPE}, {STEPS} steps a run,\n"
        f"{PAIRS} pairs of runs with and without ZTSNR Model, interleaved, one thread. At most {LIMIT}:"
        f" {'reached' if reached else 'missed'}.\n\n{table}\n"
    )
    print(text)
    write_section(RESULTS, "ComfyUI: overhead", text)


if __name__ == "__main__":
    main()
