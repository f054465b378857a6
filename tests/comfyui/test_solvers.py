"""er_sde, sa_solver and CFG++ are those of ComfyUI, from sigmas where ComfyUI's own can start."""

import pytest

pytestmark = pytest.mark.comfyui

SIGMAS = [60.0, 25.0, 11.0, 6.0, 4.0, 2.5, 1.3, 0.7, 0.4, 0.1, 0.0]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-2]], ids=["to the picture", "cut short"])
def test_er_sde_is_the_core_one_with_exact_integrals(inside, sigmas, eta):
    assert inside("solvers_inside.er_sde", sigmas=sigmas, eta=eta, points=50_000) < 1e-4
    assert inside("solvers_inside.er_sde", sigmas=sigmas, eta=eta, points=200) < 1e-2


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-2]], ids=["to the picture", "cut short"])
def test_sa_solver_is_the_core_one(inside, sigmas, eta):
    assert inside("solvers_inside.sa_solver", sigmas=sigmas, eta=eta) < 1e-4


@pytest.mark.parametrize("cfg", [0.6, 1.0, 1.5])
@pytest.mark.parametrize(
    ("solver", "sigmas"),
    [("euler", SIGMAS), ("euler", [None, *SIGMAS]), ("euler_ancestral", SIGMAS)],
    ids=["euler", "euler from infinity", "euler_ancestral"],
)
def test_cfg_pp_is_the_core_one(inside, solver, sigmas, cfg):
    found = inside("solvers_inside.cfg_pp", solver=solver, theirs=f"{solver}_cfg_pp", sigmas=sigmas, cfg=cfg)
    assert found["theirs"] < 1e-4
    assert found["without"] > 0.1


def test_cfg_pp_without_a_negative_prompt_changes_nothing(inside):
    assert inside("solvers_inside.cfg_pp_without_negative", sigmas=SIGMAS) == 0
