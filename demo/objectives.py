"""What the networks of the demo were trained for, and how SDXL's noise levels are scaled to their canvas.

The mean of N values of noise has a standard deviation of sigma / sqrt(N), which is .114 where SDXL's schedule ends, at
14.6 and N = 128 x 128.  At N = 32 x 32 the same sigma would hide the whole picture; with every sigma divided by 4 it is
.114 again.  Nothing is lost by that: the means of 4 x 4 blocks of SDXL's process are the process at a quarter of sigma,
so this *is* its part below 32 x 32.
"""

from dataclasses import dataclass

# by the name of the training, as ``ztsnr finetune`` takes them
OBJECTIVES: dict[str, dict] = {
    "epsilon": {"prediction_type": "epsilon", "zero_terminal_snr": False},
    "v, plain": {"zero_terminal_snr": False},
    "v, zero SNR, no floor": {"terminal_probability": 0.0, "high_noise_share": 0.0},
    "v, zero SNR": {},
}
EPSILON, PLAIN, STARVED, OURS = OBJECTIVES
BASE = "base"  # epsilon, from random weights

SDXL_SIDE = 128  # of SDXL's latents, to which its schedule belongs


def shift_of(side: int) -> float:
    """What SDXL's sigmas are multiplied by for a canvas of side x side values."""
    return side / SDXL_SIDE


def sdxl_sigma(sigma: float, side: int) -> float:
    """The noise level of a canvas of side x side values that hides as much as ``sigma`` does in SDXL's latents."""
    return sigma * shift_of(side)


@dataclass(frozen=True)
class Start:
    """The network that is fine-tuned.

    Attributes:
        path: A diffusers folder or a single file.
        config: For a single file, the folder whose settings and tokenizers complete it.
    """

    path: str
    config: str | None = None
