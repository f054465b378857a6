"""``ztsnr demo --train``: train, measure, judge and report."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import Stopped
from ..extras import no_matplotlib
from ..figures.png import png
from ..files import atomic_write
from .evaluation import Evaluation, Numbers
from .networks import DemoNetwork, quiet_libraries
from .networks_sheet import draw_sheet, sample_sheet
from .objectives import BASE, OBJECTIVES, OURS, PLAIN
from .report import claims_text, summary_table, write_report
from .shipped import start_of
from .trainings import QUICK, Trainings


def reproduce(
    out: Path,
    size: str = "cpu",
    quick: bool = False,
    seeds: Sequence[int] = (0,),
    say: Callable[[str], None] = print,
) -> None:
    """Train the networks of a size, or fine-tune the packaged base.

    Args:
        out: Folder of the trainings and of the report.
        size: Size of the networks, one of RECIPES.
        quick: Take few steps, from the packaged base.
        seeds: Seeds of the fine-tunes.  Several give intervals over trainings.
        say: Takes each line of the report.

    Raises:
        UserError: See ``Trainings``; or a training failed.
        Stopped: A signal stopped it.
    """
    quiet_libraries()
    trainings = open_trainings(out, size, quick, say)
    runs = []
    for seed in seeds:
        try:
            trainings.run(seed)
        except Stopped as stopped:
            say(f"stopped by {signal.Signals(stopped.signal).name}; the same command resumes from {out}")
            raise
        runs.append(measure(trainings, seed))
    claims = write_report(out, trainings.recipe, runs, seeds)
    say(f"\n{summary_table(runs)}\n\n{claims_text(claims)}\n")
    say(no_matplotlib() or f"Sheet:  {write_sheet(trainings, seeds[0], out / 'sheet.png')}")
    say(f"Report: {out / 'report.html'}")


def open_trainings(
    out: Path, size: str, quick: bool, say: Callable[[str], None], shipped_base: bool = False
) -> Trainings:
    """The trainings of a size; quick ones take few steps from the packaged base."""
    return Trainings(out, size, start_of(BASE) if quick or shipped_base else None, QUICK if quick else None, say)


def measure(trainings: Trainings, seed: int) -> dict[str, Numbers]:
    """The measurements of each finished training of a seed.  Earlier measurements are reused."""
    found = {}
    finished = [name for name in OBJECTIVES if trainings.exported(name, seed).exists()]
    for name in tqdm(finished, "measuring", unit="network", leave=False):
        network = DemoNetwork(trainings.exported(name, seed), dtype=torch.bfloat16)  # twice as fast, accurate enough
        path = trainings.folder(name, seed) / "measured.npz"
        found[name] = Evaluation(network, trainings.composer, path).all(long=name == OURS)
    return found


def write_sheet(trainings: Trainings, seed: int, path: Path) -> Path:
    """Draw the sheet of ``networks_sheet`` for the networks of a seed."""
    networks = {
        BASE: load_base(trainings, seed),
        PLAIN: DemoNetwork(trainings.exported(PLAIN, seed)),
        OURS: DemoNetwork(trainings.exported(OURS, seed)),
    }
    with atomic_write(path) as file:
        file.write(png(draw_sheet(sample_sheet(networks, trainings.composer))))
    return path


def load_base(trainings: Trainings, seed: int) -> DemoNetwork:
    """Load the network that was fine-tuned."""
    if trainings.base is None:
        return DemoNetwork(trainings.exported(BASE, seed))
    config = trainings.base.config
    return DemoNetwork(Path(trainings.base.path), Path(config) if config else None)
