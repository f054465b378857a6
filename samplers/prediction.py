"""What the network predicts, and how to read a denoised picture from it.

The state is variance-preserving, x = alpha x0 + s eps with alpha^2 + s^2 = 1, which stays finite at sigma = infinity:
there alpha = 0, s = 1 and x is the noise itself.
"""

import math

import torch

from ..errors import UserError

PREDICTION_TYPES = ("v_prediction", "epsilon", "sample")


def alpha_s(sigma: float) -> tuple[float, float]:
    """Signal and noise scale (alpha, s) at noise level sigma in [0, inf]; exactly (0, 1) at infinity."""
    if math.isinf(sigma):
        return 0.0, 1.0
    alpha = 1 / math.hypot(1, sigma)
    return alpha, sigma * alpha


def check_prediction_type(prediction_type: str, zero_terminal_snr: bool) -> None:
    """Raise on an unknown prediction type, and on epsilon under zero terminal SNR."""
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"unknown prediction_type {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}")
    if prediction_type == "epsilon" and zero_terminal_snr:
        raise UserError(
            "an epsilon model cannot start from infinite sigma: its input there is the very noise it is asked for, so "
            "the answer says nothing about the picture; use a v-prediction model or a schedule with some signal"
        )


def to_denoised(
    model_output: torch.Tensor, x: torch.Tensor, sigma: float, prediction_type: str = "v_prediction"
) -> torch.Tensor:
    """The denoised picture x0 that a network output stands for.

    v = alpha eps - s x0 (Salimans and Ho, arXiv 2202.00512) gives x0 = alpha x - s v, which at infinity is -v.

    Args:
        model_output: (B, C, H, W) what the network returned, any floating dtype.
        x: (B, C, H, W) float32 variance-preserving state it was asked about.
        sigma: noise level of x, inf allowed (not for epsilon).

    Returns:
        (B, C, H, W) in the dtype of x.
    """
    alpha, s = alpha_s(sigma)
    model_output = model_output.to(x.dtype)
    if prediction_type == "v_prediction":
        return (alpha * x).add_(model_output, alpha=-s)
    if prediction_type == "sample":
        return model_output
    check_prediction_type(prediction_type, zero_terminal_snr=math.isinf(sigma))
    return torch.add(x, model_output, alpha=-s).div_(alpha)


def from_denoised(
    x0: torch.Tensor, x: torch.Tensor, sigma: float, prediction_type: str = "v_prediction"
) -> torch.Tensor:
    """The network output that stands for x0; the inverse of ``to_denoised``, for models given in closed form.

    v = (alpha x - x0) / s.

    Raises:
        UserError: sigma = 0, where x0 determines neither v nor eps; an unknown prediction type.
    """
    alpha, s = alpha_s(sigma)
    if prediction_type == "sample":
        return x0
    if s == 0:
        raise UserError("at sigma = 0 the state is the picture itself, which does not determine v or epsilon")
    if prediction_type == "v_prediction":
        return (alpha * x - x0) / s
    check_prediction_type(prediction_type, zero_terminal_snr=math.isinf(sigma))
    return (x - alpha * x0) / s
