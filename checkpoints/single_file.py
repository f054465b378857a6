"""Convert diffusers folders to single files, as CompVis and Stability AI publish them.

Tensors are streamed from the folder's files, so a model of any size needs a few megabytes.  diffusers_folder.py is the
way back.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import UserError
from ..files import atomic_write, check_new
from .architecture import SUPPORTED, is_sdxl
from .folder import read_weights
from .header import SUFFIXES, read_header, shorten
from .inspect import DIFFUSERS_FOLDER, CheckpointReport, inspect_checkpoint
from .latent_scaling import METADATA, LatentScaling
from .layouts import (
    CLIP,
    OPEN_CLIP,
    POSITION_IDS,
    SDXL_CLIP,
    SDXL_OPEN_CLIP,
    UNET,
    VAE,
    Layout,
    Recipe,
    clip_layout,
    list_names,
    open_clip_layout,
    unet_layout,
    vae_layout,
)
from .markers import modelspec_architecture
from .schedule_shift import shift_of_folder, with_shift
from .stream import DTYPE_NAMES, TensorStream, cast, dtype_name, made, stacked, stored, transposed, write_tensors

Tensors = dict[str, TensorStream]

# the largest that CLIP is trained with; diffusers does not keep it, and no sampler reads it
_LOGIT_SCALE = math.log(100)
# what trainers leave in single files beside the networks: a moving average of the U-Net, and tables of its schedule
_AVERAGE = "model_ema."
_TABLES = {
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("lvlb_weights", "logvar", "denoiser.sigmas", "denoiser.log_sigmas"),
}
_SAYING_WHAT_IT_PREDICTS = (
    *("modelspec.prediction_type", "modelspec.predict_key"),
    *("ss_v_parameterization", "ss_zero_terminal_snr"),
)


def to_single_file(
    folder: str | Path, out: str | Path, *, dtype: torch.dtype | None = None, base: str | Path | None = None
) -> None:
    """Write a diffusers folder of SD 1.x, SD 2.x or the SDXL family as a single file, marked as what it is.

    Prediction type and zero terminal SNR come from the folder's scheduler_config.json and are written where programs
    look for them: the tensors ``v_pred`` and ``ztsnr``, and ``modelspec.prediction_type``.  A latent scaling that is
    not the published one (``LatentScaling``) comes from its vae/config.json, and a shift of the schedule
    (schedule_shift.py) from its scheduler; both are written as metadata.

    Of SD 2.x's text encoder a diffusers folder keeps the layers that are used, 23 of 24, and so does the single file.

    Args:
        folder: with U-Net, VAE, text encoders and scheduler; with ``base`` the U-Net and the scheduler are enough.
        out: a .safetensors file that does not exist yet.
        dtype: float32, float16 or bfloat16; by default each tensor's own.
        base: a single file to copy everything but the U-Net from, byte by byte.  The U-Net is then cast to the types
            of the base's own, unless ``dtype`` says otherwise; nothing else is cast.  The base's latent scaling stays
            unless the folder's VAE config names another.  What belongs to the base's own U-Net is left out
            (``left_behind``).

    Raises:
        UserError: the folder is not such a model, or lacks a part, or has tensors that a single file has no place for;
            the base has another U-Net; a number too large for the dtype; a VAE's config that cannot be used; ``out``
            exists or cannot be written.
    """
    folder, out = Path(folder), Path(out)
    check_new_file(out, dtype)
    report = inspect_folder(folder)
    wanted = dtype_name(dtype)
    if base is None:
        tensors, metadata = single_file_tensors(folder), {}
        if wanted is not None:
            tensors = {name: cast(tensor, wanted) for name, tensor in tensors.items()}
    else:
        tensors, metadata = _merge(folder, Path(base), wanted)
    metadata = with_shift(_with_latent_scaling(metadata, folder), shift_of_folder(folder))
    tensors, metadata = _mark(tensors, metadata, report, out.stem)
    with atomic_write(out) as file:
        write_tensors(file, tensors, metadata)


def left_behind(base: str | Path) -> list[str]:
    """Names of a single file's tensors that belong to its own U-Net, and so are wrong beside another one.

    They are the moving average of its weights (``model_ema.``) and the tables of its noise schedule.
    """
    return sorted(name for name in read_header(Path(base)).tensors if name.startswith(_AVERAGE) or name in _TABLES)


def say_left_behind(base: str | Path, say: Callable[[str], None]) -> None:
    """Say in a line what of a base was left out, if anything was."""
    names = left_behind(base)
    averages = sum(name.startswith(_AVERAGE) for name in names)
    parts = [f"{averages} tensors of its moving average ({_AVERAGE}*)"] if averages else []
    if tables := len(names) - averages:
        parts.append(f"{tables} {'table' if tables == 1 else 'tables'} of its noise schedule")
    if parts:
        say(f"Left out of {base}, because they belong to its own U-Net: {' and '.join(parts)}.")


def single_file_tensors(folder: Path) -> Tensors:
    """All tensors of a diffusers folder by their names in a single file, sorted."""
    unet = read_weights(folder / "unet")
    tensors = _lay_out(unet, unet_layout, UNET) | _lay_out(read_weights(folder / "vae"), vae_layout, VAE)
    for part, prefix in _text_encoders(unet).items():
        there = read_weights(folder / part)
        if prefix in (CLIP, SDXL_CLIP):
            tensors |= _lay_out(there, clip_layout, prefix)
            positions = torch.arange(tensors[f"{prefix}embeddings.position_embedding.weight"].shape[0])
            tensors[prefix + POSITION_IDS] = made(positions[None], "I64")
        else:
            tensors |= _lay_out(there, open_clip_layout, prefix)
            if projection := tensors.get(f"{prefix}text_projection"):
                scale = made(torch.tensor(_LOGIT_SCALE), "F32")
                tensors[f"{prefix}logit_scale"] = cast(scale, projection.dtype)
    return dict(sorted(tensors.items()))


def _text_encoders(unet: Tensors) -> dict[str, str]:
    """Part of the folder -> prefix in the single file."""
    if is_sdxl(unet):
        return {"text_encoder": SDXL_CLIP, "text_encoder_2": SDXL_OPEN_CLIP}
    projections = [tensor for name, tensor in unet.items() if name.endswith("attentions.0.proj_in.weight")]
    # SD 1.x projects by 1 x 1 convolutions, SD 2.x by matrices
    return {"text_encoder": OPEN_CLIP if projections and len(projections[0].shape) == 2 else CLIP}


def _lay_out(tensors: Tensors, layout: Callable[[Collection[str]], Layout], prefix: str) -> Tensors:
    return {prefix + name: _make(recipe, tensors) for name, recipe in layout(tensors).items()}


def _make(recipe: Recipe, tensors: Tensors) -> TensorStream:
    sources = [tensors[name] for name in recipe.sources]
    for name, tensor in zip(recipe.sources, sources, strict=True):
        if not tensor.shape or not tensor.nbytes:
            raise UserError(f"the tensor {shorten(name)} has the shape {tensor.shape}, which weights cannot have")
    tensor = sources[0] if len(sources) == 1 else stacked(sources)
    if recipe.transposed:
        return transposed(tensor)
    if recipe.convolution and len(tensor.shape) == 2:  # early folders keep it as a convolution too
        return replace(tensor, shape=(*tensor.shape, 1, 1))
    return tensor


def _merge(folder: Path, base: Path, dtype: str | None) -> tuple[Tensors, dict[str, str]]:
    """The base's tensors, in their order, with the folder's U-Net instead of its own; and its metadata."""
    header, dropped = read_header(base), set(left_behind(base))
    names = header.tensors.keys() - dropped
    order = sorted(names, key=lambda name: (header.tensors[name].begin, header.tensors[name].end, name))
    tensors = {name: stored(base, header, name) for name in order}
    unet = _lay_out(read_weights(folder / "unet"), unet_layout, UNET)
    own = {name for name in tensors if name.startswith(UNET)}
    if not own:
        raise UserError(f"{base} has no U-Net with the names of single files ({UNET}...): choose another base")
    if differing := sorted(own ^ unet.keys()):
        raise UserError(f"{base} has another kind of U-Net than {folder}: only one of them has {list_names(differing)}")
    for name, tensor in unet.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(
                f"{base} has another kind of U-Net than {folder}: {name} is {tensors[name].shape}, not {tensor.shape}"
            )
        if dtype is None and tensors[name].dtype not in DTYPE_NAMES.values():
            raise UserError(f"{base} keeps its U-Net in {tensors[name].dtype}: set dtype for the new one")
        tensors[name] = cast(tensor, dtype or tensors[name].dtype)
    return tensors, header.metadata


def _with_latent_scaling(metadata: dict[str, str], folder: Path) -> dict[str, str]:
    """The metadata with the folder's latent scaling, where it is not the published one."""
    scaling = LatentScaling.of_folder(folder)
    if scaling is None:
        return metadata
    kept = {key: value for key, value in metadata.items() if key not in METADATA}
    ordinary = LatentScaling.ordinary(sdxl=is_sdxl(read_weights(folder / "unet")))
    return kept if scaling == ordinary else kept | scaling.to_metadata()


def _mark(
    tensors: Tensors, metadata: dict[str, str], report: CheckpointReport, title: str
) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata with the marks of what the model predicts; unchanged where the folder does not say."""
    said = modelspec(report, title)
    if report.prediction_type is not None:
        v_prediction = report.prediction_type == "v_prediction"
        marks = {"v_pred": v_prediction, "ztsnr": v_prediction and bool(report.zero_terminal_snr)}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in marks}
        tensors |= {name: made(torch.zeros(0), "F32") for name, marked in marks.items() if marked}
        if marks["ztsnr"] and metadata.get("modelspec.prediction_type") == "v-zsnr":  # a base marked for SwarmUI
            said["modelspec.prediction_type"] = "v-zsnr"
        metadata = {key: value for key, value in metadata.items() if key not in _SAYING_WHAT_IT_PREDICTS}
    return tensors, metadata | said


def modelspec(report: CheckpointReport, title: str) -> dict[str, str]:
    """The fields of ModelSpec 1.0.1 that are known for a model."""
    v_prediction = report.prediction_type == "v_prediction"
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title.encode("utf-8", "replace").decode(),
        **modelspec_architecture(report.architecture, v_prediction, report.input_channels),
    }
    if report.prediction_type is not None:
        metadata["modelspec.prediction_type"] = "v" if v_prediction else "epsilon"
    return metadata


def inspect_folder(folder: Path) -> CheckpointReport:
    """Inspect a diffusers folder, and refuse one of an unsupported model."""
    report = inspect_checkpoint(folder)
    if report.format != DIFFUSERS_FOLDER:
        raise UserError(f"{folder} is not a diffusers folder but a {report.format}")
    if report.architecture not in SUPPORTED | {"unknown"}:
        raise UserError(f"{folder} is {report.architecture}, but only {', '.join(sorted(SUPPORTED))} can be converted")
    return report


def check_new_file(out: Path, dtype: torch.dtype | None) -> None:
    """Refuse what cannot be written, before anything is read."""
    check_new(out)
    if out.suffix not in SUFFIXES:
        raise UserError(f"{out} must end in {SUFFIXES[0]}, by which programs recognise such files")
    dtype_name(dtype)
