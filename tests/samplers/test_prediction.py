import math

import pytest
import torch

from ztsnr.samplers import from_denoised, guide, rescale_guidance, to_denoised
from ztsnr.samplers.prediction import alpha_s, check_prediction_type

X0, EPS = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6, 4518.0, 1e8, math.inf])
def test_alpha_and_s(sigma):
    alpha, s = alpha_s(sigma)
    assert alpha**2 + s**2 == pytest.approx(1, abs=1e-15)
    if math.isfinite(sigma):
        assert s / alpha == pytest.approx(sigma)
    else:
        assert (alpha, s) == (0, 1)


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6, 4518.0, math.inf])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_predictions_by_their_definitions(sigma, prediction_type):
    if prediction_type == "epsilon" and math.isinf(sigma):
        return
    alpha, s = alpha_s(sigma)
    x = alpha * X0 + s * EPS
    output = {"v_prediction": alpha * EPS - s * X0, "epsilon": EPS, "sample": X0}[prediction_type]
    assert torch.allclose(to_denoised(output, x, sigma, prediction_type), X0, atol=1e-9)
    assert torch.allclose(from_denoised(X0, x, sigma, prediction_type), output, atol=1e-9)


def test_at_infinity_the_prediction_is_minus_v():
    assert torch.equal(to_denoised(X0, EPS, math.inf), -X0)


def test_a_half_precision_output_is_read_in_the_precision_of_the_state():
    x = torch.randn(1, 4, 8, 8)
    assert to_denoised(x.bfloat16(), x, 1.0).dtype == torch.float32


def test_epsilon_at_zero_snr_is_refused():
    with pytest.raises(ValueError, match="cannot start from infinite sigma"):
        to_denoised(EPS, EPS, math.inf, "epsilon")
    with pytest.raises(ValueError, match="cannot start from infinite sigma"):
        from_denoised(X0, EPS, math.inf, "epsilon")
    with pytest.raises(ValueError, match="cannot start from infinite sigma"):
        check_prediction_type("epsilon", zero_terminal_snr=True)
    check_prediction_type("epsilon", zero_terminal_snr=False)
    with pytest.raises(ValueError, match="unknown prediction_type 'v'"):
        to_denoised(EPS, EPS, 1.0, "v")
    with pytest.raises(ValueError, match="sigma = 0"):
        from_denoised(X0, X0, 0.0)


def test_guidance_extrapolates():
    cond, uncond = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.allclose(guide(cond, uncond, 5.0), uncond + 5 * (cond - uncond), atol=1e-5)
    assert torch.equal(guide(cond, uncond, 1.0), cond)


def test_rescale_is_algorithm_2():
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    cond, guided = torch.randn(3, 4, 8, 8), 3 * torch.randn(3, 4, 8, 8) + 1
    for phi in (0.0, 0.3, 0.7, 1.0):
        assert torch.allclose(rescale_guidance(guided, cond, phi), rescale_noise_cfg(guided, cond, phi), atol=1e-5)
    whole = rescale_guidance(guided, cond, 1.0)
    assert torch.allclose(whole.flatten(1).std(1), cond.flatten(1).std(1))


def test_rescale_is_regular():
    flat = torch.full((1, 4, 8, 8), 0.3)
    assert torch.equal(rescale_guidance(flat, flat, 0.7), flat)
    with pytest.raises(ValueError, match="phi"):
        rescale_guidance(flat, flat, 1.5)
