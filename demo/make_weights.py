"""Make demo/weights from a folder of trainings.

    python -m ztsnr.demo.make_weights FOLDER [SEED]

FOLDER is the folder of ``ztsnr demo --train cpu``.  Writes the networks as single files in float16, marked with their
prediction type and schedule, and the settings and tokenizers that they share.
"""

import shutil
import sys
from pathlib import Path

import torch

from ..checkpoints import to_single_file, verify_checkpoint
from ..training.config import FinetuneSettings
from ..training.settings_file import settings_content
from .shipped import CONFIG, FILES, WEIGHTS
from .trainings import Trainings

KEPT = ("objective", "optimizer", "average")  # tables of the settings in the model card


def main(folder: Path, seed: int = 0) -> None:
    trainings = Trainings.open(folder)
    shutil.rmtree(CONFIG, ignore_errors=True)
    shutil.copytree(
        trainings.out / "random",
        CONFIG,
        ignore=lambda _, names: [name for name in names if name.endswith(".safetensors")],
    )
    for name, file in FILES.items():
        (WEIGHTS / file).unlink(missing_ok=True)
        to_single_file(trainings.exported(name, seed), WEIGHTS / file, dtype=torch.float16)
        report = verify_checkpoint(WEIGHTS / file)
        if not report.sound:
            raise SystemExit(str(report))
        print(f"{file}: {(WEIGHTS / file).stat().st_size / 1e6:.1f} MB, {_about(trainings.settings(name, seed))}")


def _about(settings: FinetuneSettings) -> str:
    content = settings_content(settings)
    return f"{settings.steps} steps of {settings.data.batch_size}, " + ", ".join(
        f"{table}.{key} = {value}" for table in KEPT for key, value in content[table].items()
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
