"""Latents as pictures, and figures as IMAGEs."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..diagnostics.leak_probes import ToRGB
from ..errors import UserError
from ..extras import no_matplotlib
from ..figures.png import to_image
from .messages import show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..figures.strip import Strip

STRIP = 6  # pictures
STRIP_SIDE = 192  # pixels, of the longer side of each
PAPERS = {"dark": ("#353535", "#eeeeee"), "light": ("#ffffff", "#222222")}


def rgb_of(latent_format, vae=None) -> tuple[ToRGB | None, str | None]:
    """A function from a model's latents to pictures, and its name in words; None for both if there is no way.

    The pictures are (B, 3, H, W), 0 to 1.  A VAE clips them, and raises a UserError if it is for other latents.  The
    frames of a video are stacked below each other.
    """
    if vae is not None:

        def decode(latents: torch.Tensor) -> torch.Tensor:
            try:
                pictures = vae.decode(latent_format.process_out(latents))
            except RuntimeError as error:
                reason = str(error).strip().split("\n")[0].rstrip(".")
                raise UserError(
                    f"The VAE cannot decode this model's latents: {reason}. Connect the VAE that belongs to the model."
                ) from error
            return pictures[..., :3].movedim(-1, 1).flatten(2, -2)

        return decode, "through the VAE"
    if latent_format.latent_rgb_factors is None:
        return None, None
    factors = torch.tensor(latent_format.latent_rgb_factors)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)  # newer cores'

    def mix(latents: torch.Tensor) -> torch.Tensor:
        latents = (latents if reshape is None else reshape(latents)).float()
        pictures = latents.movedim(1, -1) @ factors.to(latents.device) + bias.to(latents.device)
        return ((pictures + 1) / 2).movedim(-1, 1).flatten(2, -2)

    return mix, "by the linear latent-to-RGB factors"


def strip_of(
    predictions: Sequence[torch.Tensor], sigmas: Sequence[float], picture: torch.Tensor, to_rgb: ToRGB | None
) -> "Strip | None":
    """A strip of a run's predictions, evenly chosen, and its finished picture (1, C, ...)."""
    from ..figures.strip import Strip

    if to_rgb is None:
        return None
    chosen = np.unique(np.linspace(0, len(predictions) - 1, STRIP - 1).round().astype(int)).tolist()
    latents = torch.cat([*(predictions[i].cpu() for i in chosen), picture[:, :, :1] if picture.ndim == 5 else picture])
    pictures = torch.cat([to_rgb(latent).float().cpu() for latent in latents.split(1)])
    scale = min(1.0, STRIP_SIDE / max(pictures.shape[-2:]))
    if scale < 1:
        pictures = torch.nn.functional.interpolate(pictures, scale_factor=scale, mode="area")
    shown = (255 * pictures.nan_to_num(0).clamp(0, 1)).round().byte().movedim(1, -1).numpy()
    return Strip(shown, [*(float(sigmas[i]) for i in chosen), 0.0])


def draw(figure: "Callable[[], Figure]", theme: str, headline: str) -> torch.Tensor:
    """An IMAGE (1, H, W, 3) of a matplotlib figure that begins with a headline.

    Without matplotlib, the headline is shown under the node, and the IMAGE says how to install it.
    """
    sentence = no_matplotlib()
    if sentence is not None:
        show(headline)
        picture = np.asarray(_notice(sentence, theme))
    else:
        # not under the node as well: it would halve the room that ComfyUI gives the picture
        logging.info("ZTSNR: %s", headline)
        picture = to_image(figure())
    return torch.from_numpy(picture.astype(np.float32) / 255)[None]


def _notice(sentence: str, theme: str) -> Image.Image:
    paper, ink = PAPERS[theme]
    first, _, second = sentence.partition(": ")
    font = ImageFont.load_default(16)
    image = Image.new("RGB", (640, 120), paper)
    ImageDraw.Draw(image).multiline_text((20, 36), f"{first}:\n{second}", fill=ink, font=font, spacing=10)
    return image
