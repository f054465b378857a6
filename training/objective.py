"""The training objective: which timesteps are drawn, what the network predicts, and how each error is weighted.

Everything follows from one ``NoiseSchedule``.  Timesteps are whole numbers 0 ... T, so their distribution and the loss
weight are tables, and the share of the loss at each noise level is known before the first step.  The betas are first
rescaled to zero terminal SNR; SNR and weights are computed after that.  In the other order t = T would get the weight
of an SNR that it does not have.
"""

import csv
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr
from tabulate import tabulate

from ..data.keyed_random import NOISE, NOISE_OFFSET, TIMESTEPS, keyed_generator, keyed_noise
from ..errors import UserError
from ..samplers import NoiseSchedule, ZTSNRWarning, min_snr_weight
from ..samplers.prediction import check_prediction_type

SHOWN = (0, 100, 200, 300, 400, 500, 600, 700, 800, 850, 900, 950, 980, 990, 998, 999)  # thousandths of the schedule


@dataclass(frozen=True)
class ObjectiveSettings:
    """Settings of the objective.

    Attributes:
        prediction_type: v_prediction, epsilon or sample (x0).  Default: for an adapter that of the base, which an
            adapter cannot change; else v_prediction.
        zero_terminal_snr: rescale the betas so that t = T is pure noise (Lin et al., arXiv 2305.08891).  Default: for
            an adapter as the base; else true, except for epsilon.
        schedule_shift: factor on every sigma of the published schedule, for canvases that are longer by this factor:
            double the length, double sigma (NovelAI V3, arXiv 2409.15997).  The exported model must be sampled with
            it: its files say so, and canvas_shift sets it in ComfyUI.  Default: that of the base, 1 for most.
        timesteps: distribution of t: uniform; logit_normal (SD3, arXiv 2403.03206), or laplace in log SNR (Hang et al.,
            arXiv 2407.03297).
        timesteps_mean, timesteps_scale: mean and scale of logit_normal or laplace.
        stratified: spread the timesteps of a step evenly over the distribution, which makes the loss less noisy.
        terminal_probability: additional probability of t = T.  A uniform distribution would draw it once in 1000
            pictures, and the brightness of a picture depends on this step.
        weighting: loss weight by noise level: min_snr (Hang et al., arXiv 2303.09556), debiased (Yu et al., arXiv
            2310.08442), constant, or learned (EDM2, arXiv 2312.02696).
        min_snr_gamma: gamma of min_snr.
        high_noise_share: least share of the loss at t >= 900 (0.9 T) if the network's error were equal everywhere.  The
            weights of min_snr and debiased fall to 0 at t = T, so weights at SNR below 1 get a floor that ensures this
            share.  0 sets no floor, and the network hardly learns the step at t = T.
        noise_offset: standard deviation of a constant added to each channel's noise.  Epsilon models need this trick to
            learn brightness; v-prediction with zero terminal SNR does not.

    Raises:
        UserError: a number is out of range, or epsilon is combined with zero terminal SNR.
    """

    prediction_type: Literal["v_prediction", "epsilon", "sample"] | None = None
    zero_terminal_snr: bool | None = None
    schedule_shift: float | None = None
    timesteps: Literal["uniform", "logit_normal", "laplace"] = "uniform"
    timesteps_mean: float = 0.0
    timesteps_scale: float = 1.0
    stratified: bool = True
    terminal_probability: float = 0.02
    weighting: Literal["min_snr", "debiased", "constant", "learned"] = "min_snr"
    min_snr_gamma: float = 5.0
    high_noise_share: float = 0.1
    noise_offset: float = 0.0

    def __post_init__(self):
        check_prediction_type(self.prediction_type or "v_prediction", bool(self.zero_terminal_snr))
        if not 0 <= self.terminal_probability < 1:
            raise UserError(f"terminal_probability must be at least 0 and less than 1, not {self.terminal_probability}")
        if not 0 <= self.high_noise_share < 1:
            raise UserError(f"high_noise_share must be at least 0 and less than 1, not {self.high_noise_share}")
        if not (self.timesteps_scale > 0 and self.min_snr_gamma >= 1):
            raise UserError("timesteps_scale must be above 0, and min_snr_gamma at least 1")
        if self.schedule_shift is not None and not 0 < self.schedule_shift < math.inf:
            raise UserError(f"schedule_shift must be above 0 and finite, not {self.schedule_shift}")
        if self.noise_offset < 0:
            raise UserError(f"noise_offset must be at least 0, not {self.noise_offset}")

    def with_recipe(self) -> "ObjectiveSettings":
        """The settings with v-prediction, zero terminal SNR and no shift where they say nothing."""
        prediction_type = self.prediction_type or "v_prediction"
        zero, shift = self.zero_terminal_snr, self.schedule_shift
        return replace(
            self,
            prediction_type=prediction_type,
            zero_terminal_snr=prediction_type != "epsilon" if zero is None else zero,
            schedule_shift=1.0 if shift is None else shift,
        )


class Objective:
    """The loss of a network under a noise schedule.

    Args:
        settings: settings of the objective; what they leave open is filled by ``with_recipe``.
        schedule: schedule of the base model, before any rescaling; by default Stable Diffusion's.
        device: device of the network.

    Attributes:
        schedule: schedule rescaled and shifted by the settings; the trained model must be sampled with it.
        probability: (T + 1,) float64, probability of each timestep.
        weight: (T + 1,) float64, loss weight of the mean square error of the network's output at each timestep.
        floor: least weight at SNR below 1, which ensures ``high_noise_share``; 0 if none is needed.

    Raises:
        UserError: ``high_noise_share`` cannot be reached.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        schedule: NoiseSchedule | None = None,
        device: str | torch.device = "cpu",
    ):
        self.settings = settings = settings.with_recipe()
        self.prediction_type = _said(settings.prediction_type)
        if settings.noise_offset and settings.prediction_type == "v_prediction":
            warnings.warn(
                "noise_offset with v-prediction teaches the network to read brightness from the mean of the noise, "
                "which is the leak that zero terminal SNR removes: leave noise_offset at 0",
                ZTSNRWarning,
                stacklevel=2,
            )
        schedule = schedule or NoiseSchedule.sdxl(zero_terminal_snr=False)
        self.schedule = NoiseSchedule.from_betas(schedule.betas, bool(settings.zero_terminal_snr))
        if (shift := settings.schedule_shift) not in (None, 1):
            self.schedule = self.schedule.shifted(shift)
        self.probability = _probability(settings, self.schedule)
        self.floor = _floor(settings, self.schedule, self.probability)
        self.weight = _weight(settings, self.schedule, self.floor)
        self.share = self.probability * self.weight / (self.probability * self.weight).sum()
        abar = self.schedule.alphas_cumprod
        self._alpha, self._s, self._device_weight = (
            table.float().to(device) for table in (abar.sqrt(), (1 - abar).sqrt(), self.weight)
        )
        self._cumulative = self.probability.cumsum(0).numpy()
        self.learned = LearnedWeight(self.schedule).to(device) if settings.weighting == "learned" else None
        self.device = torch.device(device)

    @property
    def high_noise_share(self) -> float:
        """The share of the loss at t >= 0.9 T if the network's error were equal everywhere."""
        return self.share[_high_noise(self.schedule)].sum().item()

    # ------------------------------------------------------------------------------------------------------------------
    # Drawing

    def draw_timesteps(self, seed: int, epoch: int, step: int, batch_size: int) -> torch.Tensor:
        """The timesteps of a step over all ranks: a pure function of the arguments.

        Returns:
            (batch_size,) int64 on the CPU; rank r of R takes [r::R].
        """
        random = keyed_generator(seed, epoch, step, TIMESTEPS)
        u = random.random(batch_size)
        if self.settings.stratified:
            u = (random.permutation(batch_size) + u) / batch_size
        return self.timesteps_at(u)

    def timesteps_at(self, quantiles: np.ndarray) -> torch.Tensor:
        """The timesteps at quantiles in [0, 1) of the distribution, int64 on the CPU."""
        found = np.searchsorted(self._cumulative, np.asarray(quantiles) * self._cumulative[-1], side="right")
        return torch.from_numpy(np.minimum(found, self.schedule.last_timestep))

    def draw_noise(self, shape: Sequence[int], slots: range, seed: int, epoch: int, step: int) -> torch.Tensor:
        """The noise of this rank's pictures, (B, *shape) float32 on the device; see ``keyed_noise``."""
        noise = keyed_noise(shape, slots, seed, epoch, step, NOISE, self.device)
        if self.settings.noise_offset:
            offset = keyed_noise((shape[0], 1, 1), slots, seed, epoch, step, NOISE_OFFSET, self.device)
            noise.add_(offset, alpha=self.settings.noise_offset)
        return noise

    # ------------------------------------------------------------------------------------------------------------------
    # The loss

    def noisy(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = alpha x0 + s eps, float32; at a zero-terminal t = T exactly the noise."""
        alpha, s = self._alpha_s(t)
        return alpha * x0 + s * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The network's target; at a zero-terminal t = T, v is exactly -x0."""
        if self.settings.prediction_type == "epsilon":
            return noise
        if self.settings.prediction_type == "sample":
            return x0
        alpha, s = self._alpha_s(t)
        return alpha * noise - s * x0

    def losses(
        self, output: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each picture.

        Args:
            output: (B, C, H, W) output of the network in any floating dtype; compared in float32.
            x0, noise: (B, C, H, W) float32.
            t: (B,) int64.

        Returns:
            (B,) weighted losses, whose mean is minimised, and (B,) mean square errors without gradient.
        """
        errors = (output.float() - self.target(x0, noise, t)).square().flatten(1).mean(1)
        losses = self._device_weight[t] * errors
        if self.learned is not None:
            u = self.learned(t)
            losses = losses / u.exp() + u
        return losses, errors.detach()

    def _alpha_s(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._alpha[t][:, None, None, None], self._s[t][:, None, None, None]

    # ------------------------------------------------------------------------------------------------------------------
    # The table

    def rows(self) -> list[tuple[int, float, float, float, float]]:
        """For each timestep: t, sigma, probability, weight, and share of the loss if errors were equal."""
        t = torch.arange(self.schedule.last_timestep + 1)
        columns = (t, self.schedule.sigma(t), self.probability, self.weight, self.share)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def table(self) -> str:
        """A selection of the rows as text, and the share of the loss at high noise."""
        last = self.schedule.last_timestep
        shown = sorted({round(t / 999 * last) for t in SHOWN})
        names = ("t", "sigma", "probability", "weight", "share of the loss")
        text = tabulate([self.rows()[t] for t in shown], names, floatfmt=(".0f", ".4g", ".5f", ".4f", ".3e"))
        first = math.ceil(0.9 * (last + 1))
        said = f"t >= {first} has {self.high_noise_share:.2%} of the loss, t = {last} has {self.share[-1]:.2%}"
        return f"{text}\n\n{said}" + (f"; the weights have a floor of {self.floor:.4g}" if self.floor else "")

    def to_csv(self) -> str:
        """All rows."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(("t", "sigma", "probability", "weight", "share"))
        writer.writerows(self.rows())
        return text.getvalue()


class LearnedWeight(torch.nn.Module):
    """EDM2's uncertainty u(t): the loss becomes L / exp(u) + u, so exp(u) follows L (arXiv 2312.02696, eq. 21).

    As in EDM2, u is one linear layer on fixed random Fourier features of the noise level.  Here the level is given by
    the angle atan(sigma), which is finite at infinity.  Training starts at u = 0.
    """

    features: torch.Tensor

    def __init__(self, schedule: NoiseSchedule, features: int = 128):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        angles = torch.atan(schedule.sigma(torch.arange(schedule.last_timestep + 1)))
        frequencies = torch.randn(features, generator=random, dtype=torch.float64)
        phases = torch.rand(features, generator=random, dtype=torch.float64)
        waves = 2**0.5 * torch.cos(2 * math.pi * (angles[:, None] * frequencies + phases))
        self.register_buffer("features", waves.float())
        self.linear = torch.nn.Linear(features, 1, bias=False)
        torch.nn.init.zeros_(self.linear.weight)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """(B,) int64 -> (B,) float32."""
        return self.linear(self.features[t]).squeeze(1) / self.features.shape[1] ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def _high_noise(schedule: NoiseSchedule) -> slice:
    return slice(math.ceil(0.9 * (schedule.last_timestep + 1)), None)


def _probability(settings: ObjectiveSettings, schedule: NoiseSchedule) -> torch.Tensor:
    """(T + 1,) probability of each timestep: the mass of a continuous distribution around it, and more at t = T."""
    last, mean, scale = schedule.last_timestep, settings.timesteps_mean, settings.timesteps_scale
    edges = torch.arange(1, last + 1, dtype=torch.float64)  # between timesteps, without the outer two
    if settings.timesteps == "uniform":
        below = edges / (last + 1)
    elif settings.timesteps == "logit_normal":
        below = torch.from_numpy(np.exp(log_ndtr((torch.logit(edges / (last + 1)).numpy() - mean) / scale)))
    else:
        z = (-2 * torch.log(schedule.sigma(edges - 0.5)) - mean) / scale  # standardized log SNR, which falls with t
        below = torch.where(z > 0, 0.5 * torch.exp(-z.abs()), 1 - 0.5 * torch.exp(-z.abs()))
    cumulative = torch.cat([below.new_zeros(1), below, below.new_ones(1)])
    probability = cumulative.diff() * (1 - settings.terminal_probability)
    probability[-1] += settings.terminal_probability
    return probability


def _said(prediction_type: str | None) -> str:
    assert prediction_type is not None, "the settings of an objective are complete: with_recipe"
    return prediction_type


def _weight(settings: ObjectiveSettings, schedule: NoiseSchedule, floor: float) -> torch.Tensor:
    """(T + 1,) loss weight of the mean square error of the network's output."""
    abar = schedule.alphas_cumprod
    snr = abar / (1 - abar)
    if settings.weighting in ("constant", "learned"):
        return torch.ones_like(snr)
    if settings.weighting == "min_snr":
        weight = min_snr_weight(snr, settings.min_snr_gamma, _said(settings.prediction_type))
    else:
        # Yu et al. weight the error of epsilon by 1 / sqrt(SNR).  It is SNR times the error of x0, and the error of v
        # is SNR + 1 times the error of x0.
        weight = snr.sqrt() / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[_said(settings.prediction_type)]
    return torch.where(snr < 1, weight.clamp(min=floor), weight)


def _floor(settings: ObjectiveSettings, schedule: NoiseSchedule, probability: torch.Tensor) -> float:
    """The smallest floor for weights at SNR below 1 that gives high noise its share of the loss."""

    def excess(floor: float) -> float:
        shares = probability * _weight(settings, schedule, floor)
        return (shares[_high_noise(schedule)].sum() / shares.sum()).item() - settings.high_noise_share

    if not settings.high_noise_share or excess(0.0) >= 0:
        return 0.0
    most = _weight(settings, schedule, 0.0).max().item()
    if excess(most) < 0:
        raise UserError(
            f"high_noise_share = {settings.high_noise_share} cannot be reached: with these timesteps t >= 0.9 T has at "
            f"most {excess(most) + settings.high_noise_share:.3f} of the loss; raise terminal_probability, or lower "
            "high_noise_share"
        )
    return cast(float, brentq(excess, 0.0, most, xtol=1e-14))
