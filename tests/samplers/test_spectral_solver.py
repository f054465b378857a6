"""The default solver's own choices: when it is bold, when it is careful, and what it does where x0 turns back."""

import math

import numpy as np
import pytest
import torch

from ztsnr.diagnostics import GaussianMixture, GaussianModes, reference_flow
from ztsnr.samplers import NoiseSchedule, guide, sample, step_schedule
from ztsnr.samplers.prediction import alpha_s
from ztsnr.samplers.sampling import advance, start_run
from ztsnr.samplers.spectral_solver import KEPT, _Seen

ZERO = NoiseSchedule.sdxl()


class GuidedMode:
    """A Gaussian mode of std a_c with the prompt and a_u without, under guidance w: x0 = J X, with a known flow.

    x is proportional to s (1 + a_c^2 u^2)^(w/2) (1 + a_u^2 u^2)^(-(w-1)/2), with u = 1/sigma.
    """

    def __init__(self, a_c, a_u, w):
        self.a_c, self.a_u, self.w = a_c, a_u, w

    def __call__(self, x, sigma):
        def gain(a):
            return a**2 / (1 + (a / sigma) ** 2) / sigma * math.hypot(1, 1 / sigma) if math.isfinite(sigma) else 0.0

        return (self.w * gain(self.a_c) - (self.w - 1) * gain(self.a_u)) * x

    def exact(self, sigma):
        u = 1 / sigma
        s = 1 / math.hypot(1, u)
        return s * (1 + (self.a_c * u) ** 2) ** (self.w / 2) * (1 + (self.a_u * u) ** 2) ** (-(self.w - 1) / 2)


def run(denoise, noise, sigmas, solver="spectral"):
    """The states that the network is asked about."""
    states = []
    sample(denoise, noise, sigmas, solver, callback=lambda i, sigma, x, x0: states.append((sigma, x.clone())))
    return states


def test_guided_mode_is_a_solution_of_the_flow():
    """dX / dlog u = x0 - X, with X = x / alpha and dlog alpha / dlog u = s^2: the closed form below is right."""
    mode = GuidedMode(6.0, 60.0, 5.0)
    for sigma in (100.0, 20.0, 3.0, 0.5):
        step = 1e-4
        slope = (math.log(mode.exact(sigma * math.exp(-step))) - math.log(mode.exact(sigma * math.exp(step)))) / (
            2 * step
        )
        x0 = mode(torch.ones(1, dtype=torch.float64), sigma).item()
        assert slope == pytest.approx(x0 / math.hypot(1, sigma) - 1 + sigma**2 / (1 + sigma**2), abs=1e-6)


@pytest.mark.parametrize("slope", [-0.5, -2.0, -4.0])
@pytest.mark.parametrize("corrected", [0.0, 0.3])
def test_secant_step_is_exact_where_x0_is_linear_in_the_state(slope, corrected):
    """x0 = J X: the flow takes X to r^(1 - J) X, also from a state that a correction has moved."""
    sigmas = (40.0, 25.0, 16.0, 7.0, 0.0)
    direction = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    run, answers = _Seen(direction, sigmas), []
    for i, scale in enumerate((1.0, 0.55, 0.3)):  # X is any multiple of the direction
        step = run.step(i)
        answers.insert(0, slope * scale * direction)
        run.see(scale * direction * step.alpha, answers[0], step)
    assert 1 - run.power.item() == pytest.approx(slope, rel=1e-9)
    correction = corrected * torch.tensor([1.0, -1.5, 0.5, 0, 0], dtype=torch.float64)
    weights = torch.stack((correction, torch.zeros(KEPT, dtype=torch.float64)))[..., None]
    beyond = run.secant(step, weights).item()
    state = 0.3 * direction * step.alpha + sum(w * x0 for w, x0 in zip(correction, answers, strict=False))
    found = step.ratio * state + step.held * answers[0] + beyond * (answers[0] - answers[1])
    exact = state / step.alpha * step.sigma_ratio ** (1 - slope) * step.alpha_next
    assert torch.allclose(found, exact, rtol=1e-9)


@pytest.mark.parametrize(("step", "trust"), [(3, 0.0), (5, 0.0), (6, 1.0), (8, 1.0)])
def test_what_bends_early_is_trusted_less_and_what_bends_late_is_texture(step, trust):
    """x0 goes on along one direction, and once by 90 degrees: in the first five of ten steps that makes it wary."""
    sigmas = tuple(step_schedule(ZERO, 10, latent_size=(128, 128)).tolist())
    ahead, aside = torch.eye(2, dtype=torch.float64)[:, None]
    run, x0 = _Seen(ahead, sigmas), torch.zeros(1, 2, dtype=torch.float64)
    for i in range(10):
        run.see(ahead, x0, run.step(i))
        x0 = x0 + (aside if i == step - 1 else ahead)  # bent when the question of ``step`` is answered
    assert run.trust.item() == trust


@pytest.mark.parametrize("w", [3.0, 5.0, 7.5])
def test_a_stiff_mode_does_not_grow(w, monkeypatch):
    """Brightness: spread 60 in all pictures, 6 under the prompt.  Four values alone multiply a disturbance."""
    mode = GuidedMode(6.0, 60.0, w)

    def worst(steps):
        sigmas = step_schedule(ZERO, steps, latent_size=(128, 128), guidance=w).tolist()
        states = run(mode, torch.ones(1, 1, 1, 1), sigmas)[1:]
        return max(abs(x.item() - mode.exact(sigma)) for sigma, x in states)

    for steps, limit in ((10, 0.8), (14, 0.35), (20, 0.15), (28, 0.1)):  # of the noise's own amplitude
        assert worst(steps) < limit
    if w > 3:
        always_bold(monkeypatch)
        assert worst(20) > 1


def always_bold(monkeypatch):
    """The linear solver of four values, whatever happens."""
    see = _Seen.see

    def blind(run, *args):
        see(run, *args)
        run.turn = torch.zeros_like(run.turn)

    monkeypatch.setattr(_Seen, "see", blind)
    monkeypatch.setattr(_Seen, "boldness", lambda run, step: torch.ones_like(run.trust))


@pytest.mark.parametrize("size", [(128, 128), (104, 152), (97, 131)])
def test_a_stiff_mode_does_not_drown_in_a_full_size_latent(size):
    """The same mode as brightness of a whole canvas, among tens of thousands of values that are mostly noise."""
    mode = GuidedMode(6.0, 60.0, 5.0)
    along = torch.zeros(1, 4, *size)
    along[:, :2] = (2 * size[0] * size[1]) ** -0.5

    def brightness(x):
        return (x * along).sum((1, 2, 3), keepdim=True)

    def denoise(x, sigma):  # the rest is fine texture of standard deviation .3
        alpha, s = alpha_s(sigma)
        bright = brightness(x)
        return mode(bright, sigma) * along + alpha * 0.09 / (alpha**2 * 0.09 + s**2) * (x - bright * along)

    noise = torch.randn(4, 4, *size, generator=torch.Generator().manual_seed(8))
    sigmas = step_schedule(ZERO, 14, latent_size=size, guidance=5.0).tolist()
    for sigma, x in run(denoise, noise, sigmas)[1:]:
        off = (brightness(x) - mode.exact(sigma) * brightness(noise)).abs().max()
        assert off < 1.5  # times the noise's own standard deviation; 4 to 7 if the solver looked at all values


def test_unguided_modes_are_left_alone():
    """A plain Gaussian latent is no jump: fine texture keeps its strength in a real run, not only in the table."""
    for law in (0.0, 1.0):
        spread = np.geomspace(0.1, 128, 200)
        a = torch.from_numpy(np.repeat(spread, np.clip((128 / spread) ** law, 1, 200).astype(int))).view(1, 1, 1, -1)
        noise = torch.randn(2, 1, 1, a.numel(), generator=torch.Generator().manual_seed(5))
        for steps, limit in ((10, 0.026), (20, 0.01)):
            sigmas = step_schedule(ZERO, steps, latent_size=(128, 128), guidance=1)
            error = sample(GaussianModes(std=a), noise, sigmas) / (a * noise) - 1
            assert error.abs().max() < limit


def mixture(scale, shape=(3, 4, 4)):
    means = torch.randn(6, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    everything, prompt = GaussianMixture(means), GaussianMixture(means[:1])
    return lambda x, sigma: guide(prompt(x, sigma), everything(x, sigma), scale)


def test_guidance_does_not_blow_up():
    """Extrapolation amplifies what it did not foresee; the solver notices, and steps by what it measured."""
    noise = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(6))
    exact = reference_flow(mixture(7.5), noise.double(), 1000)

    def error(solver, steps):
        picture = sample(mixture(7.5), noise, step_schedule(ZERO, steps, latent_size=(4, 4)), solver)
        return (picture - exact).square().mean().sqrt().item()

    measured = {steps: error("spectral", steps) for steps in (10, 14)}
    for steps in measured:
        assert measured[steps] < error("unipc", steps)


def test_each_sample_chooses_for_itself():
    noise = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    sigmas = step_schedule(ZERO, 12, latent_size=(4, 4))
    batch = sample(mixture(5.0), noise, sigmas)
    for one, alone in zip(batch, noise.split(1), strict=True):
        assert torch.allclose(one, sample(mixture(5.0), alone, sigmas)[0], atol=1e-4)


def test_an_edited_state_keeps_its_edit():
    """Between two steps a pipeline may write into the state; the solver goes on from what it finds there."""
    sigmas = step_schedule(ZERO, 8, latent_size=(4, 4)).tolist()
    shift = 0.37

    def edited(amount):
        x, run = torch.zeros(1, 1, 4, 4), start_run("spectral", sigmas)
        for i in range(5):
            x0 = torch.full_like(x, 0.25)  # constant: nothing of it depends on the state
            x = advance(run, x + amount if i == 4 else x, x0)
        return x

    s, s_next = (sigma / math.hypot(1, sigma) for sigma in sigmas[4:6])
    assert torch.allclose(edited(shift) - edited(0.0), torch.full((1, 1, 4, 4), shift * s_next / s), atol=1e-6)
