"""The drawing in the scheduler node shows the sigmas where they are."""

import math

import numpy as np
import pytest
from PIL import ImageColor

from ztsnr.figures.schedule_picture import BOTTOM, INFINITE, LEFT, LINE, RIGHT, SIZE, TOP, schedule_picture
from ztsnr.samplers import SPACINGS, NoiseSchedule, step_schedule


def dots(picture, color):
    """Row and column of every pixel of a colour, (n, 2)."""
    return np.argwhere((np.asarray(picture) == ImageColor.getrgb(color)).all(-1))


def test_infinity_stands_at_the_top_left_and_only_if_it_is_there():
    infinite = dots(schedule_picture([math.inf, 10.0, 1.0, 0.0], [999.0, 800.0, 400.0]), INFINITE)
    assert infinite.mean(0) == pytest.approx([TOP, LEFT], abs=0.5)
    assert len(dots(schedule_picture([14.6, 10.0, 1.0, 0.0], [999.0, 800.0, 400.0]), INFINITE)) == 0


def test_equal_ratios_are_equal_distances():
    picture = schedule_picture([math.inf, 1000.0, 100.0, 10.0, 1.0, 0.0], [999.0, 990.0, 960.0, 800.0, 400.0])
    assert picture.size == SIZE
    rows = []
    for step in range(1, 5):
        column = round(LEFT + (RIGHT - LEFT) * step / 5)
        pixels = dots(picture, LINE)
        rows.append(pixels[np.abs(pixels[:, 1] - column) <= 1][:, 0].mean())
    assert np.diff(rows) == pytest.approx(np.full(3, np.diff(rows).mean()), abs=1)
    assert TOP < rows[0] < rows[-1] < BOTTOM


@pytest.mark.parametrize("steps", [1, 2, 3, 28, 1000])
def test_every_spacing_can_be_drawn(steps):
    schedule = NoiseSchedule.sdxl()
    for spacing in set(SPACINGS) - {"leading"}:
        sigmas = step_schedule(schedule, steps, spacing, latent_size=(128, 128))
        picture = np.asarray(schedule_picture(sigmas.tolist(), schedule.timestep(sigmas[:-1]).tolist()))
        assert (picture[0] == 255).all()  # nothing runs over the edge
        assert (picture[:, -1] == 255).all()
