"""The scaling between a VAE's latents and those a U-Net is trained on: a shift and a factor for each channel.

Latent diffusion multiplies by one number (0.18215; SDXL by 0.13025).  NovelAI V3 shifts and scales each channel, so
that the latents of the training pictures have mean 0 and standard deviation 1 (arXiv 2409.15997).  Everything that runs
such a model must do the same, or its pictures have wrong colours, so a checkpoint carries the numbers: a diffusers
folder in the config of its VAE, a single file in its metadata.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .header import shorten
from .settings import read_settings

if TYPE_CHECKING:  # reading a header needs no torch
    from torch import Tensor

MEAN, STD = METADATA = ("ztsnr.latent_mean", "ztsnr.latent_std")  # in the metadata of single files
MOST_CHANNELS = 1024  # a config comes from strangers, and makes that many numbers
_SCALING_FACTORS = {True: 0.13025, False: 0.18215}  # whether SDXL: what programs use where a file says nothing


@dataclass(frozen=True)
class LatentScaling:
    """The scaling from a VAE's latents z to those that the U-Net works on: (z - mean) / std, channel by channel.

    Raises:
        UserError: different numbers of means and standard deviations, or none; a number that is not finite; a standard
            deviation that is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        if not self.mean or len(self.mean) != len(self.std):
            raise UserError(
                f"a latent scaling needs a mean and a standard deviation for each channel, not {len(self.mean)} means "
                f"and {len(self.std)} standard deviations"
            )
        if not all(math.isfinite(number) for number in (*self.mean, *self.std)):
            raise UserError("the mean and the standard deviation of a latent scaling must be finite")
        if min(self.std) <= 0:
            raise UserError(f"the standard deviation of a latent scaling must be above 0, not {min(self.std):g}")

    def to_model(self, z: "Tensor") -> "Tensor":
        """Convert a VAE's latents (..., C, h, w) to the U-Net's, of the same type; computed in float32 at least."""
        mean, std = self._columns(z)
        return ((z - mean) / std).to(z.dtype)

    def from_model(self, x: "Tensor") -> "Tensor":
        """Convert the U-Net's latents (..., C, h, w) to the VAE's; the inverse of ``to_model``."""
        mean, std = self._columns(x)
        return (x * std + mean).to(x.dtype)

    def _columns(self, like: "Tensor") -> "Tensor":
        """Mean and standard deviation, (2, C, 1, 1)."""
        import torch

        from ..samplers.devices import send

        dtype = torch.promote_types(like.dtype, torch.float32)
        columns = torch.tensor([self.mean, self.std], dtype=dtype)[..., None, None]
        if like.is_cuda:  # made there, or sent from other memory, it would wait for all that the device has to do
            columns = columns.pin_memory()
        return send(columns, like.device)

    @property
    def scaling_factor(self) -> float | None:
        """The one number that does the same by multiplying; None where one is not enough."""
        return 1 / self.std[0] if not any(self.mean) and len(set(self.std)) == 1 else None

    @classmethod
    def ordinary(cls, *, sdxl: bool) -> "LatentScaling":
        """The published scaling of SDXL, or of SD 1.x and 2.x."""
        return cls.of_vae_config({"scaling_factor": _SCALING_FACTORS[sdxl]})

    # ------------------------------------------------------------------------------------------------------------------
    # In the config of diffusers' AutoencoderKL

    @classmethod
    def of_vae_config(cls, config: Mapping[str, Any]) -> "LatentScaling":
        """Read the config of an AutoencoderKL as diffusers' SDXL pipelines do.

        They decode z = x latents_std / scaling_factor + latents_mean where both statistics are there, and else
        z = x / scaling_factor.

        Raises:
            UserError: numbers that make no scaling, or a shift_factor, which the pipelines of SD and SDXL ignore.
        """
        channels, factor = config.get("latent_channels", 4), config.get("scaling_factor", 0.18215)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if type(channels) is not int or not 0 < channels <= MOST_CHANNELS:
            raise UserError(
                f"the VAE's config has {shorten(repr(channels))} for latent_channels, not 1 to {MOST_CHANNELS}"
            )
        if config.get("shift_factor"):
            raise UserError("the VAE's config has a shift_factor, which no pipeline of SD or SDXL applies")
        if not _is_number(factor) or not factor > 0:
            raise UserError(f"the VAE's config has {shorten(repr(factor))} for scaling_factor, which must be above 0")
        if mean is None or std is None:
            mean, std = [0.0] * channels, [1.0] * channels
        mean, std = _numbers(mean, "latents_mean of the VAE's config"), _numbers(std, "latents_std of the VAE's config")
        if len(mean) != channels:
            raise UserError(f"the VAE's config has {len(mean)} numbers for latents_mean, but {channels} channels")
        return cls(mean, tuple(number / factor for number in std))

    def vae_config(self, scaling_factor: float) -> dict[str, Any]:
        """The settings for the config of an AutoencoderKL with which diffusers' SDXL pipelines apply this scaling.

        Where one number is enough, it becomes the scaling_factor, which every pipeline applies.  Otherwise (read in
        diffusers 0.42) SDXL from text and from pictures is right, also with ControlNet and PAG.  SDXL inpainting, with
        PAG too, and InstructPix2Pix decode rightly but encode by the scaling_factor alone, so that the picture they are
        given comes out in wrong colours.  Mean and std mean nothing to everything of SD 1.x and 2.x and, of SDXL, to
        inpainting with ControlNet, T2I-Adapter, AnimateDiff and LEDITS++.

        Args:
            scaling_factor: the config's own, kept for those that read nothing else.
        """
        if (factor := self.scaling_factor) is not None:
            same = math.isclose(factor, scaling_factor, rel_tol=1e-15)  # 1 / (1 / x) may be one bit from x
            return {
                "scaling_factor": scaling_factor if same else factor,
                "latents_mean": None,
                "latents_std": None,
            }
        return {
            "scaling_factor": scaling_factor,
            "latents_mean": list(self.mean),
            "latents_std": [number * scaling_factor for number in self.std],
        }

    @classmethod
    def of_folder(cls, folder: Path) -> "LatentScaling | None":
        """Read vae/config.json of a diffusers folder; None if there is no such file.

        Raises:
            UserError: it cannot be read, or see ``of_vae_config``.
        """
        path = folder / "vae" / "config.json"
        if not path.is_file():
            return None
        config = read_settings(path, "a VAE's")
        try:
            return cls.of_vae_config(config)
        except UserError as error:
            raise UserError(f"{path} cannot be used: {error}") from None

    # ------------------------------------------------------------------------------------------------------------------
    # In the metadata of a single file

    def to_metadata(self) -> dict[str, str]:
        """Metadata in JSON, from which the same float64 numbers come back."""
        return {MEAN: json.dumps(list(self.mean)), STD: json.dumps(list(self.std))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "LatentScaling | None":
        """Read the metadata of a single file; None if they name no scaling.

        Raises:
            UserError: only one of the two is there, or it is not a list of numbers; see also ``LatentScaling``.
        """
        said = {key: metadata[key] for key in METADATA if key in metadata}
        if not said:
            return None
        if len(said) == 1:
            (key,) = said
            raise UserError(
                f"the metadata have {key} alone, but a latent scaling needs a mean and a standard deviation"
            )
        return cls(*(_parse(text, key) for key, text in said.items()))


def _parse(text: str, key: str) -> tuple[float, ...]:
    try:
        numbers = json.loads(text)
    except (ValueError, RecursionError):  # ValueError also of a whole number with thousands of digits
        numbers = None
    return _numbers(numbers, f"{key} of the metadata, {shorten(text)},")


def _numbers(values: Any, what: str) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not all(map(_is_number, values)):
        raise UserError(f"the {what} is not a list of finite numbers")
    return tuple(map(float, values))


def _is_number(value: Any) -> bool:
    # bool is an int for Python; the bound keeps whole numbers that no float can be from overflowing
    return type(value) in (int, float) and abs(value) < 1e30
