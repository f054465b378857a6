"""The noise schedule of a trained diffusion model: how much noise is in x at timestep t.

One table, ``alphas_cumprod``, says everything: x_t = alpha x0 + s eps with alpha^2 = alphas_cumprod[t] and
alpha^2 + s^2 = 1.  sigma = s / alpha is the same number in the scaling of k-diffusion.
"""

import math
from collections.abc import Mapping
from typing import Any, overload

import torch

from ..errors import UserError
from .devices import send, to_float64

Number = float | torch.Tensor


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Rescale betas so that the last timestep is pure noise.

    Lin et al. 2024 (arXiv 2305.08891), Algorithm 1: shift sqrt(alphas_cumprod) until it ends at zero, then stretch it
    until it begins where it began.  Applying it twice changes nothing.

    Args:
        betas: (T,) noise variances, any floating dtype.

    Returns:
        (T,) float64; the last beta is exactly 1.
    """
    alphas_bar_sqrt = (1 - to_float64(betas)).cumprod(0).sqrt()
    first, last = alphas_bar_sqrt[0].clone(), alphas_bar_sqrt[-1].clone()
    # Shift the end to 0, then stretch the beginning back to where it was.
    alphas_bar = ((alphas_bar_sqrt - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    return 1 - alphas


def make_betas(
    beta_schedule: str = "scaled_linear",
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_train_timesteps: int = 1000,
) -> torch.Tensor:
    """The beta schedules that Stable Diffusion checkpoints were trained on.

    ``linear``: betas evenly spaced (DDPM, arXiv 2006.11239).  ``scaled_linear``: their square roots evenly spaced
    (latent diffusion, arXiv 2112.10752).  ``squaredcos_cap_v2``: alphas_cumprod follows a squared cosine, betas capped
    at 0.999 (Nichol and Dhariwal, arXiv 2102.09672); it ignores beta_start and beta_end.

    Returns:
        (num_train_timesteps,) float64.
    """
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    if beta_schedule == "squaredcos_cap_v2":
        t = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        alphas_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=0.999)
    raise UserError(
        f"unknown beta_schedule {beta_schedule!r}; choose linear, scaled_linear or squaredcos_cap_v2, or pass betas"
    )


class NoiseSchedule:
    """sigma(t) and its inverse, for whole and fractional timesteps, on a table of alphas_cumprod.

    Between two table entries the angle phi = atan(sigma) is interpolated linearly in t.  The angle is finite and
    strictly increasing over the whole table, pi/2 at a zero-terminal end, so sigma(t) is finite for every t < T, goes
    to infinity as t goes to T, and ``timestep`` inverts it everywhere.  Near T this makes 1/sigma linear in t, which is
    what Algorithm 1 of arXiv 2305.08891 (a shift of sqrt(alphas_cumprod)) does itself.  The interpolation works on the
    complement atan(1/sigma), which keeps full precision where sigma is large.

    Attributes:
        alphas_cumprod: (T + 1,) float64 on the CPU, strictly decreasing, in [0, 1).
    """

    def __init__(self, alphas_cumprod: torch.Tensor):
        alphas_cumprod = to_float64(alphas_cumprod.detach()).cpu()
        if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 2:
            raise UserError(
                f"alphas_cumprod must hold at least two timesteps in one dimension, not {tuple(alphas_cumprod.shape)}"
            )
        if alphas_cumprod.isnan().any():
            raise UserError("alphas_cumprod holds NaN")
        if not (alphas_cumprod[-1] >= 0 and alphas_cumprod[0] < 1 and (alphas_cumprod.diff() < 0).all()):
            raise UserError("alphas_cumprod must decrease strictly within [0, 1): each timestep adds noise")
        self.alphas_cumprod = alphas_cumprod
        # -atan(1 / sigma) at every timestep: rises with t, exactly 0 at a zero-terminal end
        self._angles = -torch.atan2(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())

    @classmethod
    def from_betas(cls, betas: torch.Tensor, zero_terminal_snr: bool = False) -> "NoiseSchedule":
        """A schedule from the betas a model was trained with, rescaled to zero terminal SNR on request.

        Args:
            betas: (T + 1,) in (0, 1]; 1 only in the last place.

        Raises:
            UserError: betas that are NaN, outside (0, 1], or reach 1 before the end.
        """
        betas = to_float64(betas).detach().cpu()
        if betas.isnan().any():
            raise UserError("betas hold NaN")
        if not ((betas > 0) & (betas <= 1)).all():
            raise UserError("betas must lie in (0, 1]: each is the share of variance that a timestep replaces by noise")
        if (betas[:-1] == 1).any():
            raise UserError("only the last beta may be 1: after it nothing is left of the picture")
        if zero_terminal_snr:
            betas = rescale_zero_terminal_snr(betas)
        return cls((1 - betas).cumprod(0))

    @classmethod
    def sdxl(cls, zero_terminal_snr: bool = True) -> "NoiseSchedule":
        """The schedule of Stable Diffusion 1.x, 2.x and XL; by default with zero terminal SNR."""
        return cls.from_betas(make_betas(), zero_terminal_snr)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """A schedule from the config of any diffusers scheduler that defines betas.

        Reads trained_betas, or beta_schedule, beta_start, beta_end and num_train_timesteps, and rescale_betas_zero_snr;
        a missing one takes the value that Stable Diffusion was trained with.
        """
        if config.get("trained_betas") is not None:
            betas = to_float64(config["trained_betas"])
        else:
            names = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
            betas = make_betas(**{name: config[name] for name in names if name in config})
        return cls.from_betas(betas, bool(config.get("rescale_betas_zero_snr", False)))

    @property
    def betas(self) -> torch.Tensor:
        """(T + 1,) float64, the share of variance that each timestep replaces by noise."""
        abar = self.alphas_cumprod
        return 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])

    @property
    def last_timestep(self) -> int:
        """T, the noisiest timestep: 999 for Stable Diffusion."""
        return len(self.alphas_cumprod) - 1

    @property
    def zero_terminal_snr(self) -> bool:
        """True if the last timestep is pure noise."""
        return self.alphas_cumprod[-1].item() == 0

    @property
    def sigma_min(self) -> float:
        """sigma(0), the least noise the model was trained on."""
        return self.sigma(0.0)

    @property
    def sigma_max(self) -> float:
        """sigma(T); infinity under zero terminal SNR."""
        return self.sigma(float(self.last_timestep))

    @overload
    def sigma(self, t: float) -> float: ...
    @overload
    def sigma(self, t: torch.Tensor) -> torch.Tensor: ...
    def sigma(self, t: Number) -> Number:
        """Noise level at timestep t, in units of the signal (k-diffusion's sigma).

        Args:
            t: a number or a tensor of any shape, in [0, T], fractional or whole.

        Returns:
            A float for a number; for a tensor, float64 of its shape, on its device if that has float64, else on the
            CPU.  inf at a zero-terminal T.
        """
        if not isinstance(t, torch.Tensor):
            return self.sigma(to_float64(t)).item()
        t = to_float64(t).clamp(0, self.last_timestep)
        # Linear in the angle between the two table entries around t.
        angles = send(self._angles, t.device)
        below = t.long().clamp(max=self.last_timestep - 1)
        # take(), because indexing by a tensor of shape () reads it on the host
        angle = torch.lerp(angles.take(below), angles.take(below + 1), t - below)
        return (angle.cos() / angle.sin()).abs()  # of -angle, and positive where the angle is a zero of either sign

    @overload
    def timestep(self, sigma: float) -> float: ...
    @overload
    def timestep(self, sigma: torch.Tensor) -> torch.Tensor: ...
    def timestep(self, sigma: Number) -> Number:
        """The fractional timestep whose noise level is sigma; the inverse of ``sigma``.

        Args:
            sigma: a number or a tensor of any shape, inf allowed; clamped to [sigma_min, sigma_max].

        Returns:
            A float for a number; for a tensor, float64 of its shape, on its device if that has float64, else on the
            CPU.
        """
        if not isinstance(sigma, torch.Tensor):
            return self.timestep(to_float64(sigma)).item()
        angle = torch.atan(-1 / to_float64(sigma))
        angles = send(self._angles, angle.device)
        below = torch.searchsorted(angles, angle).clamp_(1, self.last_timestep) - 1
        start, end = angles.take(below), angles.take(below + 1)
        return ((angle - start) / (end - start)).add_(below).clamp_(0, self.last_timestep)

    def shifted(self, ratio: float) -> "NoiseSchedule":
        """The schedule with every sigma multiplied by ratio, for canvases ratio times longer than the trained ones.

        Averaging over a canvas of twice the length halves the noise of its mean, so double the sigma leaves the same
        signal-to-noise ratio per picture detail: NovelAI V3 (arXiv 2409.15997), the same map as SD3's timestep shift
        (arXiv 2403.03206) and simple diffusion's logSNR shift of -2 ln(ratio) (arXiv 2301.11093).
        """
        if not (0 < ratio < math.inf):
            raise UserError(f"the resolution ratio must be positive and finite, not {ratio}")
        # 1 / (1 + ratio^2 sigma^2) with sigma^2 = (1 - abar) / abar, written without dividing by abar
        abar = self.alphas_cumprod
        return NoiseSchedule(abar / (abar + ratio**2 * (1 - abar)))


def min_snr_weight(
    snr: torch.Tensor, gamma: float = 5.0, prediction_type: str = "v_prediction", floor: float = 0.0
) -> torch.Tensor:
    """Min-SNR-gamma loss weight (Hang et al., arXiv 2303.09556, section 3.4) of a loss on the network's own output.

    The method weighs the x0 loss by min(snr, gamma); on v that is min(snr, gamma) / (snr + 1), on eps
    min(snr, gamma) / snr.  For v it falls to 0 as the SNR does, which starves the zero-terminal step: ``floor`` keeps a
    least weight there.

    Args:
        snr: alpha^2 / s^2, any shape; 0 at the zero-terminal step.
    """
    if prediction_type == "v_prediction":
        weight = snr.clamp(max=gamma) / (snr + 1)
    elif prediction_type == "epsilon":
        weight = gamma / snr.clamp(min=gamma)
    elif prediction_type == "sample":
        weight = snr.clamp(max=gamma)
    else:
        raise UserError(f"unknown prediction_type {prediction_type!r}; choose v_prediction, epsilon or sample")
    return weight.clamp(min=floor)
