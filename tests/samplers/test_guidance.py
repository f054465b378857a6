"""Exposure-true guidance and the two rescales, against what they are defined to do."""

import math

import pytest
import torch

from ztsnr.diagnostics import GaussianModes, reference_flow
from ztsnr.samplers import (
    exposure_true,
    exposure_true_guidance,
    from_denoised,
    guide,
    rescale_contrast,
    rescale_guidance,
    to_denoised,
)

CHANNEL = torch.tensor([1.0, -1.0, 0.5, 2.0]).view(1, 4, 1, 1)
SHAPE = (2, 4, 12, 20)


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean((-2, -1), keepdim=True)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ----------------------------------------------------------------------------------------------------------------------
# Closed forms


def test_each_part_of_the_direction_loses_its_share():
    """d = brightness + contrast + content, where the content has neither a mean nor anything of the picture."""
    picture = random(*SHAPE, seed=1)
    p = centred(picture)
    content = centred(random(*SHAPE, seed=2))
    content -= (content * p).sum((1, 2, 3), keepdim=True) / (p * p).sum((1, 2, 3), keepdim=True) * p
    brightness, gain = CHANNEL.expand(SHAPE), torch.tensor([0.4, -0.3]).view(2, 1, 1, 1)
    for exposure, contrast in ((0.0, 0.0), (1.0, 1.0), (0.9, 0.8), (0.25, 0.0)):
        found = exposure_true(brightness + gain * p + content, picture, exposure, contrast)
        expected = (1 - exposure) * brightness + (1 - contrast) * gain * p + content
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def flow(cond: GaussianModes, uncond: GaussianModes, scale: float, noise: torch.Tensor, **shares) -> torch.Tensor:
    def model(x, sigma):
        return exposure_true_guidance(cond(x, sigma), uncond(x, sigma), scale, **shares)

    return reference_flow(model, noise.double(), steps=200)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("exposure", [0.0, 0.9, 1.0])
def test_brightness_of_a_gaussian_is_extrapolated_by_what_is_left(scale, exposure):
    """CFG carries a Gaussian of equal spread under both prompts to the mean mu_u + w (mu_c - mu_u), exactly."""
    asked, usual, spread = -0.8 * CHANNEL, 0.3 * CHANNEL, 0.5
    noise = random(*SHAPE, seed=3)
    found = flow(GaussianModes(asked, spread), GaussianModes(usual, spread), scale, noise, exposure=exposure)
    mean = asked + (scale - 1) * (1 - exposure) * (asked - usual)
    torch.testing.assert_close(found, (mean + spread * noise).double(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("contrast", [0.0, 0.8, 1.0])
def test_contrast_of_a_gaussian_is_extrapolated_by_what_is_left(contrast):
    """Both prompts ask for the same pattern, one more strongly: all that guidance adds is contrast."""
    pattern = centred(random(1, 4, 12, 20, seed=4))
    asked, usual, spread, scale, amount = 0.8, 0.5, 0.3, 5.0, 0.7
    found = flow(
        GaussianModes(asked * pattern, spread),
        GaussianModes(usual * pattern, spread),
        scale,
        amount * pattern,
        contrast=contrast,
    )
    strength = asked + (scale - 1) * (1 - contrast) * (asked - usual)
    torch.testing.assert_close(found, ((strength + spread * amount) * pattern).double(), rtol=0, atol=2e-4)


def test_without_shares_it_is_cfg():
    cond, uncond = random(*SHAPE, seed=5), random(*SHAPE, seed=6)
    for scale in (0.0, 1.0, 1.5, 7.5):
        found = exposure_true_guidance(cond, uncond, scale, exposure=0.0, contrast=0.0)
        torch.testing.assert_close(found, guide(cond, uncond, scale), rtol=0, atol=1e-5)


def test_the_prompt_alone_is_unchanged():
    cond, uncond = random(*SHAPE, seed=5), random(*SHAPE, seed=6)
    assert torch.equal(exposure_true_guidance(cond, uncond, 1.0), cond)
    assert torch.equal(exposure_true_guidance(cond, cond, 5.0), cond)


def test_it_is_linear_in_the_direction():
    one, other, picture = (random(*SHAPE, seed=seed) for seed in (7, 8, 9))
    both = exposure_true(2 * one - 3 * other, picture)
    torch.testing.assert_close(
        both, 2 * exposure_true(one, picture) - 3 * exposure_true(other, picture), rtol=0, atol=1e-5
    )


# ----------------------------------------------------------------------------------------------------------------------
# Noise levels, dtypes, batches


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6, 200.0, 4518.76, math.inf])
def test_of_v_and_of_x0_it_is_the_same(sigma):
    x, v_cond, v_uncond = (random(*SHAPE, seed=seed) for seed in (10, 11, 12))
    v_uncond = v_cond + 0.3 * v_uncond
    cond, uncond = to_denoised(v_cond, x, sigma), to_denoised(v_uncond, x, sigma)
    of_x0 = exposure_true_guidance(cond, uncond, 5.0)
    of_v = exposure_true_guidance(v_cond, v_uncond, 5.0, picture=cond)
    if sigma >= 1:  # below, x0 hardly depends on v
        assert relative(from_denoised(of_x0, x, sigma), of_v) < 1e-6
    assert relative(to_denoised(of_v, x, sigma), of_x0) < 1e-6


def test_the_picture_of_v_is_x0_and_not_v():
    """At a middle noise level v is mostly noise: its projection would take something else away."""
    x, v_cond, v_uncond = (random(*SHAPE, seed=seed) for seed in (10, 11, 12))
    right = exposure_true_guidance(v_cond, v_uncond, 5.0, picture=to_denoised(v_cond, x, 1.0))
    assert relative(exposure_true_guidance(v_cond, v_uncond, 5.0), right) > 1e-2


def test_at_infinity_v_is_its_own_picture():
    v_cond, v_uncond = random(*SHAPE, seed=11), random(*SHAPE, seed=12)
    assert torch.equal(
        exposure_true_guidance(v_cond, v_uncond, 5.0), exposure_true_guidance(v_cond, v_uncond, 5.0, picture=-v_cond)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    cond, uncond = random(*SHAPE, seed=5, dtype=dtype), random(*SHAPE, seed=6, dtype=dtype)
    found = exposure_true_guidance(cond, uncond, 5.0)
    assert found.dtype == dtype
    assert torch.equal(found, exposure_true_guidance(cond.float(), uncond.float(), 5.0).to(dtype))
    assert exposure_true(cond, uncond).dtype == torch.float32


@pytest.mark.parametrize("function", [exposure_true, rescale_contrast, rescale_guidance])
def test_a_batch_is_its_single_runs(function):
    scales = torch.tensor([1.0, 1e-3, 1e3]).view(3, 1, 1, 1)
    one, other = scales * random(3, 4, 8, 8, seed=13), scales.flip(0) * random(3, 4, 8, 8, seed=14)
    alone = torch.cat([function(*rows) for rows in zip(one.split(1), other.split(1), strict=True)])
    torch.testing.assert_close(function(one, other), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, -1.1, -2.4])
def test_a_flat_picture_has_no_contrast_to_take_away(level):
    """Its rest about the mean is what rounding leaves, and may be a mean itself."""
    picture, d = torch.full((1, 4, 32, 48), level), random(1, 4, 32, 48, seed=15) + 0.5
    for direction in (d, torch.full_like(d, 0.5)):
        found = exposure_true(direction, picture, exposure=0.0, contrast=1.0)
        # it takes no more than one of the canvas's many directions
        assert relative(found, direction) < 0.05
        assert relative(found.mean((-2, -1)), direction.mean((-2, -1))) < 1e-5


def test_nothing_is_read_on_the_host(no_host_reads):
    cond, uncond = random(*SHAPE, seed=5), random(*SHAPE, seed=6)
    with no_host_reads():
        guided = exposure_true_guidance(cond, uncond, 5.0)
        rescale_contrast(guided, cond)


# ----------------------------------------------------------------------------------------------------------------------
# Rescale


def test_rescale_of_contrast_is_algorithm_2_about_the_mean():
    guided, cond = 3 * random(*SHAPE, seed=16) + CHANNEL, random(*SHAPE, seed=17) - 0.4
    torch.testing.assert_close(rescale_contrast(guided, cond, 0.0), guided)
    whole = rescale_contrast(guided, cond, 1.0)
    torch.testing.assert_close(whole.mean((-2, -1)), cond.mean((-2, -1)), rtol=0, atol=1e-6)
    torch.testing.assert_close(centred(whole), rescale_guidance(centred(guided), centred(cond), 1.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(rescale_contrast(guided, cond, 0.7), guided.lerp(whole, 0.7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.5, 2.0, 3.0, 5.0])
def test_black_stays_black_where_the_papers_rescale_greys_it(scale):
    """First step, v = -x0: a prompt for black of level 19, and a usual picture near grey.

    Channels of equal mean have no deviation among themselves, so Algorithm 2 sees no contrast in the black and divides
    its mean, too, by what guidance made of the difference between channels.
    """

    def flat(*means, seed):
        return torch.tensor(means).view(1, -1, 1, 1) + 0.01 * random(1, len(means), 64, 64, seed=seed)

    def levels(v):
        return (1 - v.mean((-2, -1))) * 127.5

    black, usual = -flat(-0.85, -0.85, -0.85, seed=18), -flat(0.0, -0.3, -0.39, seed=19)
    asked = levels(black)
    assert asked.max() == pytest.approx(19, abs=0.5)
    guided = guide(black, usual, scale)
    assert levels(rescale_guidance(guided, black, 1.0)).min() > 90
    kept = levels(rescale_contrast(guided, black, 1.0))
    torch.testing.assert_close(kept, asked, rtol=0, atol=0.01)
    partly = levels(rescale_contrast(guided, black, 0.7))
    torch.testing.assert_close(partly, levels(guided).lerp(asked, 0.7), rtol=0, atol=0.01)
    assert partly.max() < asked.max()


def test_rescale_of_contrast_is_regular():
    flat = torch.full((1, 4, 8, 8), 0.3)
    torch.testing.assert_close(rescale_contrast(flat, flat, 0.7), flat)
    torch.testing.assert_close(rescale_contrast(flat, -flat, 1.0), -flat)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def test_bad_input_is_told_in_a_sentence():
    cond = random(*SHAPE, seed=5)
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="the guidance scale must be a finite number of at least 0, not"):
            exposure_true_guidance(cond, cond, scale)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"exposure must lie in \[0, 1\], not"):
            exposure_true_guidance(cond, cond, 5.0, exposure=share)
        with pytest.raises(ValueError, match=r"contrast must lie in \[0, 1\], not"):
            exposure_true(cond, cond, contrast=share)
        with pytest.raises(ValueError, match="guidance rescale phi must lie in"):
            rescale_contrast(cond, cond, share)
    with pytest.raises(ValueError, match=r"cond has shape \(2, 4, 12, 20\) and uncond \(1, 4, 12, 20\)"):
        exposure_true_guidance(cond, cond[:1], 5.0)
    with pytest.raises(ValueError, match=r"the picture has shape \(1, 4, 12, 20\) and the difference \(2, 4, 12, 20\)"):
        exposure_true_guidance(cond, cond, 5.0, picture=cond[:1])
    video = cond.unsqueeze(2)
    with pytest.raises(ValueError, match=r"for pictures \(B, C, H, W\), not for shape \(2, 4, 1, 12, 20\)"):
        exposure_true_guidance(video, video, 5.0)
