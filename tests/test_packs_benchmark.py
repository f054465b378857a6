"""How benchmarks/comfyui_packs.py judges a graph; the graphs themselves need ComfyUI and other people's packs."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("comfyui_packs", FOLDER / "comfyui_packs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def case(ours, stock=([1.0] * 4, [0.6] * 4), limit=([1.0] * 4, [0.6] * 4), **options):
    doors = {
        door: {"error": numbers} if isinstance(numbers, str) else dict(zip(("mean", "texture"), numbers, strict=True))
        for door, numbers in (("ours", ours), ("stock", stock), ("limit", limit))
    }
    return doors | {"node": "Node", "graph": "graph", "guided": False, "spread": False, "note": ""} | options


def test_shares_by_which_a_picture_is_off(benchmark):
    assert benchmark.errors(case(([0.99, 1.0, 1.0, 0.99], [0.603] * 4)), "ours") == pytest.approx((-0.005, 0.005))
    # the largest over the channels, over the rms of the exact means
    guided = case(
        ([1.0, -1.0, 1.0, -1.1], [0.6, 0.6, 0.57, 0.6]), limit=([1.0, -1.0, 1.0, -1.0], [0.6] * 4), guided=True
    )
    assert benchmark.errors(guided, "ours") == pytest.approx((0.1, 0.05))
    # steps that depend on the table are held against the closed form
    spread = case(([1.0] * 4, [0.6] * 4), limit=([0.5] * 4, [0.1] * 4), spread=True)
    assert benchmark.errors(spread, "ours") == pytest.approx((0, 0))


def test_verdicts(benchmark):
    def verdict(*arguments, **options):
        return benchmark.row(case(*arguments, **options))[-1]

    assert verdict(([1.004] * 4, [0.602] * 4)) == "right"
    assert verdict(([1.006] * 4, [0.6] * 4)) == "off"
    assert verdict(([1.0] * 4, [0.61] * 4)) == "off"
    assert verdict(([1.0] * 4, [0.3] * 4), spread=True) == "mean right, texture of these steps"
    assert verdict(([0.5] * 4, [0.6] * 4), note="why") == "off; why"
    assert verdict("E: no", stock="E: no") == "the pack ends, with stock too: E: no"
    assert verdict("E: no") == "ends: E: no"
    assert benchmark.row(case(([1.0] * 4, [0.6] * 4), stock="NaN"))[2] == "+0.00 % / ends"
