"""Training objectives of the demo's networks, and how SDXL's noise levels scale to their canvas.

The mean of N values of noise has a standard deviation of sigma / sqrt(N), which is 0.114 at the end of SDXL's schedule,
where sigma = 14.6 and N = 128 x 128.  At N = 32 x 32 the same sigma would hide the whole picture; dividing every sigma
by 4 restores 0.114.  This loses nothing: the means of 4 x 4 blocks of SDXL's process follow the process at a quarter of
sigma, so this is the low-resolution part of SDXL's process.
"""

from dataclasses import dataclass

# name of a training: its [objective] for ``ztsnr finetune``
OBJECTIVES: dict[str, dict] = {
    "epsilon": {"prediction_type": "epsilon", "zero_terminal_snr": False},
    "v, plain": {"zero_terminal_snr": False},
    "v, zero SNR, no floor": {"terminal_probability": 0.0, "high_noise_share": 0.0},
    "v, zero SNR": {},
}
EPSILON, PLAIN, STARVED, OURS = OBJECTIVES
BASE = "base"  # epsilon, from random weights

SDXL_SIDE = 128  # side of SDXL's latents, for which its schedule was made


def shift_of(side: int) -> float:
    """Factor on SDXL's sigmas for a canvas of side x side values."""
    return side / SDXL_SIDE


def sdxl_sigma(sigma: float, side: int) -> float:
    """The noise level on a canvas of side x side values that hides as much as ``sigma`` in SDXL's latents."""
    return sigma * shift_of(side)


@dataclass(frozen=True)
class Start:
    """The network to fine-tune.

    Attributes:
        path: Diffusers folder or single file.
        config: For a single file: folder whose settings and tokenizers complete it.
    """

    path: str
    config: str | None = None
