"""Models in closed form: the best denoiser there is for a distribution small enough to write down.

Each is a function ``model(x, sigma) -> x0``, the posterior mean E[x0 | x], with x = alpha x0 + s eps
variance-preserving (alpha^2 + s^2 = 1), sigma a Python float in [0, inf] and x of any floating dtype, which is kept.
At infinity (alpha = 0, s = 1) each answers its prior mean.  They are written in alpha and s, so no number in them grows
with sigma.  ``exact(noise)`` is the picture that the probability flow carries that noise to, so a sampler's error can
be told from a model's.

``sample`` takes them as they are; ``v_network`` turns them into what a diffusers scheduler expects.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch

from ..errors import UserError
from ..samplers import NoiseSchedule, from_denoised
from ..samplers.devices import to_float64
from ..samplers.prediction import alpha_s

Model = Callable[[torch.Tensor, float], torch.Tensor]  # model(x, sigma) -> x0
Std = TypeVar("Std", torch.Tensor, float)


def v_network(denoise: Model, schedule: NoiseSchedule) -> Callable[..., torch.Tensor]:
    """A v-prediction network equivalent to ``denoise`` that, like a trained one, is given only the timestep.

    Args:
        denoise: one of the models below.
        schedule: the noise schedule the network was "trained" with; it alone turns t into sigma.

    Returns:
        ``network(x, t) -> v``: x (B, ...) as scaled by ``scheduler.scale_model_input``, t a number or a tensor of one
        value; v in the dtype of x.  Computed in float32 at least.
    """

    def network(x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        sigma = schedule.sigma(float(t))
        state = x.to(torch.promote_types(x.dtype, torch.float32))
        return from_denoised(denoise(state, sigma), state, sigma, "v_prediction").to(x.dtype)

    return network


def reference_flow(
    denoise: Model, noise: torch.Tensor, steps: int = 400, sigma_max: float = 1e4, sigma_min: float = 1e-4
) -> torch.Tensor:
    """The probability flow from infinity to 0 in many small steps, with a method that no sampler here uses.

    dx/dphi = v in the angle phi = atan(sigma) (Salimans and Ho, arXiv 2202.00512, appendix D), classical Runge-Kutta of
    order 4, one step from pi/2 to sigma_max, the others even in log sigma, and x0 itself at sigma_min.  That resolves
    every mode whose standard deviation lies well between sigma_min and sigma_max.

    Args:
        denoise: the model.
        noise: (B, ...) unit Gaussian; give float64 for the accuracy of a reference.

    Returns:
        (B, ...) in the dtype of noise.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")

    def velocity(x: torch.Tensor, angle: float) -> torch.Tensor:
        sigma = math.inf if angle == math.pi / 2 else math.tan(angle)
        return from_denoised(denoise(x, sigma), x, sigma, "v_prediction")

    log_max, log_min = math.log(sigma_max), math.log(sigma_min)
    angles = [math.pi / 2] + [math.atan(math.exp(log_max + (log_min - log_max) * i / steps)) for i in range(steps + 1)]
    x = noise
    for start, end in pairwise(angles):
        h = end - start
        middle = start + h / 2
        k1 = velocity(x, start)
        k2 = velocity(x + h / 2 * k1, middle)
        k3 = velocity(x + h / 2 * k2, middle)
        k4 = velocity(x + h * k3, end)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return denoise(x, sigma_min)


def _gain(std: Std, sigma: float) -> Std:
    """alpha var / (alpha^2 var + s^2): the share of x - alpha mean that counts as signal, 0 at infinity."""
    alpha, s = alpha_s(sigma)
    return alpha * std**2 / (alpha**2 * std**2 + s**2)


def _normalized_log(weights: Sequence[float] | torch.Tensor | None, count: int) -> torch.Tensor:
    """log of the weights scaled to sum 1, (count,) float64; even weights for None."""
    weights = to_float64(torch.ones(count) if weights is None else weights).detach().cpu()
    if weights.shape != (count,):
        raise UserError(f"{count} components need {count} weights, not a tensor of shape {tuple(weights.shape)}")
    if not (weights >= 0).all() or not 0 < weights.sum() < math.inf:
        raise UserError("weights must be finite, not negative, and not all zero")
    return (weights / weights.sum()).log()


def _nonnegative(name: str, value: Sequence[float] | torch.Tensor | float) -> None:
    if not (torch.as_tensor(value) >= 0).all():
        raise UserError(f"{name} is a standard deviation and must not be negative or NaN")


# ----------------------------------------------------------------------------------------------------------------------
# Gaussians: every mode of the picture separately.


class GaussianModes:
    """Independent Gaussian values x0 ~ N(mean, std^2), elementwise.

    Args:
        mean, std: numbers, or tensors that broadcast against x (B, ...); std >= 0.
    """

    def __init__(self, mean: torch.Tensor | float = 0.0, std: torch.Tensor | float = 1.0):
        _nonnegative("std", std)
        self.mean, self.std = to_float64(mean), to_float64(std)

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """E[x0 | x], (B, ...)."""
        alpha, s = alpha_s(sigma)
        if s == 0:
            return x
        mean, gain = self.mean.to(x), _gain(self.std, sigma).to(x)
        return mean + gain * (x - alpha * mean)

    def exact(self, noise: torch.Tensor) -> torch.Tensor:
        """mean + std * noise: the flow keeps each value at its own quantile."""
        return self.mean.to(noise) + self.std.to(noise) * noise


class GaussianCanvas:
    """Latents whose brightness is one Gaussian number a channel and whose texture is white noise around it.

    x0 = mean + brightness + texture: the average of a channel over the canvas is N(mean, brightness_std^2), the rest is
    white with standard deviation texture_std.  Of N = height * width values the average is a mode of standard deviation
    brightness_std * sqrt(N), far larger than any other, so the noise level that decides it grows with the canvas.

    Args:
        mean: (C,) or a number; a dark picture's latents are about -2.4 in SDXL's first channel.
        brightness_std: spread of the channel averages; 0 for a set of pictures of one brightness.
        texture_std: standard deviation of the rest.
    """

    def __init__(self, mean: torch.Tensor | float = -2.4, brightness_std: float = 0.3, texture_std: float = 0.6):
        _nonnegative("brightness_std", brightness_std)
        _nonnegative("texture_std", texture_std)
        self.mean = to_float64(mean).reshape(-1, 1, 1)
        self.brightness_std = brightness_std
        self.texture_std = texture_std

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """E[x0 | x], (B, C, H, W)."""
        alpha, s = alpha_s(sigma)
        if s == 0:
            return x
        mean, average = self.mean.to(x), x.mean((-2, -1), keepdim=True)
        canvas_gain = _gain(self.brightness_std * math.sqrt(x.shape[-2] * x.shape[-1]), sigma)
        return mean + canvas_gain * (average - alpha * mean) + _gain(self.texture_std, sigma) * (x - average)

    def exact(self, noise: torch.Tensor) -> torch.Tensor:
        """The flow's picture from noise (B, C, H, W): average and rest scaled to their own spreads."""
        average = noise.mean((-2, -1), keepdim=True)
        brightness = self.brightness_std * math.sqrt(noise.shape[-2] * noise.shape[-1]) * average
        return self.mean.to(noise) + brightness + self.texture_std * (noise - average)


# ----------------------------------------------------------------------------------------------------------------------
# Mixtures.


class GaussianMixture:
    """K isotropic Gaussians, p(x0) = sum of w_k N(m_k, std_k^2 I).

    Args:
        means: (K, ...) centres; x is then (B, ...).
        weights: (K,) shares, scaled to sum 1; even by default.
        stds: (K,) standard deviations or one for all, >= 0.
    """

    def __init__(
        self,
        means: torch.Tensor,
        weights: Sequence[float] | torch.Tensor | None = None,
        stds: Sequence[float] | torch.Tensor | float = 0.1,
    ):
        means = torch.as_tensor(means)
        if means.ndim < 1 or len(means) == 0:
            raise UserError(f"means must be (K, ...) with at least one component, not {tuple(means.shape)}")
        _nonnegative("stds", stds)
        self.shape = means.shape[1:]
        self.means = to_float64(means.detach()).cpu().reshape(len(means), -1)  # (K, D)
        self.log_weights = _normalized_log(weights, len(means))
        self.stds = to_float64(stds).cpu().expand(len(means)).clone()

    def responsibilities(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """P(component | x), (B, K) float64, for sigma > 0.

        Softmax of log w - D/2 log A - |x - alpha m|^2 / 2A with A = alpha^2 std^2 + s^2, in float64 and without |x|^2
        where all A are equal, so that far components and small sigma neither overflow nor cancel.
        """
        alpha, s = alpha_s(sigma)
        x = to_float64(x.detach()).flatten(1)
        means = self.means.to(x.device)
        variance = (alpha**2 * self.stds**2 + s**2).to(x.device)
        cross = alpha * (x @ means.T) - alpha**2 / 2 * (means**2).sum(1)
        spread = 1 / variance - 1 / variance[0]  # 0 for equal stds: |x|^2 then says nothing about k
        logits = cross / variance - (x**2).sum(1, keepdim=True) / 2 * spread
        logits = logits - means.shape[1] / 2 * variance.log() + self.log_weights.to(x.device)
        return logits.softmax(1)

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """E[x0 | x], (B, ...)."""
        alpha, s = alpha_s(sigma)
        if s == 0:
            return x
        share = self.responsibilities(x, sigma)
        gain = _gain(self.stds, sigma).to(share)
        centres = (share * (1 - alpha * gain)) @ self.means.to(share)
        own = (share * gain).sum(1, keepdim=True) * to_float64(x).flatten(1)
        return (centres + own).reshape(x.shape).to(x)

    def exact(self, noise: torch.Tensor, steps: int = 400) -> torch.Tensor:
        """The flow's result from noise: the transport map in one dimension, ``reference_flow`` otherwise."""
        if self.means.shape[1] == 1 and (self.stds > 0).all():
            return self.transport(noise)
        return reference_flow(self, to_float64(noise), steps).to(noise)

    def transport(self, noise: torch.Tensor) -> torch.Tensor:
        """F^-1(Phi(noise)) with F the distribution function of a one-dimensional mixture, by bisection in float64.

        In one dimension the flow keeps the order of points, and only one map carries a Gaussian to the mixture in
        order.  It lies between the smallest and the largest of the components' own maps m_k + std_k * noise.

        Raises:
            UserError: more than one dimension, or a component without spread (F then jumps and has no inverse).
        """
        if self.means.shape[1] != 1 or not (self.stds > 0).all():
            raise UserError("transport needs a mixture in one dimension with positive stds")
        n = to_float64(noise).cpu().reshape(-1, 1)
        # Work in the tail that n lies in: there the probability is small and keeps its relative precision.
        sign = torch.where(n > 0, -1.0, 1.0)
        target = torch.special.log_ndtr(sign * n)
        ends = self.means.T + self.stds * n
        low, high = ends.amin(1, keepdim=True), ends.amax(1, keepdim=True)
        for _ in range(80):
            middle = (low + high) / 2
            tail = torch.special.log_ndtr(sign * (middle - self.means.T) / self.stds) + self.log_weights
            too_far = sign * (tail.logsumexp(1, keepdim=True) - target) > 0
            low, high = torch.where(too_far, low, middle), torch.where(too_far, middle, high)
        return ((low + high) / 2).reshape(noise.shape).to(noise)


@dataclass
class _CanvasMixture:
    """The mathematics of ``PictureSet`` on vectors, in any orthonormal basis.

    x0 = picture + brightness + grain: component k is N(picture_k, std^2 I), widened to canvas_std^2 along the canvas.

    Attributes:
        pictures: (K, D) float64.
        canvas: (D, C) float64, orthonormal columns: the average of each channel.
        log_weights: (K,) float64.
    """

    pictures: torch.Tensor
    canvas: torch.Tensor
    log_weights: torch.Tensor
    std: float
    canvas_std: float

    def responsibilities(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """P(picture | x) for x (B, D): the softmax over log-likelihoods, (B, K) float64."""
        alpha, s = alpha_s(sigma)
        x = to_float64(x.detach())
        pictures, canvas = self.pictures.to(x), self.canvas.to(x)

        def fit(x: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
            """(|x|^2 - |x - alpha picture|^2) / 2; |x|^2 is the same for all and would only cancel."""
            return alpha * (x @ pictures.T) - alpha**2 / 2 * (pictures**2).sum(1)

        precision = 1 / (alpha**2 * self.std**2 + s**2)
        canvas_precision = 1 / (alpha**2 * self.canvas_std**2 + s**2)
        logits = precision * fit(x, pictures) + (canvas_precision - precision) * fit(x @ canvas, pictures @ canvas)
        return (logits + self.log_weights.to(x)).softmax(1)

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """E[x0 | x] for x (B, D): pick among the pictures, then shrink what is left toward the pick."""
        alpha, _ = alpha_s(sigma)
        picture = self.responsibilities(x, sigma).to(x) @ self.pictures.to(x)
        rest = torch.add(x, picture, alpha=-alpha)
        gain, canvas_gain = _gain(self.std, sigma), _gain(self.canvas_std, sigma)
        canvas = self.canvas.to(x)
        return picture + gain * rest + (canvas_gain - gain) * (rest @ canvas) @ canvas.T


class PictureSet:
    """A finite set of pictures: the ideal network of a training set, which knows nothing else.

    Each picture is in the set at every exposure: x0 = picture + brightness + grain.  The brightness is one number a
    channel for the whole canvas, N(0, brightness_std^2), as pictures of one caption differ in exposure and white
    balance; the grain is white, N(0, std^2).  With both 0 the set is just its pictures.  A prompt is a subset.

    Args:
        pictures: (K, C, H, W), by custom in [-1, 1].
        weights: (K,) shares, scaled to sum 1; even by default.
        std: standard deviation of the grain.
        brightness_std: standard deviation of a channel's average, in the units of the pictures.
    """

    def __init__(
        self,
        pictures: torch.Tensor,
        weights: Sequence[float] | torch.Tensor | None = None,
        std: float = 0.0,
        brightness_std: float = 0.0,
    ):
        if pictures.ndim != 4 or len(pictures) == 0:
            raise UserError(f"pictures must be (K, C, H, W) with K at least 1, not {tuple(pictures.shape)}")
        _nonnegative("std", std)
        _nonnegative("brightness_std", brightness_std)
        channels, area = pictures.shape[1], pictures.shape[2] * pictures.shape[3]
        self._flat = _CanvasMixture(
            pictures=to_float64(pictures.detach()).cpu().flatten(1),
            canvas=torch.eye(channels, dtype=torch.float64).repeat_interleave(area, dim=0) / math.sqrt(area),
            log_weights=_normalized_log(weights, len(pictures)),
            std=std,
            canvas_std=math.hypot(std, brightness_std * math.sqrt(area)),
        )

    def __len__(self) -> int:
        return len(self._flat.pictures)

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """E[x0 | x], (B, C, H, W)."""
        return x if sigma == 0 else self._flat(x.flatten(1), sigma).reshape(x.shape)

    def responsibilities(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """P(picture | x) for x (B, C, H, W) and sigma > 0: (B, K) float64."""
        return self._flat.responsibilities(x.flatten(1), sigma)

    def nearest(self, pictures: torch.Tensor, sigma: float = 0.1) -> torch.Tensor:
        """Which picture of the set each of (B, C, H, W) shows, whatever its exposure: (B,) indices."""
        return self.responsibilities(alpha_s(sigma)[0] * pictures, sigma).argmax(1)

    def exact(self, noise: torch.Tensor, steps: int = 400) -> torch.Tensor:
        """The flow's pictures from noise (B, C, H, W), in the dtype of noise.

        One picture is a Gaussian and has a closed form.  Of several, only the K pictures and the C canvas directions
        are coupled, and outside their span every value is grain, std * noise: so ``reference_flow`` runs in at most
        K + C dimensions, whatever the size of the pictures.
        """
        flat, n = self._flat, to_float64(noise.detach()).flatten(1).cpu()
        if len(self) == 1:
            x = flat.pictures + flat.std * n + (flat.canvas_std - flat.std) * (n @ flat.canvas) @ flat.canvas.T
        else:
            _, scales, directions = torch.linalg.svd(torch.cat([flat.pictures, flat.canvas.T]), full_matrices=False)
            basis = directions[scales > 1e-10 * scales[0]].T  # (D, r), orthonormal
            coordinates = replace(flat, pictures=flat.pictures @ basis, canvas=basis.T @ flat.canvas)
            inside = n @ basis
            x = flat.std * n + (reference_flow(coordinates, inside, steps) - flat.std * inside) @ basis.T
        return x.reshape(noise.shape).to(noise)
