"""Real ranks, which load batches together: under torchrun, where this file is each of them, and as it starts them."""

import os
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ztsnr.data.bucketing import bucket_pictures
from ztsnr.data.dataset import PictureDataset, load_picture, loader
from ztsnr.data.epoch_plan import EpochPlan
from ztsnr.data.quarantine import Quarantine
from ztsnr.data.sources import PictureIndex

BUCKETS = [(32, 32), (48, 32), (32, 48)]
EPOCHS = 3


def make_dataset(place, rank=0, world_size=1):
    index = PictureIndex.load(place / "index.arrow")
    assignment = bucket_pictures(index.sizes, [BUCKETS]).assignment
    plan = EpochPlan(assignment, BUCKETS, batch_size=4, seed=3, rank=rank, world_size=world_size)
    return PictureDataset(plan, index, partial(load_picture, index=index, flip=0.5), Quarantine(place / "lists"))


def fingerprint(batch):
    """A number for each picture of a batch, (B,) int64, that its pixels and its conditioning change."""
    pixels = ((batch.data + 1) * 127.5).round().flatten(1)
    numbers = torch.cat([pixels, batch.time_ids], dim=1).long()  # so that no order of adding matters
    return (numbers * torch.arange(1, numbers.shape[1] + 1)).sum(1)


def load_as_a_rank(place, max_unusable):
    """Step by step, what both ranks have; rank 0 writes it down."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dataset = make_dataset(place, rank, world_size)
    count = sum(dataset.plan.step_count(epoch) for epoch in range(EPOCHS))
    rows = []
    for batch in islice(loader(dataset, workers=2, max_unusable=max_unusable), count):
        where = torch.tensor([batch.epoch, batch.step, batch.bucket, *batch.data.shape])
        row = torch.cat([where, batch.planned, batch.pictures, fingerprint(batch)])
        together = [torch.empty_like(row) for _ in range(world_size)]
        dist.all_gather(together, row)
        rows.append(torch.stack(together))
    if rank == 0:
        np.save(place / "rows.npy", torch.stack(rows).numpy())
    dist.destroy_process_group()


def run_under_torchrun(place, max_unusable):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, place, max_unusable]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


@pytest.fixture
def place(tmp_path):
    from ..data.test_dataset import write_pictures  # not above, because torchrun knows of no package

    write_pictures(tmp_path / "pictures").save(tmp_path / "index.arrow")
    return tmp_path


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_two_ranks(place):
    """One shape a step, each picture once an epoch, and what one rank alone loads; with pictures that are broken."""
    broken = torch.tensor([6, 9, 20])
    names = [f"pictures/{picture:03}.png" for picture in broken.tolist()]
    for name in names:
        (place / name).write_bytes(b"nothing")
    done = run_under_torchrun(place, max_unusable=0.2)
    assert done.returncode == 0, done.stderr
    rows = torch.from_numpy(np.load(place / "rows.npy"))
    where, (planned, pictures, prints) = rows[..., :7], rows[..., 7:].unflatten(2, (3, 2)).movedim(2, 0)
    assert (where[:, 0] == where[:, 1]).all()
    assert len(where[:, 0, 5:].unique(dim=0)) == len(BUCKETS)

    seen = Counter(planned.flatten().tolist())  # of epochs that end with two pictures of a bucket waiting, or none
    assert set(seen) == set(range(40))
    assert sum(EPOCHS - times for times in seen.values()) == sum(
        count.waiting for count in make_dataset(place).plan.counts(EPOCHS)
    )
    assert max(seen.values()) == EPOCHS
    is_broken = torch.isin(planned, broken)
    assert is_broken.any(2).any(0).all()  # both ranks found some
    assert len(list((place / "lists").iterdir())) > 1
    assert sorted(Quarantine(place / "lists").listed()) == names
    assert ((planned != pictures) == is_broken).all()
    assert not torch.isin(pictures, broken).any()

    alone = list(islice(loader(make_dataset(place), max_unusable=0.2), len(rows)))
    for step, batch in enumerate(alone):
        assert where[step, 0].tolist() == [batch.epoch, batch.step, batch.bucket, 2, *batch.data.shape[1:]]
        for of_ranks, of_one in ((planned, batch.planned), (pictures, batch.pictures), (prints, fingerprint(batch))):
            assert torch.equal(of_ranks[step].T.flatten(), of_one)


def test_too_many_broken_pictures_end_both_ranks(place):
    from . import forked_ranks

    for picture in range(0, 40, 4):
        np.zeros(4).tofile(place / "pictures" / f"{picture:03}.png")
    with pytest.raises(AssertionError, match=r"pictures seen so far[^\n]* more than data\.max_unusable = 0\.05 "):
        forked_ranks.run_ranks(load_as_a_rank, place, 0.05, log=place / "said.log")
    assert not (place / "rows.npy").exists()


if __name__ == "__main__":
    load_as_a_rank(Path(sys.argv[1]), float(sys.argv[2]))
