"""What is written down during a run, read again by the programs that it is for."""

import builtins
import json
import math
import resource
import sys
import types
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

from ztsnr.training.config import WatchSettings
from ztsnr.training.watch import BandedLoss, Watch, check_installed
from ztsnr.world import World

ALONE = World(0, 1, 1, torch.device("cpu"))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={SCALARS: 0, IMAGES: 0})
    found.Reload()
    return found


def scalars(folder, name):
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def test_lines_of_json_and_events_of_tensorboard(tmp_path):
    watch = Watch(tmp_path, WatchSettings(), ALONE)
    watch.write(1, {"loss": 0.5, "loss/t999": 0.25})
    watch.write(2, {"loss": 0.125})
    picture = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    watch.picture(2, "previews", Image.fromarray(picture))
    watch.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "loss/t999": 0.25}, {"step": 2, "loss": 0.125}]
    assert scalars(tmp_path, "loss") == [(1, 0.5), (2, 0.125)]
    assert scalars(tmp_path, "loss/t999") == [(1, 0.25)]
    (image,) = events(tmp_path).Images("previews")
    assert (image.step, image.width, image.height) == (2, 12, 8)
    (tmp_path / "read.png").write_bytes(image.encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "read.png")), picture)


def test_lines_are_on_the_disk_at_once(tmp_path):
    watch = Watch(tmp_path, WatchSettings(tensorboard=False), ALONE)
    watch.write(1, {"loss": 0.5})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_valid_json_all_the_same(tmp_path, value):
    watch = Watch(tmp_path, WatchSettings(), ALONE)
    watch.write(1, {"loss": value})
    watch.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None}
    np.testing.assert_equal(scalars(tmp_path, "loss"), [(1, value)])


def test_a_run_that_goes_on_drops_what_came_behind_its_state(tmp_path):
    watch = Watch(tmp_path, WatchSettings(), ALONE)
    for step in range(1, 8):
        watch.write(step, {"loss": float(step)})
    watch.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while it wrote

    watch = Watch(tmp_path, WatchSettings(), ALONE, step=4)
    watch.write(5, {"loss": 50.0})
    watch.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    assert scalars(tmp_path, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]


def test_other_processes_than_the_first_write_nothing(tmp_path):
    second = World(1, 2, 2, torch.device("cpu"))
    watch = Watch(tmp_path, WatchSettings(wandb="project"), second)
    watch.write(1, {"loss": 0.5})
    watch.picture(1, "previews", Image.new("RGB", (4, 4)))
    watch.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("wandb", WatchSettings(tensorboard=False, wandb="project"), "watch.wandb needs wandb: pip install wandb"),
        ("torch.utils.tensorboard", WatchSettings(), "watch.tensorboard needs tensorboard: pip install"),
    ],
)
def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch, name, settings, sentence):
    there = builtins.__import__

    def missing(wanted, *rest, **more):
        if wanted == name:
            raise ImportError(name)
        return there(wanted, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=sentence):
        check_installed(settings)
    with pytest.raises(ValueError, match=sentence):
        Watch(tmp_path, settings, ALONE)


def test_weights_and_biases_without_a_login(tmp_path, monkeypatch):
    """A stand-in that says what it says then."""

    class UsageError(Exception):
        pass

    def init(**more):
        raise UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=UsageError))
    with pytest.raises(ValueError, match=r"^W&B did not start: No API key"):
        Watch(tmp_path, WatchSettings(tensorboard=False, wandb="project"), ALONE)


def test_a_file_in_the_place_of_tensorboards_folder(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(ValueError, match=r"tensorboard cannot be written: (Not a directory|File exists)$"):
        Watch(tmp_path, WatchSettings(), ALONE)


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    watch = Watch(tmp_path, WatchSettings(tensorboard=False, wandb="project"), ALONE, config={"steps": 3})
    watch.write(1, {"loss": 0.5})
    watch.picture(1, "previews", Image.new("RGB", (4, 4)))
    watch.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.fixture
def full_disk(mount_disk):
    """A file system of its own, without room; and what makes room."""
    folder = mount_disk("64k")

    def fill():
        with (folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    return folder, fill, (folder / "filler").unlink


def test_a_line_without_room_is_no_half_line(tmp_path):
    watch = Watch(tmp_path, WatchSettings(tensorboard=False), ALONE)
    watch.write(1, {"loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            watch.write(2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    watch.write(3, {"loss": 3.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.0}]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_tensorboard_goes_on_when_there_is_room_again(full_disk):
    """Its writer is dead for good once it failed, so another one begins another file."""
    folder, fill, empty = full_disk
    watch = Watch(folder, WatchSettings(), ALONE)
    watch.write(1, {"loss": 1.0})
    watch._writer.flush()
    fill()
    picture = Image.effect_noise((64, 64), 60).convert("RGB")  # more than what is left of a page
    for step in range(2, 5):
        with pytest.raises(OSError, match="No space left"):  # noqa: PT012
            watch.picture(step, "previews", picture)
            watch._writer.flush()
    empty()
    watch.write(5, {"loss": 5.0})
    watch.close()
    assert scalars(folder, "loss") == [(1, 1.0), (5, 5.0)]


# ----------------------------------------------------------------------------------------------------------------------
# Losses by bands


def test_bands_of_losses_are_means_of_their_pictures():
    bands = BandedLoss(999, [300, 600, 900], torch.device("cpu"))
    assert bands.names == ["loss/t000-299", "loss/t300-599", "loss/t600-899", "loss/t900-998", "loss/t999"]
    t = torch.tensor([0, 299, 300, 599, 600, 899, 900, 998, 999, 999])
    errors = torch.arange(1.0, 11.0)
    bands.add(t[:4], errors[:4], 2 * errors[:4])
    bands.add(t[4:], errors[4:], 2 * errors[4:])
    read = bands.read(ALONE)
    assert read == {
        "loss": 5.5,
        "loss/weighted": 11.0,
        "loss/t000-299": 1.5,
        "loss/t300-599": 3.5,
        "loss/t600-899": 5.5,
        "loss/t900-998": 7.5,
        "loss/t999": 9.5,
    }
    again = bands.read(ALONE)  # it has begun anew, and there is no loss of no pictures
    assert again.keys() == {"loss", "loss/weighted"}
    assert all(math.isnan(value) for value in again.values())


def test_bands_without_a_picture_are_left_out_and_what_is_no_number_does_not_count():
    bands = BandedLoss(999, [300, 600, 900], torch.device("cpu"))
    losses = torch.tensor([1.0, math.nan, math.inf, 3.0])
    bands.add(torch.tensor([10, 10, 500, 999]), losses, losses)
    assert bands.read(ALONE) == {"loss": 2.0, "loss/weighted": 2.0, "loss/t000-299": 1.0, "loss/t999": 3.0}


def test_bands_of_a_short_schedule():
    bands = BandedLoss(99, [30, 60, 90], torch.device("cpu"))
    assert bands.names[-2:] == ["loss/t090-098", "loss/t099"]
