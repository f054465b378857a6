"""The guided benchmark's exact answers are exact, and its tables say what was measured."""

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.integrate import solve_ivp

from ztsnr.samplers import NoiseSchedule, rescale_guidance, sample, step_schedule, to_denoised
from ztsnr.samplers.prediction import from_denoised

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import comfyui_peer
import guided_accuracy as bench
import guided_peer
import guided_problems
from guided_problems import ClassMixture, ClassSet, Guidance, GuidedProblem

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]


def gaussians(stds: torch.Tensor, means: torch.Tensor, asked: torch.Tensor) -> ClassMixture:
    """One axis-aligned Gaussian a class: stds and means (classes, D)."""
    count, dim = stds.shape
    vectors = torch.eye(dim).double().expand(count, -1, -1).contiguous()
    return ClassMixture(means, vectors, stds.square(), torch.zeros(count).double(), torch.arange(count), asked)


class TwoGaussians:
    """Modes of standard deviation ``under`` with the prompt and ``without`` it, both of mean 0."""

    def __init__(self, under: torch.Tensor, without: torch.Tensor):
        zero, asked = torch.zeros(1, len(under)).double(), torch.tensor([0])
        self.models = [gaussians(stds[None], zero, asked) for stds in (under, without)]

    def __call__(self, x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(model(x, sigma)[0] for model in self.models)


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
def test_the_exact_flow_of_gaussians_under_guidance(scale):
    # x'/x of the guided flow integrates to x(u) ~ s (1 + a_c^2 u^2)^(w/2) (1 + a_u^2 u^2)^(-(w-1)/2), u = 1/sigma
    under, without = torch.tensor([0.3, 2, 30, 20]).double(), torch.tensor([0.5, 4, 64, 20]).double()
    noise = torch.ones(1, 4).double()
    problem = GuidedProblem("modes", TwoGaussians(under, without), (128, 128), noise[0] / 2, noise)
    end = 1e-3  # where the reference ends, with its x0
    growth = (1 + under**2 / end**2) ** (scale / 2) * (1 + without**2 / end**2) ** ((1 - scale) / 2)
    alpha, s = 1 / math.hypot(1, end), end / math.hypot(1, end)
    state = s * growth
    gains = [alpha * std**2 / (alpha**2 * std**2 + s**2) for std in (without, under)]
    expected = (gains[0] + scale * (gains[1] - gains[0])) * state
    found = problem.exact(Guidance(scale))[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("guidance", [Guidance(5), Guidance(5, 0.7)], ids=str)
def test_the_exact_flow_agrees_with_another_integrator(guidance):
    problem = guided_problems.random_mixture(7, samples=2)
    denoise = problem.denoise(guidance)

    def velocity(log_sigma, x):  # k-diffusion's dx/dsigma = (x - x0) / sigma
        sigma = math.exp(log_sigma)
        x = torch.from_numpy(x).reshape(problem.noise.shape)
        return (x - denoise(x / math.hypot(1, sigma), sigma)).flatten().numpy()

    x = problem.noise * 1e6 + denoise(problem.noise, math.inf)  # the exact step from infinity
    flow = solve_ivp(velocity, (math.log(1e6), math.log(1e-3)), x.flatten(), method="DOP853", rtol=1e-10, atol=1e-8)
    found = denoise(torch.from_numpy(flow.y[:, -1]).reshape(x.shape) / math.hypot(1, 1e-3), 1e-3)
    assert problem.errors(found, problem.exact(guidance)).max() < 2e-5


def test_half_the_steps_lead_to_the_same_pictures():
    problem, guidance = guided_problems.random_mixture(202), Guidance(5, 0.7)  # of all, the one that moves most
    half = problem.exact(guidance, guided_problems.REFERENCE_STEPS // 2)
    assert problem.errors(half, problem.reference(guidance)).max() < 1e-5


def test_models_are_posterior_means():
    """Against densities summed picture by picture and Gaussian by Gaussian, for a batch of two prompts."""
    generator = torch.Generator().manual_seed(3)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    asked, classes, grain = torch.tensor([0, 1]), torch.tensor([0, 1, 1, 0]), 0.4
    pictures, x = 2 * randn(4, 3), randn(2, 3)
    vectors = torch.linalg.qr(randn(4, 3, 3))[0]
    variances, weights = randn(4, 3).exp(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    for sigma in (math.inf, 3.0, 0.5):
        alpha, s = (0.0, 1.0) if math.isinf(sigma) else (1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))
        white = grain**2 * torch.eye(3).double().expand(4, -1, -1)
        full = vectors.mT @ torch.diag_embed(variances) @ vectors
        for model, covariances, shares in (
            (
                ClassSet(pictures, classes, asked, grain),
                white,
                torch.ones(4).double(),
            ),
            (ClassMixture(pictures, vectors, variances, weights.log(), classes, asked), full, weights),
        ):
            answers = model(x, sigma)
            for i in range(2):
                for answer, members in zip(answers, (classes == asked[i], torch.ones(4, dtype=bool)), strict=True):
                    density = torch.distributions.MultivariateNormal(
                        alpha * pictures, alpha**2 * covariances + s**2 * torch.eye(3).double()
                    )
                    share = shares * members * density.log_prob(x[i]).exp()
                    rest = (x[i] - alpha * pictures)[..., None]
                    own = pictures + (alpha * covariances @ torch.linalg.solve(density.covariance_matrix, rest))[..., 0]
                    torch.testing.assert_close(answer[i], (share / share.sum()) @ own, rtol=1e-9, atol=1e-9)


def test_rescaling_is_that_of_the_samplers():
    # On a canvas of D pixels whose average is the brightness, the deviation is the canvas's own.
    problem = replace(guided_problems.random_mixture(5, samples=3), references={})
    problem.brightness = torch.full_like(problem.brightness, len(problem.brightness) ** -0.5)
    x = problem.noise
    for sigma in (math.inf, 20.0, 0.3):
        v, v_cond = (from_denoised(problem.denoise(Guidance(w))(x, sigma), x, sigma, "v_prediction") for w in (5, 1))
        expected = to_denoised(rescale_guidance(v[:, None, None], v_cond[:, None, None], 0.7)[:, 0, 0], x, sigma)
        torch.testing.assert_close(problem.denoise(Guidance(5, 0.7))(x, sigma), expected, rtol=1e-9, atol=1e-9)


def test_scores():
    problem = guided_problems.random_set(9, samples=4)
    exact = problem.reference(Guidance(3))
    assert problem.score(exact[:, None, None].float(), Guidance(3))["error"] < 1e-6
    norm = exact.norm(dim=1).square().mean().sqrt()
    bright, other = (torch.eye(exact.shape[1], dtype=torch.float64)[i] for i in (0, 5))
    wrong = torch.stack([0.05 * norm * other, 0.2 * norm * other, 0 * other, 64 * bright])  # 64 is half the canvas
    broken = exact + wrong
    scores = problem.score(broken, Guidance(3))
    errors = torch.tensor([0.05, 0.2, 0, 64 / norm])
    assert scores["error"] == pytest.approx(errors.clamp(max=1).mean().item())
    assert scores["off"] == 0.5
    assert scores["brightness"] == pytest.approx(127.5 / 2 / 2)  # half of the scale, for one of four
    assert scores["median"] == pytest.approx(0.05)
    broken[0] = math.nan
    assert problem.score(broken, Guidance(3))["error"] == pytest.approx((1 + 0.2 + min(64 / norm.item(), 1)) / 4)


def test_prompts_of_the_pyramid_differ_in_brightness_and_structure():
    problem = guided_problems.exposure_pyramid(40)
    pictures = problem.exact(Guidance(1), steps=60)
    levels = pictures @ problem.brightness / problem.length
    contrast = (pictures - (pictures @ problem.brightness)[:, None] * problem.brightness).norm(dim=1) / problem.length
    by_prompt = [[values[problem.model.asked == c].mean().item() for c in range(4)] for values in (levels, contrast)]
    assert np.all(np.diff(by_prompt[0]) > 0.2)  # night, dusk, day, snow
    assert by_prompt[1][2] > 2 * max(by_prompt[1][0], by_prompt[1][3])


def test_a_batch_equals_single_runs():
    problem = guided_problems.exposure_pyramid(3)
    denoise = problem.denoise(Guidance(5, 0.7))
    together = denoise(problem.noise, 9.0)
    for i in range(3):
        alone = GuidedProblem(
            "one", replace(problem.model, asked=problem.model.asked[i : i + 1]), (64, 96), problem.brightness,
            problem.noise[i : i + 1],
        )  # fmt: skip
        torch.testing.assert_close(alone.denoise(Guidance(5, 0.7))(alone.noise, 9.0)[0], together[i])


def test_samplers_are_told_the_noise_level_that_they_are_at():
    """diffusers' loop and ours agree where both are Euler on the same sigmas."""
    problem = guided_problems.random_mixture(3, samples=2)
    euler = next(pair for pair in bench.diffusers_pairs() if pair.name == "diffusers Euler / trailing")
    found = euler.run(problem, Guidance(5), problem.denoise(Guidance(5)), 200).flatten(1)
    sigmas = step_schedule(NoiseSchedule.sdxl(), 200, "trailing")
    ours = sample(problem.denoise(Guidance(5)), guided_peer.latents(problem), sigmas, "euler").flatten(1)
    assert problem.errors(found, ours).max() < 0.02  # diffusers begins at 4096, not at infinity


def test_exchange_keeps_the_problems(tmp_path):
    problem = guided_problems.random_set(4, samples=2)
    problem.references[Guidance(5, 0.7)] = problem.noise
    comfyui_peer.save(tmp_path / "problems.npz", comfyui_peer.pack({problem.name: problem.to_arrays()}))
    with np.load(tmp_path / "problems.npz") as file:
        (arrays,) = comfyui_peer.unpack(file).values()
    back = GuidedProblem.from_arrays(problem.name, arrays)
    assert back.latent_size == problem.latent_size
    torch.testing.assert_close(back.reference(Guidance(5, 0.7)), problem.noise, rtol=0, atol=0)
    x = problem.noise.float()
    torch.testing.assert_close(back.denoise(Guidance(5))(x, 3.0), problem.denoise(Guidance(5))(x, 3.0), rtol=0, atol=0)


def test_ranks():
    names = [("ztsnr", "euler", "karras", 0.3), ("ztsnr", bench.DEFAULT_SOLVER, bench.DEFAULT_SPACING, 0.2),
             ("ztsnr", bench.DEFAULT_SOLVER, f"{bench.DEFAULT_SPACING}, told the scale", 0.1),
             ("ztsnr", "heun", "karras", 0.05)]  # fmt: skip
    rows = [
        {"program": p, "solver": s, "spacing": q, "guidance": "CFG 5", "steps": 10, "problem": "x",
         "calls": 10 + 9 * (s == "heun"), "error": e, "off": 0.0, "brightness": 0.0, "median": 0.0}
        for p, s, q, e in names
    ]  # fmt: skip
    assert [bench.rank(row, rows) for row in rows] == [4, 2, 2, 1]
    told, untold = bench.standing_table(rows)[1:]
    assert told[3:6] == ["0.1000", "2 of 4", "1 of 3"]
    assert untold[3:6] == ["0.2000", "2 of 4", "1 of 3"]
    assert told[6:] == ["ztsnr heun / karras, 19 calls", "0.0500", "ztsnr euler / karras, 10 calls", "0.3000"]


def test_a_pair_that_calls_twice_a_step_is_compared_at_half_the_steps():
    def run(solver, spacing, steps, calls, error):
        pair = {"program": "ztsnr", "solver": solver, "spacing": spacing, "guidance": "CFG 5", "steps": steps}
        scores = {"error": error, "off": 0.0, "brightness": 0.0, "median": 0.0}
        return {**pair, "problem": "x", "calls": calls, **scores}

    default = run(bench.DEFAULT_SOLVER, bench.DEFAULT_SPACING, 20, 20, 0.02)
    rows = [default, run("heun", "karras", 20, 39, 0.01), run("heun", "karras", 10, 19, 0.05)]
    assert bench.standing_table(rows)[1][4:] == [
        "2 of 2", "1 of 2", "ztsnr heun / karras, 39 calls", "0.0100", "ztsnr heun / karras, 19 calls", "0.0500"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "limits"),
    [(5, {8: 0.12, 10: 0.08, 20: 0.012, 28: 0.003}), (7.5, {10: 0.13, 20: 0.012}), (1, {10: 0.05, 20: 0.015})],
)
def test_the_default_is_accurate_at_canvas_scale(scale, limits):
    canvases = [problem for problem in guided_problems.problems() if problem.name != "exposure pyramid"]
    for steps, limit in limits.items():
        scores = []
        for problem in canvases:
            sigmas = step_schedule(NoiseSchedule.sdxl(), steps, latent_size=problem.latent_size, guidance=scale)
            found = sample(problem.denoise(Guidance(scale)), guided_peer.latents(problem), sigmas)
            scores.append(problem.score(found, Guidance(scale)))
        assert np.mean([score["error"] for score in scores]) < limit, steps
        if (scale, steps) == (5, 20):
            assert np.mean([score["brightness"] for score in scores]) < 4


@pytest.mark.parametrize("steps", [10, 20])
def test_the_default_beats_others_under_guidance(steps):
    problem = guided_problems.random_set(301, samples=24)

    def error(solver: str, spacing: str) -> float:
        sigmas = step_schedule(NoiseSchedule.sdxl(), steps, spacing, latent_size=problem.latent_size)
        found = sample(problem.denoise(Guidance(5)), guided_peer.latents(problem), sigmas, solver)
        return problem.score(found, Guidance(5))["error"]

    peers = [
        error(solver, spacing) for solver in ("euler", "dpmpp_2m", "unipc") for spacing in ("karras", "exponential")
    ]
    assert error("spectral", "spectral") < 0.75 * min(peers)


def few(samples: int = 2) -> list[GuidedProblem]:
    return [guided_problems.random_mixture(201, samples), guided_problems.exposure_pyramid(samples)]


def test_whole_command(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "problems", few)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "RESULTS.md")
    arguments = ["--cfg", "1,5r", "--steps", "2,3", "--rows", "euler", "--write", "--out", str(tmp_path / "all.csv")]
    done = CliRunner().invoke(bench.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    written = (tmp_path / "RESULTS.md").read_text()
    assert f"## {bench.HEADING}\n\n`python benchmarks/guided_accuracy.py --cfg 1,5r --steps 2,3" in written
    assert "| CFG 5, rescale 0.7 | 3 " in written
    assert f"**ztsnr {bench.DEFAULT_SOLVER} / {bench.DEFAULT_SPACING}**" in written
    with open(tmp_path / "all.csv", newline="") as file:
        records = list(csv.DictReader(file))
    assert {record["problem"] for record in records} == {"random mixture 201", "exposure pyramid", "mean"}
    assert all(0 <= float(record["error"]) <= 1 for record in records)
    bench.write_records(tmp_path / "all.json", records)
    assert json.loads((tmp_path / "all.json").read_text()) == records


def test_a_folder_without_comfyui_ends_in_a_sentence(tmp_path):
    with pytest.raises(click.ClickException, match="the ComfyUI worker failed"):
        bench.comfyui_records(tmp_path, few(), [Guidance(1)], [2], "")


def test_bad_guidance_is_refused():
    refused = CliRunner().invoke(bench.main, ["--cfg", "five"])
    assert refused.exit_code == 2
    assert "Error" in refused.output
