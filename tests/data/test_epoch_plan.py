"""Every picture once, one shape a step, and the same from any step on and with any number of ranks."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztsnr.data.epoch_plan import EpochPlan

BUCKETS = [(512, 768), (640, 640), (768, 512), (832, 448)]


@st.composite
def datasets(draw, fills=1):
    """Assignments of which every used bucket fills so many batches, and the batch."""
    batch = draw(st.integers(1, 8))
    counts = [draw(st.one_of(st.just(0), st.integers(fills * batch, 40))) for _ in BUCKETS]
    counts[0] = counts[0] or fills * batch
    left_out = draw(st.integers(0, 5))
    assignment = np.repeat([-1, *range(len(BUCKETS))], [left_out, *counts])
    np.random.default_rng(draw(st.integers(0, 99))).shuffle(assignment)
    return assignment, batch


def all_steps(plan, epoch, start=0):
    return [(bucket, pictures.tolist()) for bucket, pictures in plan.steps(epoch, start)]


@settings(deadline=None, max_examples=60)
@given(datasets(), st.integers(1, 6), st.integers(0, 2**64 - 1))
def test_every_picture_once_an_epoch(dataset, epochs, seed):
    """In the steps of the first epochs each picture is as often as there are epochs, but for those that wait."""
    assignment, batch = dataset
    plan = EpochPlan(assignment, BUCKETS, batch_size=batch, seed=seed)
    seen = Counter()
    for epoch in range(epochs):
        for bucket, pictures in plan.steps(epoch):
            assert (assignment[pictures] == bucket).all()
            assert pictures.shape == (batch,)
            seen.update(pictures.tolist())
        for index, count in enumerate(plan.counts(epoch)):
            assert count.pictures == (assignment == index).sum()
            waiting = count.waiting + count.pictures - count.steps * batch
            assert 0 <= waiting < batch
            members = np.flatnonzero(assignment == index).tolist()
            missing = Counter(dict.fromkeys(members, epoch + 1))
            missing.subtract({picture: seen[picture] for picture in members})
            assert all(times >= 0 for times in missing.values())
            assert missing.total() == waiting
        assert plan.step_count(epoch) == len(all_steps(plan, epoch))
    assert not seen.keys() & set(np.flatnonzero(assignment < 0).tolist())


@settings(deadline=None, max_examples=60)
@given(datasets(), st.integers(0, 20))
def test_no_batch_has_a_picture_twice(dataset, epoch):
    assignment, batch = dataset
    plan = EpochPlan(assignment, BUCKETS, batch_size=batch)
    for _, pictures in plan.steps(epoch):
        assert len(set(pictures.tolist())) == batch


def test_small_buckets_are_shuffled_too():
    """Of a batch and a half: each second epoch begins anew, with a batch that none waited for."""
    plan = EpochPlan(np.zeros(12, dtype=int), BUCKETS, batch_size=8)
    firsts = {tuple(all_steps(plan, epoch)[0][1]) for epoch in range(0, 20, 2)}
    assert [plan.step_count(epoch) for epoch in range(4)] == [1, 2, 1, 2]
    assert len(firsts) == 10


@settings(deadline=None, max_examples=40)
@given(datasets(), st.integers(0, 3), st.integers(1, 64), st.integers(0, 2**32), st.data())
def test_ranks_share_out_the_same_steps(dataset, epoch, world_size, seed, data):
    assignment, batch = dataset
    batch *= world_size
    assignment = np.tile(assignment, world_size)  # that the buckets fill the larger batch
    whole = all_steps(EpochPlan(assignment, BUCKETS, batch_size=batch, seed=seed), epoch)
    start = data.draw(st.integers(0, len(whole)))
    ranks = [
        all_steps(
            EpochPlan(assignment, BUCKETS, batch_size=batch, world_size=world_size, rank=rank, seed=seed), epoch, start
        )
        for rank in range(world_size)
    ]
    assert all(len(steps) == len(whole) - start for steps in ranks)
    for step, shares in zip(whole[start:], zip(*ranks, strict=True), strict=True):
        assert {bucket for bucket, _ in shares} == {step[0]}
        assert {len(pictures) for _, pictures in shares} == {batch // world_size}
        assert Counter(picture for _, pictures in shares for picture in pictures) == Counter(step[1])


def test_orders_differ_by_seed_and_epoch_and_not_otherwise():
    assignment = np.repeat(range(len(BUCKETS)), 64)
    orders = [
        str(all_steps(EpochPlan(assignment, BUCKETS, batch_size=8, seed=seed), epoch))
        for seed in (0, 1, 2, 2**53 + 1, 2**63, 2**63 + 1, 2**64 - 1)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 21
    assert orders[4] == str(all_steps(EpochPlan(assignment, BUCKETS, batch_size=8, seed=1), 1))


def test_buckets_come_in_proportion_to_what_remains():
    """The first step is of a bucket with the share of its steps, and so is the last."""
    assignment = np.repeat([0, 1, 2], [80, 240, 480])
    ends = [
        (steps[0][0], steps[-1][0])
        for steps in (all_steps(EpochPlan(assignment, BUCKETS, batch_size=8, seed=seed), 0) for seed in range(2000))
    ]
    for which in (0, 1):
        shares = np.bincount([end[which] for end in ends], minlength=3) / len(ends)
        assert shares == pytest.approx([0.1, 0.3, 0.6], abs=0.04)  # 3.6 standard deviations or more


def test_pictures_are_drawn_evenly():
    """Where a picture stands in its epoch, over many seeds: each place as often."""
    assignment = np.zeros(24, dtype=int)
    places = np.zeros((24, 24))
    for seed in range(2000):
        order = [
            p for _, pictures in EpochPlan(assignment, BUCKETS, batch_size=1, seed=seed).steps(0) for p in pictures
        ]
        places[order, range(24)] += 1
    chi_square = ((places - 2000 / 24) ** 2 / (2000 / 24)).sum()
    assert chi_square < 529 + 4 * np.sqrt(2 * 529)  # 23 x 23 degrees of freedom


# ----------------------------------------------------------------------------------------------------------------------
# Repeats


def test_repeats():
    assignment = np.repeat([0, 1], 200)
    repeats = np.where(np.arange(400) % 2, 2.5, 0.4)
    repeats[:4] = 0
    plan = EpochPlan(assignment, BUCKETS, batch_size=4, repeats=repeats)
    seen = np.zeros(400)
    for epoch in range(10):
        before = seen.copy()
        for _, pictures in plan.steps(epoch):
            np.add.at(seen, pictures, 1)
        new = seen - before
        assert new.max() <= 4  # 3, and one that waited
        assert new[4::2].sum() + 4 > 0.35 * 198
        assert new[:4].sum() == 0
    waiting = sum(count.waiting for count in plan.counts(10))
    assert seen.sum() == np.round(repeats * 10).sum() - waiting
    assert np.abs(seen - 10 * repeats).max() <= 1


def test_a_repeat_of_one_changes_nothing():
    assignment = np.repeat(range(4), 50)
    plain = EpochPlan(assignment, BUCKETS, batch_size=6)
    once = EpochPlan(assignment, BUCKETS, batch_size=6, repeats=np.ones(200))
    for epoch in range(4):
        assert all_steps(once, epoch) == all_steps(plain, epoch)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"world_size": 3}, "3 ranks cannot share a batch of 4 pictures evenly"),
        ({"batch_size": 0}, "a batch of 0 pictures"),
        ({"world_size": 2, "rank": 2}, "rank must be from 0 to 1, not 2"),
        ({"seed": -1}, "the seed must be"),
        ({"seed": 2**64}, "the seed must be"),
        ({"batch_size": 11}, r"1 buckets have fewer pictures than batch_size = 11, for example 640 x 640 with 10"),
        ({"assignment": np.full(5, -1)}, "nothing to plan"),
        ({"assignment": np.array([0, 4])}, "-1 or the index of one of 4 buckets"),
        ({"assignment": np.zeros(3)}, "whole numbers"),
        ({"assignment": np.empty(0, int)}, "nothing to plan"),
        ({"repeats": np.full(30, -1)}, "repeats must be"),
        ({"repeats": np.full(30, np.nan)}, "repeats must be"),
        ({"repeats": np.ones(3)}, "repeats must be"),
    ],
)
def test_mistakes_end_in_a_sentence(changes, sentence):
    arguments = {"assignment": np.repeat([0, 1], [20, 10]), "buckets": BUCKETS, "batch_size": 4} | changes
    with pytest.raises(ValueError, match=sentence):
        EpochPlan(**arguments)
