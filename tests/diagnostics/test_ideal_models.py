"""Every model against brute force in float64, and every exact flow against an independent one."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import ndtr  # torch.special.ndtr loses the tails

from ztsnr.diagnostics import GaussianCanvas, GaussianMixture, GaussianModes, PictureSet, reference_flow, v_network
from ztsnr.samplers import NoiseSchedule, sample, step_schedule, to_denoised
from ztsnr.samplers.prediction import alpha_s

SIGMAS = (0.02, 0.5, 3.0, 60.0, 1e5, math.inf)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bayes(x: torch.Tensor, sigma: float, means: torch.Tensor, covariances: torch.Tensor, weights: torch.Tensor):
    """E[x0 | x] of a mixture of K full-covariance Gaussians, term by term with dense matrices: the textbook formula.

    x (B, D), means (K, D), covariances (K, D, D), weights (K,) -> (B, D).
    """
    alpha, s = alpha_s(sigma)
    densities, answers = [], []
    for mean, covariance, weight in zip(means, covariances, weights, strict=True):
        total = alpha**2 * covariance + s**2 * torch.eye(len(mean), dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(alpha * mean, total)
        densities.append(normal.log_prob(x) + weight.log())
        answers.append(mean + alpha * (x - alpha * mean) @ torch.linalg.solve(total, covariance))
    share = torch.stack(densities).softmax(0)
    return (share[..., None] * torch.stack(answers)).sum(0)


def small_pictures() -> PictureSet:
    return PictureSet(randn(3, 2, 3, 4, seed=5).clamp(-1, 1), weights=[0.6, 0.3, 0.1], std=0.2, brightness_std=0.4)


MODELS = {
    "modes": (GaussianModes(mean=0.7, std=torch.tensor([0.1, 1.0, 30.0])), (6, 3)),
    "canvas": (GaussianCanvas(mean=torch.tensor([-2.4, 0.3]), brightness_std=0.3), (5, 2, 8, 6)),
    "mixture": (GaussianMixture(3 * randn(4, 5, seed=1), weights=[1, 2, 3, 4], stds=[0.3, 0.5, 1.0, 0.2]), (40, 5)),
    "line": (GaussianMixture(torch.tensor([[-1.0], [1.0], [4.0]]), [0.9, 0.05, 0.05], [0.1, 0.2, 0.5]), (300, 1)),
    "pictures": (small_pictures(), (12, 2, 3, 4)),
}
each_model = pytest.mark.parametrize(("model", "shape"), MODELS.values(), ids=MODELS)


@each_model
@pytest.mark.parametrize("sigma", SIGMAS)
def test_float32_agrees_with_float64(model, shape, sigma):
    x = 2 * randn(*shape)
    single, double = model(x.float(), sigma), model(x, sigma)
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@each_model
def test_infinity_is_the_limit_of_large_sigma_and_forgets_x(model, shape):
    x = randn(*shape)
    at_infinity = model(x, math.inf)
    torch.testing.assert_close(at_infinity, model(-x, math.inf), rtol=0, atol=1e-14)
    torch.testing.assert_close(model(x, 1e9), at_infinity, rtol=0, atol=1e-5)
    assert (at_infinity - model(x, 1e3)).abs().max() > 1e-7


@each_model
def test_sigma_zero_is_the_picture(model, shape):
    x = randn(*shape)
    assert torch.equal(model(x, 0.0), x)


@each_model
def test_exact_flow_against_another_integrator(model, shape):
    noise = randn(*shape, seed=3)
    last = 1e-4

    def velocity(angle, x):
        sigma = math.inf if angle == math.pi / 2 else math.tan(angle)
        alpha, s = alpha_s(sigma)
        state = torch.from_numpy(x).view(shape)
        return ((alpha * state - model(state, sigma)) / s).numpy().ravel()

    flow = solve_ivp(velocity, (math.pi / 2, math.atan(last)), noise.numpy().ravel(), "DOP853", rtol=1e-9, atol=1e-9)
    expected = model(torch.from_numpy(flow.y[:, -1]).view(shape), last)
    # noise that lies next to the border between two modes amplifies what is left of either method's error
    torch.testing.assert_close(model.exact(noise), expected, rtol=1e-4, atol=1e-4)
    assert model.exact(noise.float()).dtype == torch.float32


@each_model
def test_models_run_in_the_sampling_loop(model, shape):
    noise = randn(*shape).float()
    sigmas = step_schedule(NoiseSchedule.sdxl(), 400, "exponential", sigma_start=2000.0)
    torch.testing.assert_close(sample(model, noise, sigmas, "dpmpp_2m"), model.exact(noise), rtol=2e-2, atol=2e-2)


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", SIGMAS)
def test_modes_against_dense_bayes(sigma):
    std, mean = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64), torch.tensor([0.0, 2.0, -3.0], dtype=torch.float64)
    x = 3 * randn(7, 3)
    expected = bayes(x, sigma, mean[None], (std**2).diag()[None], torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(GaussianModes(mean, std)(x, sigma), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_canvas_against_dense_bayes(sigma):
    n, tau, texture = 6, 0.3, 0.6
    average = torch.full((n, n), 1 / n, dtype=torch.float64)
    covariance = n * tau**2 * average + texture**2 * (torch.eye(n, dtype=torch.float64) - average)
    x = 3 * randn(7, n)
    mean = torch.full((1, n), -2.4, dtype=torch.float64)
    expected = bayes(x, sigma, mean, covariance[None], torch.ones(1, dtype=torch.float64))
    got = GaussianCanvas(-2.4, tau, texture)(x.view(7, 1, 2, 3), sigma).flatten(1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_canvas_spread_is_that_of_its_averages():
    model = GaussianCanvas(mean=torch.tensor([-2.4, 0.5]), brightness_std=0.3, texture_std=0.6)
    noise = randn(4, 2, 10, 12)
    z = noise.mean((-2, -1)) * math.sqrt(120)
    picture = model.exact(noise)
    torch.testing.assert_close(picture.mean((-2, -1)), torch.tensor([-2.4, 0.5], dtype=torch.float64) + 0.3 * z)
    rest = picture - picture.mean((-2, -1), keepdim=True)
    torch.testing.assert_close(rest, 0.6 * (noise - noise.mean((-2, -1), keepdim=True)))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("stds", [0.3, [0.3, 0.5, 1.0, 0.2], 0.0])
def test_mixture_against_dense_bayes(sigma, stds):
    means, weights = 3 * randn(4, 5, seed=1), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    spread = torch.as_tensor(stds, dtype=torch.float64).expand(4)
    alpha, s = alpha_s(sigma)
    x = alpha * means[torch.arange(20) % 4] + s * randn(20, 5, seed=2)
    expected = bayes(x, sigma, means, spread[:, None, None] ** 2 * torch.eye(5, dtype=torch.float64), weights)
    torch.testing.assert_close(GaussianMixture(means, weights, stds)(x, sigma), expected, rtol=1e-9, atol=1e-9)


def test_mixture_keeps_the_shape_of_its_means():
    means = randn(3, 2, 4, 4)
    x = randn(5, 2, 4, 4, seed=1)
    got = GaussianMixture(means, stds=0.2)(x, 1.5)
    torch.testing.assert_close(got.flatten(1), GaussianMixture(means.flatten(1), stds=0.2)(x.flatten(1), 1.5))


def test_mixture_with_far_components_stays_finite():
    model = GaussianMixture(torch.tensor([[-1000.0, 0.0], [1000.0, 0.0]]), stds=1e-3)
    for sigma in (1e-4, 1.0, 1e4):
        x = torch.tensor([[1000.0, 0.0]]) * alpha_s(sigma)[0]
        assert model(x, sigma).isfinite().all()
        if sigma < 1e4:
            torch.testing.assert_close(model(x, sigma), torch.tensor([[1000.0, 0.0]]))


def test_transport_matches_distribution_functions_and_keeps_order():
    model, _ = MODELS["line"]
    n = torch.linspace(-9, 9, 401, dtype=torch.float64)[:, None]
    x = model.transport(n)
    assert (x.diff(dim=0) > 0).all()
    weights, means, stds = model.log_weights.exp(), model.means[:, 0], model.stds
    for sign in (1, -1):  # each tail by itself: F near 1 would hide the errors of 1 - F
        tail = (sign * n <= 0)[:, 0]
        mass = (weights.numpy() * ndtr((sign * (x[tail] - means) / stds).numpy())).sum(1)
        np.testing.assert_allclose(mass, ndtr(sign * n[tail, 0].numpy()), rtol=1e-9)


def test_transport_of_one_gaussian_is_affine():
    n = randn(50, 1)
    torch.testing.assert_close(GaussianMixture(torch.tensor([[2.0]]), stds=3.0).transport(n), 2 + 3 * n)


def test_transport_hits_the_weights():
    model = GaussianMixture(torch.tensor([[-1.0], [1.0]]), weights=[0.9, 0.1], stds=0.05)
    quantiles = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)[:, None]
    black = (model.transport(torch.special.ndtri(quantiles)) < 0).double().mean().item()
    assert black == pytest.approx(0.9, abs=2e-3)


def test_transport_is_for_one_dimension():
    with pytest.raises(ValueError, match="one dimension"):
        GaussianMixture(randn(2, 3)).transport(randn(1, 3))
    with pytest.raises(ValueError, match="positive"):
        GaussianMixture(randn(2, 1), stds=0.0).transport(randn(1, 1))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(("std", "brightness_std"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.4), (0.2, 0.4)])
def test_pictures_against_dense_bayes(sigma, std, brightness_std):
    pictures, weights = randn(3, 2, 3, 4, seed=5), torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    channel = torch.ones(12, 12, dtype=torch.float64)
    covariance = brightness_std**2 * torch.block_diag(channel, channel) + std**2 * torch.eye(24, dtype=torch.float64)
    alpha, s = alpha_s(sigma)
    x = alpha * pictures.repeat(4, 1, 1, 1) + s * randn(12, 2, 3, 4, seed=6)
    expected = bayes(x.flatten(1), sigma, pictures.flatten(1), covariance.expand(3, 24, 24), weights)
    got = PictureSet(pictures, weights, std, brightness_std)(x, sigma).flatten(1)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("std", [0.0, 0.1])
def test_one_picture_has_a_closed_form(std):
    model = PictureSet(randn(1, 3, 4, 4), std=std, brightness_std=0.2)
    noise = randn(6, 3, 4, 4, seed=1)
    torch.testing.assert_close(model.exact(noise), reference_flow(model, noise, 1500), rtol=1e-6, atol=1e-6)


def test_pictures_without_spread_end_at_a_picture():
    pictures = randn(4, 3, 8, 8)
    model = PictureSet(pictures)
    result = model.exact(randn(30, 3, 8, 8, seed=1))
    chosen = model.nearest(result)
    torch.testing.assert_close(result, pictures[chosen], rtol=1e-8, atol=1e-8)
    assert len(chosen.unique()) == 4


def test_nearest_looks_through_the_exposure():
    pictures = randn(4, 3, 8, 8).clamp(-1, 1)
    model = PictureSet(pictures, brightness_std=0.2)
    shifts = torch.tensor([-0.5, 0.5, 0.3, -0.3]).view(4, 1, 1, 1)
    assert model.nearest(pictures + shifts).tolist() == [0, 1, 2, 3]


def test_weights_decide_how_often_a_picture_comes():
    model = PictureSet(
        torch.stack([-torch.ones(1, 4, 4), torch.ones(1, 4, 4)]), weights=[0.9, 0.1], brightness_std=0.05
    )
    result = model.exact(randn(4000, 1, 4, 4), steps=200)
    assert (result.mean((1, 2, 3)) < 0).double().mean().item() == pytest.approx(0.9, abs=0.015)


# ----------------------------------------------------------------------------------------------------------------------


def test_reference_flow_is_of_fourth_order():
    model, noise = MODELS["canvas"][0], randn(2, 2, 8, 6)
    errors = [(reference_flow(model, noise, steps) - model.exact(noise)).abs().max().item() for steps in (50, 100)]
    assert errors[0] / errors[1] > 12


@pytest.mark.parametrize("t", [0.0, 500, 998.5, torch.tensor(999), torch.tensor([999.0])])
def test_v_network_knows_the_timestep_alone(t):
    schedule, model = NoiseSchedule.sdxl(), small_pictures()
    x = randn(3, 2, 3, 4).float()
    v = v_network(model, schedule)(x, t)
    sigma = schedule.sigma(float(t))
    torch.testing.assert_close(to_denoised(v, x, sigma), model(x, sigma), rtol=1e-4, atol=1e-5)
    if float(t) == 999:
        torch.testing.assert_close(v, -model(x, math.inf))


def test_v_network_answers_in_the_dtype_of_its_input():
    network = v_network(GaussianModes(), NoiseSchedule.sdxl())
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert network(torch.zeros(1, 1, 2, 2, dtype=dtype), 999).dtype == dtype


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GaussianModes(std=-1.0), "std"),
        (lambda: GaussianModes(std=math.nan), "std"),
        (lambda: GaussianCanvas(brightness_std=-0.1), "brightness_std"),
        (lambda: GaussianMixture(torch.zeros(0, 2)), "at least one component"),
        (lambda: GaussianMixture(torch.zeros(2, 2), weights=[1, 2, 3]), "2 weights"),
        (lambda: GaussianMixture(torch.zeros(2, 2), weights=[1, -1]), "not negative"),
        (lambda: GaussianMixture(torch.zeros(2, 2), weights=[0, 0]), "not all zero"),
        (lambda: GaussianMixture(torch.zeros(2, 2), weights=[math.nan, 1]), "finite"),
        (lambda: PictureSet(torch.zeros(3, 4, 4)), "K, C, H, W"),
        (lambda: PictureSet(torch.zeros(0, 3, 4, 4)), "K at least 1"),
        (lambda: PictureSet(torch.zeros(1, 3, 4, 4), std=-1), "std"),
        (lambda: reference_flow(GaussianModes(), torch.zeros(1), steps=0), "at least 1"),
    ],
)
def test_mistakes_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
