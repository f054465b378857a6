"""The same batches with any number of workers and ranks and from any step on, and pictures that cannot be used."""

import multiprocessing
import pickle
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ztsnr.data.bucketing import bucket_pictures
from ztsnr.data.captions import CaptionSettings
from ztsnr.data.dataset import TRIES, Item, PictureDataset, load_picture, loader, steps
from ztsnr.data.epoch_plan import EpochPlan
from ztsnr.data.keyed_random import CROP, keyed_generator
from ztsnr.data.pictures import MicroConditioning
from ztsnr.data.quarantine import Quarantine
from ztsnr.data.sources import PictureIndex, Source, build_index
from ztsnr.data.tokens import token_chunks

# torch counts the cores, and these tests do not want speed of their workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

BUCKETS = [(32, 32), (48, 32), (32, 48)]
SIZES = [(37, 32), (55, 32), (32, 57), (32, 35)]  # in their buckets none is resized
BATCH = 4
WEIGHTS = np.linspace(0.5, 1.5, 40)


def coordinates(number, size):
    """A picture whose red is x, green y and blue its number, (H, W, 3) uint8."""
    y, x = np.mgrid[: size[1], : size[0]]
    return np.stack([x, y, np.full_like(x, number)], -1).astype(np.uint8)


def write_pictures(folder, number=40):
    """Pictures that carry their coordinates and captions, and the index of them; their numbers are those in it."""
    folder.mkdir()
    for i in range(number):
        Image.fromarray(coordinates(i, SIZES[i % len(SIZES)])).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"picture {i}, red, green, blue, square")
    return build_index([Source(folder)])[0]


def make_plan(index, **options):
    assignment = bucket_pictures(index.sizes, [BUCKETS]).assignment
    return EpochPlan(assignment, BUCKETS, **{"batch_size": BATCH, "seed": 7} | options)


@dataclass
class Setting:
    """Where the pictures of a test are, and datasets of them."""

    folder: object
    index: PictureIndex
    lists: object

    def dataset(self, lists=None, flip=0.5, load=None, plan=None, index=None, **options):
        index = index or self.index
        return PictureDataset(
            plan or make_plan(index),
            index,
            load or partial(load_picture, index=index, flip=flip),
            Quarantine(lists or self.lists),
            **{"caption_settings": CaptionSettings(shuffle=True, kept_tags=1), "weights": WEIGHTS} | options,
        )

    def file(self, picture):
        return self.folder / f"{picture:03}.png"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """For tests that change no file."""
    place = tmp_path_factory.mktemp("shared")
    return Setting(place / "pictures", write_pictures(place / "pictures"), place / "lists")


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path / "pictures", write_pictures(tmp_path / "pictures"), tmp_path / "lists")


def content(batch):
    """All that is in a batch, to be compared."""
    return tuple(
        (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else str(value)
        for value in batch
    )


def first(number, dataset, **options):
    return list(islice(loader(dataset, **options), number))


# ----------------------------------------------------------------------------------------------------------------------
# What is in a batch


def test_a_batch(shared):
    batch = next(loader(shared.dataset()))
    width, height = BUCKETS[batch.bucket]
    assert batch.data.shape == (BATCH, 3, height, width)
    assert batch.data.dtype == batch.time_ids.dtype == batch.weights.dtype == torch.float32
    assert -1 <= batch.data.min() < -0.9
    assert batch.time_ids.shape == (BATCH, 6)
    assert (batch.epoch, batch.step) == (0, 0)
    assert batch.tokens is None
    assert torch.equal(batch.pictures, batch.planned)
    for caption, picture, weight in zip(batch.captions, batch.pictures.tolist(), batch.weights.tolist(), strict=True):
        tags = caption.split(", ")
        assert tags[0] == f"picture {picture}"
        assert sorted(tags[1:]) == ["blue", "green", "red", "square"]
        assert weight == pytest.approx(WEIGHTS[picture])


def test_without_weights_all_are_one(shared):
    assert next(loader(shared.dataset(weights=None))).weights.tolist() == [1] * BATCH


def test_micro_conditioning_says_where_the_pixels_are_from(shared):
    """The pictures carry their coordinates, so each pixel can be asked, mirrored or not."""
    mirrored = []
    for batch in first(40, shared.dataset()):
        pixels = ((batch.data + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for seen, picture, time_ids in zip(pixels, batch.pictures.tolist(), batch.time_ids.tolist(), strict=True):
            size = SIZES[picture % len(SIZES)]
            whole = coordinates(picture, size)
            mirrored.append(bool(seen[0, 0, 0] > seen[0, 1, 0]))
            if mirrored[-1]:
                whole = whole[:, ::-1]
            height, width, top, left, *target = map(int, time_ids)
            assert (width, height) == size
            assert (target[1], target[0]) == BUCKETS[batch.bucket]
            assert (seen == whole[top : top + target[0], left : left + target[1]]).all()
    assert 0.3 < np.mean(mirrored) < 0.7  # of 160


@pytest.mark.parametrize("flip", [0, 1])
def test_mirrored_never_or_always(shared, flip):
    for batch in first(5, shared.dataset(flip=flip)):
        assert ((batch.data[:, 0, 0, 0] > batch.data[:, 0, 0, 1]) == bool(flip)).all()


def test_a_large_picture_is_resized(tmp_path):
    """Ten times too large, so that a JPEG is decoded smaller; smooth, so that its pixels say where they are from."""
    y, x = np.mgrid[:320, :400]
    Image.fromarray(np.stack([x / 400 * 255, y / 320 * 255, 0 * x], -1).astype(np.uint8)).save(tmp_path / "a.jpg")
    index, _ = build_index([Source(tmp_path)], allow_missing_captions=True)
    pixels, conditioning = load_picture(
        0, (32, 32), lambda purpose: keyed_generator(0, 0, 0, purpose), index=index, flip=1.0
    )
    assert conditioning.original_size == (320, 400)
    top, left = conditioning.crop_top_left
    assert top == 0
    red = (pixels[0].mean(0).numpy() + 1) / 2
    x = 40 - (left + np.arange(32)) - 0.5  # of the 40 columns that it has when its height is 32
    assert red == pytest.approx(x / 40, abs=0.02)


def test_tokens(shared, tmp_path):
    from ..tiny_pipelines import make_tokenizer  # diffusers, and test_torchrun imports this file

    tokenizers = [make_tokenizer(tmp_path / name, pad) for name, pad in (("1", "<|endoftext|>"), ("2", "!"))]

    def tokenize(caption):
        return [token_chunks(caption * 3, tokenizer, 0) for tokenizer in tokenizers]

    for batch in first(3, shared.dataset(tokenize=tokenize)):
        for tokenizer, chunks in zip(tokenizers, batch.tokens.chunks, strict=True):
            for caption, rows in zip(batch.captions, batch.tokens.rows, strict=True):
                expected = token_chunks(caption * 3, tokenizer, 0)
                assert len(expected) == 2  # a letter is a token
                assert torch.equal(chunks[rows], expected)


def test_another_load(shared):
    """Latents come through the same seam."""

    def load(picture, bucket, numbers):
        latents = torch.from_numpy(numbers(CROP).random((4, bucket[1] // 8, bucket[0] // 8), dtype=np.float32))
        return latents, MicroConditioning((1215, picture), (0, 8), bucket[::-1])

    for batch in first(3, shared.dataset(load=load)):
        width, height = BUCKETS[batch.bucket]
        assert batch.data.shape == (BATCH, 4, height // 8, width // 8)
        for time_ids, picture in zip(batch.time_ids.tolist(), batch.pictures.tolist(), strict=True):
            assert time_ids == [1215, picture, 0, 8, height, width]


def test_latents_from_a_cache(shared, tmp_path):
    """Of a VAE of random weights, with latents of 2 pixels; with workers and without, and each epoch another crop."""
    from diffusers import AutoencoderKL

    from ztsnr.data.latent_cache import load_latents
    from ztsnr.data.make_latent_cache import cache_latents

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4)
    plan = make_plan(shared.index)
    cache = cache_latents(tmp_path / "cache", shared.index, plan.assignment, BUCKETS, vae, margin=8)
    dataset = shared.dataset(load=partial(load_latents, cache=cache))
    batches = first(22, dataset)
    assert list(map(content, first(22, dataset, workers=2))) == list(map(content, batches))
    crops = defaultdict(set)
    for batch in batches:
        width, height = BUCKETS[batch.bucket]
        assert batch.data.shape == (BATCH, 4, height // 2, width // 2)
        for time_ids, picture in zip(batch.time_ids.tolist(), batch.pictures.tolist(), strict=True):
            assert (time_ids[1], time_ids[0]) == SIZES[picture % len(SIZES)]
            assert time_ids[4:] == [height, width]
            crops[picture].add(tuple(time_ids[2:4]))
    assert sum(len(places) > 1 for places in crops.values()) > 10


# ----------------------------------------------------------------------------------------------------------------------
# The same batches


@pytest.fixture(scope="module")
def reference(shared):
    """Three epochs and a little more, 40 pictures each."""
    batches = first(33, shared.dataset())
    assert {batch.epoch for batch in batches} == {0, 1, 2, 3}
    return batches


@pytest.mark.parametrize("workers", [2, 8])
def test_same_batches_with_any_number_of_workers(shared, reference, workers):
    batches = first(33, shared.dataset(), workers=workers)
    assert list(map(content, batches)) == list(map(content, reference))


def test_the_plan_is_followed(shared, reference):
    batches = iter(reference)
    for epoch in range(3):
        for step, (bucket, pictures) in enumerate(make_plan(shared.index).steps(epoch)):
            batch = next(batches)
            assert (batch.epoch, batch.step, batch.bucket) == (epoch, step, bucket)
            assert batch.pictures.tolist() == pictures.tolist()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 28), st.sampled_from([1, 2, 4]), st.integers(0, 2))
def test_resume_anywhere_with_any_number_of_ranks(shared, reference, done, world_size, more):
    """The ranks' batches, laid side by side, are those of one rank that was never stopped."""
    expected = reference[done : done + 2 + more]
    epoch, start = (0, 0) if done == 0 else (reference[done - 1].epoch, reference[done - 1].step + 1)
    ranks = [
        first(
            len(expected),
            shared.dataset(plan=make_plan(shared.index, world_size=world_size, rank=rank)),
            epoch=epoch,
            start=start,
        )
        for rank in range(world_size)
    ]
    for whole, shares in zip(expected, zip(*ranks, strict=True), strict=True):
        assert {(batch.epoch, batch.step, batch.bucket) for batch in shares} == {
            (whole.epoch, whole.step, whole.bucket)
        }
        for name in ("data", "time_ids", "weights", "pictures", "planned"):
            together = torch.stack([getattr(batch, name) for batch in shares], 1).flatten(0, 1)
            assert torch.equal(together, getattr(whole, name))
        assert [text for texts in zip(*(batch.captions for batch in shares), strict=True) for text in texts] == (
            whole.captions
        )


def test_a_dataset_in_a_new_process(shared, reference):
    """Where workers are not forked they get a copy."""
    copy = pickle.loads(pickle.dumps(shared.dataset()))
    for items, batch in zip(steps(copy.plan), reference[:3], strict=False):
        for item, data, caption in zip(items, batch.data, batch.captions, strict=True):
            assert torch.equal(copy[item].data, data)
            assert copy[item].caption == caption


def test_global_random_numbers_are_left_alone(shared):
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - of all who use it
    first(3, shared.dataset())
    first(3, shared.dataset(), workers=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def showings(batches):
    """What is random about each showing of each picture."""
    shown = defaultdict(list)
    for batch in batches:
        for picture, time_ids, caption, data in zip(
            batch.pictures.tolist(), batch.time_ids.tolist(), batch.captions, batch.data, strict=True
        ):
            shown[picture].append((*time_ids[2:4], caption, bool(data[0, 0, 0] > data[0, 0, 1])))
    return shown


def test_each_epoch_is_another(reference):
    """Of a picture's crops, orders of tags and mirrorings few are the same in two epochs."""
    shown = showings(batch for batch in reference if batch.epoch < 3)
    assert len(shown) == 40
    for part in (slice(0, 2), slice(2, 3), slice(3, 4)):
        different = [len({showing[part] for showing in all_of_one}) > 1 for all_of_one in shown.values()]
        assert sum(different) > 20


def test_each_showing_in_an_epoch_is_another(shared):
    """With 20 repeats."""
    plan = make_plan(shared.index, repeats=np.full(40, 20))
    shown = showings(first(190, shared.dataset(plan=plan)))
    for all_of_one in shown.values():
        assert len(set(all_of_one)) > 0.8 * len(all_of_one) > 10


def test_seeds_differ(shared, reference):
    other = first(3, shared.dataset(plan=make_plan(shared.index, seed=8)))
    assert not set(map(content, other)) & set(map(content, reference))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 3), st.integers(0, 9), st.sampled_from([0, 3, 36, 39]))
def test_keyed_by_epoch_picture_and_place(shared, epoch, step, picture):
    """The crop of an item from the documented counter, by itself."""
    size, (slot, seed) = SIZES[picture % len(SIZES)], (step % BATCH, 7)
    sample = shared.dataset(flip=0)[Item(epoch, step, 0, picture, slot)]
    counter = np.array([0, step * BATCH + slot, picture + 1, CROP], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=counter))
    left = generator.integers(size[0] - 32, endpoint=True)
    top = generator.integers(size[1] - 32, endpoint=True)
    assert sample.time_ids[2:4] == (top, left)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures that cannot be used


def spoil(setting):
    """A truncated, a destroyed, an empty, a replaced and a vanished picture; their numbers."""
    data = setting.file(3).read_bytes()
    setting.file(3).write_bytes(data[: len(data) // 2])
    setting.file(8).write_bytes(b"\0" * 1000)
    setting.file(9).write_bytes(b"")
    Image.new("RGB", (33, 32)).save(setting.file(16))
    setting.file(22).unlink()
    return {3, 8, 9, 16, 22}


def differences(batches, clean):
    """{(epoch, step, slot): (planned, shown)} of what was replaced; all else must be the same."""
    replaced = {}
    for batch, good in zip(batches, clean, strict=True):
        assert torch.equal(batch.planned, good.planned)
        kept = batch.planned == batch.pictures
        for name in ("data", "time_ids", "weights"):
            assert torch.equal(getattr(batch, name)[kept], getattr(good, name)[kept])
        for slot in np.flatnonzero(~kept.numpy()).tolist():
            place = batch.epoch, batch.step, slot
            replaced[place] = int(batch.planned[slot]), int(batch.pictures[slot])
            assert batch.captions[slot].startswith(f"picture {batch.pictures[slot]},")
            assert batch.weights[slot] == pytest.approx(WEIGHTS[batch.pictures[slot]])
    return replaced


@pytest.mark.parametrize("workers", [0, 3])
def test_replaced_in_their_bucket_and_listed_once(setting, reference, workers):
    spoilt = spoil(setting)
    dataset = setting.dataset()
    batches = first(33, dataset, workers=workers, max_unusable=0.2)
    assignment = dataset.plan.assignment
    replaced = differences(batches, reference)
    assert {planned for planned, _ in replaced.values()} == spoilt
    assert len(replaced) >= 3 * len(spoilt)
    for planned, shown in replaced.values():
        assert shown not in spoilt
        assert assignment[shown] == assignment[planned]
    assert len(set(replaced.values())) > len(spoilt)  # others in other epochs
    lists = [path.read_text().splitlines() for path in setting.lists.iterdir()]
    assert len(lists) > 1 if workers else len(lists) == 1  # each process its own
    assert all(len(lines) == len(set(lines)) for lines in lists)
    reasons = Quarantine(setting.lists).listed()
    assert sorted(reasons) == [f"pictures/{i:03}.png" for i in sorted(spoilt)]
    assert reasons["pictures/009.png"] == "it is empty"
    assert "it was 37 x 32 pixels when it was indexed" in reasons["pictures/016.png"]
    assert "cannot be read" in reasons["pictures/022.png"]


def test_all_agree_on_what_replaces_what(setting, tmp_path):
    """Two ranks, many workers, and one that knows the list already."""
    spoil(setting)
    batches = first(22, setting.dataset(), max_unusable=1)
    for options in ({}, {"lists": tmp_path / "other"}):
        again = first(22, setting.dataset(**options), workers=2, max_unusable=1)
        assert list(map(content, again)) == list(map(content, batches))
    for rank in (0, 1):
        plan = make_plan(setting.index, world_size=2, rank=rank)
        shares = first(22, setting.dataset(tmp_path / "ranks", plan=plan), max_unusable=1)
        for share, batch in zip(shares, batches, strict=True):
            assert torch.equal(share.data, batch.data[rank::2])
            assert torch.equal(share.pictures, batch.pictures[rank::2])
    assert Quarantine(tmp_path / "ranks").listed().keys() == Quarantine(setting.lists).listed().keys()


def test_listed_pictures_are_not_tried_again(setting, reference, tmp_path):
    """Not even when they are good again, until the list is gone."""
    files = {picture: setting.file(picture).read_bytes() for picture in (3, 8, 9, 16, 22)}
    spoil(setting)
    batches = first(33, setting.dataset(), max_unusable=1)
    for picture, data in files.items():
        setting.file(picture).write_bytes(data)
    resumed = first(20, setting.dataset(), epoch=batches[12].epoch, start=batches[12].step + 1, max_unusable=1)
    assert list(map(content, resumed)) == list(map(content, batches[13:]))
    fresh = first(33, setting.dataset(tmp_path / "new"))
    assert list(map(content, fresh)) == list(map(content, reference))


def test_a_list_of_other_pictures(setting, reference):
    Quarantine(setting.lists).add("elsewhere/a.png", "it is empty")
    assert list(map(content, first(3, setting.dataset()))) == list(map(content, reference[:3]))


def test_any_failure_to_read_is_one_of_the_picture(shared, tmp_path):
    def load(picture, bucket, numbers):
        if picture == 5:
            raise TimeoutError("the disk does not answer")
        return load_picture(picture, bucket, numbers, index=shared.index)

    pictures = {p for b in first(11, shared.dataset(tmp_path, load=load), max_unusable=1) for p in b.pictures.tolist()}
    assert 5 not in pictures
    assert Quarantine(tmp_path).listed() == {"pictures/005.png": "the disk does not answer"}


def test_a_mistake_of_the_program_is_none_of_the_picture(shared, tmp_path):
    def load(picture, bucket, numbers):
        raise TypeError("no such argument")

    with pytest.raises(TypeError, match="no such argument"):
        first(1, shared.dataset(tmp_path, load=load))
    assert Quarantine(tmp_path).listed() == {}


def test_pictures_of_no_repeats_replace_none(setting):
    """Held out by a weight of 0, say."""
    setting.file(1).write_bytes(b"")
    repeats = np.where(np.arange(40) % 8 == 5, 0, 1)  # half of its bucket
    plan = make_plan(setting.index, repeats=repeats)
    dataset = setting.dataset(plan=plan)
    shown = {dataset[Item(epoch, 0, plan.assignment[1], 1, 0)].picture for epoch in range(40)}
    assert shown == {9, 17, 25, 33}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_stop_the_run(setting, workers):
    for picture in range(0, 40, 7):
        setting.file(picture).write_bytes(b"")
    sentence = (
        rf"6 of the \d+ pictures seen so far \(\d+\.\d\d%\) cannot be used, more than data.max_unusable = 0.1 allows: "
        rf".*; 6 pictures are listed in {setting.lists} .*; the first are pictures/0\d\d.png: it is empty; .*empty$"
    )
    with pytest.raises(ValueError, match=sentence):
        first(20, setting.dataset(), workers=workers, max_unusable=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_is_gone_stops_the_run(setting, workers):
    for path in setting.folder.glob("*.png"):
        path.unlink()
    sentence = (
        rf"^a batch cannot be filled: .*{TRIES} replacements can be used; \d+ pictures are listed in .*No such file"
    )
    with pytest.raises(ValueError, match=sentence):
        first(1, setting.dataset(), workers=workers, max_unusable=1)
    assert multiprocessing.active_children() == []  # nobody is left to wait for


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"plan": EpochPlan(np.zeros(8, int), BUCKETS, batch_size=4)},
            "the plan is for 8 pictures, but the index has 40",
        ),
        ({"weights": np.ones(39)}, "weights must be a number of at least 0 for each of the 40 pictures"),
        ({"weights": np.full(40, np.nan)}, "weights must be"),
        ({"weights": np.full(40, -1)}, "weights must be"),
    ],
)
def test_mistakes_end_in_a_sentence(shared, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        shared.dataset(**options)


def with_captions(index, captions):
    table = index.table
    lists = [captions if i == 6 else texts for i, texts in enumerate(table["captions"].to_pylist())]
    place = table.schema.get_field_index("captions")
    return PictureIndex(table.set_column(place, "captions", [lists]))


def test_captions_that_do_not_fit(shared):
    with pytest.raises(ValueError, match=r"^1 pictures have no caption, the first is pictures/006.png"):
        shared.dataset(index=with_captions(shared.index, []))
    weighted = CaptionSettings(caption_weights=(3, 1))
    with pytest.raises(ValueError, match=r"pictures/006.png has 3 captions, but caption_weights has only 2"):
        shared.dataset(index=with_captions(shared.index, ["a", "b", "c"]), caption_settings=weighted)
    index = with_captions(shared.index, [])
    left_out = make_plan(index).assignment
    left_out[6] = -1
    plan = EpochPlan(left_out, BUCKETS, batch_size=BATCH)
    assert shared.dataset(index=index, plan=plan).plan is plan


@pytest.mark.parametrize(("epoch", "start"), [(0, 11), (0, -1), (-1, 0)])
def test_a_step_that_is_not_there(shared, epoch, start):
    with pytest.raises(ValueError, match=f"there is no step {start} in epoch {epoch}, which has"):
        loader(shared.dataset(), epoch=epoch, start=start)


def test_a_share_that_is_none(shared):
    with pytest.raises(ValueError, match="must be from 0 to 1, not 5"):
        loader(shared.dataset(), max_unusable=5)
