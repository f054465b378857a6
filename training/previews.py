"""Pictures of fixed prompts during training, always from the same noise, sampled from exact infinity."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from ..data.tokens import batch_prompts, encode_prompts
from ..diagnostics.leak import mean_leak
from ..diagnostics.leak_run import PROMPTS, parse_prompt
from ..diagnostics.pipelines import encode, network, vae_to_rgb
from ..samplers import NoiseSchedule, ZTSNRScheduler
from .config import WatchSettings
from .networks import Networks, Tokenize

LEAK_SEEDS = 4
LABEL = 14  # pixels


class Previews:
    """Previews of solid colours and of the user's prompts, and a measurement of the leak.

    Args:
        networks: networks on the device; their pipeline gets a ZTSNRScheduler.
        schedule, prediction_type: schedule and prediction type of the training.
        tokenize: prompt -> tokens, as captions are trained.
        empty_text: what guidance subtracts: the encoded empty text, which caption dropout trains and ComfyUI gives; or
            else zeros, as SDXL's pipeline does by default.
        settings: size, steps, guidance and prompts of the previews.
    """

    def __init__(
        self,
        networks: Networks,
        schedule: NoiseSchedule,
        prediction_type: str,
        settings: WatchSettings,
        tokenize: Tokenize | None = None,
        *,
        empty_text: bool = True,
    ) -> None:
        self._text_encoders, self._tokenize = networks.text_encoders, tokenize or Tokenize(networks)
        self._zeros = not empty_text and bool(networks.pipeline.config.get("force_zeros_for_empty_prompt"))
        self._pipe, self._settings = networks.pipeline, settings
        self._schedule, self._prediction_type = schedule, prediction_type
        self._prompts = [prompt for prompt in PROMPTS if prompt.target is not None]
        self._prompts += [parse_prompt(text) for text in settings.prompts]
        own = networks.unet.config["sample_size"] * networks.factor
        width, height = settings.preview_size or (own, own)
        self._shape = (networks.unet.config["in_channels"], height // networks.factor, width // networks.factor)
        scheduler(self._pipe, schedule, prediction_type, latent_size=self._shape[1:])

    @torch.no_grad()
    def make(self) -> tuple[Image.Image, dict[str, float]]:
        """A sheet of pictures, and metrics: the error of each solid colour in levels of 255, and the leak."""
        to_rgb = vae_to_rgb(self._pipe)
        pictures, metrics = [], {}
        for number, prompt in enumerate(self._prompts):
            picture = to_rgb(self._sample(prompt.text, number))[0].clamp(0, 1).float().cpu().numpy().transpose(1, 2, 0)
            pictures.append(np.round(255 * picture).astype(np.uint8))
            if prompt.target is not None:
                error = 255 * picture.mean((0, 1)) - np.array(prompt.target)
                metrics[f"preview/{prompt.text}"] = float(np.abs(error).mean())
        if self._settings.leak:
            metrics |= self._leak()
        return _sheet(pictures, [prompt.name for prompt in self._prompts]), metrics

    def _sample(self, prompt: str, number: int) -> torch.Tensor:
        noise = torch.randn(1, *self._shape, generator=torch.Generator().manual_seed(number))
        height, width = (side * self._pipe.vae_scale_factor for side in self._shape[1:])
        sampled = self._pipe(
            **self._encode(prompt),
            latents=noise.to(self._pipe.device, self._pipe.unet.dtype),
            height=height,
            width=width,
            num_inference_steps=self._settings.preview_steps,
            guidance_scale=self._settings.guidance,
            output_type="latent",
        )
        return cast(Any, sampled).images

    def _encode(self, prompt: str) -> dict[str, Any]:
        """A prompt and the other side of guidance as training encodes captions: of any length, and unescaped."""
        tokens = batch_prompts([self._tokenize(prompt), self._tokenize("")])  # both of one length
        states = dict(zip(("", "pooled_"), encode_prompts(tokens, self._text_encoders), strict=True))
        encoded = {}
        for name, state in states.items():
            if state is not None:  # SD 1.x has no pooled state
                prompted, empty = state.chunk(2)
                encoded[f"{name}prompt_embeds"] = prompted
                encoded[f"negative_{name}prompt_embeds"] = torch.zeros_like(empty) if self._zeros else empty
        return encoded

    def _leak(self) -> dict[str, float]:
        """Measure the leak with the empty prompt, which leaves the brightness open."""
        denoise = network(self._pipe, encode(self._pipe, ""), self._schedule, self._prediction_type)
        report = mean_leak(
            denoise, None, self._shape, schedule=self._schedule, seeds=range(LEAK_SEEDS), device=self._pipe.device
        )
        assert report.checkpoint is not None  # there is a network
        return {"leak/slope": report.checkpoint.slope.value, "leak/share of peak": report.checkpoint.share.value}


def scheduler(pipe: DiffusionPipeline, schedule: NoiseSchedule, prediction_type: str, **config: Any) -> None:
    """Give a pipeline the scheduler of this package, with exactly the schedule of the training."""
    pipe.register_modules(
        scheduler=ZTSNRScheduler(
            trained_betas=schedule.betas.tolist(),
            prediction_type=prediction_type,
            rescale_betas_zero_snr=schedule.zero_terminal_snr,
            **config,
        )
    )


def _sheet(pictures: Sequence[np.ndarray], labels: Sequence[str]) -> Image.Image:
    """Pictures up to four in a row, each below its label; long labels are cut off."""
    height, width = pictures[0].shape[:2]
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + LABEL)), "white")
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        tile = Image.new("RGB", (width, height + LABEL), "white")
        ImageDraw.Draw(tile).text((2, 1), label, fill="black")
        tile.paste(Image.fromarray(picture), (0, LABEL))
        sheet.paste(tile, (number % columns * width, number // columns * (height + LABEL)))
    return sheet
