"""Averages of the weights in other widths than those of the training, made after it (EDM2, arXiv 2312.02696).

python examples/post_hoc_average.py RUN/snapshots averages 0.03 0.06 0.12

The training needs `average.snapshots` in its settings.  A width is a share of the training's length.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

from ztsnr.training.ema import post_hoc


def main(snapshots: str, out: str, *widths: str) -> list[Path]:
    files = sorted(Path(snapshots).glob("power_*.safetensors"))
    Path(out).mkdir(parents=True, exist_ok=True)
    written = []
    for width in map(float, widths):
        average = post_hoc(files, width)  # float32 tensors by the names that training has for them
        written.append(Path(out) / f"power_{width}.safetensors")
        save_file(average, written[-1])
    return written


if __name__ == "__main__":
    main(*sys.argv[1:])
