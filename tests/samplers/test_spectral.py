"""The default solver and spacing: their closed forms, and what they are chosen for."""

import math

import numpy as np
import pytest
import torch

from ztsnr.diagnostics import GaussianModes
from ztsnr.samplers import NoiseSchedule, sample, step_schedule
from ztsnr.samplers.flow_solvers import angle_weights, dpmpp_2m_weights, euler_weights, unipc_weights
from ztsnr.samplers.multistep import angle as angle_coordinate
from ztsnr.samplers.multistep import integral_weights, inverse_sigmas, noise_ratios, predict_and_correct, predictor
from ztsnr.samplers.prediction import alpha_s
from ztsnr.samplers.spectral import decision_table, finish_table, mode_errors, spectral_table, spectral_weights
from ztsnr.samplers.spectral_solver import _Seen

ZERO = NoiseSchedule.sdxl()


def bold_weights(sigmas):
    """What the default solver does with a sample that moves as Gaussian modes do."""
    predict, correct = spectral_table(sigmas)
    return predict_and_correct(noise_ratios(sigmas), finish_table(sigmas, predict, correct), correct)


def worst_mode(steps, side, weights=bold_weights, spacing="spectral"):
    sigmas = step_schedule(ZERO, steps, spacing, latent_size=(side, side), guidance=1).numpy()
    return np.abs(mode_errors(sigmas, weights(sigmas), np.geomspace(0.1, side, 80))).max()


def run_modes(steps, side, solver, modes):
    """Relative errors of Gaussian modes, all of them in one latent, through the loop."""
    a = torch.from_numpy(modes).reshape(1, 1, 1, -1)
    sigmas = step_schedule(ZERO, steps, latent_size=(side, side), guidance=1)
    picture = sample(GaussianModes(std=a), torch.ones(1, 1, 1, len(modes)), sigmas, solver)
    return (picture / a - 1).flatten().numpy(), sigmas.numpy()


def always(monkeypatch, bold):
    """Make the default solver linear: of this boldness, and without secant steps."""
    see = _Seen.see

    def blind(run, *args):
        see(run, *args)
        run.turn = torch.zeros_like(run.turn)

    monkeypatch.setattr(_Seen, "see", blind)
    monkeypatch.setattr(_Seen, "boldness", lambda run, step: torch.full_like(run.trust, bold))


@pytest.mark.parametrize(
    ("solver", "weights"),
    [
        ("spectral", bold_weights),
        ("angle", angle_weights),
        ("euler", euler_weights),
        ("dpmpp_2m", dpmpp_2m_weights),
        ("unipc", unipc_weights),
    ],
)
def test_mode_errors_are_what_the_loop_does(solver, weights, monkeypatch):
    always(monkeypatch, bold=1.0)  # the linear solver, whatever happens
    modes = np.geomspace(0.05, 200, 32)
    errors, sigmas = run_modes(13, 64, solver, modes)
    assert np.allclose(errors, mode_errors(sigmas, weights(sigmas), modes), atol=2e-5)


def test_never_bold_is_the_table_of_decisions(monkeypatch):
    always(monkeypatch, bold=0.0)
    modes = np.geomspace(0.05, 200, 32)
    errors, sigmas = run_modes(13, 64, "spectral", modes)
    weights = predict_and_correct(noise_ratios(sigmas), *decision_table(tuple(sigmas)))
    assert np.allclose(errors, mode_errors(sigmas, weights, modes), atol=2e-5)


def test_the_last_step_makes_up_for_what_the_others_lost():
    for side in (64, 128):
        assert worst_mode(10, side) < 0.6 * worst_mode(10, side, spectral_weights)


@pytest.mark.parametrize("side", [8, 32, 64, 128, 256])
def test_every_mode_within_two_percent_at_20_steps(side):
    assert worst_mode(20, side) < 0.02
    assert worst_mode(28, side) < 0.01
    modes = np.geomspace(0.1, side, 80)
    assert np.abs(run_modes(20, side, "spectral", modes)[0]).max() < 0.02


def test_ten_steps_beat_twenty_of_the_others():
    others = [
        worst_mode(20, 128, weights, spacing)
        for weights in (dpmpp_2m_weights, unipc_weights, euler_weights)
        for spacing in ("trailing", "karras", "exponential", "beta")
    ]
    assert worst_mode(10, 128) < min(others)


def test_weights_do_not_depend_on_the_unit_of_sigma():
    """Only ratios of sigmas matter where signal and noise scale drop out: the weights over s_end."""
    sigmas = np.array([math.inf, 50, 11, 3, 0.6, 0.1])

    def per_noise(sigmas):
        u = inverse_sigmas(sigmas)
        s = 1 / np.hypot(1, u[1:])
        return [
            w / s_end / (end - start)
            for w, s_end, start, end in zip(spectral_weights(sigmas), s, u[:-1], u[1:], strict=True)
        ]

    for ours, scaled in zip(per_noise(sigmas)[:1], per_noise(7 * sigmas)[:1], strict=True):
        assert np.allclose(ours, scaled)


def test_batched_weights_equal_single_ones():
    schedules = np.stack([step_schedule(ZERO, 12, latent_size=(n, n)).numpy() for n in (8, 64, 200)])
    batch = bold_weights(schedules)
    for row, sigmas in enumerate(schedules):
        for together, alone in zip(batch, bold_weights(sigmas), strict=True):
            assert np.allclose(together[row], alone, rtol=1e-9, atol=1e-12)


def test_integral_weights_are_exact_integrals():
    """A polynomial in the angle is integrated exactly; against a fine rectangle rule in u."""
    nodes = np.array([0.4, 0.1, 0.0])
    start, end = 0.4, 1.3
    weights = integral_weights(nodes, start, end, angle_coordinate)
    u = np.linspace(start, end, 200_001)
    middles = (u[1:] + u[:-1]) / 2
    for power in range(3):
        exact = (np.arctan2(1, middles) ** power).mean() * (end - start) / math.hypot(1, end)
        assert weights @ np.arctan2(1, nodes) ** power == pytest.approx(exact, rel=1e-9)


def test_predictor_of_order_one_is_ddim():
    sigmas = [math.inf, 30.0, 2.0, 0.3, 0.0]
    for i, weights in enumerate(predictor(inverse_sigmas(sigmas), 1, angle_coordinate)):
        (alpha, s), (alpha_next, s_next) = alpha_s(sigmas[i]), alpha_s(sigmas[i + 1])
        assert weights[0] == pytest.approx(alpha_next - alpha * s_next / s)
        assert noise_ratios(sigmas)[i] == pytest.approx(s_next / s)


@pytest.mark.parametrize("spacing", ["trailing", "karras", "beta"])
def test_other_spacings_suit_the_solver_too(spacing):
    """It must not blow up on schedules it was not made with: no worse than first order there."""
    assert worst_mode(20, 64, spacing=spacing) <= worst_mode(20, 64, euler_weights, spacing)
