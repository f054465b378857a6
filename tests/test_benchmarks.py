"""The benchmark measures what it says, at sizes that take seconds."""

import math
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.integrate import solve_ivp

from ztsnr.samplers import DEFAULT_SOLVER, NoiseSchedule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import comfyui_peer
import sampler_accuracy as bench

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]


def test_the_exact_flow_agrees_with_another_integrator():
    for guidance in (1.0, 5.0):
        arrays = bench.draw_mixture(kind=1, seed=11) | {"guidance": guidance}
        problem, check = bench.mixture_problem([2], 1, 11, samples=3, guidance=guidance)
        denoise = comfyui_peer.ideal_model(arrays)

        def velocity(log_sigma, x, denoise=denoise):  # k-diffusion's dx/dsigma = (x - x0) / sigma
            sigma = math.exp(log_sigma)
            x = torch.from_numpy(x).reshape(3, 3, 8, 8)
            return (x - denoise(x / math.hypot(1, sigma), sigma)).flatten().numpy()

        start, end = math.log(1e5), math.log(1e-4)
        noise = problem.noise.double()
        x = noise * 1e5 + denoise(noise, math.inf)  # the exact step from infinity
        flow = solve_ivp(velocity, (start, end), x.flatten().numpy(), method="DOP853", rtol=1e-9, atol=1e-9)
        picture = torch.from_numpy(flow.y[:, -1]).reshape(3, 3, 8, 8)
        assert problem.score(picture)["guided RMSE" if guidance > 1 else "RMSE"] < 2e-4  # sigma ends at 1e-4
        assert check < 1e-4


def test_bias_of_plain_sdxl_is_that_of_a_recursion_by_hand():
    row = bench.diffusers_rows()[0].measure({"canvas": bench.canvas_problem([20])})
    timesteps = torch.arange(999, 0, -50).double()
    sigmas = [*NoiseSchedule.sdxl(zero_terminal_snr=False).sigma(timesteps).tolist(), 0.0]
    offset, std = 0.0, 0.3 * 128  # Euler on the brightness: noise of average 0, in k-diffusion's scaling
    for sigma, sigma_next in pairwise(sigmas):
        denoised = bench.MEAN + std**2 / (std**2 + sigma**2) * (offset - bench.MEAN)
        offset = denoised + sigma_next / sigma * (offset - denoised)
    by_hand = (offset - bench.MEAN) * 127.5 / 2.4
    assert row.mean("canvas", "bias", 20) == pytest.approx(by_hand, abs=0.01)
    assert by_hand == pytest.approx(118, abs=1)


def test_share_of_black_is_exact_for_the_exact_map():
    problem = bench.black_white_problem([2], tau=0.3)
    exact = comfyui_peer.ideal_model(problem.arrays).transport(problem.noise)
    assert problem.score(exact) == {"P(black)": pytest.approx(0.9, abs=5e-4)}


def test_scores_of_exact_pictures():
    for problem in (bench.canvas_problem([2]), bench.modes_problem([2])):
        exact = comfyui_peer.ideal_model(problem.arrays).exact(problem.noise.double())
        expected = {"bias": 0, "gM": 1, "gP": 1, "mode error": 0}
        for name, value in problem.score(exact).items():
            assert value == pytest.approx(expected[name], abs=1e-6)


def test_default_reaches_its_targets():
    problems = {
        "canvas": bench.canvas_problem([10, 20]),
        "modes": bench.modes_problem([20]),
        "black_white 0": bench.black_white_problem([20], 0.0, points=1000),
        "black_white 0.3": bench.black_white_problem([20], 0.3, points=1000),
    }
    default, door = (bench.our_rows()[i].measure(problems) for i in (0, -1))
    for row in (default, door):
        assert abs(row.mean("canvas", "bias", 10)) <= 0.05
        assert abs(row.mean("canvas", "bias", 20)) <= 0.05
        assert row.mean("modes", "mode error", 20) <= 0.02
        assert row.mean("black_white 0", "P(black)", 20) == pytest.approx(0.9, abs=0.01)
        assert row.mean("black_white 0.3", "P(black)", 20) == pytest.approx(0.9, abs=0.01)
    assert default.calls[20] == 20


def test_every_deterministic_solver_keeps_the_mean():
    solvers = [solver for solver in bench.SOLVERS if bench.is_deterministic(solver)]
    assert DEFAULT_SOLVER in solvers
    assert not {"euler_ancestral", "lcm"} & set(solvers)
    worst = bench.worst_biases(solvers, "float32", [10, 28], [0.0, 1.0], [64])
    assert max(found.levels for found in worst) <= 0.05
    (found,) = bench.worst_biases([DEFAULT_SOLVER], "bfloat16", [10, 20], [0.3], [64])
    assert found.levels <= 0.6


def test_default_beats_the_best_peer_on_mixtures(monkeypatch):
    monkeypatch.setattr(bench, "REFERENCE_STEPS", 100)
    problems = {
        f"mixture {kind} {seed}": bench.mixture_problem([20], kind, seed, 60)[0]
        for kind in range(4)
        for seed in (11, 12)
    }
    default = bench.our_rows()[0].measure(problems)
    peers = [row.measure(problems) for row in bench.diffusers_rows() if row.name.startswith("diffusers UniPC / exp")]
    assert default.mean("mixture", "RMSE", 20) <= 0.5 * peers[0].mean("mixture", "RMSE", 20)


def test_whole_command(tmp_path, monkeypatch):
    for name, small in {"SEEDS": (11,), "BIAS_STEPS": (2,), "BIAS_TAUS": (0.3,), "BIAS_WIDTHS": (16,)}.items():
        monkeypatch.setattr(bench, name, small)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(bench, "REFERENCE_STEPS", 10)
    monkeypatch.setattr(bench, "cost_per_step", partial(bench.cost_per_step, repeats=2, steps=2, shape=(1, 4, 8, 8)))
    (tmp_path / "RESULTS.md").write_text(
        "# Results\n\n## Another\n\nkept\n\n## Sampler accuracy\n\nold\n\n## Last\n\nend\n"
    )
    done = CliRunner().invoke(bench.main, ["--samples", "2", "--steps", "2,3"], catch_exceptions=False)
    assert done.exit_code == 0
    written = (tmp_path / "RESULTS.md").read_text()
    assert written.startswith("# Results\n\n## Another\n\nkept\n\n## Sampler accuracy\n\n`python benchmarks/")
    assert written.endswith("\n\n## Last\n\nend\n")
    assert "\nold\n" not in written
    assert "| diffusers | UniPC " in written
    assert list(tmp_path.iterdir()) == [tmp_path / "RESULTS.md"]


def test_cost_takes_turns():
    times = bench.cost_per_step(repeats=2, steps=3, shape=(1, 4, 8, 8))
    assert {len(values) for values in times.values()} == {2}


def test_bad_steps_are_refused():
    for steps in ("ten", "1,20", ""):
        refused = CliRunner().invoke(bench.main, ["--steps", steps])
        assert refused.exit_code == 2
        assert "Error" in refused.output


def test_exchange_keeps_the_problems(tmp_path):
    problems = {
        "modes": bench.modes_problem([2, 3]).arrays,
        "mixture 0 11": bench.mixture_problem([2], 0, 11, 2)[0].arrays,
    }
    comfyui_peer.save(tmp_path / "problems.npz", comfyui_peer.pack(problems))
    with np.load(tmp_path / "problems.npz") as file:
        back = comfyui_peer.unpack(file)
    assert back.keys() == problems.keys()
    for name, arrays in problems.items():
        for key, value in arrays.items():
            np.testing.assert_array_equal(back[name][key], value)


def test_a_folder_without_comfyui_ends_in_a_sentence(tmp_path):
    with pytest.raises(click.ClickException, match=r"worker failed[\s\S]*No module named 'comfy'"):
        list(bench.comfyui_rows(tmp_path, {"modes": bench.modes_problem([2])}))


def test_a_table_is_written_without_torch(tmp_path):
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); import results; from pathlib import Path\n"
        "table = results.markdown([['name', 'x'], ['one', '1']])\n"
        f"results.write_section(Path({str(tmp_path / 'R.md')!r}), 'A', table)\n"
        "print(results.machine(None)); print(sorted({'torch', 'diffusers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "## A\n\n| name   | x   |" in (tmp_path / "R.md").read_text()
