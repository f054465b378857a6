"""The order in which training sees its pictures.

Every step takes one batch of pictures from one bucket, so that all ranks have the same shape.  Think of one queue of
pictures per bucket: the pictures of epoch 0 in random order, then those of epoch 1 in another random order, and so on.
The queue is cut into batches, and the steps of an epoch are the batches that its pictures complete; pictures that do
not fill a batch wait at the head of the next epoch's queue.  So nothing is dropped, duplicated or squeezed into another
shape, and every picture is seen once per epoch, or, if it waited, at the beginning of the next.  The batch that starts
with waiting pictures takes none of them a second time.  A bucket that cannot fill two batches keeps one order to ensure
this, until an epoch ends in which no picture waits.  Only with repeats may a batch contain a picture twice.

The steps of an epoch come in random order.  That is the same as drawing the bucket of each step with a probability
proportional to its remaining steps (NovelAI, github.com/NovelAI/novelai-aspect-ratio-bucketing).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..canvas import Size
from ..errors import UserError

# Purposes of random numbers, so that no two uses share them.  KEPT_ORDER + b is that of bucket b.
ORDER, STEPS, PHASE, KEPT_ORDER = range(4)


@dataclass(frozen=True)
class BucketCount:
    """What an epoch does with a bucket.

    Attributes:
        size: (width, height) of the bucket.
        pictures: number of the epoch's pictures, with repeats.
        waiting: number of pictures left over from earlier epochs; they are taken first.
        steps: number of batches, so that ``waiting + pictures - steps * batch_size`` wait for the next epoch.
    """

    size: Size
    pictures: int
    waiting: int
    steps: int


class EpochPlan:
    """Which pictures each step of each epoch takes: a pure function of the arguments.

    A step's pictures do not depend on ``world_size``; each rank takes its share of them.  The state of a run is three
    integers, the seed, the epoch and the step, from which any number of ranks can resume.

    Args:
        assignment: (N,) bucket of each picture, -1 to leave it out (``assign_buckets``).
        buckets: (width, height) of each bucket.
        batch_size: number of pictures of a step, over all ranks.
        world_size: number of ranks; must divide ``batch_size``.
        rank: number of this rank, from 0.
        seed: seed of the order.
        repeats: (N,) how often an epoch sees each picture; 1.5 is once and twice in turns.  By default once.

    Raises:
        UserError: a bucket has fewer pictures than a batch, which would then contain one twice; ranks cannot share a
            batch evenly; a number is out of range.
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
        """The steps of an epoch, from step ``start`` on.

        Yields:
            The index of the bucket, and the indices of this rank's pictures, (batch_size / world_size,) int64.
        """
        line, begins = self._line(epoch)
        # Cut each bucket's queue into batches: step number -> bucket, and number of the batch within the bucket.
        steps = np.diff(begins) // self.batch_size
        bucket_of_step = np.repeat(np.arange(len(steps)), steps)
        batch_of_step = np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps)
        # All batches of all buckets in random order.
        drawn = np.argsort(self._random(epoch, STEPS, len(bucket_of_step)), kind="stable")
        for step in drawn[start:]:
            bucket = bucket_of_step[step]
            # Every world_size-th picture is this rank's, so the batch itself is the same for any number of ranks.
            begin = begins[bucket] + batch_of_step[step] * self.batch_size
            yield int(bucket), line[begin : begin + self.batch_size][self.rank :: self.world_size]

    def step_count(self, epoch: int) -> int:
        """The number of steps of an epoch; epochs may differ by one step per bucket."""
        return sum(count.steps for count in self.counts(epoch))

    def counts(self, epoch: int) -> list[BucketCount]:
        """What an epoch does with each bucket."""
        # All pictures queued before this epoch, less whole batches, still wait at its beginning.
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
                f"{self.world_size} ranks cannot share a batch of {self.batch_size} pictures evenly: make batch_size a "
                "multiple of world_size"
            )
        if not 0 <= self.seed < 2**64:
            raise UserError(f"the seed must be a whole number from 0 to 2**64 - 1, not {self.seed}")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank must be from 0 to {self.world_size - 1}, not {self.rank}")
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
            raise UserError("no picture has a bucket and is repeated at least once: there is nothing to plan")
        counts = np.bincount(self.assignment[self._pictures], minlength=len(self.buckets))
        small = [index for index, count in enumerate(counts) if 0 < count < self.batch_size]
        if small:
            width, height = self.buckets[small[0]]
            raise UserError(
                f"{len(small)} buckets have fewer pictures than batch_size = {self.batch_size}, for example "
                f"{width} x {height} with {counts[small[0]]}: leave their pictures out, move them to other buckets, or "
                "choose a smaller batch_size"
            )
        repeating = np.zeros(len(counts), dtype=bool)
        if self.repeats is not None:
            repeating[self.assignment[self._pictures[self.repeats[self._pictures] != 1]]] = True
        # Buckets that cannot fill two batches -> number of epochs that share an order.  After that many epochs the
        # pictures have filled whole batches, so none waits, and a new order cannot bring one twice into a batch.
        self._keeping = {
            b: self.batch_size // math.gcd(int(count), self.batch_size)
            for b, count in enumerate(counts)
            if 0 < count < 2 * self.batch_size and not repeating[b]
        }

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The queues of an epoch, concatenated bucket by bucket; and where each bucket begins."""
        pictures, begins = self._order(epoch)
        line = [
            part
            for b, waiting in enumerate(self._waiting(epoch))
            for part in (waiting, self._after(waiting, pictures[begins[b] : begins[b + 1]]))
        ]
        lengths = [len(waiting) + len(new) for waiting, new in zip(line[::2], line[1::2], strict=True)]
        return np.concatenate(line), np.cumsum([0, *lengths])

    def _after(self, waiting: np.ndarray, pictures: np.ndarray) -> np.ndarray:
        """An epoch's pictures, reordered so that the batch that begins with waiting pictures has none of them twice.

        Pictures that will wait for the next epoch stay at the end, so that an epoch depends only on the one before it.
        """
        # The first batch needs ``wanted`` new pictures; ``leaving`` are those that this epoch's batches use.
        wanted = self.batch_size - len(waiting) if len(waiting) else 0
        leaving = (len(waiting) + len(pictures)) // self.batch_size * self.batch_size - len(waiting)
        # Fewer than batch_size pictures wait, so two batches contain enough others.
        head = np.arange(max(0, min(leaving, 2 * self.batch_size)))
        again = np.isin(pictures[head], waiting)
        # Move the first ``wanted`` of the others to the front, and keep the order of the rest.
        chosen = head[~again][:wanted]
        pictures = pictures.copy()
        pictures[head] = pictures[np.concatenate([chosen, np.setdiff1d(head, chosen)])]
        return pictures

    def _waiting(self, epoch: int) -> list[np.ndarray]:
        """For each bucket, the pictures of earlier epochs that did not fill a batch."""
        missing = self._seen(epoch) % self.batch_size
        waiting = [np.empty(0, np.int64) for _ in self.buckets]
        while missing.any():  # a bucket may get fewer pictures per epoch than a batch needs, so go back until enough
            epoch -= 1
            pictures, begins = self._order(epoch)
            for b in np.flatnonzero(missing):
                end = pictures[max(begins[b], begins[b + 1] - missing[b]) : begins[b + 1]]
                waiting[b] = np.concatenate([end, waiting[b]])
                missing[b] -= len(end)
        return waiting

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pictures of an epoch in random order within each bucket; and where each bucket begins."""
        pictures = self._pictures
        if self.repeats is not None:
            pictures = np.repeat(pictures, self._times(epoch + 1) - self._times(epoch))
        # One sort does both: the bucket in the upper bits of the key, a random number in the lower bits.
        bits = len(self.buckets).bit_length()
        keys = self._random(epoch, ORDER, len(pictures)) >> np.uint64(bits)
        keys |= self.assignment[pictures].astype(np.uint64) << np.uint64(64 - bits)
        pictures = pictures[np.argsort(keys, kind="stable")]
        counts = np.bincount(self.assignment[pictures], minlength=len(self.buckets))
        begins = np.concatenate([[0], np.cumsum(counts)])
        # Small buckets: the order belongs to the first of the epochs that share it.
        for b, epochs in self._keeping.items():
            members = np.sort(pictures[begins[b] : begins[b + 1]])
            keys = self._random(epoch - epoch % epochs, KEPT_ORDER + b, len(members))
            pictures[begins[b] : begins[b + 1]] = members[np.argsort(keys, kind="stable")]
        return pictures, begins

    def _seen(self, epochs: int) -> np.ndarray:
        """(buckets,) number of pictures that the first ``epochs`` epochs queue, with repeats."""
        if self.repeats is None:
            return epochs * np.bincount(self.assignment[self._pictures], minlength=len(self.buckets))
        times = np.bincount(self.assignment[self._pictures], self._times(epochs), minlength=len(self.buckets))
        return times.astype(np.int64)

    def _times(self, epochs: int) -> np.ndarray:
        """Number of times that the first ``epochs`` epochs have each picture: floor(epochs * repeats + phase).

        The phase, random in [0, 1), spreads the extra times of fractional repeats evenly over the epochs.
        """
        assert self.repeats is not None
        phase = self._random(0, PHASE, len(self.assignment))[self._pictures] / 2.0**64
        return np.floor(epochs * self.repeats[self._pictures] + phase).astype(np.int64)

    def _random(self, epoch: int, purpose: int, count: int) -> np.ndarray:
        """(count,) uint64, the same in all versions of NumPy, which guarantees the streams of its bit generators."""
        key = np.array([self.seed, epoch], dtype=np.uint64)  # NumPy would turn a list of large integers into floats
        return np.random.Philox(key=key, counter=[0, 0, 0, purpose]).random_raw(count)
