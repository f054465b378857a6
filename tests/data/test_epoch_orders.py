"""Each of the orders of a plan by itself: what one of them hides where all are looked at together."""

import numpy as np

from ztsnr.canvas import novelai_buckets
from ztsnr.data.epoch_plan import EpochPlan

BUCKETS = novelai_buckets()
EPOCHS = range(6)


def test_pictures_come_in_another_order_each_epoch():
    """In one bucket, where the order of steps is that of its batches, whatever they hold."""
    plan = EpochPlan(np.zeros(64, dtype=int), BUCKETS, batch_size=8, seed=1)
    companies = {frozenset(frozenset(pictures.tolist()) for _, pictures in plan.steps(epoch)) for epoch in EPOCHS}
    assert len(companies) == len(EPOCHS)


def test_buckets_come_in_another_order_each_epoch():
    plan = EpochPlan(np.repeat(range(len(BUCKETS)), 8), BUCKETS, batch_size=8, seed=1)
    orders = {tuple(bucket for bucket, _ in plan.steps(epoch)) for epoch in EPOCHS}
    assert len(orders) == len(EPOCHS)


def test_a_bucket_of_less_than_two_batches_keeps_its_order_until_none_waits():
    """Nine pictures, eight a step: eight epochs make nine steps, and no step has a picture twice."""
    plan = EpochPlan(np.zeros(9, dtype=int), BUCKETS, batch_size=8, seed=3)
    for first in range(0, 80, 8):
        steps = [pictures for epoch in range(first, first + 8) for _, pictures in plan.steps(epoch)]
        assert [len(set(pictures.tolist())) for pictures in steps] == [8] * 9
        assert np.bincount(np.concatenate(steps)).tolist() == [8] * 9


def test_small_buckets_are_shuffled_independently():
    """Two of twelve pictures each; were they drawn alike, their first batches would hold the same places."""
    assignment = np.repeat([0, 1], 12)
    alike = 0
    for seed in range(20):
        plan = EpochPlan(assignment, BUCKETS, batch_size=8, seed=seed)
        first = {bucket: [p % 12 for p in pictures.tolist()] for bucket, pictures in plan.steps(0)}
        alike += first[0] == first[1]
    assert alike == 0
