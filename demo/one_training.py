"""Run one training of a folder of trainings in its own process.  Arguments: OUT NAME SEED THREADS."""

import sys
from pathlib import Path

import torch

from .trainings import Trainings


def main(out: str, name: str, seed: str, threads: str) -> int:
    """Train to the end, or until a signal stops it.  Returns the exit status."""
    torch.set_num_threads(int(threads))
    return 0 if Trainings.open(Path(out)).train(name, int(seed)) else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
