"""One step of the optimizer: timesteps, noise, forward, backward, clip, guard, update, average."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import torch

from ..data.dataset import Batch
from ..data.keyed_random import POSTERIOR, keyed_noise
from ..data.prefetch import sent
from ..data.tokens import batch_prompts
from .learning_rate import lr_factor, set_lr
from .networks import in_groups
from .optimizers import clip_grad_norm
from .run import Place, Run

if TYPE_CHECKING:
    from diffusers.models.modeling_outputs import AutoencoderKLOutput


class TrainingStep:
    """Takes the steps of a run, and enters its stages.

    Nothing in a step is read from the device, so the device never waits for the host.

    Args:
        run: the parts of the run; ``run.place`` advances with each step.
    """

    def __init__(self, run: Run):
        self.run = run
        self.stage = -1

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take one step; (B,) timesteps, mean square errors and weighted losses of this rank's pictures."""
        run, settings = self.run, self.run.settings
        step = run.place.step
        if self.stage_at(step) != self.stage:
            self.warm_up()  # other parameters need other graphs

        # Timesteps.  All ranks draw the whole batch's and take their own, so the number of ranks changes nothing.
        plan = run.data.plan
        slots = range(plan.rank, plan.batch_size, plan.world_size)
        t = run.objective.draw_timesteps(settings.seed, batch.epoch, batch.step, plan.batch_size)
        t = sent(t[plan.rank :: plan.world_size], run.world.device)

        # Gradients, averaged over all ranks.
        errors, losses = self._backward(batch, slots, t)
        if run.objective.learned is not None:  # no wrapper averages those of the learned loss weight
            run.world.average_gradients(run.objective.learned.parameters())

        # Learning rate: schedule times the stage's factor; it depends on the step alone.
        set_lr(run.optimizer, self._lr_factor(step) * settings.stages[self.stage].learning_rate)

        # Unscale before clipping, and clip the model's gradients alone: the learned weight's have another scale.
        if run.loss_scale:
            run.loss_scale.unscale(run.all_parameters())
        norm = clip_grad_norm(run.model.parameters.values(), settings.optimizer.clip or None)

        # Stochastic rounding draws from torch's global generator: seed it alike on all ranks and after a resume.
        if settings.optimizer.bf16_stochastic_round:
            torch.manual_seed(settings.seed + step)

        # Update, unless the norm is not finite.
        bad = run.guard.step(run.optimizer, norm, batch, t, step, errors)
        if run.loss_scale:
            run.loss_scale.update(bad)
        run.optimizer.zero_grad(set_to_none=True)

        # Averages see the weights after the step; after a skipped step, the same weights again.
        run.ema.update(step + 1)
        run.place = Place(step + 1, batch.epoch, batch.step + 1)
        return t, errors, losses

    def latents(self, data: torch.Tensor, slots: range, epoch: int, step: int) -> torch.Tensor:
        """The U-Net's latents: of cached latents, or of pixels through the VAE, as a sample of its posterior."""
        run = self.run
        if run.data.cache is None:
            with torch.no_grad():
                posterior = cast("AutoencoderKLOutput", run.networks.vae.encode(data)).latent_dist
            shape = posterior.mean.shape[1:]
            noise = keyed_noise(shape, slots, run.settings.seed, epoch, step, POSTERIOR, run.world.device)
            data = posterior.mean + posterior.std * noise
        return run.latent_scaling.to_model(data)

    def _backward(self, batch: Batch, slots: range, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of this rank's share of a step, in ``optimizer.accumulation`` parts; errors and losses (B,)."""
        run = self.run
        size = -(-len(slots) // run.settings.optimizer.accumulation)
        assert batch.tokens is not None
        errors, losses = [], []
        for begin in range(0, len(slots), size):
            part = slice(begin, begin + size)
            is_last = begin + size >= len(slots)
            x0 = self.latents(batch.data[part], slots[part], batch.epoch, batch.step)
            noise = run.objective.draw_noise(x0.shape[1:], slots[part], run.settings.seed, batch.epoch, batch.step)
            # x_t = alpha_t x0 + s_t noise
            noisy = run.objective.noisy(x0, noise, t[part]).to(run.dtype)
            noisy = noisy.contiguous(memory_format=run.layout)
            tokens = run.speed.of_one_length(batch.tokens._replace(rows=batch.tokens.rows[part]))
            # The last part's backward pass exchanges the gradients of all parts.
            with nullcontext() if is_last else run.model.accumulating():
                output = run.model(noisy, t[part], tokens, batch.time_ids[part])
                weighted, error = run.objective.losses(output, x0, noise, t[part])
                weighted = weighted * batch.weights[part]
                loss = weighted.sum() / len(slots)  # the parts' losses add up to the mean of the share
                (loss * run.loss_scale.scale if run.loss_scale else loss).backward()
            errors.append(error)
            losses.append(weighted.detach())
        return torch.cat(errors), torch.cat(losses)

    def _lr_factor(self, step: int) -> float:
        settings = self.run.settings.optimizer
        return lr_factor(
            step,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            total_steps=self.run.settings.steps,
            final_share=settings.final_share,
            reference_steps=settings.reference_steps,
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Stages

    def stage_at(self, step: int) -> int:
        """The index of the stage that a step belongs to; the last stage has no end."""
        stages = self.run.settings.stages
        for index, stage in enumerate(stages[:-1]):
            if stage.steps is None or step < stage.steps:
                return index
            step -= stage.steps
        return len(stages) - 1

    def warm_up(self) -> None:
        """Enter the stage of the next step, and compile for every bucket before the clock runs."""
        self._enter(self.stage_at(self.run.place.step))
        self.run.speed.warm_up(self._try_bucket)

    def _enter(self, index: int) -> None:
        """Train the parameters of a stage from now on, and no others."""
        run = self.run
        stage = run.settings.stages[index]
        names = in_groups(run.model.parameters, stage.groups)
        run.model.train_only(names)
        for name, parameter in run.model.parameters.items():
            if name not in names:
                parameter.grad = None  # otherwise the optimizer would keep updating it
        if len(run.settings.stages) > 1:
            run.say(f"stage {index + 1}: {', '.join(stage.groups)}, {len(names)} tensors")
        self.stage = index

    def _try_bucket(self, size: tuple[int, int], batch: int) -> None:
        """Run a forward and a backward pass of a bucket (width, height) without any lasting effect."""
        run = self.run
        device, factor = run.world.device, run.networks.factor
        channels = run.networks.unet.config["in_channels"]
        noisy = torch.zeros(batch, channels, size[1] // factor, size[0] // factor, device=device, dtype=run.dtype)
        noisy = noisy.contiguous(memory_format=run.layout)
        tokens = run.speed.of_one_length(batch_prompts([run.tokenize("")] * batch))
        t = torch.zeros(batch, dtype=torch.int64, device=device)
        run.model(noisy, t, tokens, torch.zeros(batch, 6, device=device)).float().sum().backward()
        for parameter in run.all_parameters():
            parameter.grad = None
