"""The loss on held-out pictures, at fixed timesteps and with fixed noise, so that runs can be compared."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from ..data.captions import CaptionSettings, caption_text
from ..data.keyed_random import CAPTION, keyed_generator
from ..data.pictures import PictureError
from ..data.tokens import TokenBatch, batch_prompts
from ..samplers.devices import widest_float
from ..world import World
from .networks import Tokenize
from .objective import Objective
from .run_data import TrainingData

QUANTILES = 8  # of the distribution of timesteps; t = T is added


class _Question(NamedTuple):
    """A picture with its noise and conditioning, for Q timesteps."""

    latents: torch.Tensor  # (1, C, h, w)
    noise: torch.Tensor  # (1, C, h, w)
    tokens: TokenBatch
    time_ids: torch.Tensor  # (Q, 6)


class Validation:
    """Mean square errors on held-out pictures.

    Each picture is evaluated at the middles of 8 equal parts of the distribution of timesteps and at t = T.  Its noise,
    crop and caption never change.  The pictures are read once and kept as latents.  The numbers are the same for any
    number of processes.

    Args:
        data: data with held-out pictures; those that cannot be used are skipped.
        pictures: maximum number of pictures.
        captions: caption settings; without shuffling and dropout here.
        tokenize: tokens of a caption.
        objective: noise, timesteps and loss.
        to_latents: (pixels or cached latents (1, ...), number of the posterior's noise) -> latents (1, C, h, w).
        world: the processes of the run.

    Attributes:
        count: number of pictures over all processes.
        timesteps: (Q,) int64.
    """

    def __init__(
        self,
        data: TrainingData,
        pictures: int,
        captions: CaptionSettings,
        tokenize: Tokenize,
        objective: Objective,
        to_latents: Callable[[torch.Tensor, int], torch.Tensor],
        world: World,
    ):
        self._objective, self._world = objective, world
        middles = objective.timesteps_at((np.arange(QUANTILES) + 0.5) / QUANTILES)
        self.timesteps = torch.cat([middles, torch.tensor([objective.schedule.last_timestep])]).unique()
        self.count, own, first = 0, [], None
        for picture, bucket in zip(data.held_out.tolist(), data.held_out_buckets.tolist(), strict=True):
            if self.count == pictures:
                break
            try:
                numbers = partial(keyed_generator, data.plan.seed, 0, picture)
                loaded = (picture, *data.load(picture, data.plan.buckets[bucket], numbers))
            except (PictureError, OSError):
                continue
            first = first or loaded
            if self.count % world.size == world.rank:
                own.append(loaded)
            self.count += 1
        self._counted = len(own)
        if len(own) < -(-self.count // world.size):
            own.append(first)  # evaluated, not counted: with FSDP all processes gather weights equally often
        plain = replace(captions, shuffle=False, tag_dropout=0.0, caption_dropout=0.0)
        self._questions = []
        for picture, pixels, conditioning in own:
            latents = to_latents(pixels[None].to(objective.device), picture)
            numbers = partial(keyed_generator, data.plan.seed, 0, picture)
            tokens = tokenize(caption_text(data.index.captions(picture), plain, numbers(CAPTION)))
            asked = len(self.timesteps)
            self._questions.append(
                _Question(
                    latents.cpu(),
                    objective.draw_noise(latents.shape[1:], range(1), data.plan.seed, 0, picture).cpu(),
                    batch_prompts([tokens] * asked),
                    torch.tensor([sum(conditioning, ())] * asked, dtype=torch.float32),
                )
            )

    @torch.no_grad()
    def measure(self, predict: Callable[..., torch.Tensor]) -> dict[str, float]:
        """The errors as metrics: "validation" over all timesteps, and one for each timestep.

        Args:
            predict: (noisy, timesteps, tokens, time_ids) -> the network's output.
        """
        device, t = self._objective.device, self.timesteps.to(self._objective.device)
        total = torch.zeros(len(t), dtype=widest_float(device), device=device)
        for number, question in enumerate(self._questions):
            latents, noise = (
                tensor.to(device).expand(len(t), -1, -1, -1) for tensor in (question.latents, question.noise)
            )
            noisy = self._objective.noisy(latents, noise, t)
            output = predict(noisy, t, question.tokens, question.time_ids.to(device))
            _, errors = self._objective.losses(output, latents, noise, t)
            if number < self._counted:
                total += errors
        means = (self._world.sum(total) / self.count).tolist()
        by_timestep = zip(self.timesteps.tolist(), means, strict=True)
        return {"validation": float(np.mean(means))} | {f"validation/t{at:03d}": mean for at, mean in by_timestep}
