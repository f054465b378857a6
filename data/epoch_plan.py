"""The order in which training sees its pictures.

Every step takes one batch of pictures of one bucket, so that all ranks have one shape.  Think of a line of pictures a
bucket: those of epoch 0 in random order, behind them those of epoch 1 in another one, and so on.  The line is cut into
batches, and the steps of an epoch are the batches that its pictures complete; what is too few for a batch waits at the
head of the next epoch's line.  So nothing is dropped, filled up or squeezed into another shape, and every picture is
seen once an epoch, or, if it waits, at the beginning of the next.  The batch that those who waited are in takes none of
them a second time; a bucket that does not fill two batches keeps its order for that, until an epoch ends in which none
waits.  Only with repeats may a batch have a picture twice.

The steps of an epoch come in random order, which is to draw the bucket of each step with probability proportional to
the steps that remain of it (NovelAI, github.com/NovelAI/novelai-aspect-ratio-bucketing).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..canvas import Size
from ..errors import UserError

# what random numbers are for, so that no two uses share them
ORDER, STEPS, PHASE, KEPT_ORDER = range(4)  # the last one is of bucket 0, and those behind it are of the others


@dataclass(frozen=True)
class BucketCount:
    """What an epoch does with a bucket.

    Attributes:
        pictures: of the epoch, repeats counted.
        waiting: left over by the epochs before, taken first.
        steps: batches, so that ``waiting + pictures - steps * batch_size`` wait for the next epoch.
    """

    size: Size
    pictures: int
    waiting: int
    steps: int


class EpochPlan:
    """Which pictures each step of each epoch takes: a pure function of what it is made from.

    A step's pictures do not depend on ``world_size``; each rank takes its share of them.  The state of a run is three
    integers, the seed, the epoch and the step, and any number of ranks can go on from there.

    Args:
        assignment: (N,) bucket of each picture, -1 for those left out (``assign_buckets``).
        buckets: (width, height) of each bucket.
        batch_size: pictures of a step, of all ranks together.
        world_size: ranks; ``batch_size`` must be a multiple.
        rank: which one this is, from 0.
        seed: of the order.
        repeats: (N,) how often an epoch sees each picture; 1.5 is once and twice in turns.  By default once.

    Raises:
        UserError: a bucket with too few pictures for one step, which would bring a picture twice in a batch; a batch
            that cannot be shared out evenly; numbers out of range.
    """

    def __init__(
        self,
        assignment: np.ndarray,
        buckets: Sequence[Size],
        *,
        batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        repeats: np.ndarray | None = None,
    ):
        self.assignment = np.asarray(assignment)
        self.buckets = list(buckets)
        self.batch_size, self.world_size, self.rank, self.seed = batch_size, world_size, rank, seed
        self.repeats = None if repeats is None else np.asarray(repeats, dtype=np.float64)
        self._check()

    def steps(self, epoch: int, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """The steps of an epoch from ``start`` on.

        Yields:
            the index of the bucket, and the indices of this rank's pictures, (batch_size / world_size,) int64.
        """
        line, begins = self._line(epoch)
        steps = np.diff(begins) // self.batch_size
        bucket_of_step = np.repeat(np.arange(len(steps)), steps)
        batch_of_step = np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps)
        drawn = np.argsort(self._random(epoch, STEPS, len(bucket_of_step)), kind="stable")
        for step in drawn[start:]:
            bucket = bucket_of_step[step]
            begin = begins[bucket] + batch_of_step[step] * self.batch_size
            yield int(bucket), line[begin : begin + self.batch_size][self.rank :: self.world_size]

    def step_count(self, epoch: int) -> int:
        """The number of steps of an epoch; epochs may differ by one step a bucket."""
        return sum(count.steps for count in self.counts(epoch))

    def counts(self, epoch: int) -> list[BucketCount]:
        """What an epoch does with each bucket."""
        before, after = self._seen(epoch), self._seen(epoch + 1)
        waiting = before % self.batch_size
        steps = (waiting + after - before) // self.batch_size
        return [
            BucketCount(size, *map(int, numbers))
            for size, *numbers in zip(self.buckets, after - before, waiting, steps, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.assignment.ndim != 1 or self.assignment.dtype.kind not in "iu":
            raise UserError(
                f"assignment must be whole numbers of shape (N,), not {self.assignment.dtype} of shape "
                f"{self.assignment.shape}"
            )
        if self.batch_size < 1 or self.world_size < 1 or self.batch_size % self.world_size:
            raise UserError(
                f"a batch of {self.batch_size} pictures cannot be shared out evenly to {self.world_size} ranks: make "
                "batch_size a multiple of world_size"
            )
        if not 0 <= self.seed < 2**64:
            raise UserError(f"the seed must be a whole number from 0 to 2**64 - 1, not {self.seed}")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"there is no rank {self.rank} among {self.world_size}")
        if self.assignment.size and not -1 <= self.assignment.min() <= self.assignment.max() < len(self.buckets):
            raise UserError(f"assignment must be -1 or the index of one of {len(self.buckets)} buckets")
        if self.repeats is not None and (
            self.repeats.shape != self.assignment.shape or not (self.repeats >= 0).all() or np.isinf(self.repeats).any()
        ):
            raise UserError("repeats must be a number of at least 0 for each picture")
        self._pictures = np.flatnonzero(self.assignment >= 0)
        if self.repeats is not None:
            self._pictures = self._pictures[self.repeats[self._pictures] > 0]
        if not len(self._pictures):
            raise UserError("there are no pictures to plan for")
        counts = np.bincount(self.assignment[self._pictures], minlength=len(self.buckets))
        small = [index for index, count in enumerate(counts) if 0 < count < self.batch_size]
        if small:
            width, height = self.buckets[small[0]]
            raise UserError(
                f"{len(small)} buckets have fewer pictures than the {self.batch_size} of a step, for one "
                f"{width} x {height} with {counts[small[0]]}: leave them out, give their pictures to other buckets, or "
                "choose a smaller batch"
            )
        repeating = np.zeros(len(counts), dtype=bool)
        if self.repeats is not None:
            repeating[self.assignment[self._pictures[self.repeats[self._pictures] != 1]]] = True
        # bucket -> epochs in which it has one order; behind them its pictures have filled batches without a rest
        self._keeping = {
            b: self.batch_size // math.gcd(int(count), self.batch_size)
            for b, count in enumerate(counts)
            if 0 < count < 2 * self.batch_size and not repeating[b]
        }

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pictures that an epoch has to choose from, in order, bucket by bucket; and where each bucket begins."""
        pictures, begins = self._order(epoch)
        line = [
            part
            for b, waiting in enumerate(self._waiting(epoch))
            for part in (waiting, self._behind(waiting, pictures[begins[b] : begins[b + 1]]))
        ]
        lengths = [len(waiting) + len(new) for waiting, new in zip(line[::2], line[1::2], strict=True)]
        return np.concatenate(line), np.cumsum([0, *lengths])

    def _behind(self, waiting: np.ndarray, pictures: np.ndarray) -> np.ndarray:
        """The pictures, in such an order that the batch that those waiting are in has none of them twice.

        Those that are going to wait in turn stay at the end, so that no epoch depends on more than the one before.
        """
        wanted = self.batch_size - len(waiting) if len(waiting) else 0
        leaving = (len(waiting) + len(pictures)) // self.batch_size * self.batch_size - len(waiting)
        head = np.arange(
            max(0, min(leaving, 2 * self.batch_size))
        )  # in which fewer than batch_size are among the waiting
        again = np.isin(pictures[head], waiting)
        chosen = head[~again][:wanted]
        pictures = pictures.copy()
        pictures[head] = pictures[np.concatenate([chosen, np.setdiff1d(head, chosen)])]
        return pictures

    def _waiting(self, epoch: int) -> list[np.ndarray]:
        """For each bucket the pictures of the epochs before that were too few for a batch."""
        missing = self._seen(epoch) % self.batch_size
        waiting = [np.empty(0, np.int64) for _ in self.buckets]
        while missing.any():
            epoch -= 1
            pictures, begins = self._order(epoch)
            for b in np.flatnonzero(missing):
                end = pictures[max(begins[b], begins[b + 1] - missing[b]) : begins[b + 1]]
                waiting[b] = np.concatenate([end, waiting[b]])
                missing[b] -= len(end)
        return waiting

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """One permutation of the pictures of an epoch, sorted by bucket; and where each bucket begins."""
        pictures = self._pictures
        if self.repeats is not None:
            pictures = np.repeat(pictures, self._times(epoch + 1) - self._times(epoch))
        # a bucket above all random numbers: one sort does both
        bits = len(self.buckets).bit_length()
        keys = self._random(epoch, ORDER, len(pictures)) >> np.uint64(bits)
        keys |= self.assignment[pictures].astype(np.uint64) << np.uint64(64 - bits)
        pictures = pictures[np.argsort(keys, kind="stable")]
        counts = np.bincount(self.assignment[pictures], minlength=len(self.buckets))
        begins = np.concatenate([[0], np.cumsum(counts)])
        for b, epochs in self._keeping.items():
            members = np.sort(pictures[begins[b] : begins[b + 1]])
            keys = self._random(epoch - epoch % epochs, KEPT_ORDER + b, len(members))
            pictures[begins[b] : begins[b + 1]] = members[np.argsort(keys, kind="stable")]
        return pictures, begins

    def _seen(self, epochs: int) -> np.ndarray:
        """(buckets,) how many pictures the first epochs have, repeats counted."""
        if self.repeats is None:
            return epochs * np.bincount(self.assignment[self._pictures], minlength=len(self.buckets))
        times = np.bincount(self.assignment[self._pictures], self._times(epochs), minlength=len(self.buckets))
        return times.astype(np.int64)

    def _times(self, epochs: int) -> np.ndarray:
        """How often the first epochs have each picture; what is due to fractions is spread over the epochs."""
        phase = self._random(0, PHASE, len(self.assignment))[self._pictures] / 2.0**64
        return np.floor(epochs * self.repeats[self._pictures] + phase).astype(np.int64)

    def _random(self, epoch: int, purpose: int, count: int) -> np.ndarray:
        """(count,) uint64.  NumPy promises the same numbers in all its versions."""
        key = np.array([self.seed, epoch], dtype=np.uint64)  # of large numbers in a list NumPy would make floats
        return np.random.Philox(key=key, counter=[0, 0, 0, purpose]).random_raw(count)
