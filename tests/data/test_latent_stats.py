"""Statistics gathered in pieces are those of the whole."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ztsnr.data.latent_stats import ChannelStatistics, merge

FAR = torch.tensor([1e4, -3.0, 0.0, 1e-3])[:, None, None]  # from zero: sums of squares would lose the spread


def pictures(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    return [FAR + torch.randn(4, *size, generator=generator) for size in sizes]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_merged_statistics_are_those_of_all_numbers(seed, sizes):
    latents = pictures(seed, sizes)
    found = merge([ChannelStatistics.of(picture, torch.zeros_like(picture)) for picture in latents])
    numbers = torch.cat([picture.flatten(1) for picture in latents], dim=1).double().numpy()
    assert found.count == numbers.shape[1]
    assert found.mean == pytest.approx(numbers.mean(axis=1), rel=1e-12)
    assert found.std == pytest.approx(numbers.std(axis=1), rel=1e-9, abs=1e-9)


def test_they_are_those_of_samples():
    """Against samples of the posterior, of which each latent has another mean and std."""
    mean, std = pictures(0, [(16, 16), (16, 16)])
    std = (std - FAR).abs()
    samples = mean + std * torch.randn(2000, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    numbers = samples.double().transpose(0, 1).flatten(1)
    found = ChannelStatistics.of(mean, std)
    assert found.mean == pytest.approx(numbers.mean(dim=1).numpy(), abs=0.01)
    assert found.std == pytest.approx(numbers.std(dim=1).numpy(), rel=0.01)


def test_the_order_of_merging_matters_little():
    parts = [ChannelStatistics.of(picture, picture * 0.1) for picture in pictures(2, [(5, 7), (1, 1), (9, 3)])]
    a, b, c = parts
    for other in (c.merged(a).merged(b), b.merged(c.merged(a))):
        assert other.count == merge(parts).count
        assert other.mean == pytest.approx(merge(parts).mean, rel=1e-14)
        assert other.squares == pytest.approx(merge(parts).squares, rel=1e-12)


def test_through_json():
    found = ChannelStatistics.of(*pictures(4, [(3, 3), (3, 3)]))
    again = ChannelStatistics.from_json(json.loads(json.dumps(found.to_json())))
    assert again.count == found.count
    assert np.array_equal(again.mean, found.mean)
    assert np.array_equal(again.squares, found.squares)
