"""The trainings differ in nothing but their objective; a folder is of one set of them, and what is done in it stays."""

import json
import os
import signal
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ztsnr.checkpoints import inspect_checkpoint
from ztsnr.data.latent_cache import LatentCache
from ztsnr.demo import trainings as module
from ztsnr.demo.composed import FEW, Sprites
from ztsnr.demo.objectives import BASE, EPSILON, OBJECTIVES, OURS, PLAIN, STARVED, Start, sdxl_sigma, shift_of
from ztsnr.demo.small_model import COLOUR_TO_LATENT, SCALING_FACTOR, SIZES
from ztsnr.demo.trainings import ABOUT, QUICK, RECIPES, Recipe, Trainings
from ztsnr.errors import Stopped
from ztsnr.samplers import NoiseSchedule
from ztsnr.training.objective import Objective

TINY = Recipe(6, True, 8, 4, 2, 1e-3, 8e-4, 0.1, "float32")
NAMES = (BASE, *OBJECTIVES)


def quiet(out, **options):
    return Trainings(out, recipe=TINY, say=lambda line: None, **options)


@pytest.fixture
def trainings(tmp_path):
    return quiet(tmp_path / "out")


def without(settings, *names):
    """The settings as tables, without some."""
    return {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in names}


# ----------------------------------------------------------------------------------------------------------------------
# What is trained


def test_fine_tunes_differ_in_the_objective_alone(trainings):
    settings = {name: trainings.settings(name, 3) for name in OBJECTIVES}
    same = [without(one, "objective", "out") for one in settings.values()]
    assert all(one == same[0] for one in same)
    assert len({one.out for one in settings.values()}) == 4
    objectives = {name: Objective(one.objective) for name, one in settings.items()}
    predicted = {name: objective.settings.prediction_type for name, objective in objectives.items()}
    assert predicted == {EPSILON: "epsilon", PLAIN: "v_prediction", STARVED: "v_prediction", OURS: "v_prediction"}
    zero = {name: objective.schedule.zero_terminal_snr for name, objective in objectives.items()}
    assert zero == {EPSILON: False, PLAIN: False, STARVED: True, OURS: True}


def test_what_starves_the_first_step_is_the_weight(trainings):
    """Without a floor Min-SNR leaves t = T no weight at all, and next to none near it."""
    starved, ours = (Objective(trainings.settings(name, 0).objective) for name in (STARVED, OURS))
    assert starved.weight[-1] == 0
    assert starved.high_noise_share < 0.01
    assert ours.weight[-1] > 0
    assert ours.high_noise_share == pytest.approx(0.1, abs=0.001)
    assert ours.probability[-1] > starved.probability[-1]


def test_the_base_is_trained_from_random_weights_and_fine_tunes_from_it(trainings):
    base = trainings.settings(BASE, 0)
    assert base.model.base == str(trainings.out / "random")
    assert base.objective == trainings.settings(EPSILON, 0).objective
    assert (base.steps, base.optimizer.learning_rate) == (8, 1e-3)
    for seed in (0, 5):
        for name in OBJECTIVES:
            settings = trainings.settings(name, seed)
            assert settings.model.base == str(trainings.exported(BASE, seed)) == str(trainings.exported(BASE, 0))
            assert (settings.steps, settings.optimizer.learning_rate, settings.seed) == (4, 8e-4, seed)


def test_another_base_takes_its_place(tmp_path):
    trainings = quiet(tmp_path / "out", base=Start("base.safetensors", "config"))
    for name in OBJECTIVES:
        model = trainings.settings(name, 0).model
        assert (model.base, model.config) == ("base.safetensors", "config")
    folder = quiet(tmp_path / "other", base=Start("folder"))
    assert folder.settings(OURS, 0).model.base == "folder"
    assert folder.settings(OURS, 0).model.config is None


def test_every_training_has_a_place_of_its_own(trainings):
    places = {trainings.folder(name, seed) for name in OBJECTIVES for seed in (0, 1)}
    assert len(places) == 8
    for place in places | {trainings.folder(BASE, 0)}:
        assert place.is_relative_to(trainings.out)
        assert set(place.name) <= set("abcdefghijklmnopqrstuvwxyzSNR-")
    assert trainings.folder(OURS, 1).relative_to(trainings.out).as_posix() == "seed-1/v-zero-SNR"
    assert trainings.exported(OURS, 1) == trainings.folder(OURS, 1) / "export" / "v-zero-SNR"


@pytest.mark.parametrize("size", SIZES)
def test_captions_and_emoji_of_a_size(tmp_path, size):
    composer = Trainings(tmp_path / "out", size).composer
    assert composer.side == SIZES[size].side
    assert composer.emoji == (FEW if size == "cpu" else Sprites().names)


def test_recipes_are_of_the_sizes():
    assert RECIPES.keys() == SIZES.keys()
    differing = {name for name, value in asdict(QUICK).items() if value != asdict(RECIPES["cpu"])[name]}
    assert differing == {"pictures", "steps"}  # fewer pictures: those that are not seen need not be made
    assert QUICK.steps < RECIPES["cpu"].steps
    assert QUICK.pictures * 4 >= QUICK.steps * QUICK.batch_size  # and none is seen much more than four times


# ----------------------------------------------------------------------------------------------------------------------
# The schedule


def test_the_schedule_is_sdxls_for_the_canvas(trainings):
    assert shift_of(32) == 0.25
    assert shift_of(128) == 1
    end = NoiseSchedule.sdxl(zero_terminal_snr=False).sigma_max
    assert end == pytest.approx(14.6146, abs=1e-4)
    for side in (32, 64, 128):
        # as the mean of the canvas sees it: the noise of a mean of N values
        assert sdxl_sigma(end, side) / side == pytest.approx(14.6146 / 128, rel=1e-4)
    for name in NAMES:
        schedule = Objective(trainings.settings(name, 0).objective).schedule
        finite = schedule.sigma(float(schedule.last_timestep - schedule.zero_terminal_snr))
        published = NoiseSchedule.sdxl(zero_terminal_snr=schedule.zero_terminal_snr)
        assert finite == pytest.approx(published.sigma(999.0 - schedule.zero_terminal_snr) / 4, rel=1e-9)


def test_means_of_blocks_are_the_process_at_a_part_of_sigma():
    """Why nothing is lost by a smaller canvas: of 4 x 4 blocks the noise has a quarter of the standard deviation."""
    noise = torch.randn(64, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    blocks = torch.nn.functional.avg_pool2d(noise, 4)
    assert blocks.std().item() == pytest.approx(shift_of(32), rel=0.02)
    neighbours = (blocks[..., 1:] * blocks[..., :-1]).mean() / blocks.var()
    assert abs(neighbours.item()) < 0.02  # and is as independent from one value to the next


# ----------------------------------------------------------------------------------------------------------------------
# The folder


def test_the_folder_is_of_one_set_of_trainings(tmp_path):
    quiet(tmp_path / "out")
    quiet(tmp_path / "out")  # the same again
    others = [
        {"size": "gpu"},
        {"base": Start("base.safetensors")},
        {"recipe": replace(TINY, steps=5)},
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"^[^\n]*out holds trainings with other settings: choose [^\n]*$"):
            Trainings(tmp_path / "out", **{"recipe": TINY} | other)
    assert Trainings.open(tmp_path / "out").recipe == TINY  # nothing of them is left in it


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"is not empty and holds no trainings: choose another folder$"):
        quiet(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("dear")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"^[^\n]*cannot be used: [^\n]+$"):
            quiet(place)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 10])
def test_a_folder_whose_settings_are_damaged(tmp_path, content):
    (tmp_path / ABOUT).write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read: remove the folder, or choose another$"):
        quiet(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"size": "cpu"}'])
def test_a_folder_of_other_settings_altogether(tmp_path, content):
    (tmp_path / ABOUT).write_text(content)
    with pytest.raises(ValueError, match="other settings"):
        quiet(tmp_path)


@pytest.mark.parametrize("base", [None, Start("base.safetensors", "config"), Start("folder")])
def test_open_gives_the_same(tmp_path, base):
    made = quiet(tmp_path / "out", base=base)
    opened = Trainings.open(tmp_path / "out")
    assert (opened.base, opened.recipe, opened.size) == (base, TINY, "cpu")
    assert all(opened.settings(name, 2) == made.settings(name, 2) for name in NAMES)


# ----------------------------------------------------------------------------------------------------------------------
# Running them


@pytest.fixture
def calls(monkeypatch):
    """What ``run_trainings`` is asked for, in place of doing it; and at which of these calls a signal comes."""
    made, stops = [], set()

    def run_trainings(trainings, jobs, at_a_time, cores):
        made.append((jobs, at_a_time, cores))
        if len(made) in stops:
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(module, "run_trainings", run_trainings)
    monkeypatch.setattr(Trainings, "prepare", lambda self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    return made, stops


def test_the_base_comes_first_and_then_all_others(trainings, calls):
    trainings.run(7)
    assert calls[0] == [([(BASE, 7)], 1, 3), ([(name, 7) for name in OBJECTIVES], 3, 3)]


def test_a_base_that_is_there_is_not_trained(tmp_path, calls):
    quiet(tmp_path / "out", base=Start("base")).run(7)
    assert [jobs for jobs, *_ in calls[0]] == [[], [(name, 7) for name in OBJECTIVES]]


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_run_that_is_stopped_does_not_go_on(trainings, calls, stopped):
    made, stops = calls
    stops.add(stopped)
    with pytest.raises(Stopped):
        trainings.run(0)
    assert len(made) == stopped


def test_a_gpu_trains_one_after_the_other(trainings, calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trainings.run(0)
    assert [(at_a_time, cores) for _, at_a_time, cores in calls[0]] == [(1, 1), (1, 1)]


def test_a_training_that_was_exported_is_done(trainings, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "run_finetune", lambda settings, **options: asked.append((settings, options)) or [])
    trainings.train(OURS, 0)
    assert asked[0][0] == trainings.settings(OURS, 0)
    assert asked[0][1]["resume"] is True
    monkeypatch.setattr(module, "run_finetune", None)
    trainings.exported(OURS, 0).mkdir(parents=True)
    trainings.train(OURS, 0)


def test_what_they_need_is_made_once(trainings):
    trainings.prepare()
    made = {path: path.stat().st_mtime_ns for path in trainings.out.rglob("*") if path.is_file()}
    names = {path.relative_to(trainings.out).parts[0] for path in made}
    assert names == {ABOUT, "pictures", "random", "latents"}
    trainings.prepare()
    again = {path: path.stat().st_mtime_ns for path in trainings.out.rglob("*") if path.is_file()}
    assert again == made

    report = inspect_checkpoint(trainings.out / "random")
    assert (report.prediction_type, report.zero_terminal_snr) == ("epsilon", False)
    # the latents of every picture are the linear map of its pixels that the VAE is
    cache = LatentCache(trainings.out / "latents")
    assert len(cache) == TINY.pictures
    for i, key in enumerate(cache.pictures["key"].to_pylist()):
        with Image.open(trainings.out / "pictures" / Path(key).name) as picture:
            pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32)) / 127.5 - 1
        expected = (SCALING_FACTOR * pixels @ COLOUR_TO_LATENT.T).movedim(-1, 0)
        torch.testing.assert_close(SCALING_FACTOR * cache[i].mean.float(), expected, rtol=0, atol=5e-3)  # of float16


def test_settings_are_written_as_they_are(trainings):
    about = json.loads((trainings.out / ABOUT).read_text())
    assert about == {"size": "cpu", "base": None, "recipe": asdict(TINY)}
