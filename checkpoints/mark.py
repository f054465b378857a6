"""Add and remove the marks that tell programs a checkpoint is for v-prediction and zero terminal SNR.

A single file gets the empty tensors ``v_pred`` and ``ztsnr``, which ComfyUI, Forge, reForge and AUTOMATIC1111 look for,
and the metadata of ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec).  Empty tensors take no bytes, so the
header is written anew and the data are copied as they are.  A diffusers folder gets its scheduler's settings changed.
"""

import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from ..files import atomic_write
from .architecture import SUPPORTED
from .header import HASH, SUFFIXES, Header, TensorEntry, hash_data, open_data, read_header
from .inspect import (
    BARE_UNET,
    DIFFUSERS_FOLDER,
    DIFFUSERS_UNET,
    LORA,
    PREFIXED_UNET,
    SINGLE_FILE,
    CheckpointReport,
    inspect_checkpoint,
)
from .markers import modelspec_architecture, read_scheduler_config

BUFFER = 1 << 20  # bytes
BLOCK = 64 << 10  # bytes


def mark_checkpoint(
    path: str | Path,
    *,
    v_pred: bool | None = None,
    ztsnr: bool | None = None,
    out: str | Path | None = None,
    in_place: bool = False,
    swarm: bool = False,
) -> Path:
    """Mark a checkpoint as v-prediction and zero terminal SNR, or as not.

    Tensor data are copied, never changed, in less than 100 MB of memory.  The new file is written whole or not at all
    (``atomic_write``).  A ``modelspec.hash_sha256`` in the metadata is computed again.

    Args:
        path: a .safetensors or .sft file with a U-Net, or a diffusers folder.
        v_pred: True marks v-prediction, False epsilon, None leaves it as it is.
        ztsnr: True marks zero terminal SNR, False removes the mark, None leaves it as it is.
        out: the file to write, which must not exist yet; a folder can only be marked in place.
        in_place: replace ``path`` itself.
        swarm: write "v-zsnr" as prediction type, as SwarmUI wants it, instead of ModelSpec's "v", with which SwarmUI
            turns zero terminal SNR off.

    Returns:
        the path written: ``out``, or ``path``.

    Raises:
        UserError: nothing to do; marks that contradict each other; a file that marks are not for; a file that is
            damaged, or would be replaced without in_place, or cannot be written.
    """
    path = Path(path)
    if v_pred is None and ztsnr is None and not swarm:
        raise UserError("nothing to mark: set v_pred or ztsnr")
    report = inspect_checkpoint(path)
    _check_format(report)
    target = _target(path, out, in_place)
    if report.format == DIFFUSERS_FOLDER:
        _mark_folder(path, v_pred, ztsnr, swarm)
    else:
        header = read_header(path)
        v_pred, ztsnr = _settle("v_pred" in header.tensors, "ztsnr" in header.tensors, v_pred, ztsnr, swarm)
        tensors = _mark_tensors(header, {"v_pred": v_pred, "ztsnr": ztsnr}, path)
        metadata = _mark_metadata(report, v_pred, ztsnr, swarm, title=target.stem)
        _write(path, header, tensors, metadata, target)
    return target


# ----------------------------------------------------------------------------------------------------------------------
# The request


def _check_format(report: CheckpointReport) -> None:
    if report.format == LORA:
        raise UserError(f"{report.path} is a LoRA, and no program looks for marks there: mark the checkpoint it is for")
    if report.format == DIFFUSERS_UNET:
        raise UserError(
            f"{report.path} is a U-Net with diffusers' names, and no program looks for marks there: mark its diffusers "
            "folder, or convert that to a single file first"
        )
    if report.format not in (SINGLE_FILE, PREFIXED_UNET, BARE_UNET, DIFFUSERS_FOLDER):
        raise UserError(f"{report.path} has no U-Net of Stable Diffusion, and marks are for checkpoints with one")
    if report.architecture not in SUPPORTED | {"unknown"}:
        raise UserError(
            f"{report.path} is {report.architecture}, but marks are only for {', '.join(sorted(SUPPORTED))}"
        )


def _target(path: Path, out: str | Path | None, in_place: bool) -> Path:
    """The file or folder to write."""
    target = path if out is None else Path(out)
    if path.is_dir():
        if out is not None or not in_place:
            raise UserError(f"{path} is a folder, which can only be marked in place: set in_place, and not out")
        return path
    same = out is None or (target.exists() and target.samefile(path))
    if same and not in_place:
        raise UserError(f"{path} would be replaced: name another file with out, or allow it with in_place")
    if in_place and not same:
        raise UserError("out and in_place exclude each other: set one of them")
    if not same and os.path.lexists(target):
        raise UserError(f"{target} already exists: choose another name")
    if target.suffix.lower() not in SUFFIXES:
        raise UserError(f"no program takes {target} for a checkpoint: end its name in {' or '.join(SUFFIXES)}")
    if same and path.stat().st_nlink > 1:
        raise UserError(
            f"{path} has several names (hard links), and the others would keep the old content: name another file "
            "with out"
        )
    return target


def _settle(
    had_v_pred: bool, had_ztsnr: bool, v_pred: bool | None, ztsnr: bool | None, swarm: bool = False
) -> tuple[bool | None, bool | None]:
    """What the marked checkpoint says; None where it still says nothing."""
    v_pred = True if v_pred is None and had_v_pred else v_pred
    ztsnr = True if ztsnr is None and had_ztsnr else ztsnr
    if ztsnr and not v_pred:
        raise UserError(
            "zero terminal SNR does nothing without v-prediction, and an epsilon model cannot have it: set v_pred, or "
            "remove ztsnr too"
        )
    if swarm and not ztsnr:
        raise UserError("SwarmUI's v-zsnr means v-prediction with zero terminal SNR: set v_pred and ztsnr")
    return v_pred, ztsnr


# ----------------------------------------------------------------------------------------------------------------------
# Single files


def _mark_tensors(header: Header, marks: dict[str, bool | None], path: Path) -> dict[str, TensorEntry]:
    """The header's tensors, with the marks that are set and without the others."""
    tensors = dict(header.tensors)
    for name, marked in marks.items():
        if marked:
            end = _data_size(header)
            tensors.setdefault(name, TensorEntry("F32", (0,), end, end))
        elif name in tensors and tensors.pop(name).nbytes:
            raise UserError(f"the tensor {name} of {path} holds data, so it is not a mark and cannot be removed")
    return tensors


def _mark_metadata(
    report: CheckpointReport, v_pred: bool | None, ztsnr: bool | None, swarm: bool, title: str
) -> dict[str, str]:
    """The file's metadata, changed to say what the marks say, with the fields of ModelSpec that are known."""
    metadata = dict(report.metadata)
    if v_pred is not None:
        prediction_type = "v" if v_pred else "epsilon"
        metadata["modelspec.prediction_type"] = "v-zsnr" if swarm else prediction_type
        _replace(metadata, "modelspec.predict_key", prediction_type)
        _replace(metadata, "ss_v_parameterization", str(v_pred))
    if ztsnr is not None:
        _replace(metadata, "ss_zero_terminal_snr", str(ztsnr))
    if v_pred is not None and (known := modelspec_architecture(report.architecture, v_pred, report.input_channels)):
        for key, value in {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": title, **known}.items():
            metadata.setdefault(key, value)
    return metadata


def _replace(metadata: dict[str, str], key: str, value: str) -> None:
    """Change an entry that another program wrote, so that it does not contradict the marks."""
    if key in metadata:
        metadata[key] = value


def _write(path: Path, header: Header, tensors: dict[str, TensorEntry], metadata: dict[str, str], target: Path) -> None:
    """Write the data of ``path`` behind a new header.

    A hash of the data is computed again, in a thread of its own, where the file has one.  It is not added where there
    is none: that takes longer than all the rest.
    """
    has_hash = HASH in metadata
    if has_hash:
        metadata = metadata | {HASH: f"0x{'0' * 64}"}  # of the right length until it is known
    with (
        atomic_write(target) as file,
        ThreadPoolExecutor(1) as thread,
        open_data(path, header) as data,  # closed first, so that nobody waits for the thread when copying fails
    ):
        hashing = thread.submit(hash_data, data) if has_hash else None
        file.write(_encode(tensors, metadata, like=header))
        _copy_data(path, header, file)
        if hashing:
            file.seek(0)
            file.write(_encode(tensors, metadata | {HASH: hashing.result()}, like=header))


def _encode(tensors: dict[str, TensorEntry], metadata: dict[str, str], like: Header) -> bytes:
    """The bytes before the data.

    They are padded so that the data begin at a multiple of 8, and as far into a block as in the file that they are
    copied from: the kernel copies whole blocks in two thirds of the time.
    """
    content: dict[str, Any] = {"__metadata__": metadata} | {
        name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (tensor.begin, tensor.end)}
        for name, tensor in tensors.items()
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * ((like.data_start - 8 - len(text)) % BLOCK if like.data_start % 8 == 0 else -len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy_data(path: Path, header: Header, file: BinaryIO) -> None:
    """Append the data to ``file``; within the kernel, as cp does, where it can do that."""
    file.flush()
    start = file.tell()
    with open_data(path, header) as data:
        with suppress(AttributeError, OSError):  # another system, another file system, or a full disk
            count = -header.data_start % BLOCK or BLOCK  # to where whole blocks begin
            end = start
            while copied := os.copy_file_range(data.fileno(), file.fileno(), count):
                # begins to bring the piece to the disk while the next one is copied
                os.posix_fadvise(file.fileno(), end, copied, os.POSIX_FADV_DONTNEED)
                end += copied
                count = 64 * BUFFER
        file.seek(0, os.SEEK_END)
        shutil.copyfileobj(data, file, BUFFER)  # what is left
    if file.tell() - start != _data_size(header):
        raise UserError(f"{path} was changed while it was read: try again")


def _data_size(header: Header) -> int:
    return max((tensor.end for tensor in header.tensors.values()), default=0)


# ----------------------------------------------------------------------------------------------------------------------
# Diffusers folders


def _mark_folder(folder: Path, v_pred: bool | None, ztsnr: bool | None, swarm: bool) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_scheduler_config(path)
    if not config:
        raise UserError(f"{folder} has no scheduler/scheduler_config.json, which is where a diffusers folder is marked")
    if swarm:
        raise UserError(f"{folder} is a diffusers folder, which SwarmUI does not read: mark it without swarm")
    v_pred, ztsnr = _settle(
        config.get("prediction_type") == "v_prediction", config.get("rescale_betas_zero_snr") is True, v_pred, ztsnr
    )
    if v_pred is not None:
        config["prediction_type"] = "v_prediction" if v_pred else "epsilon"
    if ztsnr is not None:
        config["rescale_betas_zero_snr"] = ztsnr
    if ztsnr:
        config["timestep_spacing"] = "trailing"  # begins at the last timestep, as the usual "leading" does not
    with atomic_write(path) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
