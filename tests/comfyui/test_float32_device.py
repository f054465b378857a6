"""Every node that touches a model, on a stand-in for a device without float64, makes what it makes on the CPU."""

import pytest

from ztsnr.samplers import SOLVERS

pytestmark = pytest.mark.comfyui


def assert_same(found):
    assert found["size"] > 0.1
    assert found["difference"] < 1e-3 * max(1, found["size"])


@pytest.mark.parametrize("cfg_pp", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_our_solvers_and_guidance(inside, solver, cfg_pp):
    assert_same(inside("float32_inside.ours", solver=solver, cfg_pp=cfg_pp))


@pytest.mark.parametrize("scheduler", ["ztsnr_trailing", "ztsnr_spectral", "karras"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc", "euler_cfg_pp"])
def test_samplers_of_the_core(inside, sampler, scheduler):
    assert_same(inside("float32_inside.theirs", sampler=sampler, scheduler=scheduler))


@pytest.mark.parametrize("scheduler", ["ztsnr_trailing", "ztsnr_spectral"])
def test_our_schedulers_alone(inside, scheduler):
    assert_same(inside("float32_inside.unpatched", scheduler=scheduler))


def test_the_probe_and_its_report(inside):
    assert_same(inside("float32_inside.probed"))


def test_the_diagnostic(inside):
    assert_same(inside("float32_inside.diagnosed", timeout=300))
