"""The template completely_black: what its note and its picture say is what is measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import black_and_white

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
WORKFLOW = json.loads((ROOT / "workflows" / "completely_black.json").read_text(encoding="utf-8"))


def test_the_picture_samples_as_the_template_does():
    samplers = [node["widgets_values"] for node in WORKFLOW["nodes"] if node["type"] == "KSampler"]
    titles = [group["title"].split("  ")[1] for group in WORKFLOW["groups"]]
    ways = black_and_white.ways()
    assert [way.name for way in ways] == titles
    assert [way.detail.split(", ") for way in ways] == [values[4:6] for values in samplers]
    assert {values[2] for values in samplers} == {len(way.sigmas) - 1 for way in ways} == {20}
    assert [way.sigmas[0] for way in ways] == [
        float("inf"),
        pytest.approx(4518.76, abs=0.01),
        pytest.approx(14.61, abs=0.01),
    ]


@pytest.mark.parametrize("colour", black_and_white.SEEDS)
def test_the_picture_shows_what_is_gained(colour):
    """The exact row is off by 0, and the exact answers look black and white."""
    exact, _, (ours, comfyui, plain) = black_and_white.measure(colour, black_and_white.SEEDS[colour])
    assert (exact.clamp(-1, 1).mean((-2, -1)) - torch.tensor(black_and_white.COLOURS[colour])).abs().max() < 5 * 2 / 255
    assert abs(ours) < 0.5 < 3 < abs(comfyui) < 9 < 100 < abs(plain)
    with Image.open(black_and_white.PICTURE) as picture:
        assert picture.size == (512, 512)


def test_the_note_holds_for_other_seeds():
    for seed in range(6):
        ours, comfyui, plain = map(abs, black_and_white.measure("white", seed)[2])
        assert ours < 1
        assert 2.5 < comfyui < 9.5
        assert plain > 90
