"""Measures against closed forms, and a small untrained model measured from every start."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ztsnr.diagnostics.leak_probes import LUMA
from ztsnr.diagnostics.leak_report import COLOURS
from ztsnr.training.reproduction_data import SIZES as PICTURE_SIZES
from ztsnr.training.reproduction_data import draw_picture, vocabulary
from ztsnr.training.reproduction_measures import (
    BANDS,
    LEADING,
    SHAPES,
    SOLIDS,
    KnownPrompt,
    TrainedModel,
    coarse_contrast,
    colour_distance,
    frechet_distance,
    is_whole,
    measure_prompts,
    pixel_statistics,
)
from ztsnr.training.small_model import SIZES, write_small_model


def test_colour_distance_is_ciede2000():
    assert colour_distance(np.zeros((2, 3, 3)), (0, 0, 0)).max() == 0
    # of black and white only the lightness differs, and about their middle, L = 50, its weight S_L is 1
    assert colour_distance(np.ones((1, 3)), (0, 0, 0))[0] == pytest.approx(100, rel=1e-3)


def test_coarse_contrast_sees_halves_and_not_grain():
    halves = np.repeat([[0.0, 200.0]], 16, axis=0).repeat(8, axis=1)
    assert coarse_contrast(halves) == pytest.approx(100)
    chequered = np.indices((16, 16)).sum(0) % 2 * 200.0
    assert coarse_contrast(chequered) == pytest.approx(0)


def test_a_band_that_is_broken_is_not_whole():
    drawn = (draw_picture(number, 0, PICTURE_SIZES[number % 4]) for number in range(200))
    bands = [one for one in drawn if one.kind == "band"]
    assert len(bands) > 20
    for one in bands:
        prompt = KnownPrompt(one.caption, one.background, one.subject)
        assert is_whole(one.pixels, prompt)
        broken = one.pixels.copy()
        height, width = broken.shape[:2]
        broken[height // 2 - 4 : height // 2 + 4] = COLOURS[one.background]
        broken[:, width // 2 - 4 : width // 2 + 4] = COLOURS[one.background]
        assert not is_whole(broken, prompt)


def test_frechet_distance_against_the_general_formula():
    random = np.random.default_rng(0)
    one = random.standard_normal((500, 9)) @ random.standard_normal((9, 9))
    other = random.standard_normal((400, 9)) @ random.standard_normal((9, 9)) + 1
    covariances = np.cov(one.T), np.cov(other.T)
    expected = np.square(one.mean(0) - other.mean(0)).sum()
    expected += np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert frechet_distance(one, other) == pytest.approx(expected)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, one + 2) == pytest.approx(9 * 4)


def test_pixel_statistics():
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:, 2:, 0] = 100
    assert pixel_statistics([picture])[0].tolist() == pytest.approx([50, 0, 0, 50, 0, 0, 100 / 3, 0, 0])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_small_model(tmp_path_factory.mktemp("measured") / "model", vocabulary(), SIZES["cpu"])
    return TrainedModel(folder)


def test_a_model_is_measured_from_every_start_it_has(model):
    rows = measure_prompts(model, (SOLIDS[0], SHAPES[0], BANDS[0]), steps=(2,), seeds=range(2))
    assert len(rows) == 3 * 5  # an epsilon model has no first step from infinity
    side = SIZES["cpu"].side
    for row in rows:
        assert row.pictures.shape == (2, side, side, 3)
        assert row.pictures.dtype == np.uint8
        assert row.brightness == pytest.approx((row.pictures @ LUMA).mean(), abs=1)
        assert math.isnan(row.first_colour_error) == (row.start == LEADING)


def test_each_picture_is_of_its_own_prompt_and_noise(model):
    texts, noise = [prompt.text for prompt in SOLIDS[:3]], model.noise(range(3))
    together, _ = model.sample(texts, noise, 14.6, 3)
    for number, text in enumerate(texts):
        alone, _ = model.sample([text], noise[number : number + 1], 14.6, 3)
        torch.testing.assert_close(together[number], alone[0], rtol=1e-4, atol=1e-4)


def test_pictures_of_another_size(model):
    wide = TrainedModel(model.pipe.config["_name_or_path"], size=(64, 32))
    latents, _ = wide.sample([SOLIDS[0].text], wide.noise([0]), LEADING, 2)
    assert wide.pictures(latents).shape == (1, 32, 64, 3)
