"""The step that trains a VAE's decoder, and the state that it resumes from."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from diffusers import AutoencoderKL
from torch import nn

from ...errors import UserError
from ..ema import ConstantDecay, Ema
from .export import TRAINED
from .perceptual import PatchDiscriminator, adaptive_weight, hinge_loss
from .reconstruction import Perceptual
from .settings import VaeDecoderSettings

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DecoderOutput
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

BETAS = (0.5, 0.9)  # of Adam, as latent diffusion trains autoencoders: less momentum against an adversary


class DecoderTraining:
    """A decoder in training: its weights and their average, the discriminator, and both optimizers.

    Args:
        vae: float32, on its device; its decoder and post_quant_conv are trained in place.
        settings: losses and optimizers.
        perceptual: LPIPS; None if its weight is 0.
    """

    def __init__(self, vae: AutoencoderKL, settings: VaeDecoderSettings, perceptual: Perceptual | None):
        self.vae, self.settings, self.perceptual = vae, settings, perceptual
        vae.requires_grad_(False)
        self.weights = {name: p for name, p in vae.named_parameters() if name.startswith(TRAINED)}
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.profile = ConstantDecay(settings.ema_decay)
        self.ema = Ema(self.weights, [self.profile])
        self.optimizer = _adamw(self.weights, settings)
        self.discriminator, self.adversary = None, {}
        if settings.discriminator_weight:
            generator = torch.Generator().manual_seed(settings.seed)
            self.discriminator = PatchDiscriminator(settings.discriminator_width, generator=generator).to(vae.device)
            self.adversary = dict(self.discriminator.named_parameters())
            self.discriminator_optimizer = _adamw(self.adversary, settings)
        self.steps = 0  # done
        self.is_finite = torch.ones((), dtype=torch.bool, device=vae.device)

    def step(self, data: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step of the decoder, and one of the discriminator if it has begun.

        Args:
            data: (B, 4, H, W) pixels in [-1, 1] and marks of boxes, see ``load_crop``.
            noise: (B, C, h, w) standard normal, of the samples of the posterior.

        Returns:
            the losses by name, each () on the device.
        """
        settings, (pixels, marks) = self.settings, (data[:, :3], data[:, 3:])
        # A sample of the frozen encoder's posterior, decoded.
        with torch.no_grad():
            posterior = cast("AutoencoderKLOutput", self.vae.encode(pixels)).latent_dist
            latents = posterior.mean + posterior.std * noise
        with self._computing():
            decoded = cast("DecoderOutput", self.vae.decode(latents)).sample
        decoded = decoded.float()
        # The decoder's loss, with the adversary's part once that has begun.
        losses = self.reconstruction_losses(decoded, pixels, marks)
        loss = losses["reconstruction"]
        discriminator = self.discriminator if self.steps >= settings.discriminator_start else None
        if discriminator is not None:
            losses |= self.adversarial_losses(decoded, loss)
            loss = loss + settings.discriminator_weight * losses["adaptive_weight"] * losses["adversarial"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        self.ema.update(self.steps)

        # The discriminator learns from its own loss alone, on the reconstruction without its graph.
        if discriminator is not None:
            with self._computing():
                real, fake = discriminator(pixels), discriminator(decoded.detach())
            losses["discriminator"] = hinge_loss(real.float(), fake.float())
            self.discriminator_optimizer.zero_grad()  # removes what the decoder's loss left in it
            losses["discriminator"].backward()
            self.discriminator_optimizer.step()
        losses = {name: value.detach() for name, value in losses.items()}
        self.is_finite &= torch.stack([*losses.values(), loss.detach()]).isfinite().all()
        return losses

    def reconstruction_losses(
        self, decoded: torch.Tensor, pixels: torch.Tensor, marks: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """L1 and LPIPS, and their weighted sum, "reconstruction".

        Inside boxes they are weighted; the weights of each picture have the mean 1.
        """
        settings = self.settings
        weights = 1 + (settings.box_weight - 1) * marks
        weights = weights / weights.mean(dim=(1, 2, 3), keepdim=True)
        losses = {"l1": ((decoded - pixels).abs() * weights).mean()}
        total = settings.l1_weight * losses["l1"]
        if self.perceptual is not None:
            losses["lpips"] = (self.perceptual(decoded, pixels) * weights).mean()
            total = total + settings.lpips_weight * losses["lpips"]
        return {"reconstruction": total} | losses

    def adversarial_losses(self, decoded: torch.Tensor, reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
        """The adversarial loss of the decoder, and its adaptive weight."""
        assert self.discriminator is not None
        with self._computing():
            scores = self.discriminator(decoded)
        adversarial = -scores.float().mean()
        weight = adaptive_weight(reconstruction, adversarial, self.vae.decoder.conv_out.weight)
        return {"adversarial": adversarial, "adaptive_weight": weight}

    def check(self) -> None:
        """Check that all losses so far and the weights are finite; waits for the device.

        Raises:
            UserError: they are not.
        """
        # gradients of finite losses may still be infinite, and then the weights are
        norms = torch.stack(torch._foreach_norm([*self.weights.values(), *self.adversary.values()]))
        if not (self.is_finite & norms.isfinite().all()):
            raise UserError(
                f"a loss or a weight was not finite by step {self.steps}, and the run has stopped: lower "
                "learning_rate, or set dtype = float32; the last saved state is sound"
            )

    def take_average(self) -> None:
        """Replace the weights by their moving average."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.ema.tensors(self.profile)[name])

    def _computing(self) -> torch.autocast:
        is_half = self.settings.dtype == "bfloat16"
        return torch.autocast(self.vae.device.type, dtype=torch.bfloat16, enabled=is_half)

    # ------------------------------------------------------------------------------------------------------------------
    # Its state

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors that the next step depends on, by name; they are its own, but for the average's step count."""
        tensors = _prefixed("weights", self.weights) | _prefixed("ema", self.ema.state_tensors())
        tensors |= _prefixed("optimizer", _moments(self.optimizer, self.weights))
        if self.discriminator is not None:
            tensors |= _prefixed("discriminator", self.adversary)
            tensors |= _prefixed("discriminator_optimizer", _moments(self.discriminator_optimizer, self.adversary))
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        """Take over what ``state`` gave after ``steps`` steps, or those tensors themselves once they were loaded into.

        Version 0.1.0 had no moments of weights that had not been trained yet: they stay zero.
        """
        own = self.state()
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        averages = {name.removeprefix("ema/"): t for name, t in tensors.items() if name.startswith("ema/")}
        self.ema.load_state_tensors(averages)
        self.steps = steps


def _adamw(weights: Mapping[str, nn.Parameter], settings: VaeDecoderSettings) -> torch.optim.AdamW:
    """AdamW with its whole state, zero, so that a state on disk always has the same tensors."""
    optimizer = torch.optim.AdamW(weights.values(), settings.learning_rate, BETAS, weight_decay=0)
    for weight in weights.values():
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": torch.zeros(()), **moments}
    return optimizer


def _prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": tensor.detach() for name, tensor in tensors.items()}


def _moments(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor for name, weight in weights.items() for key, tensor in optimizer.state[weight].items()
    }
