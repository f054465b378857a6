"""A VAE whose decoder was trained, written as a folder and into the checkpoint that it is from."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ...checkpoints.folder import read_weights
from ...checkpoints.header import HASH, read_header
from ...checkpoints.layouts import VAE, vae_layout
from ...checkpoints.stream import DTYPE_NAMES, TensorStream, cast, made, stored, write_tensors
from ...checkpoints.verify import verify_checkpoint
from ...errors import UserError
from ...files import atomic_folder, atomic_write, check_new

TRAINED = ("decoder.", "post_quant_conv.")
_OF_FILE = re.compile(re.escape(VAE) + r"(decoder|post_quant_conv)\.")
_OF_FOLDER = re.compile(r"vae(\.|/[^/]*: )(decoder|post_quant_conv)\.")  # all variants, such as fp16, included
_OTHER_HASHES = ("sshs_model_hash", "sshs_legacy_hash")  # of kohya's scripts; wrong once a tensor has changed


def is_whole(base: Path) -> bool:
    """True if a checkpoint contains more than a VAE, so that a VAE can be merged into it."""
    return (base / "vae").is_dir() if base.is_dir() else any(name.startswith(VAE) for name in read_header(base).tensors)


def save_vae(vae: AutoencoderKL, out: Path) -> None:
    """Write the diffusers folder of a VAE, atomically.

    Raises:
        UserError: ``out`` exists already, or cannot be written.
    """
    with atomic_folder(out) as folder:
        vae.save_pretrained(folder, safe_serialization=True)


def merge_decoder(vae: AutoencoderKL, base: str | Path, out: str | Path) -> None:
    """Write a copy of a checkpoint that differs from it only in the VAE's decoder and post_quant_conv.

    Names, types of numbers, marks and metadata stay those of the base; ModelSpec's hash is computed again where there
    is one.  The copy is read again in the end, and compared with the base.

    Args:
        vae: with the trained decoder.
        base: a single file, or a diffusers folder of a whole model.
        out: a file or folder, as the base is one, that is not there yet.

    Raises:
        UserError: the base has another kind of VAE or none; a number is too large for the base's type; ``out`` is
            there, or cannot be written, or is not what it should be.
    """
    base, out = Path(base), Path(out)
    check_new(out)
    layout = vae_layout(vae.state_dict().keys())
    # by their names in a single file, which are one for all versions of diffusers' own
    trained = {name: vae.state_dict()[recipe.sources[0]] for name, recipe in layout.items() if name.startswith(TRAINED)}
    if base.is_dir():
        own = {name: r.sources[0] for name, r in vae_layout(read_weights(base / "vae").keys()).items()}
        new = {own[name]: tensor for name, tensor in trained.items() if name in own}
        _check_names(base, len(new), trained)
        with atomic_folder(out) as folder:
            shutil.copytree(base, folder, dirs_exist_ok=True)
            for file in (base / "vae").glob("*.safetensors"):
                copy = folder / "vae" / file.name
                copy.unlink()
                _write(file, new, copy)
    else:
        new = {VAE + name: tensor for name, tensor in trained.items()}
        _check_names(base, len(new.keys() & read_header(base).tensors.keys()), trained)
        _write(base, new, out)
    _check_merged(out, base)


def _check_names(base: Path, found: int, trained: Mapping[str, torch.Tensor]) -> None:
    if found != len(trained):
        raise UserError(f"{base} has only {found} of this decoder's {len(trained)} tensors: it has another kind of VAE")


def _write(base: Path, new: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write a file anew, some of its tensors being replaced and cast to what they were in."""
    header = read_header(base)
    order = sorted(header.tensors, key=lambda name: (header.tensors[name].begin, header.tensors[name].end, name))
    tensors = {name: stored(base, header, name) for name in order}
    for name in tensors.keys() & new.keys():
        tensors[name] = _replaced(name, tensors[name], new[name].detach().cpu(), base)
    metadata = {key: text for key, text in header.metadata.items() if key not in _OTHER_HASHES}
    with atomic_write(out) as file:
        write_tensors(file, tensors, metadata, hashed=HASH in metadata)


def _replaced(name: str, old: TensorStream, tensor: torch.Tensor, base: Path) -> TensorStream:
    if [side for side in tensor.shape if side > 1] != [side for side in old.shape if side > 1]:  # 1 x 1 kernels
        raise UserError(f"{name} is {old.shape} in {base}, but {tuple(tensor.shape)} here: it has another kind of VAE")
    return replace(cast(made(tensor, DTYPE_NAMES[tensor.dtype]), old.dtype), shape=old.shape)


def _check_merged(out: Path, base: Path) -> None:
    report = verify_checkpoint(out, base)
    names = {change.name for change in report.changes or ()} | {*report.only_here, *report.only_there}
    may_differ = _OF_FOLDER if out.is_dir() else _OF_FILE
    wrong = [name for name in sorted(names) if not may_differ.match(name)]
    if report.changes is None or wrong:
        raise UserError(
            f"{out} differs from {base} in more than the decoder, for example in {wrong[0] if wrong else 'its names'}: "
            "the base was changed meanwhile, or the disk is faulty; export again"
        )
