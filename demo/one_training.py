"""Run one training of a folder of trainings in its own process.  Arguments: OUT NAME SEED THREADS."""

import sys
from pathlib import Path

import torch

from .trainings import Trainings


def main(out: str, name: str, seed: str, threads: str) -> None:
    """Train to the end, or until a signal stops it."""
    torch.set_num_threads(int(threads))
    Trainings.open(Path(out)).train(name, int(seed))


if __name__ == "__main__":
    main(*sys.argv[1:])
