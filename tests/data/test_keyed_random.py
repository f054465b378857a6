"""Random numbers that belong to (seed, epoch, picture, purpose) and to nothing else."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from ztsnr.data import keyed_random
from ztsnr.data.keyed_random import CROP, FLIP, NOISE, keyed_generator, keyed_noise


def test_what_was_drawn_before_changes_nothing():
    expected = keyed_generator(1, 2, 3, CROP).random(5)
    keyed_generator(1, 2, 2, CROP).random(1000)
    np.random.default_rng().random(3)
    assert (keyed_generator(1, 2, 3, CROP).random(5) == expected).all()


def test_every_key_has_its_own_numbers():
    keys = [*itertools.product(range(6), repeat=4), (2**64 - 1, 0, 0, 0), (0, 0, 2**63, 0)]
    numbers = {key: tuple(keyed_generator(*key).integers(0, 2**63, 4)) for key in keys}
    flat = [number for four in numbers.values() for number in four]
    assert len(set(flat)) == len(flat)


def test_none_of_them_are_those_of_the_epoch_plan():
    plan = set(np.random.Philox(key=[7, 3], counter=[0, 0, 0, CROP]).random_raw(1000).tolist())
    for purpose in range(3):
        for picture in range(20):
            assert not plan & set(keyed_generator(7, 3, picture, purpose).bit_generator.random_raw(40).tolist())


def test_purposes_differ():
    names = ["CROP", "FLIP", "CAPTION", "POSTERIOR", "REPLACEMENT"]
    assert len({getattr(keyed_random, name) for name in names}) == len(names)


@pytest.mark.parametrize("varied", range(4))
def test_first_numbers_are_uniform_along_each_key(varied):
    """And independent of their neighbour's."""
    first = []
    for value in range(4000):
        key = [5, 1, 9, FLIP]
        key[varied] = value
        first.append(keyed_generator(*key).random())
    assert stats.kstest(first, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / np.sqrt(len(first))


@pytest.mark.parametrize("key", [(-1, 0, 0, 0), (0, -1, 0, 0), (0, 0, -1, 0), (0, 0, 0, -1), (2**64, 0, 0, 0)])
def test_numbers_out_of_range(key):
    with pytest.raises(ValueError, match=r"must be whole numbers from 0 to 2\*\*64 - 1, not"):
        keyed_generator(*key)


def test_every_slot_has_noise_of_its_own():
    both = keyed_noise((64,), range(2), 1, 0, 0, NOISE)
    assert not torch.equal(both[0], both[1])
    assert torch.equal(keyed_noise((64,), range(1, 2), 1, 0, 0, NOISE)[0], both[1])
