"""Random numbers that belong to a picture of an epoch, and not to the worker that happens to draw them.

``EpochPlan`` takes the numbers of the same key whose counter has no picture, so none are used twice.
"""

import numpy as np

# what random numbers are for, so that no two uses share them
CROP, FLIP, CAPTION, POSTERIOR, REPLACEMENT = range(5)


def keyed_generator(seed: int, epoch: int, picture: int, purpose: int) -> np.random.Generator:
    """The random numbers of one purpose for one picture in one epoch.

    A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): nothing that was
    drawn before, and no other process, changes what it gives.  One of these has 2**128 blocks of numbers before it
    would run into the next.

    Args:
        seed: of the run, from 0 to 2**64 - 1.
        epoch: from 0.
        picture: its number in the index, from 0.
        purpose: CROP, FLIP, ...

    Raises:
        ValueError: a number below 0 or above 2**64 - 1.
    """
    key, counter = (seed, epoch), (0, 0, picture + 1, purpose)
    if not all(0 <= number < 2**64 for number in key + counter) or picture < 0:
        raise ValueError(
            "seed, epoch, picture and purpose must be whole numbers from 0 to 2**64 - 1, not "
            f"{seed}, {epoch}, {picture} and {purpose}"
        )
    # as uint64, because NumPy makes floats of a list that mixes numbers above 2**63 with smaller ones
    philox = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array(counter, dtype=np.uint64))
    return np.random.Generator(philox)
