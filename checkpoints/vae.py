"""Load the VAE of a model, and tell VAEs apart by a hash of their encoders."""

import dataclasses
import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..errors import UserError
from .components import check_network
from .header import read_header
from .inspect import UNKNOWN, inspect_checkpoint
from .pipeline import loading, settings_folder
from .settings import read_settings
from .supported import inspect_file


def load_vae(
    model: str | Path,
    *,
    config: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> AutoencoderKL:
    """Load the VAE of a model.

    Args:
        model: a diffusers folder, of a whole model or of its VAE alone, or a .safetensors file of the same.
        config: only for a file, the diffusers folder, or its name on the Hub, whose settings complete it; by default
            those of the first model of its kind, from the Hub or its cache.
        device, dtype: device and dtype of the VAE.

    Raises:
        UserError: no such file or folder, or it has no VAE of the class AutoencoderKL.
    """
    path = Path(model)
    if not path.exists():
        raise UserError(f"there is no file or folder {model} to take the VAE from")
    if path.is_dir():
        vae = _vae_of_folder(path / "vae" if (path / "vae").is_dir() else path, dtype)
    else:
        vae = _vae_of_file(path, config, dtype)
    if any(weight.is_meta for weight in vae.parameters()):  # a weight that the files lack stays without data
        raise UserError(f"{model} lacks weights that its VAE needs")
    with loading(path):
        # diffusers wraps .to in a decorator that hides its signature
        return vae.eval().requires_grad_(False).to(device)  # pyright: ignore[reportArgumentType]


def _vae_of_folder(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    try:
        kind = read_settings(folder / "config.json", "a VAE's").get("_class_name")
    except UserError:
        kind = None
    if kind != "AutoencoderKL":
        raise UserError(f"{folder} must hold a VAE of the class AutoencoderKL, but holds {kind or 'none'}")
    check_network(folder, AutoencoderKL)
    has_plain = any(folder.glob("diffusion_pytorch_model.safetensors*"))
    versions = sorted(file.name.split(".")[1] for file in folder.glob("diffusion_pytorch_model.*.safetensors*"))
    with loading(folder):
        return AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=versions[0] if versions and not has_plain else None,
            use_safetensors=True,
            local_files_only=True,
        )


def _vae_of_file(path: Path, config: str | Path | None, dtype: torch.dtype) -> AutoencoderKL:
    report = inspect_checkpoint(path)
    if report.format == UNKNOWN:
        if not any(name.endswith("encoder.conv_in.weight") for name in read_header(path).tensors):
            raise UserError(f"{path} has no VAE: give a file or folder with one")
        report = dataclasses.replace(report, architecture="SDXL base")  # SD's VAEs have other weights, but one form
    else:
        report = inspect_file(path)
    settings = str(settings_folder(report, config))
    with loading(path):
        return AutoencoderKL.from_single_file(
            str(path), config=settings, subfolder="vae", torch_dtype=dtype, local_files_only=True
        )


def hash_encoder(vae: AutoencoderKL) -> str:
    """SHA-256 of all that latents depend on: the weights of the encoder, without those of the decoder."""
    digest = hashlib.sha256()
    for name in ("act_fn", "norm_num_groups"):  # that weights do not show
        digest.update(f"{name}={vae.config[name]};".encode())
    for name, weight in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name}:{tuple(weight.shape)};".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
