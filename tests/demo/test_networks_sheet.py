"""The sheet of networks: one caption and one noise down a column, and grounds that are off are told."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from ztsnr.demo import networks_sheet as module
from ztsnr.demo.composed import COLOURS, Asked, Composer
from ztsnr.demo.networks_sheet import (
    ASKED,
    GUIDANCE,
    ROWS,
    SEED,
    NetworksSheet,
    draw_sheet,
    sample_sheet,
    show_networks,
)
from ztsnr.demo.objectives import BASE, OURS, PLAIN
from ztsnr.samplers import NoiseSchedule, exposure_true_guidance, guide

LUMA = np.array([0.2126, 0.7152, 0.0722])


class FakeNetwork:
    """Paints every picture in one grey level; what it was asked is kept.

    Args:
        level: from its own start; from infinity it paints 3.
    """

    def __init__(self, level, zero_snr=False):
        self.level = level
        self.schedule = NoiseSchedule.sdxl(zero_terminal_snr=zero_snr).shifted(0.25)
        self.asked = []

    def noise(self, seeds):
        return torch.cat([torch.full((1, 4, 32, 32), float(seed)) for seed in seeds])

    def sample_as_published(self, captions, noise, steps, guidance):
        return self._paint("published", captions, noise, [], guidance)

    def sample(self, captions, noise, sigmas, solver="default", guidance=1.0, join=guide):
        return self._paint(solver, captions, noise, [float(sigma) for sigma in sigmas], guidance, join)

    def default_sigmas(self, steps, guidance):
        assert guidance == GUIDANCE
        return [math.inf, *np.linspace(8, 0, steps)]

    def _paint(self, solver, captions, noise, sigmas, guidance, join=guide):
        self.asked.append(
            SimpleNamespace(solver=solver, captions=captions, noise=noise, sigmas=sigmas, guidance=guidance, join=join)
        )
        level = 3 if sigmas and math.isinf(sigmas[0]) else self.level
        return torch.full((len(captions), 32, 32, 3), float(level))

    def pictures(self, latents):
        return latents.numpy().astype(np.uint8)


@pytest.fixture
def networks():
    return {BASE: FakeNetwork(70), PLAIN: FakeNetwork(60), OURS: FakeNetwork(50, zero_snr=True)}


@pytest.fixture
def sheet(networks):
    return sample_sheet(networks, Composer())


def test_each_row_is_sampled_its_own_way(networks, sheet):
    published, base_finite = networks[BASE].asked
    (plain,) = networks[PLAIN].asked
    ours_finite, ours, exposure_true = networks[OURS].asked
    assert published.solver == "published"
    for finite, network in ((base_finite, BASE), (plain, PLAIN), (ours_finite, OURS)):
        assert finite.solver == "euler"
        assert finite.sigmas[0] == pytest.approx(14.6146 / 4, rel=1e-5)
        assert finite.sigmas[0] <= networks[network].schedule.sigma_max
    for one, join in ((ours, guide), (exposure_true, exposure_true_guidance)):
        assert one.solver == "default"
        assert one.sigmas[0] == math.inf
        assert one.join is join
    everything = [one for network in networks.values() for one in network.asked]
    assert {one.guidance for one in everything} == {GUIDANCE}
    for one in everything:  # one noise, of all columns and all rows
        assert one.captions == [asked.caption for asked in ASKED]
        assert one.noise.shape == (len(ASKED), 4, 32, 32)
        assert (one.noise == SEED).all()


def test_grounds_are_measured_along_the_frame(sheet):
    assert sheet.pictures.shape == (len(ROWS) + 1, len(ASKED), 32, 32, 3)
    assert sheet.pictures.dtype == np.uint8
    np.testing.assert_allclose(sheet.grounds[1:], np.repeat([[70], [70], [60], [50], [3], [3]], len(ASKED), 1))
    for asked, picture, ground in zip(ASKED, sheet.pictures[0], sheet.grounds[0], strict=True):
        if asked.ground != "stars":  # it is even, and its corner is ground
            assert ground == pytest.approx(picture[0, 0] @ LUMA)


def test_the_first_row_is_what_the_captions_mean(sheet):
    grounds = dict(zip(ASKED, sheet.grounds[0], strict=True))
    assert grounds[Asked("black")] < 60 < 195 < grounds[Asked("white")]
    assert grounds[ASKED[3]] < 110 < 145 < grounds[ASKED[6]]  # dark and light


@pytest.mark.parametrize(
    ("asked", "fine", "off"),
    [
        (Asked("black"), (0, 7, 30), (34, 128, 255)),  # which means 6.6
        (Asked("white", "train"), (255, 226), (221, 128, 0)),
        (Asked("dark", "fox"), (0, 60, 109), (111, 255)),
        (Asked("light"), (255, 146), (144, 0)),
        (Asked("grey"), (128, 150, 106), (156, 100)),
        (Asked("stars", "guitar"), (0, 128, 255), ()),  # of which nothing can be said
    ],
    ids=lambda value: value.caption if isinstance(value, Asked) else None,
)
def test_what_is_off(asked, fine, off):
    assert not any(module._is_off(asked, ground) for ground in fine)
    assert all(module._is_off(asked, ground) for ground in off)


def test_wanted_grounds_are_those_of_the_pictures():
    for name, colour in COLOURS.items():
        if min(*colour, *(255 - level for level in colour)) > 50:
            assert module.WANTED[name] == pytest.approx(np.array(colour) @ LUMA, abs=2)
    assert module.WANTED["dark"] == pytest.approx(55, abs=3)
    assert "stars" not in module.WANTED


def test_the_table(sheet):
    lines = sheet.table().splitlines()
    rows = [line for line in lines if line.startswith(("pictures of", "epsilon", "v, "))]
    assert len(rows) == len(ROWS) + 1
    for row, level in zip(rows[1:], (70, 70, 60, 50, 3, 3), strict=True):
        numbers = row.split("  ")
        assert [word.strip() for word in numbers if word.strip()][1:] == [str(level)] * 7  # all but that among stars


def test_the_sheet_is_drawn_with_its_captions_and_alarms(sheet):
    figure = draw_sheet(sheet)
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    written = [text.get_text() for text in texts]
    for asked in ASKED:
        assert any(asked.caption == text.replace("\n", " ") for text in written)
    for row in ROWS:
        assert any(row.title in text for text in written)
    shown = {
        float(text.get_text().removeprefix("ground ")): text for text in texts if text.get_text().startswith("ground ")
    }
    assert {70, 60, 50, 3} <= set(shown)
    assert sum(text.get_text() == "ground 70" for text in texts) == 14  # two rows without the column of the stars
    # 70 is red where black was asked for, and not where darkness was
    colours = {text.get_color() for text in texts if text.get_text() == "ground 70"}
    assert len(colours) == 2
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(images) == sheet.pictures.shape[0] * sheet.pictures.shape[1]
    assert (np.asarray(images[0]) == sheet.pictures[0, 0]).all()


def test_no_alarm_in_what_was_trained(sheet):
    """The first row is the standard, whatever it is."""
    grey = NetworksSheet(sheet.asked, np.full_like(sheet.pictures, 100), np.full_like(sheet.grounds, 100.0))
    figure = draw_sheet(grey)
    of_rows = [text.get_color() for text in figure.findobj(Text) if text.get_text() == "ground 100"]
    columns = 7
    assert len(set(of_rows[:columns])) == 1
    assert len(set(of_rows[columns : 2 * columns])) == 2  # of the others black and white are off, and dark is not


def test_networks_that_come_with_the_package_are_shown(networks, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "load_shipped", networks.get)
    said = []
    sheet = show_networks(tmp_path, said.append)
    text = "\n".join(said)
    assert sheet.table() in text
    assert str(tmp_path / "networks.png") in text
    with Image.open(tmp_path / "networks.png") as picture:
        assert min(picture.size) > 600
    assert [path.name for path in tmp_path.iterdir()] == ["networks.png"]


def test_without_matplotlib_there_are_numbers_alone(networks, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "load_shipped", networks.get)
    monkeypatch.setattr(module, "no_matplotlib", lambda: "No pictures: pip install matplotlib")
    said = []
    show_networks(tmp_path, said.append)
    assert "pip install matplotlib" in "\n".join(said)
    assert list(tmp_path.iterdir()) == []
