"""What each program takes a checkpoint for.

Every program looks for the prediction type in a place of its own, and most of them fall back to epsilon without a word.
Read in the programs' sources: ComfyUI (supported_models.py, sd.py), Forge, reForge and AUTOMATIC1111 (sd_models.py),
SD.Next (sd_detect.py), InvokeAI (model configs), SwarmUI (WorkflowGenerator), diffusers 0.42 (single_file).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import DIFFUSERS_FOLDER, DIFFUSERS_UNET, PREFIXED_UNET, SINGLE_FILE

SDXL_FAMILY = frozenset({"SDXL base", "SSD-1B", "Vega", "KOALA"})


@dataclass(frozen=True)
class Taken:
    """What a program takes a checkpoint for.

    Attributes:
        prediction_type: "v_prediction" or "epsilon"; None if the program does not load such a file, or finds it out
            from the weights.
        zero_terminal_snr: whether it samples with a zero-SNR schedule; None where the prediction type is.
        why: where it looked, in words.
    """

    prediction_type: str | None
    zero_terminal_snr: bool | None
    why: str


@dataclass(frozen=True)
class ProgramRow:
    """One program's reading, beside what the checkpoint is.

    Attributes:
        right: whether that is what the checkpoint is; None if nobody says what it is, or the program finds it out.
        change: what to do about it, "" if nothing.
    """

    program: str
    taken: Taken
    right: bool | None
    change: str

    def __str__(self) -> str:
        taken = self.taken
        if taken.prediction_type is None:
            reading = taken.why
        else:
            snr = "zero SNR" if taken.zero_terminal_snr else "no zero SNR"
            reading = f"{taken.prediction_type}, {snr} ({taken.why})"
        return f"{self.program}: {reading}." + (f" {self.change}" if self.change else "")


@dataclass(frozen=True)
class Marked:
    """What programs look at.

    Attributes:
        form: one of architecture.py's formats.
        names: of the tensors, "v_pred" and "ztsnr" among them.
        scheduler_config: of a diffusers folder, else empty.
    """

    file_name: str
    form: str
    architecture: str
    names: Collection[str]
    metadata: Mapping[str, str]
    scheduler_config: Mapping[str, Any]

    @property
    def is_single_file(self) -> bool:
        return self.form == SINGLE_FILE

    @property
    def is_folder(self) -> bool:
        return self.form == DIFFUSERS_FOLDER


def rows(marked: Marked, prediction_type: str | None, zero_terminal_snr: bool | None) -> tuple[ProgramRow, ...]:
    """One row a program.

    Args:
        prediction_type, zero_terminal_snr: what the checkpoint is, by all its marks together; None if nothing says.
    """
    options = {("v_prediction", True): "--v-pred --ztsnr", ("v_prediction", False): "--v-pred --no-ztsnr"}.get(
        (prediction_type, bool(zero_terminal_snr)), "--no-v-pred --no-ztsnr"
    )
    found = []
    for program, (read, remedy) in PROGRAMS.items():
        taken = read(marked)
        if taken.prediction_type is None or prediction_type is None:
            right = None
        else:
            right = (taken.prediction_type, taken.zero_terminal_snr) == (prediction_type, bool(zero_terminal_snr))
        found.append(ProgramRow(program, taken, right, remedy(marked, options) if right is False else ""))
    return tuple(found)


# ----------------------------------------------------------------------------------------------------------------------
# Where they look


def _by_tensors(marked: Marked, why: str = "tensors v_pred and ztsnr") -> Taken:
    """ztsnr without v_pred does nothing."""
    v_prediction = "v_pred" in marked.names
    return Taken("v_prediction" if v_prediction else "epsilon", v_prediction and "ztsnr" in marked.names, why)


def _by_scheduler_config(marked: Marked) -> Taken:
    config = marked.scheduler_config
    prediction_type = config.get("prediction_type", "epsilon")
    return Taken(prediction_type, bool(config.get("rescale_betas_zero_snr", False)), "scheduler_config.json")


def _not_loaded(what: str) -> Taken:
    return Taken(None, None, f"does not load {what}")


def _comfyui(marked: Marked) -> Taken:
    if marked.is_folder:
        return Taken("epsilon", False, "its diffusers loader reads no marks")
    if marked.form in (PREFIXED_UNET, DIFFUSERS_UNET):
        return Taken("epsilon", False, "its loader drops the marks of such U-Net files")
    if marked.architecture == "SD 2.x":
        return Taken(None, None, "guesses v-prediction from a weight, never zero SNR")
    if marked.architecture not in SDXL_FAMILY:
        return Taken("epsilon", False, f"takes every {marked.architecture} for epsilon")
    return _by_tensors(marked)


def _webui(marked: Marked) -> Taken:
    if not marked.is_single_file:
        return _not_loaded(f"a {marked.form} as a checkpoint")
    if marked.architecture == "SD 2.x":
        return Taken(None, None, "finds the prediction out by a try; zero SNR by the tensor ztsnr")
    return _by_tensors(marked)


def _sdnext(marked: Marked) -> Taken:
    if marked.is_folder:
        return _by_scheduler_config(marked)
    if not marked.is_single_file:
        return _not_loaded(f"a {marked.form} as a checkpoint")
    name = marked.file_name.lower()
    if "vpred" in name or "v-pred" in name:
        return Taken("v_prediction", "ztsnr" in marked.names, "the file's name")
    return _by_tensors(marked)


def _invokeai(marked: Marked) -> Taken:
    if marked.is_folder:
        return _by_scheduler_config(marked)
    if not marked.is_single_file:
        return _not_loaded(f"a {marked.form}")
    return Taken("epsilon", False, "takes every single file for epsilon")


def _swarmui(marked: Marked) -> Taken:
    said = marked.metadata.get("modelspec.prediction_type")
    if said in ("v", "v-zsnr"):
        return Taken("v_prediction", said == "v-zsnr", f"modelspec.prediction_type {said}")
    if said in ("epsilon", "eps"):
        return Taken("epsilon", False, f"modelspec.prediction_type {said}")
    taken = _comfyui(marked)
    return Taken(taken.prediction_type, taken.zero_terminal_snr, f"as ComfyUI: {taken.why}")


def _diffusers_file(marked: Marked) -> Taken:
    if marked.is_folder:
        return _not_loaded("folders by from_single_file")
    if not marked.is_single_file:
        return _not_loaded(f"a {marked.form} as a pipeline")
    return Taken("epsilon", False, "from_single_file reads no marks")


def _diffusers_folder(marked: Marked) -> Taken:
    return _by_scheduler_config(marked) if marked.is_folder else _not_loaded("files by from_pretrained")


# ----------------------------------------------------------------------------------------------------------------------
# What to do about it, given what the checkpoint is


def _mark(marked: Marked, options: str) -> str:
    return f"Run: ztsnr mark {options}."


def _mark_or_node(marked: Marked, options: str) -> str:
    if marked.is_single_file and marked.architecture in SDXL_FAMILY:
        return _mark(marked, options)
    if marked.is_folder:
        return "Convert it to a single file (ztsnr convert), or set ZTSNR Model (v-prediction) by hand."
    return "Load it with the node Load Checkpoint (ZTSNR), or set ZTSNR Model (v-prediction) by hand."


def _mark_for_swarm(marked: Marked, options: str) -> str:
    return f"Run: ztsnr mark {options} --swarm."


def _mark_folder(marked: Marked, options: str) -> str:
    return _mark(marked, options) if marked.is_folder else "Convert it to a diffusers folder (ztsnr convert)."


def _mark_and_rename(marked: Marked, options: str) -> str:
    return f"Run: ztsnr mark {options}. It believes the file's name before the marks."


def _set_scheduler(marked: Marked, options: str) -> str:
    return "Give the pipeline ZTSNRScheduler.from_config(..., prediction_type=..., rescale_betas_zero_snr=...)."


PROGRAMS: dict[str, tuple[Callable[[Marked], Taken], Callable[[Marked, str], str]]] = {
    "ComfyUI": (_comfyui, _mark_or_node),
    "Forge, reForge": (_webui, _mark),
    "AUTOMATIC1111 (dev)": (_webui, _mark),
    "SD.Next": (_sdnext, _mark_and_rename),
    "InvokeAI": (_invokeai, _mark_folder),
    "SwarmUI": (_swarmui, _mark_for_swarm),
    "diffusers, single file": (_diffusers_file, _set_scheduler),
    "diffusers, folder": (_diffusers_folder, _mark_folder),
}
