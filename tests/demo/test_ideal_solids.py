"""The flow of the exact denoiser, where it can be told by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import norm

from ztsnr.demo import ideal_solids
from ztsnr.demo.composed import SHADE, TINT
from ztsnr.demo.evaluation import START, STEPS, canvas_sigma
from ztsnr.demo.ideal_solids import NOISES, flow
from ztsnr.demo.small_model import SCALING_FACTOR
from ztsnr.diagnostics.leak_run import steps_from
from ztsnr.samplers import NoiseSchedule

ZERO = NoiseSchedule.sdxl().shifted(0.25)
INFINITE = steps_from(ZERO, math.inf, 28)
FINITE = steps_from(ZERO, 3.65, 28)


def noise(pixels):
    """(NOISES, 3) means of the noise of a canvas."""
    return np.random.default_rng(1).standard_normal((NOISES, 3)) / math.sqrt(pixels)


@pytest.mark.parametrize("sigmas", [INFINITE, FINITE, [math.inf, 0.0], [50.0, 0.0], [0.1, 0.05, 0.0]], ids=len)
@pytest.mark.parametrize("pixels", [1, 1024])
def test_one_colour_is_reached_from_anywhere(sigmas, pixels):
    colour = np.array([[200.0, 30, 90]])
    np.testing.assert_allclose(flow(colour, sigmas, pixels), np.repeat(colour, NOISES, 0), atol=1e-9)


def test_the_first_prediction_at_infinity_is_the_mean_of_all():
    colours = np.array([[0.0, 10, 20], [100, 110, 120], [110, 0, 220]])
    found = flow(colours, [math.inf, 0.0])
    np.testing.assert_allclose(found, np.tile(colours.mean(0), (NOISES, 1)), atol=1e-9)
    symmetric = np.array([[27.5, 27.5, 27.5], [227.5, 227.5, 227.5]])
    np.testing.assert_allclose(flow(symmetric, [math.inf, 0.0]), 127.5, atol=1e-9)


@pytest.mark.parametrize("pixels", [4, 1024])
@pytest.mark.parametrize("sigma", [0.5, 3.0, 14.6])
def test_the_second_prediction_of_two_colours_is_a_hyperbolic_tangent(sigma, pixels):
    """Between -c and c the posterior mean of a state y = c + sigma n is c tanh(N c y / sigma^2)."""
    level = 60.0
    c = np.full(3, level / 127.5 * SCALING_FACTOR)
    symmetric = np.array([[127.5 - level] * 3, [127.5 + level] * 3])
    # From infinity the first prediction is 0, and the noise stays the noise
    y = sigma * noise(pixels)
    expected = 127.5 + level * np.tanh(pixels * (y @ c) / sigma**2)
    for sigmas in ([math.inf, sigma, 0.0], [sigma, 0.0]):
        np.testing.assert_allclose(flow(symmetric, sigmas, pixels), expected[:, None].repeat(3, 1), atol=1e-6)


def test_each_noise_ends_at_the_colour_on_its_side():
    symmetric = np.array([[67.5] * 3, [187.5] * 3])
    found = flow(symmetric, steps_from(ZERO, math.inf, 200), 1024)
    expected = np.where(noise(1024).sum(1) > 0, 187.5, 67.5)
    np.testing.assert_allclose(found, expected[:, None].repeat(3, 1), atol=0.5)


def test_a_finite_start_is_taken_for_grey_by_a_canvas_of_many_pixels():
    """Pure noise at a finite level: many pixels say that the mean is 0, so it is the shade nearest to grey; few say
    nothing, so it is the mean of all shades."""
    shades = np.repeat(np.linspace(0, 60, 7)[:, None], 3, 1)
    np.testing.assert_allclose(flow(shades, [3.65, 0.0], pixels=10**6), 60, atol=1e-3)
    np.testing.assert_allclose(flow(shades, [3.65, 0.0], pixels=1e-6), 30, atol=0.1)
    # from infinity it is the mean, whatever the canvas
    for pixels in (1e-6, 1024, 10**6):
        np.testing.assert_allclose(flow(shades, [math.inf, 0.0], pixels), 30, atol=1e-9)
    grey = flow(shades, FINITE, 10**6).mean() - flow(shades, INFINITE, 10**6).mean()
    assert grey > 20  # and the flow as a whole


@pytest.mark.parametrize("steps", [28, 400])
def test_shades_of_grey_that_are_gaussian(steps):
    """There the posterior mean is linear: Euler's steps are a product of factors, which many steps bring to the
    quantiles of the pictures themselves."""
    tau, pixels = 20 / 127.5 * SCALING_FACTOR, 1024
    shades = 127.5 + 20 * np.repeat(norm.ppf((np.arange(1000) + 0.5) / 1000)[:, None], 3, 1)
    sigmas = steps_from(ZERO, math.inf, steps)
    y = sigmas[1] * noise(pixels).mean(1)  # after the first step, of which the prediction is 0
    for sigma, after in pairwise(sigmas[1:]):
        share = tau**2 / (tau**2 + sigma**2 / (3 * pixels))
        y = y * (share + after / sigma * (1 - share))
    expected = 127.5 + y / SCALING_FACTOR * 127.5
    np.testing.assert_allclose(flow(shades, sigmas, pixels), expected[:, None].repeat(3, 1), atol=1)
    quantiles = 127.5 + 20 * noise(pixels).mean(1) * (3 * pixels) ** 0.5
    error = np.abs(expected - quantiles).max()
    assert (error < 2) if steps == 400 else (error > 5)


@pytest.fixture(scope="module")
def bounds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ideal_solids, "SHADES", 400)
        return {bound.caption: bound for bound in ideal_solids.bounds()}


def test_bounds_of_solid_captions(bounds):
    spread = math.hypot(SHADE, TINT)
    clipped = spread / math.sqrt(2 * math.pi)  # mean of a Gaussian of which half is clipped
    assert bounds["black"].data == pytest.approx(clipped, abs=2.5)
    assert bounds["white"].data == pytest.approx(255 - clipped, abs=2.5)
    assert bounds["grey"].data == pytest.approx(128, abs=4)
    for bound in bounds.values():
        assert bound.from_infinity == pytest.approx(bound.data, abs=4), bound.caption
    assert bounds["no caption"].from_finite == pytest.approx(127.5, abs=3)
    for caption, pull in (("black", 30), ("white", -30), ("dark", 50), ("light", -50)):
        assert (bounds[caption].from_finite - bounds[caption].data) * np.sign(pull) > abs(pull)


def test_the_bounds_are_those_of_the_steps_that_are_measured(bounds):
    """Black by the definition: the plain schedule's own end and 28 steps for the finite start."""
    random = np.random.default_rng((1, 0))
    shades = np.array([ideal_solids.ground_colour("black", random) for _ in range(400)])
    plain = NoiseSchedule.sdxl(zero_terminal_snr=False).shifted(0.25)
    start = min(canvas_sigma(START, 32), plain.sigma_max)
    assert start == pytest.approx(14.6146 / 4, rel=1e-5)
    expected = flow(shades, steps_from(plain, start, STEPS)) @ [0.2126, 0.7152, 0.0722]
    assert bounds["black"].from_finite == pytest.approx(expected.mean(), abs=1e-9)
