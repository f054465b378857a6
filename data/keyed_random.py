"""Random numbers that belong to a picture of an epoch, not to the worker that happens to draw them.

``EpochPlan`` uses the same key with counters without a picture, so no number is used twice.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import UserError

# Purposes of random numbers, so that no two uses share them.
CROP, FLIP, CAPTION, POSTERIOR, REPLACEMENT, TIMESTEPS, NOISE, NOISE_OFFSET = range(8)


def keyed_generator(seed: int, epoch: int, picture: int, purpose: int) -> np.random.Generator:
    """The random numbers of one purpose for one picture in one epoch.

    A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): nothing that was
    drawn before, and no other process, changes its numbers.  It has 2**128 blocks of numbers before it would reach
    those of the next purpose.

    Args:
        seed: seed of the run, from 0 to 2**64 - 1.
        epoch: epoch, from 0.
        picture: number of the picture in the index, from 0.
        purpose: CROP, FLIP, ...

    Raises:
        UserError: a number is below 0 or above 2**64 - 1.
    """
    key, counter = (seed, epoch), (0, 0, picture + 1, purpose)
    if not all(0 <= number < 2**64 for number in key + counter) or picture < 0:
        raise UserError(
            "seed, epoch, picture and purpose must be whole numbers from 0 to 2**64 - 1, not "
            f"{seed}, {epoch}, {picture} and {purpose}"
        )
    # as uint64, because NumPy makes floats of a list that mixes numbers above 2**63 with smaller ones
    philox = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array(counter, dtype=np.uint64))
    return np.random.Generator(philox)


def keyed_noise(
    shape: Sequence[int],
    slots: range,
    seed: int,
    epoch: int,
    step: int,
    purpose: int,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Unit noise for the pictures of a step, keyed by place, so that it is the same on any number of ranks.

    Drawn on the device, without waiting for it.  Devices of another kind draw other numbers.

    Args:
        shape: shape of one picture's noise.
        slots: places of this rank's pictures in the step, over all ranks.

    Returns:
        (len(slots), *shape) float32.
    """
    seeds = keyed_generator(seed, epoch, step, purpose).integers(2**63, size=slots[-1] + 1)
    noise = torch.empty(len(slots), *shape, device=device)
    generator = torch.Generator(device)
    for picture, slot in zip(noise, slots, strict=True):
        picture.normal_(generator=generator.manual_seed(int(seeds[slot])))
    return noise
