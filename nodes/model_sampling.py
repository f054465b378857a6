"""What a patched MODEL carries as ``model_sampling``: exact schedules, fractional timesteps, and a top at infinity.

ComfyUI writes the state in k-diffusion's scaling, x = x0 + sigma eps, which has no value at infinity.  A large number
stands for it wherever other packs may read it and calculate with it, the table of sigmas included, and the state is the
noise times that number: x and sigma belong together.  A power of two loses no bit of the noise, so what the network is
given at infinity is the noise itself; and what it answers is taken for x0 without any share of x.
"""

import math

import comfy.model_sampling
import torch

from ..samplers import NoiseSchedule
from ..samplers.devices import to_float64

INFINITE_SIGMA = 2.0**13  # stands for infinity; below 10000, at which the sliders of other packs end
# From here on a sigma means infinity: ComfyUI's own zero-SNR table ends at 4518.76.  The network could not tell them
# apart, as its input is noise and a share of 1/4518 of the picture.
INFINITE_FROM = 4518.0


class ExactSchedule(comfy.model_sampling.ModelSamplingDiscrete):
    """sigma(t) and t(sigma) of a ``NoiseSchedule``, without rounding timesteps.

    Attributes:
        schedule: the noise schedule, canvas shift included.
        canvas_length: sqrt(height * width) of the latent canvas that the schedule is for: stock schedulers that spread
            sigmas over a range start there or above.
        guidance: CFG scale that the scheduler ztsnr_spectral makes its steps for.
        sigmas: (T + 1,) float32; the last is INFINITE_SIGMA under zero terminal SNR.
    """

    made_by_ztsnr = True

    def __init__(self, schedule: NoiseSchedule, canvas_length: float, guidance: float):
        torch.nn.Module.__init__(self)  # the stock constructor would compute another table
        self.schedule = schedule
        self.canvas_length = canvas_length
        self.guidance = guidance
        self.sigma_data = 1.0
        self.num_timesteps = schedule.last_timestep + 1
        self.zsnr = schedule.zero_terminal_snr  # Save Checkpoint marks the file by it
        self.set_sigmas(self.sigma(torch.arange(self.num_timesteps)))

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Fractional timesteps of sigmas of any shape, float32 on their device."""
        levels = to_float64(sigma)
        levels = levels.masked_fill(levels >= INFINITE_FROM, math.inf)
        return self.schedule.timestep(levels).float().to(sigma.device)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Sigmas of timesteps of any shape, float32 on their device."""
        return self.schedule.sigma(timestep).float().clamp(max=INFINITE_SIGMA).to(timestep.device)

    def percent_to_sigma(self, percent: float) -> float:
        """The noise level below which a condition that starts at ``percent`` of the sampling is on."""
        if percent <= 0:
            return math.inf
        return self.schedule.sigma((1 - percent) * self.schedule.last_timestep) if percent < 1 else 0.0


class ExactEpsilon(ExactSchedule, comfy.model_sampling.EPS):
    """An epsilon model on an exact schedule; it cannot have a top at infinity."""


class ExactVPrediction(ExactSchedule, comfy.model_sampling.V_PREDICTION):
    """A v-prediction model, regular at infinity: v = alpha eps - s x0 with alpha = 0 and s = 1 there."""

    def calculate_denoised(
        self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor
    ) -> torch.Tensor:
        """x0 = alpha^2 x - s v in terms of k-diffusion's x; alpha^2 vanishes and s is 1 at infinity."""
        sigma = _like(sigma, model_output)
        alpha_squared = (sigma**2 + 1).reciprocal().masked_fill_(sigma >= INFINITE_FROM, 0)
        s = (sigma**-2 + 1).rsqrt()
        return torch.addcmul(model_input * alpha_squared, model_output, s, value=-1)

    def noise_scaling(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, max_denoise: bool = False
    ) -> torch.Tensor:
        """The state at sigma: the picture plus sigma times the noise, or at infinity the noise alone."""
        sigma = _like(sigma, noise)
        level = (sigma**2 + 1).sqrt() if max_denoise else sigma
        return noise * level + latent_image * (sigma < INFINITE_FROM)


def _like(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One sigma, or one a sample, shaped to multiply x."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1))
