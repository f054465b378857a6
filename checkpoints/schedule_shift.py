"""Shifted noise schedules, whose sigmas are the published ones times one number, as models for other canvases have.

Twice the canvas's length needs twice the sigma (NovelAI V3, arXiv 2409.15997).  Everything that runs such a model must
do the same, so a checkpoint carries the number: a diffusers folder in the betas of its scheduler, a single file in its
metadata.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .header import shorten
from .markers import read_scheduler_config

if TYPE_CHECKING:  # reading a header needs no torch
    from ..samplers import NoiseSchedule

METADATA = "ztsnr.schedule_shift"  # in the metadata of single files
TOLERANCE = 1e-6  # relative, of sigmas


def shift_of(schedule: "NoiseSchedule") -> float | None:
    """The factor from the sigmas of Stable Diffusion's schedule to those of this one; None if there is none."""
    from ..samplers import NoiseSchedule

    published = NoiseSchedule.sdxl(zero_terminal_snr=schedule.zero_terminal_snr)
    if schedule.alphas_cumprod.shape != published.alphas_cumprod.shape:
        return None
    last = schedule.last_timestep - schedule.zero_terminal_snr  # the last finite one
    ratios = [schedule.sigma(float(t)) / published.sigma(float(t)) for t in range(last + 1)]
    shift = ratios[0]
    if not all(math.isclose(ratio, shift, rel_tol=TOLERANCE) for ratio in ratios):
        return None
    return 1.0 if math.isclose(shift, 1, rel_tol=TOLERANCE) else float(f"{shift:.7g}")


def shift_of_folder(folder: Path) -> float | None:
    """The shift in the scheduler of a diffusers folder; None if it has none, or is not Stable Diffusion's schedule.

    Raises:
        UserError: the scheduler's settings cannot be read.
    """
    from ..samplers import NoiseSchedule

    config = read_scheduler_config(folder / "scheduler" / "scheduler_config.json")
    if not config.get("trained_betas"):  # a shifted schedule cannot be said by anything else
        return None
    try:
        return shift_of(NoiseSchedule.from_config(config))
    except (TypeError, ValueError):
        raise UserError(f"{folder / 'scheduler'} has trained_betas that are not a noise schedule") from None


def shift_of_metadata(metadata: Mapping[str, str]) -> float:
    """The shift in the metadata of a single file; 1 if they name none.

    Raises:
        UserError: it is not a number above 0.
    """
    if METADATA not in metadata:
        return 1.0
    try:
        shift = float(metadata[METADATA])
    except ValueError:
        shift = math.nan
    if not 0 < shift < math.inf:
        raise UserError(f"{METADATA} of the metadata, {shorten(metadata[METADATA])}, is not a number above 0")
    return shift


def with_shift(metadata: Mapping[str, str], shift: float | None) -> dict[str, str]:
    """The metadata with a shift, or without an entry for it where there is none."""
    kept = {key: value for key, value in metadata.items() if key != METADATA}
    return kept if shift in (None, 1) else kept | {METADATA: f"{shift:.7g}"}


def set_shift(pipeline: Any, shift: float) -> None:
    """Give the scheduler of a pipeline, which already knows whether it has zero terminal SNR, a file's schedule.

    A shift of 1 takes away the betas of a config that was made for another file.
    """
    from ..samplers import NoiseSchedule

    config = {**pipeline.scheduler.config, "_use_default_values": []}
    if shift == 1 and config.get("trained_betas") is None:
        return
    zero = bool(config.get("rescale_betas_zero_snr", False))
    betas = None if shift == 1 else NoiseSchedule.sdxl(zero_terminal_snr=zero).shifted(shift).betas.tolist()
    pipeline.register_modules(scheduler=type(pipeline.scheduler).from_config(config, trained_betas=betas))
