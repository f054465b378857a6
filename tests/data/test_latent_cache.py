"""The cache holds what the VAE says of the pictures, gives true crops of it, and is not used when it is stale."""

import copy
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny_pipelines import make_tiny_sdxl, write_single_file
from ztsnr.canvas import area_buckets, assign_buckets
from ztsnr.checkpoints.vae import load_vae
from ztsnr.cli import main
from ztsnr.data import make_latent_cache
from ztsnr.data.bucketing import bucket_pictures
from ztsnr.data.dataset import PictureDataset, loader
from ztsnr.data.epoch_plan import EpochPlan
from ztsnr.data.keyed_random import POSTERIOR, keyed_generator
from ztsnr.data.latent_cache import LatentCache, load_latents
from ztsnr.data.latent_stats import ChannelStatistics
from ztsnr.data.make_latent_cache import cache_latents, recipe_of, scaled_size
from ztsnr.data.pictures import PictureError, cover_size
from ztsnr.data.quarantine import Quarantine
from ztsnr.data.sources import PictureIndex, Source, build_index
from ztsnr.files import lock_folder

BUCKETS = [(128, 192), (160, 160), (192, 128)]


def tiny_vae(seed=0):
    """As Stable Diffusion's in all but size: four levels, so a latent is 8 pixels wide."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(4,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=2,
            layers_per_block=1,
        ).eval()


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


def make_pictures(folder, count, seed=0):
    """Blurred noise, of many shapes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        width, height = (int(side) for side in rng.integers(150, 420, 2))
        noise = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        noise.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


def index_of(folder):
    return build_index([Source(folder)], allow_missing_captions=True)[0]


def bucketed(index):
    return index, assign_buckets(index.sizes, BUCKETS), BUCKETS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Ten pictures: good ones, one that cannot be decoded, and a transparent one; one has no bucket."""
    folder = make_pictures(tmp_path_factory.mktemp("data") / "pictures", 8)
    data = (folder / "000.png").read_bytes()
    (folder / "100.png").write_bytes(data[: len(data) // 2])
    Image.new("RGBA", (300, 200), (255, 0, 0, 128)).save(folder / "101.png")
    index, assignment, buckets = bucketed(index_of(folder))
    assignment[3] = -1
    return index, assignment, buckets


@pytest.fixture(scope="module")
def cache(dataset, vae, tmp_path_factory):
    return cache_latents(tmp_path_factory.mktemp("cache") / "new" / "folder", *dataset, vae)


def posterior(vae, pixels):
    """Of (h, w, 3) uint8, in the plainest way."""
    with torch.no_grad():
        inputs = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        found = vae.encode(inputs).latent_dist
    return found.mean[0], found.std[0]


def numbers_of(picture, epoch=0):
    return partial(keyed_generator, 7, epoch, picture)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("*.safetensors")}


# ----------------------------------------------------------------------------------------------------------------------
# What is cached


def test_cached_latents_are_those_of_the_resized_pictures(cache, dataset, vae):
    index, assignment, buckets = dataset
    assert len(cache) == len(index)
    for i in np.flatnonzero(cache.has):
        found = cache[i]
        path = index.table["path"][i].as_py()
        picture = Image.open(path).convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        assert found.original_size == picture.size
        assert found.scaled_size == scaled_size(picture.size, buckets[assignment[i]], 64)
        pixels = np.asarray(picture.resize(found.scaled_size, Image.Resampling.LANCZOS))
        cut = [(side - side // 8 * 8) // 2 for side in found.scaled_size]
        pixels = pixels[cut[1] :][: pixels.shape[0] // 8 * 8, cut[0] :][:, : pixels.shape[1] // 8 * 8]
        mean, std = posterior(vae, pixels)
        assert found.mean.shape == (4, found.scaled_size[1] // 8, found.scaled_size[0] // 8)
        torch.testing.assert_close(found.mean.float(), mean, rtol=2**-11, atol=1e-3)  # float16, and its own alpha
        torch.testing.assert_close(found.std.float(), std, rtol=2**-10, atol=0)


@pytest.mark.parametrize(
    ("size", "bucket", "margin", "scaled"),
    [
        ((2000, 2000), (1024, 1024), 64, (1088, 1088)),
        ((2000, 4000), (1024, 1024), 64, (1088, 2176)),  # all of it, though far from its bucket
        ((3000, 2000), (1216, 832), 64, (1344, 896)),
        ((1050, 2000), (1024, 1024), 64, (1050, 2000)),  # 26 pixels are left for a margin
        ((1024, 1024), (1024, 1024), 64, (1024, 1024)),
        ((500, 400), (1024, 1024), 64, (1280, 1024)),  # enlarged for the bucket, but not for the margin
        ((2000, 2000), (1024, 1024), 0, (1024, 1024)),
    ],
)
def test_scaled_size(size, bucket, margin, scaled):
    assert scaled_size(size, bucket, margin) == scaled
    assert scaled_size(size[::-1], bucket[::-1], margin) == scaled[::-1]


def test_pictures_that_cannot_be_used_are_listed(cache, dataset):
    index, _, _ = dataset
    assert cache.refused.to_pydict() == {
        "key": ["pictures/100.png"],
        "reason": ["it cannot be decoded: image file is truncated"],
    }
    assert (~cache.has).nonzero()[0].tolist() == [3, 8]
    with pytest.raises(PictureError, match="truncated"):
        cache[8]
    with pytest.raises(PictureError, match="no bucket"):
        cache[3]
    assignment, buckets = cache.bucketing
    expected = [None if i in (3, 8) else BUCKETS[dataset[1][i]] for i in range(len(index))]
    assert [buckets[bucket] if bucket >= 0 else None for bucket in assignment] == expected


def test_shards_are_plain_safetensors(cache, dataset):
    index, _, _ = dataset
    found = {}
    for path in cache.folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert sorted(found) == sorted(index.key(i) for i in np.flatnonzero(cache.has))
    for i in np.flatnonzero(cache.has):
        assert torch.equal(found[index.key(i)], torch.stack([cache[i].mean, cache[i].std]))


def test_statistics_are_those_of_all_cached_latents(cache):
    pictures = [cache[i] for i in np.flatnonzero(cache.has)]
    mean, std = (torch.cat([picture[which].flatten(1) for picture in pictures], 1).double() for which in (0, 1))
    assert cache.statistics.count == mean.shape[1]
    assert cache.statistics.mean == pytest.approx(mean.mean(dim=1).numpy(), rel=1e-12)
    total = mean.var(dim=1, correction=0) + (std**2).mean(dim=1)
    assert cache.statistics.std == pytest.approx(total.sqrt().numpy(), rel=1e-12)


def test_shards_have_about_the_size_asked_for(dataset, vae, tmp_path, monkeypatch):
    def sizes(folder):
        shards = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
        return len(shards), max(shards)

    monkeypatch.setattr(make_latent_cache, "LEAST_SHARDS", 1)
    whole = cache_latents(tmp_path / "a", *dataset, vae)
    count, size = sizes(whole.folder)
    assert count == 1
    monkeypatch.setattr(make_latent_cache, "SHARD_BYTES", size // 2)
    split = cache_latents(tmp_path / "b", *dataset, vae)
    count, largest = sizes(split.folder)
    assert count in (2, 3)
    assert largest < 0.75 * size
    monkeypatch.setattr(make_latent_cache, "MOST_PICTURES", 2)
    pairs = cache_latents(tmp_path / "c", *dataset, vae)
    assert sizes(pairs.folder)[0] >= 5
    for i in np.flatnonzero(whole.has):
        assert torch.equal(whole[i].mean, split[i].mean)
        assert torch.equal(whole[i].std, pairs[i].std)
    assert pairs.statistics.mean == pytest.approx(whole.statistics.mean, rel=1e-12)
    assert pairs.statistics.std == pytest.approx(whole.statistics.std, rel=1e-12)
    assert pairs.statistics.count == whole.statistics.count


# ----------------------------------------------------------------------------------------------------------------------
# Crops


def test_crops_are_parts_of_the_cached_picture_and_say_where(cache, dataset):
    _, assignment, buckets = dataset
    corners = set()
    for i in np.flatnonzero(cache.has):
        picture, (width, height) = cache[i], buckets[assignment[i]]
        cut = [side % 8 // 2 for side in picture.scaled_size]
        for epoch in range(40):
            latents, (original, corner, target) = load_latents(
                i, (width, height), numbers_of(i, epoch), cache=cache, sample=False
            )
            assert latents.dtype == torch.float32
            assert (original, target) == (picture.original_size[::-1], (height, width))
            top, left = corner[0] - cut[1], corner[1] - cut[0]
            assert top % 8 == left % 8 == 0
            assert 0 <= corner[0] <= picture.scaled_size[1] - height
            assert 0 <= corner[1] <= picture.scaled_size[0] - width
            window = picture.mean[:, top // 8 : (top + height) // 8, left // 8 : (left + width) // 8]
            assert torch.equal(latents, window.float())
            corners.add((i, corner))
    most = sum(
        (cache[i].mean.shape[1] - buckets[assignment[i]][1] // 8 + 1)
        * (cache[i].mean.shape[2] - buckets[assignment[i]][0] // 8 + 1)
        for i in np.flatnonzero(cache.has)
    )
    assert len(corners) > min(most, 40) / 2


def test_every_place_of_the_grid_is_taken_and_evenly(cache, dataset):
    _, assignment, buckets = dataset
    i = int(np.flatnonzero(cache.has)[0])
    bucket = buckets[assignment[i]]
    room = [1 + found - side // 8 for found, side in zip(cache[i].mean.shape[:0:-1], bucket, strict=True)]
    counts = np.zeros(room)
    cut = [side % 8 // 2 for side in cache[i].scaled_size]
    for epoch in range(20 * counts.size):
        _, (_, (top, left), _) = load_latents(i, bucket, numbers_of(i, epoch), cache=cache, sample=False)
        counts[(left - cut[0]) // 8, (top - cut[1]) // 8] += 1
    freedom = counts.size - 1
    assert freedom > 20
    assert ((counts - 20) ** 2 / 20).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_a_dot_is_found_where_the_crop_says(vae, tmp_path):
    """Pictures that differ in one dot: their latents differ the most where it is, by the crop's coordinates."""
    size, bucket, dots = (700, 520), (192, 128), [(150, 130), (352, 300), (521, 260)]
    folder = tmp_path / "dots"
    folder.mkdir()
    for number, dot in enumerate([None, *dots]):
        pixels = np.full((size[1], size[0], 3), 90, np.uint8)
        if dot:
            pixels[dot[1] - 10 : dot[1] + 10, dot[0] - 10 : dot[0] + 10] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
    index = index_of(folder)
    cache = cache_latents(tmp_path / "cache", index, np.zeros(4, int), [bucket], vae)
    scale = cover_size(size, (256, 192))[0] / size[0]
    seen = 0
    for number, dot in enumerate(dots, 1):
        for epoch in range(30):
            (plain, _), (dotted, told) = (
                load_latents(i, bucket, numbers_of(0, epoch), cache=cache, sample=False) for i in (0, number)
            )
            x, y = (scale * where - corner for where, corner in zip(dot, told.crop_top_left[::-1], strict=True))
            if 24 < x < bucket[0] - 24 and 24 < y < bucket[1] - 24:
                change = (dotted - plain).square().sum(dim=0)
                change[change < change.max() / 10] = 0
                weights = change / change.sum()
                column = (weights.sum(dim=0) * torch.arange(weights.shape[1])).sum().item()
                row = (weights.sum(dim=1) * torch.arange(weights.shape[0])).sum().item()
                assert (8 * column + 4, 8 * row + 4) == pytest.approx((x, y), abs=10)
                seen += 1
    assert seen > 30


def test_samples_of_the_posterior(cache, dataset):
    _, assignment, buckets = dataset
    i = int(np.flatnonzero(cache.has)[2])
    bucket = buckets[assignment[i]]
    samples = []
    for epoch in range(300):
        numbers = numbers_of(i, epoch)
        # the same place, so that only the noise differs
        here = lambda purpose, numbers=numbers: numbers(purpose) if purpose == POSTERIOR else numbers_of(0)(purpose)  # noqa: E731
        samples.append(load_latents(i, bucket, here, cache=cache)[0])
    mean, told = load_latents(i, bucket, numbers_of(0), cache=cache, sample=False)
    cut = [side % 8 // 2 for side in cache[i].scaled_size]
    top, left = (told.crop_top_left[0] - cut[1]) // 8, (told.crop_top_left[1] - cut[0]) // 8
    std = cache[i].std[:, top : top + mean.shape[1], left : left + mean.shape[2]].float()
    noise = (torch.stack(samples) - mean) / std
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert noise.mean(dim=0).abs().max() < 5 / np.sqrt(300)
    again = load_latents(i, bucket, numbers_of(i, 5), cache=cache)
    assert torch.equal(load_latents(i, bucket, numbers_of(i, 5), cache=cache)[0], again[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_it_feeds_training(cache, dataset, tmp_path, workers):
    index, _, _ = dataset
    assignment, buckets = cache.bucketing
    plan = EpochPlan(assignment, buckets, batch_size=2, seed=7)
    quarantine = Quarantine(tmp_path)
    found = loader(PictureDataset(plan, index, partial(load_latents, cache=cache), quarantine), workers=workers)
    for epoch, start in ((0, 0), (0, 1), (0, 2)):
        batch, (bucket, pictures) = next(found), next(plan.steps(epoch, start))
        width, height = buckets[bucket]
        assert batch.data.shape == (2, 4, height // 8, width // 8)
        assert batch.pictures.tolist() == pictures.tolist()
        for data, time_ids, i in zip(batch.data, batch.time_ids.int().tolist(), pictures, strict=True):
            assert time_ids[:2] == list(cache[i].original_size[::-1])
            assert time_ids[4:] == [height, width]
            top, left = (
                (corner - side % 8 // 2) // 8
                for corner, side in zip(time_ids[2:4], cache[i].scaled_size[::-1], strict=True)
            )
            window = np.s_[:, top : top + height // 8, left : left + width // 8]
            noise = (data - cache[i].mean[window].float()) / cache[i].std[window].float()
            assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert not quarantine.listed()


def test_a_cache_is_left_as_it_is_by_whoever_writes_into_its_tensors(cache):
    i = int(np.flatnonzero(cache.has)[0])
    before = digests(cache.folder)
    cache[i].mean.fill_(0)
    assert digests(cache.folder) == before
    assert not (LatentCache(cache.folder)[i].mean == 0).all()


def test_a_worker_opens_the_cache_itself(cache):
    i = int(np.flatnonzero(cache.has)[1])
    mean = cache[i].mean
    packed = pickle.dumps(cache)
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed)[i].mean, mean)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks the system for open files, as Linux tells them")
def test_no_file_is_kept_open(cache):
    for i in np.flatnonzero(cache.has):
        assert cache[i].mean.isfinite().all()
    opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert not [path for path in opened if path.endswith(".safetensors")]


@pytest.mark.parametrize(("bucket", "sentence"), [((512, 128), "cannot be cropped"), ((100, 128), "grid of 8")])
def test_a_bucket_that_does_not_fit(cache, bucket, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_latents(int(np.flatnonzero(cache.has)[0]), bucket, numbers_of(0), cache=cache)


# ----------------------------------------------------------------------------------------------------------------------
# Killed, resumed, shared


def start(*arguments, **options):
    """A process of its own that makes a cache; forked, because importing diffusers takes longer than all the rest."""
    process = multiprocessing.get_context("fork").Process(target=cache_latents, args=arguments, kwargs=options)
    process.start()
    return process


def test_killed_and_resumed(vae, tmp_path):
    """A run that is killed keeps the shards it has finished, and the next one makes the same cache as one in one go."""
    arguments = *bucketed(index_of(make_pictures(tmp_path / "pictures", 24))), vae
    folder = tmp_path / "cache"
    process = start(folder, *arguments)
    while len(list(folder.glob("*.safetensors"))) < 3:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "index.arrow").exists()
    with pytest.raises(ValueError, match="not a finished cache"):
        LatentCache(folder)

    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    resumed = cache_latents(folder, *arguments)
    assert 3 <= len(kept) < len(list(folder.glob("*.safetensors")))
    assert kept == {name: (folder / name).stat().st_mtime_ns for name in kept}
    assert not list(folder.glob(".*"))
    whole = cache_latents(tmp_path / "whole", *arguments)
    assert digests(folder) == digests(whole.folder)
    assert resumed.pictures.equals(whole.pictures, check_metadata=True)
    resumed.verify()


def test_a_shard_that_is_half_written_has_no_name(dataset, vae, tmp_path, monkeypatch):
    def stop_halfway(file, *_):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(make_latent_cache, "write_tensors", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(tmp_path, *dataset, vae)
    assert not list(tmp_path.iterdir())


def test_two_processes_at_once(dataset, vae, tmp_path, cache):
    processes = [start(tmp_path, *dataset, vae, rank=rank, world_size=2) for rank in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert digests(tmp_path) == digests(cache.folder)
    assert LatentCache(tmp_path).pictures.equals(cache.pictures, check_metadata=True)


@pytest.mark.slow  # three times diffusers' import
def test_the_command_under_torchrun(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    make_pictures(tmp_path / "pictures", 12)
    (tmp_path / "program.py").write_text("from ztsnr.cli import main; main()")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [tmp_path / "program.py", "cache", tmp_path / "pictures", "--vae", tmp_path / "vae", "--verify"]
    command += ["--area", "128x128", "--out", tmp_path / "cache", "--workers", "1"]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment(), timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    alone = cache_latents(tmp_path / "alone", *command_bucketing(tmp_path / "pictures"), vae)
    together = LatentCache(tmp_path / "cache")
    assert digests(together.folder) == digests(alone.folder)
    assert together.pictures.equals(alone.pictures, check_metadata=True)
    assert done.stdout.count("12 pictures are cached") in (1, 2), done.stdout  # both, if they end at once


def test_the_command(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    folder = make_pictures(tmp_path / "pictures", 4)
    (folder / "100.png").write_bytes((folder / "000.png").read_bytes()[:-500])
    (folder / "101.png").write_bytes(b"")
    Image.new("RGB", (1200, 100)).save(folder / "102.png")
    arguments = ["cache", folder, "--vae", tmp_path / "vae", "--area", "128x128", "--out", tmp_path / "cache"]
    arguments = [str(part) for part in [*arguments, "--workers", 0, "--device", "cpu"]]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "pictures/101.png cannot be used: it is empty\n" in result.output
    assert "pictures/100.png cannot be used: it cannot be decoded" in result.output
    assert "too far from every bucket's): 1 pictures" in result.output
    assert f"Cached 4 pictures in {tmp_path / 'cache'}" in result.output
    cache = LatentCache(tmp_path / "cache")
    for number in cache.statistics.mean:
        assert f"{number:9.5f}" in result.output
    for wrong, sentence in (
        (["--margin", "32"], "is stale: it was made with margin = 64, not 32"),
        (["--vae", str(folder)], "holds none"),
        (["--background", "nonsense"], "nonsense"),
        (["--device", "nonsense"], "nonsense"),
    ):
        result = CliRunner().invoke(main, arguments + wrong)
        assert result.exit_code == 2
        assert sentence in result.output


def test_the_command_wants_the_vae_before_it_looks_at_millions_of_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(make_latent_cache, "build_index", lambda *_, **__: pytest.fail("looked at pictures"))
    arguments = ["cache", str(tmp_path), "--vae", "none", "--out", str(tmp_path / "cache"), "--device", "cpu"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.output == "Error: there is no file or folder none to take the VAE from\n"


def test_the_command_with_names_for_its_sources(vae, tmp_path):
    """Two folders of one name have the same keys; and training compares keys with those of its own names."""
    vae.save_pretrained(tmp_path / "vae")
    folders = [make_pictures(tmp_path / where / "pictures", 2) for where in "ab"]
    arguments = ["--vae", tmp_path / "vae", "--area", "128x128", "--workers", 0, "--device", "cpu"]
    arguments = [str(part) for part in ["cache", *arguments, "--out", tmp_path / "cache"]]
    result = CliRunner().invoke(main, [*arguments, *map(str, folders)])
    assert result.exit_code == 2
    assert "pictures/000.png occurs twice" in result.output
    result = CliRunner().invoke(main, [*arguments, f"cats={folders[0]}", str(folders[1])])
    assert result.exit_code == 0, result.output
    index, _ = build_index([Source(folders[0], "cats"), Source(folders[1])], allow_missing_captions=True)
    LatentCache(tmp_path / "cache").check(index)


def test_the_command_for_lists_of_pictures_elsewhere(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    folder = make_pictures(tmp_path / "pictures", 1)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "one.jsonl").write_text(json.dumps({"path": str(folder / "000.png")}))
    arguments = ["cache", tmp_path / "lists" / "one.jsonl", "--vae", tmp_path / "vae", "--area", "128x128"]
    arguments = [str(part) for part in [*arguments, "--out", tmp_path / "cache", "--workers", 0, "--device", "cpu"]]
    assert "to allow it, use --outside" in CliRunner().invoke(main, arguments).output
    result = CliRunner().invoke(main, [*arguments, "--outside"])
    assert result.exit_code == 0, result.output
    assert len(LatentCache(tmp_path / "cache")) == 1


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def command_bucketing(folder):
    """As the command does it."""
    index = index_of(folder)
    found = bucket_pictures(index.sizes, [area_buckets((128, 128))])
    return index, found.assignment, found.buckets


def test_processes_share_the_shards_and_the_last_one_ends_it(dataset, vae, tmp_path, cache):
    shares = []
    for rank in range(3):
        found = cache_latents(tmp_path, *dataset, vae, rank=rank, world_size=3)
        shares.append(set(digests(tmp_path)))
        assert (found is None) == (rank < 2)
        assert (tmp_path / "index.arrow").exists() == (rank == 2)
    assert all(len(late - early) >= 2 for early, late in pairwise(shares))
    assert digests(tmp_path) == digests(cache.folder)
    assert found.pictures.equals(cache.pictures, check_metadata=True)


def test_another_number_of_processes_goes_on(dataset, vae, tmp_path, cache):
    assert cache_latents(tmp_path, *dataset, vae, rank=1, world_size=4) is None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert cache_latents(tmp_path, *dataset, vae).pictures.equals(cache.pictures, check_metadata=True)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_workers_give_the_same(dataset, vae, tmp_path, cache):
    cache_latents(tmp_path, *dataset, vae, workers=2)
    assert digests(tmp_path) == digests(cache.folder)


# ----------------------------------------------------------------------------------------------------------------------
# Stale


@pytest.fixture
def small(tmp_path, vae):
    """A folder of three pictures, the arguments that its cache was made by, and the cache."""
    folder = make_pictures(tmp_path / "pictures", 3)
    arguments = [*bucketed(index_of(folder)), vae]
    return folder, arguments, cache_latents(tmp_path / "cache", *arguments)


def changed_vae(vae, name):
    vae = copy.deepcopy(vae)
    with torch.no_grad():
        dict(vae.named_parameters())[name].view(-1)[0] += 1e-3
    return vae


def test_the_same_again_makes_nothing_anew(small):
    _, arguments, cache = small
    before = {path: path.stat().st_mtime_ns for path in cache.folder.glob("*.safetensors")}
    again = cache_latents(cache.folder, *arguments)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    again.check(*arguments[:3], recipe_of(arguments[3]))
    again.check(arguments[0])


def test_the_decoder_does_not_matter(small):
    _, arguments, cache = small
    arguments[3] = changed_vae(arguments[3], "decoder.conv_out.bias")
    cache.check(*arguments[:3], recipe_of(arguments[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vae_of_a_model_that_is_trained(dataset, vae, tmp_path, dtype):
    """It is float32 in training, whatever the cache was made in."""
    cache = cache_latents(tmp_path, *dataset, copy.deepcopy(vae).to(dtype))
    cache.check_vae(vae)
    assert vae.dtype == torch.float32
    cache.check_vae(changed_vae(vae, "decoder.conv_out.bias"))
    for name in ("encoder.conv_in.weight", "quant_conv.bias"):
        other = changed_vae(vae, name)
        dict(other.named_parameters())[name].data.view(-1)[0] += 1  # more than bfloat16 rounds away
        with pytest.raises(ValueError, match="is stale: it was made with another VAE"):
            cache.check_vae(other)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: {"vae": changed_vae(a["vae"], "encoder.conv_in.weight")}, "another VAE"),
        (lambda a: {"vae": changed_vae(a["vae"], "quant_conv.bias")}, "another VAE"),
        (lambda a: {"vae": copy.deepcopy(a["vae"]).bfloat16()}, "dtype = float32, not bfloat16"),
        (lambda a: {"margin": 32}, "margin = 64, not 32"),
        (lambda a: {"background": (0, 0, 0)}, r"background = \(255, 255, 255\), not \(0, 0, 0\)"),
        (lambda a: {"assignment": (a["assignment"] + 1) % 3}, "for a bucket of"),
        (lambda a: {"buckets": [(120, 192), (152, 160), (192, 120)]}, "for a bucket of"),
    ],
    ids=["encoder", "quant_conv", "dtype", "margin", "background", "assignment", "buckets"],
)
def test_stale_settings_are_refused(small, change, sentence):
    _, arguments, cache = small
    arguments = dict(zip(("index", "assignment", "buckets", "vae"), arguments, strict=True))
    arguments |= change(arguments)
    with pytest.raises(ValueError, match=f"is stale: .*({sentence})"):
        cache_latents(cache.folder, **arguments)
    vae, settings = arguments.pop("vae"), {k: arguments.pop(k) for k in ("margin", "background") if k in arguments}
    with pytest.raises(ValueError, match=f"is stale: .*({sentence})"):
        cache.check(**arguments, recipe=recipe_of(vae, **settings))


def touch(folder):
    os.utime(folder / "001.png", ns=(0, 10**18))


def longer(folder):
    path = folder / "001.png"
    stamp = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(stamp, stamp))


def another_size(folder):
    path = folder / "001.png"
    Image.open(path).resize((333, 222)).save(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (touch, "the file of pictures/001.png has changed since then"),
        (longer, "the file of pictures/001.png has changed since then"),
        (another_size, "the file of pictures/001.png has changed since then"),
        (
            lambda folder: (folder / "001.png").rename(folder / "0001.png"),
            "it has pictures/001.png where there is now pictures/0001.png",
        ),
        (lambda folder: (folder / "002.png").unlink(), "from 3 pictures, not 2|none of the 2 shards"),
        (lambda folder: (folder / "004.png").write_bytes((folder / "002.png").read_bytes()), "from 3 pictures, not 4"),
    ],
    ids=["date", "length", "size", "name", "fewer", "more"],
)
def test_changed_pictures_are_refused(small, change, sentence):
    folder, arguments, cache = small
    change(folder)
    index, assignment, buckets = bucketed(index_of(folder))
    with pytest.raises(ValueError, match=f"is stale: .*({sentence})"):
        cache.check(index)
    if len(index) <= 3:  # a shard of its own for one more picture would just be made
        with pytest.raises(ValueError, match="is stale"):
            cache_latents(cache.folder, index, assignment, buckets, arguments[3])


def test_pictures_may_go_once_they_are_cached(small, tmp_path):
    folder, arguments, cache = small
    arguments[0].save(tmp_path / "pictures.arrow")
    for path in folder.iterdir():
        path.unlink()
    cache.check(PictureIndex.load(tmp_path / "pictures.arrow"), *arguments[1:3], recipe_of(arguments[3]))


# ----------------------------------------------------------------------------------------------------------------------
# Damage and mistakes


def test_a_missing_shard(small):
    _, arguments, cache = small
    victim = sorted(cache.folder.glob("*.safetensors"))[1]
    before = digests(cache.folder)
    victim.unlink()
    with pytest.raises(ValueError, match=f"{victim.name} is missing: make the cache again"):
        LatentCache(cache.folder)
    cache_latents(cache.folder, *arguments)
    assert digests(cache.folder) == before


def test_a_shortened_shard(small):
    _, arguments, cache = small
    victim = sorted(cache.folder.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{victim.name} does not have the size that the index records: it is damaged"):
        LatentCache(cache.folder)
    with pytest.raises(ValueError, match=f"{victim.name} cannot be read"):
        cache_latents(cache.folder, *arguments)


def test_a_damaged_shard_is_found_when_asked(small):
    _, _, cache = small
    cache.verify()
    victim = sorted(cache.folder.glob("*.safetensors"))[1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    opened = LatentCache(cache.folder)
    with pytest.raises(ValueError, match=f"{victim.name} does not have the checksum that the index records"):
        opened.verify()


def test_a_vae_that_overflows(dataset, vae, tmp_path):
    vae = copy.deepcopy(vae)
    with torch.no_grad():
        vae.quant_conv.bias[0] = 1e5
    with pytest.raises(ValueError, match=r"latents of pictures/000.png are not finite, or too large .* in torch"):
        cache_latents(tmp_path / "cache", *dataset, vae)
    assert not list((tmp_path / "cache").glob("*"))


def test_no_picture_can_be_used(vae, tmp_path):
    folder = make_pictures(tmp_path / "pictures", 2)
    arguments = bucketed(index_of(folder))
    for path in folder.iterdir():
        path.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"none of the pictures can be used; pictures/000.png, for example: it"):
        cache_latents(tmp_path / "cache", *arguments, vae)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"assignment": np.full(10, -1)}, "nothing to cache: no picture has a bucket"),
        ({"assignment": np.zeros(9, int)}, "assignment has 9 buckets for 10 pictures"),
        ({"buckets": [(100, 128)] * 3}, "100 x 128 is off the grid of this VAE: sides must be multiples of 8"),
        ({"margin": -8}, "margin must be at least 0"),
    ],
)
def test_mistakes_end_in_a_sentence(dataset, vae, tmp_path, changes, sentence):
    arguments = dict(zip(("index", "assignment", "buckets"), dataset, strict=True))
    with pytest.raises(ValueError, match=sentence):
        cache_latents(tmp_path / "cache", **arguments | changes, vae=vae)


def test_a_folder_that_cannot_be_made(dataset, vae, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="file cannot be made"):
        cache_latents(tmp_path / "file", *dataset, vae)


def test_folders_that_are_no_cache(tmp_path):
    with pytest.raises(ValueError, match="not a finished cache of latents"):
        LatentCache(tmp_path / "nowhere")
    (tmp_path / "index.arrow").write_bytes(b"none")
    with pytest.raises(ValueError, match="cannot be read"):
        LatentCache(tmp_path)
    index = index_of(make_pictures(tmp_path / "pictures", 1))
    index.save(tmp_path / "index.arrow")
    with pytest.raises(ValueError, match="not an index of cached latents"):
        LatentCache(tmp_path)


def test_a_folder_in_use_is_refused(dataset, vae, tmp_path):
    """But not to the other processes of the one that uses it."""
    with lock_folder(tmp_path):
        with pytest.raises(ValueError, match=f"^{tmp_path} is in use by process"):
            cache_latents(tmp_path, *dataset, vae)
        cache_latents(tmp_path, *dataset, vae, rank=1, world_size=2)
    assert cache_latents(tmp_path, *dataset, vae) is not None


def test_a_foreign_shard_is_not_touched(dataset, vae, tmp_path, write_checkpoint):
    path = write_checkpoint(tmp_path / "latents-00000.safetensors", {"a": (2, 2)})
    before = digests(tmp_path)
    with pytest.raises(ValueError, match="not a shard of cached latents"):
        cache_latents(tmp_path, *dataset, vae)
    assert digests(tmp_path) == before
    assert path.exists()


# ----------------------------------------------------------------------------------------------------------------------
# VAEs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny")


def test_vaes_are_found_in_every_kind_of_model(model, tmp_path):
    expected = AutoencoderKL.from_pretrained(model / "vae").state_dict()
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    whole = write_single_file(pipeline, tmp_path / "whole.safetensors")
    prefix = "first_stage_model."
    tensors = {name: tensor for name, tensor in load_file(whole).items() if name.startswith(prefix)}
    save_file({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, tmp_path / "vae.safetensors")
    pipeline.vae.save_pretrained(tmp_path / "half", variant="fp16")

    hashes = set()
    for place, config in (
        (model, None),
        (model / "vae", None),
        (tmp_path / "half", None),
        (whole, model),
        (tmp_path / "vae.safetensors", model),
    ):
        vae = load_vae(place, config=config)
        assert vae.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.state_dict().items())
        assert not any(weight.requires_grad for weight in vae.parameters())
        hashes.add(recipe_of(vae))
    assert len(hashes) == 1
    assert load_vae(model, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_models_without_a_vae(model, tmp_path, write_checkpoint):
    unet = write_checkpoint(tmp_path / "unet.safetensors", {"encoder.other": (1,)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "vae.ckpt").write_bytes(b"")
    for place, sentence in (
        (model / "unet", "must hold a VAE of the class AutoencoderKL, but holds UNet2DConditionModel"),
        (tmp_path / "empty", "holds none"),
        (unet, "has no VAE"),
        (tmp_path / "nothing.safetensors", "there is no file"),
        (tmp_path / "vae.ckpt", "pickle"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_vae(place, config=model)
    lacking = tmp_path / "lacking"
    (lacking / "vae").mkdir(parents=True)
    vae = AutoencoderKL.from_pretrained(model / "vae")
    vae.save_pretrained(lacking / "vae")
    weights = {name: tensor for name, tensor in vae.state_dict().items() if "conv_in" not in name}
    save_file(weights, lacking / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weights|cannot be loaded"):
        load_vae(lacking)


def test_statistics_come_from_the_shards_and_not_from_one(cache):
    """So that the test above would notice a shard that is forgotten."""
    parts = []
    for path in cache.folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            parts.append(json.loads(file.metadata()["ztsnr.latents"])["statistics"])
    counts = [ChannelStatistics.from_json(part).count for part in parts if part]
    assert len(counts) == cache.has.sum()
    assert sum(counts) == cache.statistics.count
