"""What each program takes a checkpoint for.

Every program looks for the prediction type in a place of its own, and most of them fall back to epsilon without a word.
Read in the programs' sources of 2025 and 2026: ComfyUI 0.33 (comfy/supported_models.py, sd.py), Forge
(backend/loader.py, modules/processing.py, huggingface_guess), reForge (modules_forge/forge_loader.py),
AUTOMATIC1111 dev (modules/sd_models_config.py, sd_models.py), SD.Next (modules/sd_models.py, sd_samplers_diffusers.py),
InvokeAI 6.14 (model_manager/configs/main.py, denoise_latents.py), SwarmUI (T2IModelHandler.cs,
WorkflowGeneratorModelSupport.cs), diffusers 0.42 (loaders/single_file_utils.py).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .architecture import DIFFUSERS_FOLDER, DIFFUSERS_UNET, PREFIXED_UNET, SINGLE_FILE
from .header import shorten
from .latent_scaling import LatentScaling

SDXL_FAMILY = frozenset({"SDXL base", "SSD-1B", "Vega", "KOALA"})
SWARM_KEYS = ("modelspec.prediction_type", "prediction_type")  # where SwarmUI looks in the metadata


@dataclass(frozen=True)
class Taken:
    """What a program takes a checkpoint for.

    Attributes:
        prediction_type: "v_prediction", "epsilon" or "flow_prediction"; None if the program does not load such a file,
            or looks where this package does not: into the weights, or a configuration file.
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
        right: whether that is what the checkpoint is; None if the checkpoint does not say enough, or the program looks
            elsewhere.
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
        has_yaml: whether a .yaml file of the same name lies beside it.
        latent_scaling: of its latents, where it is not the published one.
    """

    file_name: str
    form: str
    architecture: str
    names: Collection[str]
    metadata: Mapping[str, str]
    scheduler_config: Mapping[str, Any]
    has_yaml: bool = False
    latent_scaling: LatentScaling | None = None

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
    options = {
        ("v_prediction", True): "--v-pred --ztsnr",
        ("v_prediction", False): "--v-pred --no-ztsnr",
        ("v_prediction", None): "--v-pred",
    }.get((prediction_type, zero_terminal_snr), "--no-v-pred --no-ztsnr")
    found = []
    for program, (read, remedy) in PROGRAMS.items():
        taken = read(marked)
        right = _is_right(taken, prediction_type, zero_terminal_snr)
        change = remedy(marked, options) if right is False else ""
        if taken.prediction_type is not None and not (scales := _scales_latents(program, marked)):
            right = False if scales is False else right and None
            change = f"{change} {_LATENTS[scales]}".strip()
        found.append(ProgramRow(program, taken, right, change))
    return tuple(found)


def _is_right(taken: Taken, prediction_type: str | None, zero_terminal_snr: bool | None) -> bool | None:
    if taken.prediction_type is None or prediction_type is None:
        return None
    if taken.prediction_type != prediction_type:
        return False
    if prediction_type == "epsilon":  # which cannot have zero SNR
        zero_terminal_snr = bool(zero_terminal_snr)
    return None if zero_terminal_snr is None else taken.zero_terminal_snr == zero_terminal_snr


_LATENTS = {
    False: "It does not scale latents as this one says, so that colours are wrong: load a file with the node Load "
    "Checkpoint (ZTSNR), a folder of SDXL with diffusers.",
    None: "Whether it scales latents as the folder says is not known here.",
}


def _scales_latents(program: str, marked: Marked) -> bool | None:
    """Whether a program scales latents as the checkpoint says; None if that is not known here."""
    if marked.latent_scaling is None:
        return True
    if not marked.is_folder or program == "ComfyUI":  # the names in the metadata are this package's own
        return False
    if marked.latent_scaling.scaling_factor is not None:  # one number, which every pipeline takes from the config
        return True
    return marked.architecture in SDXL_FAMILY if program == "diffusers, folder" else None


# ----------------------------------------------------------------------------------------------------------------------
# Where they look


def _by_tensors(marked: Marked) -> Taken:
    """ztsnr without v_pred does nothing."""
    v_prediction = "v_pred" in marked.names
    return Taken(
        "v_prediction" if v_prediction else "epsilon",
        v_prediction and "ztsnr" in marked.names,
        "tensors v_pred and ztsnr",
    )


def _by_scheduler_config(marked: Marked) -> Taken:
    config = marked.scheduler_config
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("v_prediction", "epsilon"):
        return Taken(None, None, f"scheduler_config.json says {shorten(str(prediction_type))}")
    return Taken(prediction_type, bool(config.get("rescale_betas_zero_snr", False)), "scheduler_config.json")


def _not_loaded(what: str) -> Taken:
    return Taken(None, None, f"does not load {what}")


def _comfyui(marked: Marked) -> Taken:
    if marked.architecture == "SD 2.x":
        return Taken(None, None, "guesses v-prediction from a weight, never zero SNR")
    if marked.is_folder:
        return Taken("epsilon", False, "its diffusers loader reads no marks")
    if marked.form in (PREFIXED_UNET, DIFFUSERS_UNET):
        return Taken("epsilon", False, "its loader drops the marks of such U-Net files")
    if marked.architecture not in SDXL_FAMILY:
        return Taken("epsilon", False, f"takes every {marked.architecture} for epsilon")
    return _by_tensors(marked)


def _webui(marked: Marked) -> Taken:
    """By the tensors alone.  Unlike ComfyUI they rescale for ztsnr whatever the prediction is."""
    if not marked.is_single_file:
        return _not_loaded(f"a {marked.form} as a checkpoint")
    if marked.architecture == "SD 2.x":
        return Taken(None, None, "finds the prediction out from the weights; zero SNR by the tensor ztsnr")
    zero_terminal_snr = "ztsnr" in marked.names
    if marked.architecture not in SDXL_FAMILY:
        return Taken(
            "epsilon", zero_terminal_snr, f"no .yaml beside it, and so epsilon for every {marked.architecture}"
        )
    return Taken(_by_tensors(marked).prediction_type, zero_terminal_snr, "tensors v_pred and ztsnr")


def _forge(marked: Marked) -> Taken:
    """A .yaml beside the file can only add v-prediction."""
    taken = _webui(marked)
    if marked.has_yaml and taken.prediction_type == "epsilon":
        return Taken(None, None, "v-prediction if the .yaml beside it says so; zero SNR by the tensor ztsnr")
    return taken


def _automatic1111(marked: Marked) -> Taken:
    """A .yaml beside the file is believed before the tensors."""
    taken = _webui(marked)
    if marked.has_yaml and taken.prediction_type is not None:
        return Taken(None, None, "believes the .yaml beside it before the tensor v_pred; zero SNR by the tensor ztsnr")
    return taken


def _sdnext(marked: Marked) -> Taken:
    """Its samplers other than Default set zero SNR by an option of theirs, "rescale", whatever the model is."""
    if marked.is_folder:
        return _by_scheduler_config(marked)
    if not marked.is_single_file:
        return _not_loaded(f"a {marked.form} as a checkpoint")
    taken = _by_name(marked.file_name.lower()) or _by_tensors(marked)
    if taken.prediction_type == "epsilon" and marked.architecture == "SD 2.x":
        return Taken("v_prediction", False, "takes every SD 2.x file for v-prediction")
    return taken


def _by_name(name: str) -> Taken | None:
    """SD.Next's words, in its order."""
    if "bigaspv25" in name or "noobai-rf" in name or ("flow" in name and "flower" not in name):
        return Taken("flow_prediction", False, "the file's name")
    if any(word in name for word in ("vpred", "v-pred", "v_pred")):
        return Taken("v_prediction", True, "the file's name")
    return None


def _invokeai(marked: Marked) -> Taken:
    if marked.is_folder:
        return _by_scheduler_config(marked)
    if not marked.is_single_file:
        return _not_loaded(f"a {marked.form}")
    if marked.architecture == "SD 2.x":
        return Taken(
            "v_prediction", False, "takes every SD 2.x file for v-prediction unless its settings say otherwise"
        )
    return Taken("epsilon", False, "takes every single file for epsilon unless its settings say otherwise")


def _swarmui(marked: Marked) -> Taken:
    """Whatever the metadata say goes to ComfyUI's node ModelSamplingDiscrete; without it ComfyUI decides."""
    if marked.is_folder:
        return _not_loaded("folders")
    key = next((key for key in SWARM_KEYS if marked.metadata.get(key, "").strip()), None)
    if key is None:
        taken = _comfyui(marked)
        return Taken(taken.prediction_type, taken.zero_terminal_snr, f"as ComfyUI: {taken.why}")
    said = marked.metadata[key]
    if said in ("v", "v-zsnr", "v_prediction"):
        return Taken("v_prediction", said == "v-zsnr", f"{key} {said}")
    if said in ("epsilon", "eps"):
        return Taken("epsilon", False, f"{key} {said}")
    return Taken(None, None, f"{key} {shorten(said)}, which is neither v-prediction nor epsilon there")


def _diffusers_file(marked: Marked) -> Taken:
    if marked.is_folder:
        return _not_loaded("folders by from_single_file")
    if not marked.is_single_file:
        return _not_loaded(f"a {marked.form} as a pipeline")
    if marked.architecture == "SD 2.x":
        return Taken("v_prediction", False, "from_single_file reads no marks, and takes SD 2.x for SD 2.1")
    return Taken("epsilon", False, "from_single_file reads no marks")


def _diffusers_folder(marked: Marked) -> Taken:
    if not marked.is_folder:
        return _not_loaded("files by from_pretrained")
    taken = _by_scheduler_config(marked)
    if marked.scheduler_config.get("_class_name") == "ZTSNRScheduler":  # diffusers imports no libraries of strangers
        return replace(taken, why=f"{taken.why}; loads after `from ztsnr.samplers import ZTSNRScheduler`")
    return taken


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


def _mark_or_yaml(marked: Marked, options: str) -> str:
    if marked.architecture in SDXL_FAMILY:
        return _mark(marked, options)
    return f"Run: ztsnr mark {options}, and for v-prediction put a .yaml with `parameterization: v` beside the file."


def _mark_for_swarm(marked: Marked, options: str) -> str:
    zero_terminal_snr = options == "--v-pred --ztsnr"
    return _mark(marked, f"{options} --swarm" if zero_terminal_snr else options)


def _mark_folder(marked: Marked, options: str) -> str:
    return _mark(marked, options) if marked.is_folder else "Convert it to a diffusers folder (ztsnr convert)."


def _mark_or_rename(marked: Marked, options: str) -> str:
    if marked.is_folder:
        return _mark(marked, options)
    if _by_name(marked.file_name.lower()):
        return "Rename it: words in the name (vpred, v-pred, v_pred, flow) are believed before the marks."
    if options.startswith("--no-v-pred"):
        return "Set the prediction method of its sampler by hand."
    return _mark(marked, options)


def _set_scheduler(marked: Marked, options: str) -> str:
    return "Give the pipeline ZTSNRScheduler.from_config(..., prediction_type=..., rescale_betas_zero_snr=...)."


PROGRAMS: dict[str, tuple[Callable[[Marked], Taken], Callable[[Marked, str], str]]] = {
    "ComfyUI": (_comfyui, _mark_or_node),
    "Forge, reForge": (_forge, _mark_or_yaml),
    "AUTOMATIC1111 (dev)": (_automatic1111, _mark_or_yaml),
    "SD.Next": (_sdnext, _mark_or_rename),
    "InvokeAI": (_invokeai, _mark_folder),
    "SwarmUI": (_swarmui, _mark_for_swarm),
    "diffusers, single file": (_diffusers_file, _set_scheduler),
    "diffusers, folder": (_diffusers_folder, _mark_folder),
}
