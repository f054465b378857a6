"""The forward process in diffusers' terms: pictures to noised states and training targets."""

import torch

from ..errors import UserError
from .devices import send
from .noise_schedule import NoiseSchedule

NO_STEP_LEFT = (
    "no step is left to run: strength times the number of steps is below 1; raise the strength or the number of steps"
)


class ForwardProcess:
    """The part of ``ZTSNRScheduler`` that adds noise.

    Attributes:
        schedule: the model's noise schedule.
    """

    schedule: NoiseSchedule
    _adds_noise: bool

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = alpha x0 + s eps; at a zero-terminal t = T exactly the noise.

        Args:
            original_samples: (B, C, H, W) pictures x0.
            noise: (B, C, H, W) unit Gaussian eps.
            timesteps: () or (B,), fractional or whole.  B may be 1 in any of the three, which then broadcasts.

        Returns:
            (B, C, H, W) in the dtype of ``original_samples``; the sum is taken in float32 at least.
        """
        self._adds_noise = True
        alpha, s = self._alpha_s(timesteps, original_samples)
        return (alpha * original_samples + s * noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = alpha eps - s x0, the target of v-prediction; at a zero-terminal t = T exactly -x0.

        Shapes and dtypes as in ``add_noise``, ``sample`` being the picture x0 (arXiv 2202.00512).
        """
        alpha, s = self._alpha_s(timesteps, sample)
        return (alpha * noise - s * sample).to(sample.dtype)

    def _alpha_s(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha(t) and s(t), each (B or 1, 1, ...), on the device of ``like``."""
        timesteps = torch.as_tensor(timesteps).reshape(-1)
        if len(timesteps) == 0:
            raise UserError(NO_STEP_LEFT)
        if len(timesteps) != len(like) and 1 not in (len(timesteps), len(like)):
            raise UserError(f"{len(timesteps)} timesteps for a batch of {len(like)}: give one per sample, or one")
        u = 1 / self.schedule.sigma(timesteps).reshape(-1, *[1] * (like.ndim - 1))  # exactly 0 at sigma = inf
        s = (1 + u**2).rsqrt()
        dtype = torch.promote_types(like.dtype, torch.float32)
        return send((u * s).to(dtype), like.device), send(s.to(dtype), like.device)
