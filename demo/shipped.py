"""The networks that come with the package, as single files with a folder of settings."""

from functools import cache
from pathlib import Path

from .networks import DemoNetwork
from .objectives import BASE, OURS, PLAIN, Start

WEIGHTS = Path(__file__).resolve().parent / "weights"
CONFIG = WEIGHTS / "config"  # a diffusers folder without weights
FILES = {BASE: "epsilon_base.safetensors", PLAIN: "v_plain.safetensors", OURS: "v_zero_snr.safetensors"}


def start_of(name: str = BASE) -> Start:
    """A network as the start of a training."""
    return Start(str(WEIGHTS / FILES[name]), str(CONFIG))


@cache
def load_shipped(name: str) -> DemoNetwork:
    """Load a network by the name of its training: BASE, PLAIN or OURS."""
    return DemoNetwork(WEIGHTS / FILES[name], CONFIG)
