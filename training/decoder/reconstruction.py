"""The quality of a VAE's reconstructions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from ...samplers.devices import to_float64

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DecoderOutput
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

MOST_SHOWN = 8  # pictures in a sheet

# maps two pictures (B, 3, H, W) in [-1, 1] to how different they look, (B, 1, H, W)
Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """The errors of reconstructions of held-out pictures, each a mean over pictures.

    Attributes:
        pictures: number of pictures.
        l1: |x - y| of pixels in [-1, 1].
        psnr: PSNR in dB, relative to the range from black to white; pixels are clipped to it and not rounded.
        lpips: LPIPS, or None without the package.
        psnr_in_boxes: PSNR in dB of the pixels in boxes, or None without boxes.
    """

    pictures: int
    l1: float
    psnr: float
    lpips: float | None
    psnr_in_boxes: float | None

    def __str__(self) -> str:
        parts = [f"L1 {self.l1:.4f}", f"PSNR {self.psnr:.2f} dB"]
        parts += [] if self.lpips is None else [f"LPIPS {self.lpips:.4f}"]
        parts += [] if self.psnr_in_boxes is None else [f"PSNR in boxes {self.psnr_in_boxes:.2f} dB"]
        return ", ".join(parts)


@torch.no_grad()
def evaluate(
    vae: AutoencoderKL, examples: torch.Tensor, perceptual: Perceptual | None, batch_size: int
) -> tuple[Scores, torch.Tensor]:
    """Encode pictures, decode the means of their posteriors, and compare; all in float32.

    Args:
        vae: VAE in float32, on its device.
        examples: (N, 4, H, W) pixels in [-1, 1] and marks of boxes.
        perceptual: LPIPS, or None to leave it out.
        batch_size: pictures per batch.

    Returns:
        The scores, and the first reconstructions, (at most MOST_SHOWN, 3, H, W) float32 on the CPU.
    """
    l1, psnr, lpips, in_boxes, shown = [], [], [], [], []
    for data in examples.split(batch_size):
        pixels = data[:, :3].to(vae.device)
        posterior = cast("AutoencoderKLOutput", vae.encode(pixels)).latent_dist
        decoded = cast("DecoderOutput", vae.decode(posterior.mean)).sample.clamp(-1, 1)
        l1.append((decoded - pixels).abs().mean(dim=(1, 2, 3)))
        squares = to_float64((decoded - pixels) / 2).square().mean(dim=1, keepdim=True)
        psnr.append(-10 * squares.mean(dim=(1, 2, 3)).log10())
        marks = data[:, 3:].to(squares.device)
        marked = marks.sum(dim=(1, 2, 3)) > 0
        of_boxes = (squares * marks).sum(dim=(1, 2, 3)) / marks.sum(dim=(1, 2, 3))
        in_boxes.append(-10 * of_boxes[marked].log10())
        if perceptual is not None:
            lpips.append(perceptual(decoded, pixels).mean(dim=(1, 2, 3)))
        if len(shown) * batch_size < MOST_SHOWN:
            shown.append(decoded.cpu())
    scores = Scores(
        pictures=len(examples),
        l1=torch.cat(l1).mean().item(),
        psnr=torch.cat(psnr).mean().item(),
        lpips=torch.cat(lpips).mean().item() if lpips else None,
        psnr_in_boxes=torch.cat(in_boxes).mean().item() if any(map(len, in_boxes)) else None,
    )
    return scores, torch.cat(shown)[:MOST_SHOWN]


def picture_sheet(columns: Mapping[str, torch.Tensor]) -> Image.Image:
    """A sheet with one row per picture and one titled column per version of it.

    Args:
        columns: title -> (N, 3, H, W) pictures in [-1, 1].
    """
    titles, (count, _, height, width) = list(columns), next(iter(columns.values())).shape
    line = 16
    sheet = Image.new("RGB", (len(titles) * width, line + count * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(columns.items()):
        draw.text((column * width + 3, 2), title, fill="black")
        pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for row, picture in enumerate(pixels):
            sheet.paste(Image.fromarray(picture), (column * width, line + row * height))
    return sheet
