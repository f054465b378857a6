"""What each program takes a checkpoint for.

Every program looks for the prediction type in a place of its own, and most of them fall back to epsilon without a word.
Read in the programs' sources of 2025 and 2026: ComfyUI 0.33 (comfy/supported_models.py, sd.py), Forge
(backend/loader.py, modules/processing.py, huggingface_guess), reForge (modules_forge/forge_loader.py),
AUTOMATIC1111 dev (modules/sd_models_config.py, sd_models.py), SD.Next (modules/sd_models.py, sd_samplers_diffusers.py),
InvokeAI 6.14 (model_manager/configs/main.py, denoise_latents.py), SwarmUI (T2IModelHandler.cs,
WorkflowGeneratorModelSupport.cs), diffusers 0.42 (loaders/single_file_utils.py).
"""

from dataclasses import replace

from .architecture import DIFFUSERS_UNET, PREFIXED_UNET
from .header import shorten
from .reading import SDXL_FAMILY, Marked, Program, ProgramRow, Taken, scales_by_one_number

SWARM_KEYS = ("modelspec.prediction_type", "prediction_type")  # where SwarmUI looks in the metadata


def rows(marked: Marked, prediction_type: str | None, zero_terminal_snr: bool | None) -> tuple[ProgramRow, ...]:
    """One row for each program.

    Args:
        prediction_type, zero_terminal_snr: what the checkpoint is, by all its marks together; None if nothing says.
    """
    return tuple(program.row(marked, prediction_type, zero_terminal_snr) for program in PROGRAMS.values())


# ----------------------------------------------------------------------------------------------------------------------
# Where they look


def _by_tensors(marked: Marked) -> Taken:
    """The tensors of an SDXL file; ztsnr without v_pred does nothing."""
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
        return Taken("epsilon", False, f"loads every {marked.architecture} file as epsilon")
    return _by_tensors(marked)


def _webui(marked: Marked) -> Taken:
    """The tensors alone.  Unlike ComfyUI, these programs rescale for ztsnr whatever the prediction is."""
    if not marked.is_single_file:
        return _not_loaded(f"a {marked.form} as a checkpoint")
    if marked.architecture == "SD 2.x":
        return Taken(None, None, "guesses the prediction from the weights; zero SNR from the tensor ztsnr")
    zero_terminal_snr = "ztsnr" in marked.names
    if marked.architecture not in SDXL_FAMILY:
        return Taken(
            "epsilon", zero_terminal_snr, f"without a .yaml beside it, every {marked.architecture} file is epsilon"
        )
    return Taken(_by_tensors(marked).prediction_type, zero_terminal_snr, "tensors v_pred and ztsnr")


def _forge(marked: Marked) -> Taken:
    """A .yaml beside the file can only add v-prediction."""
    taken = _webui(marked)
    if marked.has_yaml and taken.prediction_type == "epsilon":
        return Taken(None, None, "v-prediction if the .yaml beside it says so; zero SNR from the tensor ztsnr")
    return taken


def _automatic1111(marked: Marked) -> Taken:
    """A .yaml beside the file is believed before the tensors."""
    taken = _webui(marked)
    if marked.has_yaml and taken.prediction_type is not None:
        return Taken(None, None, "believes the .yaml beside it before v_pred; zero SNR from the tensor ztsnr")
    return taken


def _sdnext(marked: Marked) -> Taken:
    """Its samplers other than Default take zero SNR from their option "rescale", whatever the model is."""
    if marked.is_folder:
        return _by_scheduler_config(marked)
    if not marked.is_single_file:
        return _not_loaded(f"a {marked.form} as a checkpoint")
    taken = _by_name(marked.file_name.lower()) or _by_tensors(marked)
    if taken.prediction_type == "epsilon" and marked.architecture == "SD 2.x":
        return Taken("v_prediction", False, "loads every SD 2.x file as v-prediction")
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
        return Taken("v_prediction", False, "loads every SD 2.x file as v-prediction unless its settings say otherwise")
    return Taken("epsilon", False, "loads every single file as epsilon unless its settings say otherwise")


def _swarmui(marked: Marked) -> Taken:
    """The metadata's word goes to ComfyUI's node ModelSamplingDiscrete; without one ComfyUI decides."""
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
    return Taken(None, None, f"{key} {shorten(said)}, which means neither v-prediction nor epsilon there")


def _diffusers_file(marked: Marked) -> Taken:
    if marked.is_folder:
        return _not_loaded("folders by from_single_file")
    if not marked.is_single_file:
        return _not_loaded(f"a {marked.form} as a pipeline")
    if marked.architecture == "SD 2.x":
        return Taken("v_prediction", False, "from_single_file reads no marks, and loads SD 2.x as SD 2.1")
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
        return "Convert it to a single file (ztsnr convert), or set the node ZTSNR Model (v-prediction) by hand."
    return "Load it with the node Load Checkpoint (ZTSNR), or set the node ZTSNR Model (v-prediction) by hand."


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
        return "Rename it: SD.Next believes words in the name (vpred, v-pred, v_pred, flow) before the marks."
    if options.startswith("--no-v-pred"):
        return "Set the prediction method of its sampler by hand."
    return _mark(marked, options)


def _set_scheduler(marked: Marked, options: str) -> str:
    return "Give the pipeline ZTSNRScheduler.from_config(..., prediction_type=..., rescale_betas_zero_snr=...)."


# ----------------------------------------------------------------------------------------------------------------------
# Which of them scale latents as the checkpoint says


def _ignores_scaling(marked: Marked) -> bool:
    return False


def _scales_sdxl(marked: Marked) -> bool:
    """diffusers' SDXL pipelines apply the mean and std of each channel, those of SD 1.x and 2.x one number only."""
    return bool(scales_by_one_number(marked)) or marked.architecture in SDXL_FAMILY


# ----------------------------------------------------------------------------------------------------------------------
# The registry: to add a program, add its entry, and run docs/render_programs.py

_PROGRAMS = (
    Program(
        "ComfyUI",
        read=_comfyui,
        remedy=_mark_or_node,
        scales_latents=_ignores_scaling,
        looks_at="the empty tensors `v_pred` and `ztsnr` of SDXL files; `ztsnr` alone does nothing; drops both from "
        "U-Net files with single-file or diffusers names; guesses SD 2.x from a weight, and loads SD 1.x as epsilon",
        what_to_do="`ztsnr mark`, or the node Load Checkpoint (ZTSNR)",
    ),
    Program(
        "Forge, reForge",
        read=_forge,
        remedy=_mark_or_yaml,
        looks_at="the same tensors of SDXL files, `ztsnr` also without `v_pred`; a `.yaml` of the same name beside the "
        "file can add v-prediction, and for SD 1.x nothing else can; guesses SD 2.x from the weights",
        what_to_do="`ztsnr mark`",
    ),
    Program(
        "AUTOMATIC1111 (dev)",
        read=_automatic1111,
        remedy=_mark_or_yaml,
        looks_at="the same, but believes such a `.yaml` before the tensor `v_pred`",
        what_to_do="`ztsnr mark`, and remove a wrong `.yaml`",
    ),
    Program(
        "SD.Next",
        read=_sdnext,
        remedy=_mark_or_rename,
        looks_at='words in the file\'s name first: "vpred", "v-pred" or "v_pred" is v-prediction with zero SNR, "flow" '
        'is flow matching; then the tensors. Zero SNR works in its sampler Default; others need their option "rescale"',
        what_to_do="`ztsnr mark`, and choose the name with care",
    ),
    Program(
        "InvokeAI",
        read=_invokeai,
        remedy=_mark_folder,
        looks_at="a folder's `scheduler_config.json`; loads every single file as epsilon, SD 2.x as v-prediction; its "
        "settings can change that, but not zero SNR",
        what_to_do="`ztsnr convert` to a folder",
    ),
    Program(
        "SwarmUI",
        read=_swarmui,
        remedy=_mark_for_swarm,
        looks_at="`modelspec.prediction_type` in the header, or in a `.json` beside the file; `v` turns zero SNR off, "
        "`v-zsnr` on; without either as ComfyUI",
        what_to_do="`ztsnr mark --swarm`",
    ),
    Program(
        "diffusers, single file",
        read=_diffusers_file,
        remedy=_set_scheduler,
        looks_at="no marks: epsilon, and SD 2.x v-prediction",
        what_to_do="`ZTSNRScheduler.from_config(..., prediction_type=..., rescale_betas_zero_snr=True)`, or load with "
        "`ztsnr.checkpoints.load_pipeline`",
    ),
    Program(
        "diffusers, folder",
        read=_diffusers_folder,
        remedy=_mark_folder,
        scales_latents=_scales_sdxl,
        looks_at="`scheduler_config.json`",
        what_to_do="`ztsnr mark FOLDER --in-place`",
    ),
)
PROGRAMS: dict[str, Program] = {program.name: program for program in _PROGRAMS}
