"""Convert single files to diffusers folders.

The names and shapes of a network's tensors come from diffusers' and transformers' own classes, built from the settings
without memory; layouts.py says which tensors of the single file each is made of.  Tensors are streamed, so a model of
any size needs a few megabytes.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

from ..errors import UserError
from ..files import atomic_folder, check_new
from .components import NETWORKS
from .folder import weights_file
from .header import Header, read_header
from .latent_scaling import LatentScaling
from .layouts import (
    CLIP,
    OPEN_CLIP,
    SDXL_CLIP,
    SDXL_OPEN_CLIP,
    UNET,
    VAE,
    Recipe,
    clip_layout,
    list_names,
    open_clip_layout,
    unet_layout,
    vae_layout,
)
from .pipeline import loading, rebuild_scheduler, set_latent_scaling, settings_folder, settle
from .schedule_shift import set_shift, shift_of_metadata
from .stream import DTYPE_NAMES, FLOATS, TensorStream, cast, dtype_name, stored, transposed, write_tensors
from .supported import inspect_file, left_out, pipeline_class, read_index

Shape = tuple[int, ...]

_DTYPES = {name: str(dtype).removeprefix("torch.") for dtype, name in DTYPE_NAMES.items()}


def to_folder(
    file: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
) -> None:
    """Write a single file as a diffusers folder whose scheduler says what the model is.

    For a model with zero terminal SNR the scheduler begins at the last timestep (``timestep_spacing="trailing"``), and
    is diffusers' Euler where the published one cannot rescale.

    A latent scaling in the file's metadata (``LatentScaling``) goes into vae/config.json; without one that of the
    settings stays.  A shift of the schedule goes into the scheduler's betas.

    What diffusers does not use is left out: moving averages, noise schedules, the last layer of SD 2.x's text encoder.

    Args:
        file: a .safetensors or .sft file with everything in it.
        out: a folder that does not exist yet.
        config: the diffusers folder, or its name on the Hub, whose settings and tokenizers complete the file; by
            default those of the first model of its kind, from the Hub or its cache.
        dtype: float32, float16 or bfloat16; by default each tensor's own, and float32 for tensors of other types.
        prediction_type, zero_terminal_snr: override what the file says.

    Raises:
        UserError: not a whole model of a supported kind, or a damaged file; a missing tensor, or one whose shape does
            not fit the settings; prediction_type and zero_terminal_snr that contradict each other; settings that cannot
            be downloaded; a number too large for the dtype; ``out`` exists or cannot be written.
    """
    file, out = Path(file), Path(out)
    check_new(out)
    wanted = dtype_name(dtype)
    if file.is_dir():
        raise UserError(f"{file} is already a folder: give a single file")
    report = inspect_file(file)
    said = settle(report, prediction_type, zero_terminal_snr)
    scaling, shift = LatentScaling.from_metadata(report.metadata), shift_of_metadata(report.metadata)
    settings = settings_folder(report, config)
    pipeline = _empty_pipeline(settings)
    set_scheduler(pipeline, said["prediction_type"], said["zero_terminal_snr"])
    set_shift(pipeline, shift)
    if scaling is not None:
        set_latent_scaling(pipeline, scaling)
    networks = {part: network for part, network in pipeline.components.items() if part in NETWORKS}
    index, tokenizers = _model_index(pipeline, settings), _read_tokenizers(settings)
    tensors = _folder_tensors(file, networks, settings, wanted)
    with atomic_folder(out) as folder:
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        for path, content in tokenizers.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        for part, network in networks.items():
            _save_settings(network, folder / part, {tensor.dtype for tensor in tensors[part].values()})
            with weights_file(folder / part).open("wb") as opened:
                write_tensors(opened, tensors[part], {"format": "pt"}, hashed=False)


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def _empty_pipeline(settings: Path) -> DiffusionPipeline:
    """The pipeline of a diffusers folder, without tokenizers and with networks that have no data."""
    kind = pipeline_class(settings)
    networks = {part: network for part, network in NETWORKS.items() if part in kind._get_signature_types()}
    with loading(settings):
        return kind.from_pretrained(
            settings,
            local_files_only=True,
            **{part: _empty_network(network, settings, part) for part, network in networks.items()},
            **{part: None for part in kind._get_signature_types() if part.startswith("tokenizer")},
            **left_out(kind),
        )


def _empty_network(kind: Any, settings: Path, part: str) -> torch.nn.Module:
    place = {"subfolder": part, "local_files_only": True}
    with torch.device("meta"):
        if part.startswith("text_encoder"):
            return kind(kind.config_class.from_pretrained(settings, **place))
        return kind.from_config(kind.load_config(settings, **place))


def set_scheduler(pipeline: DiffusionPipeline, prediction_type: str, zero_terminal_snr: bool) -> None:
    """Give the pipeline a scheduler that says what the model is and can run it."""
    rebuild_scheduler(pipeline, prediction_type, zero_terminal_snr)
    if zero_terminal_snr:
        kind = type(pipeline.scheduler)
        if "rescale_betas_zero_snr" not in kind._get_init_keys(kind):
            kind = EulerDiscreteScheduler
        config = {**pipeline.scheduler.config, "_use_default_values": []}
        pipeline.register_modules(scheduler=kind.from_config(config, timestep_spacing="trailing"))


def _model_index(pipeline: DiffusionPipeline, settings: Path) -> dict:
    """The model_index.json that diffusers would write, with the tokenizers that the pipeline lacks."""
    index = json.loads(pipeline.to_json_string())
    index.pop("_name_or_path", None)  # where the settings lie
    return index | {part: said for part, said in read_index(settings).items() if part.startswith("tokenizer")}


def _read_tokenizers(settings: Path) -> dict[Path, bytes]:
    """The tokenizers' files: path within the folder -> content."""
    with loading(settings):
        return {
            path.relative_to(settings): path.read_bytes()
            for path in sorted(settings.glob("tokenizer*/*"))
            if path.suffix in (".json", ".txt")
        }


def _save_settings(network: Any, folder: Path, dtypes: set[str]) -> None:
    """Write a network's config.json as its ``save_pretrained`` does."""
    if hasattr(network, "save_config"):  # of diffusers, not of transformers
        network.save_config(folder)
        return
    config = network.config
    config.architectures = [type(network).__name__]
    (dtype,) = dtypes if len(dtypes) == 1 else ["F32"]
    # in which it is loaded again; transformers before 4.56 called it otherwise
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", _DTYPES[dtype])
    config.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


def _folder_tensors(
    file: Path, networks: dict[str, torch.nn.Module], settings: Path, dtype: str | None
) -> dict[str, dict[str, TensorStream]]:
    """Part of the folder -> the tensors of its network."""
    header = read_header(file)
    tensors = {}
    for part, (prefix, make_layout) in _places(header.tensors, networks).items():
        shapes = {name: tuple(tensor.shape) for name, tensor in networks[part].state_dict().items()}
        try:
            layout = {prefix + name: recipe for name, recipe in make_layout(shapes).items()}
        except UserError as error:
            raise UserError(f"the settings in {settings} do not fit any single file: {error}") from None
        if missing := sorted(layout.keys() - header.tensors.keys()):
            raise UserError(f"{file} lacks {list_names(missing)}, which the settings in {settings} require")
        made = {}
        for name, recipe in layout.items():
            made |= _take_apart(file, header, name, recipe, shapes)
        tensors[part] = {name: _cast(tensor, dtype) for name, tensor in sorted(made.items())}
    return tensors


def _places(names: Collection[str], parts: Collection[str]) -> dict[str, tuple[str, Callable]]:
    """Part of the folder -> what its names begin with in the single file, and its layout."""

    def clip(prefix: str) -> tuple[str, Callable]:
        old = prefix.removesuffix("text_model.")  # which old files lack, and those written by way of transformers 5.6
        return (old if f"{old}final_layer_norm.weight" in names else prefix), clip_layout

    vae = "vae." if any(name.startswith("vae.") for name in names) else VAE
    places = {"unet": (UNET, unet_layout), "vae": (vae, vae_layout)}
    if "text_encoder_2" in parts:
        return places | {"text_encoder": clip(SDXL_CLIP), "text_encoder_2": (SDXL_OPEN_CLIP, open_clip_layout)}
    if any(name.startswith(OPEN_CLIP) for name in names):
        return places | {"text_encoder": (OPEN_CLIP, open_clip_layout)}
    return places | {"text_encoder": clip(CLIP)}


def _take_apart(
    file: Path, header: Header, name: str, recipe: Recipe, shapes: dict[str, Shape]
) -> dict[str, TensorStream]:
    """The tensors of the folder, of the given shapes, that one tensor of the single file holds."""
    entry = header.tensors[name]
    shape, first = entry.shape, shapes[recipe.sources[0]]
    while recipe.convolution and len(shape) > 2 and shape[-1] == 1:  # of one pixel, which some files keep as a matrix
        shape = shape[:-1]
    expected = first[::-1] if recipe.transposed else (sum(shapes[source][0] for source in recipe.sources), *first[1:])
    if shape != expected:
        raise UserError(f"{file}: {name} has the shape {entry.shape}, but the settings require {expected}")
    if entry.dtype not in FLOATS:
        raise UserError(f"{file}: {name} has the type {entry.dtype}, which weights cannot have")
    if recipe.transposed:
        return {source: transposed(stored(file, header, name)) for source in recipe.sources}
    tensors, row = {}, 0
    for source in recipe.sources:
        rows = range(row, row + shapes[source][0])
        tensors[source] = replace(stored(file, header, name, rows), shape=shapes[source])
        row = rows.stop
    return tensors


def _cast(tensor: TensorStream, dtype: str | None) -> TensorStream:
    """Cast to the type asked for; without one, keep the tensor's own type if folders can have it."""
    return cast(tensor, dtype or (tensor.dtype if tensor.dtype in _DTYPES else "F32"))
