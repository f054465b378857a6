"""What the base model is, by its own files, and what is trained on it.

An adapter is a small change of the base, so it is trained as the base was: the same prediction type, the same schedule.
A fine-tune of the whole U-Net may change both, and by default makes v-prediction with zero terminal SNR.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.inspect import DIFFUSERS_FOLDER
from ..checkpoints.markers import read_scheduler_config
from ..checkpoints.pipeline import inspect_model
from ..checkpoints.reading import SDXL_FAMILY
from ..checkpoints.schedule_shift import TOLERANCE, shift_of, shift_of_metadata
from ..errors import UserError
from ..samplers import NoiseSchedule
from .objective import ObjectiveSettings

NAMES = {"v_prediction": "v-prediction", "epsilon": "epsilon", "sample": "x0-prediction"}


@dataclass(frozen=True)
class Base:
    """What a base model says of itself.

    Attributes:
        path: its file or folder on this machine.
        prediction_type: "v_prediction" or "epsilon"; None if nothing says.
        zero_terminal_snr: None if nothing says.
        schedule_shift: factor from the published sigmas to the base's; 1 if it has a schedule of another shape.
        schedule: the base's own schedule where it is not the published one, before any rescaling; else None.
    """

    path: Path
    prediction_type: str | None
    zero_terminal_snr: bool | None
    schedule_shift: float = 1.0
    schedule: NoiseSchedule | None = None


def read_base(model: str | Path) -> Base:
    """What a model says of itself; only headers and settings are read.

    Raises:
        UserError: see ``load_pipeline``; or its noise schedule cannot be read.
    """
    report = inspect_model(model)
    prediction_type, zero = report.prediction_type, report.zero_terminal_snr
    shift, own = 1.0, None
    if report.format == DIFFUSERS_FOLDER:
        path = report.path / "scheduler" / "scheduler_config.json"
        config = read_scheduler_config(path)
        try:
            # compared as it is sampled: a table may be shifted before the rescaling or after it
            sampled = NoiseSchedule.from_config({**config, "rescale_betas_zero_snr": bool(zero)})
            found = shift_of(sampled)
            if found is None:
                own = NoiseSchedule.from_config({**config, "rescale_betas_zero_snr": False})
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} has no usable noise schedule: {error}") from None
        shift = found or 1.0
        zero = True if sampled.zero_terminal_snr else zero  # the betas themselves may say so
    else:
        shift = shift_of_metadata(report.metadata)
    if zero is None and (
        prediction_type == "epsilon" or (prediction_type is not None and report.architecture not in SDXL_FAMILY)
    ):
        zero = False  # epsilon cannot have it, and SD 2.x was published without
    return Base(report.path, prediction_type, zero, shift, own)


def resolve_objective(
    settings: ObjectiveSettings, base: Base, *, is_adapter: bool, say: Callable[[str], None]
) -> ObjectiveSettings:
    """The settings with prediction type, zero terminal SNR and schedule shift filled in, and a line about them.

    Args:
        settings: as the user gave them; None stands for a default.
        base: what is trained.
        is_adapter: True if an adapter is trained, and not the U-Net itself.
        say: called with each line for the user.

    Raises:
        UserError: an adapter that differs from its base, or whose base does not say what it is.
    """
    chosen = (_as_the_base if is_adapter else _as_the_recipe)(settings, base)
    before = _describe(base.prediction_type, base.zero_terminal_snr, base.schedule_shift, base.schedule)
    after = _describe(chosen.prediction_type, chosen.zero_terminal_snr, chosen.schedule_shift, base.schedule)
    say(f"base: {before} -> trained: {after}")
    if not is_adapter:
        lost = []
        if base.prediction_type == "v_prediction" and chosen.prediction_type == "epsilon":
            lost.append('v-prediction (objective.prediction_type = "epsilon")')
        if base.zero_terminal_snr and not chosen.zero_terminal_snr:
            lost.append("zero terminal SNR (objective.zero_terminal_snr = false)")
        if lost:
            say(f"Warning: the base has {' and '.join(lost)}, which this training takes away")
    return chosen


def _as_the_base(settings: ObjectiveSettings, base: Base) -> ObjectiveSettings:
    """An adapter's objective: the base's, where it says."""
    prediction_type = _agreed(
        "prediction_type", settings.prediction_type, base.prediction_type, base, "what it predicts", '"epsilon"'
    )
    stated = False if prediction_type == "epsilon" and base.zero_terminal_snr is None else base.zero_terminal_snr
    zero = _agreed("zero_terminal_snr", settings.zero_terminal_snr, stated, base, "whether it has zero terminal SNR")
    shift = _agreed("schedule_shift", settings.schedule_shift, base.schedule_shift, base, "its noise schedule")
    return replace(settings, prediction_type=prediction_type, zero_terminal_snr=zero, schedule_shift=shift)


def _agreed(name: str, setting: Any, stated: Any, base: Base, what: str, example: str = "true") -> Any:
    """The value of a setting that the base decides, where it says."""
    if stated is None and setting is None:
        raise UserError(
            f"{base.path} does not say {what}, and an adapter must be trained as its base was: set objective.{name}, "
            f"for example to {example}, as the base's author says"
        )
    if stated is None or setting is None:
        return stated if setting is None else setting
    same = math.isclose(setting, stated, rel_tol=TOLERANCE) if isinstance(stated, float) else setting == stated
    if not same:
        raise UserError(
            f"objective.{name} = {json.dumps(setting)}, but the base {base.path} has {json.dumps(stated)}, and an "
            f"adapter cannot change it: leave objective.{name} out, or train the whole U-Net without model.adapter"
        )
    return stated


def _as_the_recipe(settings: ObjectiveSettings, base: Base) -> ObjectiveSettings:
    """A whole U-Net's objective: v-prediction with zero terminal SNR unless the settings say otherwise."""
    shift = base.schedule_shift if settings.schedule_shift is None else settings.schedule_shift
    chosen = replace(settings, schedule_shift=shift).with_recipe()
    if base.schedule is not None and base.schedule.zero_terminal_snr and not chosen.zero_terminal_snr:
        raise UserError(
            f"{base.path} has a noise schedule of its own, which ends at zero SNR: set objective.zero_terminal_snr to "
            "true"
        )
    return chosen


def _describe(prediction_type: str | None, zero: bool | None, shift: float | None, own: NoiseSchedule | None) -> str:
    snr = {True: "zero terminal SNR", False: "plain", None: "zero terminal SNR or not is not stated"}[zero]
    words = [NAMES[prediction_type] if prediction_type else "prediction type not stated", snr]
    if own is not None:
        words.append("the base's own schedule")
    if shift not in (None, 1):
        words.append(f"sigma x {shift:g}")
    return ", ".join(words)
