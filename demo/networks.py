"""A trained network of the demo: captions to pictures, from any noise level, with or without guidance."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import EulerDiscreteScheduler

from ..checkpoints.pipeline import load_pipeline
from ..diagnostics.pipelines import encode, vae_to_rgb
from ..samplers import NoiseSchedule, guide, sample, step_schedule, to_denoised
from ..samplers.prediction import from_denoised
from ..samplers.sampling import Denoise
from ..samplers.solvers import DEFAULT_SOLVER
from ..training.networks import predict

BATCH = 64
NO_CAPTION = ""


def quiet_libraries() -> None:
    """Silence the loading messages of diffusers and transformers, because a demo loads a dozen networks."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


class DemoNetwork:
    """An exported network of ``trainings``.

    Args:
        path: Diffusers folder or single file.
        config: For a single file: folder whose settings and tokenizers complete it.
        side: Side of the pictures, in pixels.  Default: the side that it was trained with.
        device: Device to run on.
        dtype: Dtype of the U-Net.

    Attributes:
        schedule, prediction_type: As marked in the files.
        shape: (C, h, w) of its latents.
    """

    def __init__(
        self,
        path: Path,
        config: Path | None = None,
        side: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        loaded = load_pipeline(path, config=config, device=device)
        self.pipe = loaded.pipeline
        self.know_schedule(loaded.prediction_type)
        length = self.pipe.unet.config.sample_size if side is None else side // self.pipe.vae_scale_factor
        self.shape = (self.pipe.unet.config.in_channels, length, length)
        self._to_rgb = vae_to_rgb(self.pipe)
        self.pipe.unet.to(dtype)
        self._known: dict[str, dict[str, torch.Tensor]] = {}

    def know_schedule(self, prediction_type: str) -> None:
        """Set the prediction type, and the schedule from the pipeline's scheduler."""
        self.prediction_type = prediction_type
        self.schedule = NoiseSchedule.from_config(self.pipe.scheduler.config)

    def noise(self, seeds: Sequence[int]) -> torch.Tensor:
        """(K, C, h, w) unit noise."""
        rows = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.pipe.device)

    def _encoded(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        if text not in self._known:
            self._known[text] = encode(self.pipe, text)
        return self._known[text]["prompt_embeds"], self._known[text]["pooled_prompt_embeds"]

    @torch.no_grad()
    def predict(self, x: torch.Tensor, t: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """The network's own output for states (B, C, h, w) at timesteps (B,), each with its own caption."""
        hidden, pooled = (torch.cat(rows) for rows in zip(*map(self._encoded, captions), strict=True))
        height, width = (side * self.pipe.vae_scale_factor for side in x.shape[2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=x.device)
        x, hidden, pooled = (rows.to(self.pipe.unet.dtype) for rows in (x, hidden, pooled))
        parts = zip(*(rows.split(BATCH) for rows in (x, t, hidden, pooled)), strict=True)
        return torch.cat([predict(self.pipe.unet, *part, sizes.expand(len(part[0]), -1)) for part in parts]).float()

    def denoise(
        self,
        captions: Sequence[str],
        guidance: float = 1.0,
        join: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = guide,
    ) -> Denoise:
        """``denoise(x_vp, sigma) -> x0`` of states (B, C, h, w).

        Args:
            captions: One per state.
            guidance: Scale of classifier-free guidance.  The unconditional prediction uses the empty caption, as in
                training, not zeros.
            join: Combines the two predictions of x0; takes (conditional, unconditional, guidance).
        """

        def ask(x: torch.Tensor, sigma: float, texts: Sequence[str]) -> torch.Tensor:
            t = torch.full((len(x),), self.schedule.timestep(sigma), dtype=torch.float32, device=x.device)
            return to_denoised(self.predict(x, t, texts), x, sigma, self.prediction_type)

        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            conditional = ask(x, sigma, captions)
            if guidance == 1:
                return conditional
            return join(conditional, ask(x, sigma, [NO_CAPTION] * len(x)), guidance)

        return denoise

    def default_sigmas(self, steps: int, guidance: float) -> torch.Tensor:
        """(steps + 1,) sigmas of this package's default spacing, from infinity."""
        return step_schedule(self.schedule, steps, latent_size=self.shape[1:], guidance=guidance)

    def sample(
        self,
        captions: Sequence[str],
        noise: torch.Tensor,
        sigmas: Sequence[float] | torch.Tensor,
        solver: str = DEFAULT_SOLVER,
        guidance: float = 1.0,
        callback: Callable[[int, float, torch.Tensor, torch.Tensor], None] | None = None,
        join: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = guide,
    ) -> torch.Tensor:
        """Latents (B, C, h, w) from unit noise; ``guidance`` and ``join`` as in ``denoise``.

        Pure noise stands for the state at a finite start too, as in every program: there it is scaled to the spread
        that a state of the start has without a picture in it.
        """
        start = float(sigmas[0])
        state = noise if math.isinf(start) else noise * (start / math.hypot(1, start))
        return sample(self.denoise(captions, guidance, join), state, sigmas, solver, callback=callback)

    def sample_as_published(
        self, captions: Sequence[str], noise: torch.Tensor, steps: int, guidance: float = 1.0
    ) -> torch.Tensor:
        """Latents sampled as in SDXL's own pipeline: diffusers' Euler scheduler with ``leading`` timesteps."""
        scheduler = EulerDiscreteScheduler.from_config(
            self.pipe.scheduler.config, timestep_spacing="leading", steps_offset=1
        )
        scheduler.set_timesteps(steps)
        denoise = self.denoise(captions, guidance)
        x = noise * scheduler.init_noise_sigma
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            state = scheduler.scale_model_input(x, t)
            x0 = denoise(state, float(sigma))
            x = scheduler.step(from_denoised(x0, state, float(sigma), self.prediction_type), t, x).prev_sample
        return x

    def levels(self, latents: torch.Tensor) -> np.ndarray:
        """(B, H, W, 3) float32 in levels of 255, not clipped."""
        return 255 * self._to_rgb(latents).permute(0, 2, 3, 1).float().cpu().numpy()

    def pictures(self, latents: torch.Tensor) -> np.ndarray:
        """(B, H, W, 3) uint8."""
        return self.levels(latents).round().clip(0, 255).astype(np.uint8)
