"""Runs, caches and indices that are made again while the old ones are in use, by Windows' rules for files."""

import os

import numpy as np
import torch
from PIL import Image

from ztsnr.data.latent_cache import LatentCache, load_latents
from ztsnr.data.make_latent_cache import cache_latents
from ztsnr.data.picture_boxes import read_boxes
from ztsnr.data.sources import PictureIndex, Source, build_index
from ztsnr.training.decoder.settings import VaeDecoderSettings
from ztsnr.training.decoder.state import restore_state
from ztsnr.training.run_state import RunStates
from ztsnr.training.settings_file import read_settings
from ztsnr.world import World

from ..training.decoder.test_trainer import batch, training_of
from ..training.tiny_run import make_content, states, train
from ..windows import held_files, windows_files  # noqa: F401 (a fixture)
from .test_latent_cache import bucketed, index_of, make_pictures, numbers_of, tiny_vae

BOM = b"\xef\xbb\xbf"


def test_an_index_is_written_while_it_is_open(tmp_path, windows):
    index = index_of(make_pictures(tmp_path / "pictures", 3))
    index.save(tmp_path / "index.arrow")
    opened = PictureIndex.load(tmp_path / "index.arrow")
    index.save(tmp_path / "index.arrow")
    assert opened.table.equals(index.table)


def test_an_index_is_mapped_elsewhere(tmp_path):
    index = index_of(make_pictures(tmp_path / "pictures", 3))
    index.save(tmp_path / "index.arrow")
    opened = PictureIndex.load(tmp_path / "index.arrow")
    assert os.path.realpath(tmp_path / "index.arrow") in held_files()
    assert len(opened) == 3


def test_a_cache_is_completed_while_it_is_in_use(tmp_path, windows):
    data, vae = bucketed(index_of(make_pictures(tmp_path / "pictures", 3))), tiny_vae()
    cache = cache_latents(tmp_path / "cache", *data, vae)
    before, _ = load_latents(0, data[2][data[1][0]], numbers_of(0), cache=cache)
    again = cache_latents(tmp_path / "cache", *data, vae)
    assert torch.equal(load_latents(0, data[2][data[1][0]], numbers_of(0), cache=again)[0], before)
    assert LatentCache(tmp_path / "cache").pictures.equals(cache.pictures)


def test_a_run_resumes_writes_and_removes_states(place, tmp_path, windows):
    out = tmp_path / "run"
    changes = {"save_every": 2, "keep": 1, "export__single_file": True}
    train(make_content(place, out, steps=4, **changes))
    assert states(out) == [4]
    written = train(make_content(place, out, steps=8, **changes), resume=True)
    assert states(out) == [8]
    assert all(path.exists() for path in written)


def test_the_state_of_a_decoder_is_written_after_it_was_read(tmp_path, windows):
    from ..tiny_pipelines import make_tiny_sdxl

    make_tiny_sdxl(tmp_path / "folder")
    training = training_of(tmp_path)
    training.step(*batch())
    states_of_it = RunStates(tmp_path / "states", 1, 0, World(0, 1, 1, torch.device("cpu")))
    states_of_it.write(1, training.state(), {"settings": {}})
    resumed = training_of(tmp_path)
    restore_state(resumed, states_of_it, *states_of_it.last(), {})
    states_of_it.write(2, resumed.state(), {"settings": {}})
    assert resumed.steps == 1
    assert list(states_of_it.paths()) == [2]


def test_files_that_notepad_saved(tmp_path):
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "a.png")
    index, _ = build_index([Source(tmp_path, name="p")], allow_missing_captions=True)
    path = tmp_path / "boxes.jsonl"
    path.write_bytes(BOM + b'{"picture": "p/a.png", "boxes": [[1, 2, 30, 35]]}\r\n')
    assert read_boxes(path, index)[0].tolist() == [[1, 2, 30, 35]]
    path = tmp_path / "settings.toml"
    path.write_bytes(BOM + b'model = "m"\r\nsources = ["p"]\r\nout = "o"\r\nsteps = 3\r\n')
    assert read_settings(VaeDecoderSettings, path).steps == 3
