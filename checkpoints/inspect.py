"""Tell what a checkpoint is from its header alone, without loading its gigabytes of weights."""

import os
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import UserError
from .architecture import (
    BARE_UNET,
    DIFFUSERS_FOLDER,
    DIFFUSERS_UNET,
    LORA,
    PREFIXED_UNET,
    SINGLE_FILE,
    SUPPORTED,
    UNKNOWN,
    Shapes,
    input_channels,
    is_sdxl,
    lora_architecture,
    transformer_architecture,
    unet_architecture,
)
from .header import PICKLES, Header, read_header
from .latent_scaling import LatentScaling
from .markers import find_marks, read_scheduler_config, settle
from .programs import rows as program_rows
from .reading import SDXL_FAMILY, Marked, ProgramRow
from .schedule_shift import METADATA, shift_of_metadata

_PREFIX = "model.diffusion_model."
_TEXT_ENCODERS = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")
_VAE = ("first_stage_model.", "vae.")
_LORA = re.compile(r"[._]lora[._](up|down|A|B)\b|\.(hada_w|lokr_w|oft_blocks|oft_diag|oft_R|dora_scale)")


@dataclass(frozen=True)
class CheckpointReport:
    """The result of ``inspect_checkpoint``; ``str()`` gives it as text."""

    path: Path
    format: str  # one of architecture.py's
    architecture: str  # one of architecture.SUPPORTED, the name of another one, or "unknown"
    input_channels: int | None  # of the U-Net: 4, or more for inpainting and editing; None without one
    prediction_type: str | None  # "v_prediction", "epsilon", or None if nothing says
    zero_terminal_snr: bool | None  # None if nothing says
    evidence: tuple[str, ...]  # a sentence for each mark that was found
    warnings: tuple[str, ...]  # a sentence each
    precision: dict[str, float]  # type of the tensors, as safetensors names it -> its share of the bytes
    has_text_encoders: bool
    has_vae: bool
    latent_scaling: LatentScaling | None  # of its latents; None where it is the published one, or nothing says
    metadata: dict[str, str]
    programs: tuple[ProgramRow, ...]  # what each program takes it for; none for LoRAs and unsupported architectures

    @property
    def supported(self) -> bool:
        """True if zero-terminal-SNR sampling supports this architecture."""
        return self.architecture in SUPPORTED

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        programs = [
            {"program": row.program, **asdict(row.taken), "right": row.right, "change": row.change}
            for row in self.programs
        ]
        scaling = None if self.latent_scaling is None else asdict(self.latent_scaling)
        return kept | {
            "path": str(self.path),
            "supported": self.supported,
            "latent_scaling": scaling,
            "programs": programs,
        }

    def _schedule(self) -> list[str]:
        shift = self.metadata.get(METADATA)
        return [] if shift is None else [f"Noise schedule: {shift} times the published sigmas."]

    def __str__(self) -> str:
        architecture = "unknown architecture" if self.architecture == "unknown" else self.architecture
        types = [f"{dtype} {share:.0%}" for dtype, share in self.precision.items()]
        zero_terminal_snr = {True: "yes", False: "no", None: "not stated"}[self.zero_terminal_snr]
        lines = [
            f"{self.path.name}: {', '.join([architecture, self.format, *types])}.",
            f"Prediction: {self.prediction_type or 'not stated'}. Zero terminal SNR: {zero_terminal_snr}.",
            *([] if self.latent_scaling is None else [_describe(self.latent_scaling)]),
            *self._schedule(),
            *self.evidence,
            *(f"Warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


def inspect_checkpoint(path: str | Path) -> CheckpointReport:
    """Read what a checkpoint is and what it says about itself, from its header.

    Args:
        path: a .safetensors or .sft file, or a folder that diffusers wrote (unet/, scheduler/, ...).

    Raises:
        UserError: no such file, a pickle, a damaged or hostile file, a folder without a U-Net.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, no error for a name that is too long
        header, form = _read_unet_of_folder(path), DIFFUSERS_FOLDER
        has_text_encoders = any(path.glob("text_encoder*/*.safetensors"))
        has_vae = any(path.glob("vae/*.safetensors"))
    else:
        header = read_header(path)
        form = _format(header)
        has_text_encoders = any(name.startswith(_TEXT_ENCODERS) for name in header.tensors)
        has_vae = any(name.startswith(_VAE) for name in header.tensors)
    shapes = {name.removeprefix(_PREFIX): tensor.shape for name, tensor in header.tensors.items()}
    architecture = _architecture(shapes, form)
    warnings = []
    try:
        scheduler_config = _scheduler_config(path, form)
    except UserError as error:
        scheduler_config = {}
        warnings.append(f"{error}.")
    try:
        latent_scaling = _latent_scaling(path, form, header)
    except UserError as error:
        latent_scaling = None
        warnings.append(f"Its latent scaling is unknown: {error}.")
    try:
        shift_of_metadata(header.metadata)
    except UserError as error:
        warnings.append(f"Its noise schedule is unknown: {error}.")
    if latent_scaling and latent_scaling.scaling_factor is None and architecture in ("SD 1.x", "SD 2.x"):
        warnings.append(
            "diffusers' pipelines of SD 1.x and 2.x ignore the mean and the standard deviation of latents: run them "
            'with output_type="latent", and decode what LatentScaling.from_model makes of the result.'
        )
    marks = find_marks(header, scheduler_config)
    prediction_type, zero_terminal_snr, amiss = settle(marks)
    warnings += amiss
    if prediction_type is None and architecture in SUPPORTED and form != LORA:
        warnings.append(
            "Nothing in the file says what the model predicts, so programs load it as epsilon. If its author says "
            "v-prediction, set that by hand where you load it."
        )
    if (prediction_type, zero_terminal_snr) == ("v_prediction", None) and architecture in SDXL_FAMILY and form != LORA:
        warnings.append(
            "Nothing in the file says whether it has zero terminal SNR, as most v-prediction models of SDXL do. If its "
            "author says so, mark it (ztsnr mark --v-pred --ztsnr), or set that by hand where you load it."
        )
    programs = ()
    if architecture in SUPPORTED and form != LORA:
        marked = Marked(
            file_name=path.name,
            form=form,
            architecture=architecture,
            names=header.tensors.keys(),
            metadata=header.metadata,
            scheduler_config=scheduler_config,
            has_yaml=os.path.isfile(path.with_suffix(".yaml")),
            latent_scaling=latent_scaling,
        )
        programs = program_rows(marked, prediction_type, zero_terminal_snr)
    return CheckpointReport(
        path=path,
        format=form,
        architecture=architecture,
        input_channels=input_channels(shapes),
        prediction_type=prediction_type,
        zero_terminal_snr=zero_terminal_snr,
        evidence=tuple(mark.sentence for mark in marks),
        warnings=tuple(warnings),
        precision=_precision(header),
        has_text_encoders=has_text_encoders,
        has_vae=has_vae,
        latent_scaling=latent_scaling,
        metadata=header.metadata,
        programs=programs,
    )


def _format(header: Header) -> str:
    """The kind of file, by the names of its tensors."""
    names = header.tensors.keys()
    if any(_LORA.search(name) for name in names):
        return LORA
    if any(name.startswith(_PREFIX) for name in names):
        return SINGLE_FILE if any(name.startswith(_TEXT_ENCODERS + _VAE) for name in names) else PREFIXED_UNET
    if {"input_blocks.0.0.weight", "out.2.weight"} <= names:
        return BARE_UNET
    if {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"} <= names:
        return DIFFUSERS_UNET
    return UNKNOWN


def _architecture(shapes: Shapes, form: str) -> str:
    if form == LORA:
        return lora_architecture(shapes)
    if form == UNKNOWN:  # half a U-Net, such as a ControlNet, does not count as one
        return transformer_architecture(shapes)
    return unet_architecture(shapes)


def _scheduler_config(path: Path, form: str) -> dict:
    """The settings that belong to a diffusers U-Net.  Beside other files they may be any neighbour's."""
    places = []
    if form == DIFFUSERS_FOLDER:
        places = [path / "scheduler"]
    elif form == DIFFUSERS_UNET:
        places = [path.parent, path.parent.parent / "scheduler"] if path.parent.name == "unet" else [path.parent]
    return next(filter(None, (read_scheduler_config(place / "scheduler_config.json") for place in places)), {})


def _latent_scaling(path: Path, form: str, header: Header) -> LatentScaling | None:
    """The checkpoint's latent scaling; None where it is the published one, or nothing says."""
    if form == DIFFUSERS_FOLDER:
        folder = path
    elif form == DIFFUSERS_UNET and path.parent.name == "unet":
        folder = path.parent.parent
    else:
        return LatentScaling.from_metadata(header.metadata)
    scaling = LatentScaling.of_folder(folder)
    return None if scaling == LatentScaling.ordinary(sdxl=is_sdxl(header.tensors)) else scaling


def _describe(scaling: LatentScaling) -> str:
    mean, std = (", ".join(f"{number:.4g}" for number in numbers) for numbers in (scaling.mean, scaling.std))
    return (
        f"Latents: the U-Net works on (z - mean) / std of the VAE's z, mean {mean}, std {std}; programs that ignore "
        "this get wrong colours."
    )


def _read_unet_of_folder(folder: Path) -> Header:
    """The header of a diffusers folder's U-Net, merged if it is in several files (...-00001-of-00002...)."""
    stem = "diffusion_pytorch_model"
    # the shortest name first: the plain file before its versions (.fp16)
    files = sorted((folder / "unet").glob(f"{stem}*.safetensors"), key=lambda file: len(file.name))
    pickles = [file for file in (folder / "unet").glob(f"{stem}*") if file.suffix in PICKLES]
    if not files and not pickles:
        raise UserError(
            f"{folder} has no unet/{stem}.safetensors: it is not a diffusers folder of a model with a U-Net"
        )
    if not files:
        return read_header(pickles[0])  # always raises, and says why
    parts = [file for file in files if re.search(r"-\d{5}-of-\d{5}", file.name)]
    headers = [read_header(file) for file in [file for file in files if file not in parts][:1] or parts]
    return Header(
        tensors={name: tensor for header in headers for name, tensor in header.tensors.items()},
        metadata={key: value for header in headers for key, value in header.metadata.items()},
        data_start=headers[0].data_start,
    )


def _precision(header: Header) -> dict[str, float]:
    """Type of the tensors -> its share of the bytes, the largest first."""
    sizes = defaultdict(int)
    for tensor in header.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    total = sum(sizes.values())
    return {dtype: size / total for dtype, size in sorted(sizes.items(), key=lambda item: -item[1]) if size}
