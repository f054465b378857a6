"""A network of the demo's kind, small enough for tests, with random weights and any schedule."""

import json
from pathlib import Path

from ztsnr.demo.small_model import SmallModelSize, write_small_model
from ztsnr.samplers import NoiseSchedule

SIDE = 16
SIZE = SmallModelSize(
    side=SIDE,
    factor=1,
    widths=(8, 16),
    attention=(False, True),
    layers=1,
    text_widths=(8, 16),
    norm_groups=4,
    head_dim=8,
)
WORDS = ("a", "background", "black", "completely", "frog", "on", "red", "white")


def write_tiny_network(
    folder: Path, prediction_type: str = "epsilon", zero_snr: bool = False, shift: float = 1
) -> Path:
    """A diffusers folder whose scheduler says what it predicts, and on which schedule."""
    write_small_model(folder, WORDS, SIZE, seed=1)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    config |= {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    if shift != 1:
        config["trained_betas"] = NoiseSchedule.sdxl(zero_terminal_snr=zero_snr).shifted(shift).betas.tolist()
    path.write_text(json.dumps(config))
    return folder
