"""What the mean-leak test expects of a Gaussian canvas, whose average is one Gaussian number a channel."""

import math

from ..samplers.prediction import alpha_s


def expected_slope(sigma: float, variance: float) -> float:
    """Slope of x0's mean on that of a pure-noise input: alpha V / (alpha^2 V + s^2), 0 at infinity.

    Args:
        variance: V = tau^2 N, tau being the spread of the pictures' averages and N the values of the canvas.
    """
    alpha, s = alpha_s(sigma)
    return alpha * variance / (alpha**2 * variance + s**2)


def expected_denoised_mean(sigma: float, mean: float, slope: float, noise_mean: float) -> float:
    """x0's mean on the exact flow that carries a noise of mean ``noise_mean`` to mean + slope * noise_mean.

    The flow keeps every mode at its quantile: with slope tau sqrt(N), the mean of the state is
    alpha mean + noise_mean sqrt(alpha^2 slope^2 + s^2), and x0's the posterior mean of that.
    """
    alpha, s = alpha_s(sigma)
    scale = math.hypot(alpha * slope, s)
    return mean + (noise_mean * alpha * slope * abs(slope) / scale if scale > 0 else 0.0)
