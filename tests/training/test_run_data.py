"""The data of a run from its settings: which pictures, in which buckets, which of them held out."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ztsnr.data.bucket_report import bucket_sets
from ztsnr.data.dataset import loader
from ztsnr.data.latent_cache import LatentCache
from ztsnr.data.make_latent_cache import run_cache
from ztsnr.data.quarantine import Quarantine
from ztsnr.training.config import DataSettings, SourceSettings, TagWeightSettings, TrainingCaptions
from ztsnr.training.run_data import open_data
from ztsnr.world import World

from ..tiny_pipelines import make_tiny_sdxl

SIZES = [(48, 32), (32, 48), (40, 40), (100, 32)]
BUCKETS = ("32x32,48x32,32x48",)
ALONE = World(0, 1, 1, torch.device("cpu"))


@dataclass(frozen=True)
class OneOfTwo(World):
    """A stand-in for one of two processes, where the first has said what it has to say."""

    said: tuple = (None, None)

    def tell(self, value=None):
        return value if self.first else self.said


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """48 pictures of one colour each, 12 of each size, the last of which is in no bucket; one is no picture."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    for i in range(48):
        Image.new("RGB", SIZES[i % 4], (i, 5 * i, 200)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"picture, {'rare' if i == 4 else 'common'}, number {i}")
    (folder / "48.png").write_bytes(b"no picture")
    (folder / "48.txt").write_text("broken")
    return folder


def settings(pictures, **changes):
    base = DataSettings(
        (SourceSettings(pictures),), batch_size=4, buckets=BUCKETS, step=16, validation_share=0.2, workers=0
    )
    return replace(base, **changes)


@pytest.fixture
def opened(pictures, tmp_path):
    return open_data(settings(pictures), 0, ALONE, tmp_path / "index.arrow")


def test_pictures_are_trained_with_held_out_or_left_out_with_a_reason(opened):
    assert len(opened.index) == 48
    assert opened.refused["key"].to_pylist() == ["pictures/48.png"]
    planned = np.flatnonzero(opened.plan.assignment >= 0)
    assert set(planned).isdisjoint(opened.held_out.tolist())
    long = {i for i in range(48) if tuple(opened.index.sizes[i]) == (100, 32)}
    assert long.isdisjoint(planned)
    assert long.isdisjoint(opened.held_out.tolist())
    (count,) = opened.left_out.values()
    assert len(planned) + len(opened.held_out) + len(long) == 48
    assert 0 < count <= len(long)  # of those that would be trained with
    assert 4 <= len(opened.held_out) <= 15
    # each in the bucket that has its shape
    for i in planned:
        assert opened.plan.buckets[opened.plan.assignment[i]] == {(40, 40): (32, 32)}.get(
            tuple(opened.index.sizes[i].tolist()), tuple(opened.index.sizes[i].tolist())
        )
    for i, bucket in zip(opened.held_out, opened.held_out_buckets, strict=True):
        assert opened.plan.buckets[bucket] in {(32, 32), (48, 32), (32, 48)}
        width, height = opened.index.sizes[i]
        assert (opened.plan.buckets[bucket][0] > opened.plan.buckets[bucket][1]) == (width > height)


def test_none_is_held_out_for_a_share_of_nothing(pictures, tmp_path):
    opened = open_data(settings(pictures, validation_share=0.0), 0, ALONE, tmp_path / "index.arrow")
    assert len(opened.held_out) == 0
    assert (opened.plan.assignment >= 0).sum() == 36


def test_batches(opened, tmp_path):
    dataset = opened.dataset(
        Quarantine(tmp_path / "quarantine"),
        TrainingCaptions(caption_dropout=0.0),
        lambda text: [torch.zeros(1, 77, dtype=torch.long)],
    )
    seen = []
    for batch in loader(dataset, epoch=0, workers=0):
        if batch.epoch > 0:
            break
        seen += batch.pictures.tolist()
        width, height = opened.plan.buckets[batch.bucket]
        assert batch.data.shape == (4, 3, height, width)
        assert batch.data.dtype == torch.float32
        assert (batch.weights == 1).all()
    assert len(seen) == 4 * opened.plan.step_count(0)
    assert set(seen).isdisjoint(opened.held_out.tolist())


def test_the_fingerprint_tells_what_the_order_depends_on(pictures, opened, tmp_path):
    def fingerprint(seed=0, world=ALONE, **changes):
        return open_data(settings(pictures, **changes), seed, world, tmp_path / "index.arrow").fingerprint

    assert fingerprint() == opened.fingerprint
    assert fingerprint(workers=3, background="black", flip=0.5) == opened.fingerprint
    two = OneOfTwo(1, 2, 2, torch.device("cpu"), said=(None, opened.refused))
    assert fingerprint(world=two) == opened.fingerprint  # a run goes on with another number of processes
    others = [
        fingerprint(seed=1),
        fingerprint(batch_size=2),
        fingerprint(validation_share=0.1),
        fingerprint(buckets=("32x32,48x32",)),
        fingerprint(sources=(SourceSettings(pictures, weight=2.0),)),
    ]
    assert len({opened.fingerprint, *others}) == 6


def test_all_processes_read_what_the_first_has_found(pictures, tmp_path):
    path = tmp_path / "index.arrow"
    first = open_data(settings(pictures), 0, OneOfTwo(0, 2, 2, torch.device("cpu")), path)
    second = open_data(settings(pictures), 0, OneOfTwo(1, 2, 2, torch.device("cpu"), said=(None, first.refused)), path)
    assert (first.plan.rank, second.plan.rank) == (0, 1)
    for (bucket, ours), (same, theirs) in zip(first.plan.steps(0), second.plan.steps(0), strict=True):
        assert bucket == same
        assert len(ours) == len(theirs) == 2
        assert set(ours.tolist()).isdisjoint(theirs.tolist())
    with pytest.raises(ValueError, match="what went wrong there"):
        open_data(
            settings(pictures), 0, OneOfTwo(1, 2, 2, torch.device("cpu"), said=("what went wrong there", 0)), path
        )


def test_weights_by_tags(pictures, tmp_path):
    opened = open_data(settings(pictures, tag_weights=TagWeightSettings()), 0, ALONE, tmp_path / "index.arrow")
    weights = opened.weights.weights
    rare = opened.index.table["key"].to_pylist().index("pictures/04.png")
    assert weights.argmax() == rare
    assert (weights >= 0.25).all()
    assert (weights <= 4).all()


def test_cached_latents(pictures, tmp_path):
    """Their buckets are used, and what no step can be filled with is left out."""
    make_tiny_sdxl(tmp_path / "tiny")
    run_cache(
        [pictures],
        tmp_path / "latents",
        bucket_sets(settings(pictures).buckets, (), settings(pictures).step, settings(pictures).limit),
        vae=tmp_path / "tiny",
        margin=0,
        say=lambda line: None,
    )
    opened = open_data(settings(pictures, latents=tmp_path / "latents"), 0, ALONE, tmp_path / "index.arrow")
    long = {i for i in range(48) if tuple(opened.index.sizes[i]) == (100, 32)}
    training = set(range(48)) - set(opened.held_out.tolist())
    assert set(opened.left_out) == {"not in the cache"}
    assert 0 < opened.left_out["not in the cache"] <= len(long & training)
    planned = np.flatnonzero(opened.plan.assignment >= 0)
    picture = int(planned[0])
    latents, _ = opened.load(
        picture, opened.plan.buckets[opened.plan.assignment[picture]], lambda purpose: np.random.default_rng(purpose)
    )
    mean, std = LatentCache(tmp_path / "latents")[picture][:2]
    assert latents.shape == mean.shape
    assert ((latents - mean.float()).abs() <= 6 * std.float() + 1e-3).all()

    counts = np.bincount(opened.plan.assignment[planned])
    largest = int(counts.max())
    assert counts.min() < largest
    few = open_data(
        settings(pictures, latents=tmp_path / "latents", batch_size=largest), 0, ALONE, tmp_path / "index.arrow"
    )
    assert (few.plan.assignment >= 0).sum() == largest * (counts == largest).sum()
    assert sum(few.left_out.values()) == sum(opened.left_out.values()) + counts[counts < largest].sum()


def test_a_list_of_pictures_elsewhere(pictures, tmp_path):
    lines = [{"path": str(path), "tags": f"picture {path.stem}"} for path in sorted(pictures.glob("*.png"))]
    listed = tmp_path / "lists" / "list.jsonl"
    listed.parent.mkdir()
    listed.write_text("\n".join(map(json.dumps, lines)))
    source = SourceSettings(listed, caption_fields=("tags",), outside=True)
    opened = open_data(settings(pictures, sources=(source,)), 0, ALONE, tmp_path / "index.arrow")
    assert {opened.index.captions(i) for i in range(len(opened.index))} == {(line["tags"],) for line in lines[:48]}
    with pytest.raises(ValueError, match="outside = true"):
        open_data(settings(pictures, sources=(replace(source, outside=False),)), 0, ALONE, tmp_path / "index.arrow")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sources": (SourceSettings(Path("nowhere")),)}, "nowhere"),
        ({"min_size": 5000}, "none of the 48 pictures can be trained with: "),
        ({"background": "mauvish"}, "data.background = 'mauvish' is not a colour"),
        ({"buckets": ("hexagons",)}, "hexagons"),
        ({"validation_share": 1.5}, "share must be at least 0 and less than 1"),
        ({"batch_size": 3}, "data.batch_size = 3 is not a multiple of the 2 processes"),
        ({"latents": Path("nowhere")}, "nowhere"),
    ],
)
def test_mistakes(pictures, tmp_path, changes, sentence):
    world = OneOfTwo(0, 2, 2, torch.device("cpu")) if "batch_size" in changes else ALONE
    with pytest.raises(ValueError, match=sentence):
        open_data(settings(pictures, **changes), 0, world, tmp_path / "index.arrow")


def test_pictures_without_captions_are_refused_unless_that_is_allowed(tmp_path):
    (tmp_path / "bare").mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32)).save(tmp_path / "bare" / f"{i}.png")
    with pytest.raises(ValueError, match="caption"):
        open_data(settings(tmp_path / "bare"), 0, ALONE, tmp_path / "index.arrow")
    opened = open_data(settings(tmp_path / "bare", allow_missing_captions=True), 0, ALONE, tmp_path / "index.arrow")
    assert (opened.plan.assignment >= 0).any()
