"""The picture of the template completely_black: its three ways to sample, on a model that never errs.

    python benchmarks/black_and_white.py [--write]

Black and white, each with one noise; below every square how far its worst colour channel is from the exact answer.
``--write`` makes workflows/completely_black.jpg.
"""

import io
from pathlib import Path
from typing import NamedTuple

import click
import torch
from PIL import Image

from ztsnr.demo.exact_prompts import EXPOSURE, solid
from ztsnr.demo.exact_report import VISIBLE, signed
from ztsnr.demo.exact_runs import LEVEL
from ztsnr.diagnostics import PictureSet
from ztsnr.samplers import NoiseSchedule, sample, step_schedule

PICTURE = Path(__file__).resolve().parent.parent / "workflows" / "completely_black.jpg"
STEPS, SIZE = 20, 128
STOCK_SIGMA_MAX = 4518.7637  # ComfyUI's stand-in for infinity
# The model knows each colour at many exposures and white balances, and the mean of the noise chooses one.  With these
# seeds the exact answers look black and white; how far samplers are off does not depend on that (see the test).
SEEDS = {"black": 5, "white": 9}
COLOURS = {"black": (-1, -1, -1), "white": (1, 1, 1)}


class Way(NamedTuple):
    """One of the template's three ways to sample."""

    name: str
    detail: str
    solver: str
    sigmas: list[float]


def simple(schedule: NoiseSchedule) -> list[float]:
    """ComfyUI's scheduler ``simple``: evenly spaced entries of its table, whose last one is never infinite."""
    table = [min(float(schedule.sigma(float(t))), STOCK_SIGMA_MAX) for t in range(schedule.last_timestep + 1)]
    return [*(table[-1 - int(i * len(table) / STEPS)] for i in range(STEPS)), 0.0]


def ways() -> list[Way]:
    zero_snr, plain = NoiseSchedule.sdxl(), NoiseSchedule.sdxl(zero_terminal_snr=False)
    spectral = step_schedule(zero_snr, STEPS, "spectral", latent_size=(SIZE, SIZE)).tolist()
    return [
        Way("Exact, from infinity", "dpmpp_2m, ztsnr_spectral", "dpmpp_2m", spectral),
        Way("ComfyUI, from 4518.76", "euler, simple", "euler", simple(zero_snr)),
        Way("Plain SDXL, from 14.6", "euler, simple", "euler", simple(plain)),
    ]


def measure(colour: str, seed: int) -> tuple[torch.Tensor, list[torch.Tensor], list[float]]:
    """The exact answer (3, H, W), what each way makes of the same noise, and how far its worst channel is off.

    Pictures are in [-1, 1], distances in levels of 255.
    """
    model = PictureSet(solid(COLOURS[colour], SIZE)[None], brightness_std=EXPOSURE)
    noise = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    exact = model.exact(noise)[0]
    made = [sample(model, noise, way.sigmas, way.solver)[0] for way in ways()]
    off = [max(((x - exact).mean((-2, -1)) / LEVEL).tolist(), key=abs) for x in made]
    return exact, made, off


def draw() -> bytes:
    """The JPEG, 512 x 512.  ComfyUI lays a label over its upper left corner."""
    from matplotlib.figure import Figure

    columns = {colour: measure(colour, seed) for colour, seed in SEEDS.items()}
    figure = Figure(figsize=(5.12, 5.12), dpi=100, facecolor="white")
    for column, (colour, (_, made, off)) in enumerate(columns.items()):
        left = 0.45 + 0.275 * column
        figure.text(left + 0.125, 0.955, f"solid {colour}", ha="center", va="center", fontsize=13, weight="bold")
        for row, (picture, error) in enumerate(zip(made, off, strict=True)):
            axes = figure.add_axes((left, 0.675 - 0.315 * row, 0.25, 0.25))
            axes.imshow(((picture.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).round().byte().numpy())
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="#bdbdbd")
            alarm = abs(error) > VISIBLE / 2
            style = {"color": "#b3261e" if alarm else "#2e7d32", "weight": "bold", "fontsize": 12, "ha": "center"}
            figure.text(left + 0.125, 0.65 - 0.315 * row, f"off by {signed(error, 0)}", va="center", **style)
    for row, way in enumerate(ways()):
        first, start = way.name.split(", ")
        y = 0.8 - 0.315 * row
        figure.text(0.42, y + 0.045, first, ha="right", va="center", fontsize=15, weight="bold")
        figure.text(0.42, y - 0.012, start, ha="right", va="center", fontsize=12.5)
        figure.text(0.42, y - 0.06, way.detail, ha="right", va="center", fontsize=9.5, color="#757575")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    picture = io.BytesIO()
    Image.open(buffer).convert("RGB").save(picture, "JPEG", quality=92)
    return picture.getvalue()


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--write", is_flag=True, help="Make workflows/completely_black.jpg.")
def main(write: bool) -> None:
    for colour, seed in SEEDS.items():
        exact, _, off = measure(colour, seed)
        levels = ((exact.mean((-2, -1)) + 1) / LEVEL).round().int().tolist()
        print(f"{colour}: seed {seed}, exact answer {levels}; off by {', '.join(signed(error) for error in off)}")
    if write:
        PICTURE.write_bytes(draw())
        print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
