import math

import pytest
import torch

from ztsnr.samplers import SOLVERS, sample

SIGMAS = torch.tensor([math.inf, 20.0, 3.0, 0.5, 0.0], dtype=torch.float64)
NOISE = torch.randn(2, 3, 4, 4)


def denoise(x, sigma):
    return torch.tanh(x)


def test_state_is_float32_and_the_model_sees_every_level():
    seen = []

    def model(x, sigma):
        seen.append((x.dtype, type(sigma), sigma))
        return denoise(x, sigma).bfloat16()

    picture = sample(model, NOISE.half(), SIGMAS)
    assert picture.dtype == torch.float32
    assert seen == [(torch.float32, float, sigma) for sigma in SIGMAS[:-1].tolist()]


def test_callback_sees_every_evaluation():
    calls = []
    sample(denoise, NOISE, SIGMAS, "heun", callback=lambda *call: calls.append(call))
    assert [call[0] for call in calls] == list(range(7))
    assert [call[1] for call in calls] == [math.inf, 20, 20, 3, 3, 0.5, 0.5]
    assert torch.equal(calls[0][2], NOISE)
    assert torch.equal(calls[0][3], torch.tanh(NOISE))


def test_noise_is_not_written_to():
    before = NOISE.clone()
    for solver in SOLVERS:
        sample(denoise, NOISE, SIGMAS, solver)
    assert torch.equal(NOISE, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "dpm++"}, "unknown solver 'dpm\\+\\+'; choose one of spectral"),
        ({"noise": torch.full((1, 1, 2, 2), math.nan)}, "noise holds NaN"),
        ({"noise": torch.zeros(1, 1, 2, 2, dtype=torch.int64)}, "floating-point"),
        ({"sigmas": [1.0]}, "beginning and an end"),
        ({"sigmas": [1.0, 2.0, 0.0]}, "must decrease"),
        ({"sigmas": [2.0, 2.0, 0.0]}, "must decrease"),
        ({"sigmas": [math.inf, math.inf, 0.0]}, "only the first sigma"),
        ({"sigmas": [5.0, math.inf, 0.0]}, "only the first sigma"),
        ({"sigmas": [5.0, math.nan, 0.0]}, "NaN"),
        ({"sigmas": [5.0, 1.0, -0.5]}, "negative"),
        ({"eta": -1.0}, "eta must be"),
        ({"eta": math.nan}, "eta must be"),
        ({"generator": [torch.Generator()]}, "1 generators for a batch of 2"),
        ({"denoise": lambda x, sigma: x[:, :1]}, "shape"),
        ({"denoise": lambda x, sigma: x.to("meta")}, "on meta"),
        ({"denoise": lambda x, sigma: (x, x)}, "return x0 alone, or set cfg_pp=True"),
        ({"denoise": lambda x, sigma: (x, x, x), "cfg_pp": True}, "must return a pair"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(**{"denoise": denoise, "noise": NOISE, "sigmas": SIGMAS, **arguments})


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_never_reads_a_tensor_on_the_host(solver, no_host_reads):
    guard, evaluations = no_host_reads(), []

    def model(x, sigma):
        if not evaluations:
            guard.__enter__()  # from the first evaluation on; checks of the arguments come before
        evaluations.append(sigma)
        return denoise(x, sigma)

    try:
        sample(model, NOISE, SIGMAS, solver)
    finally:
        guard.__exit__(None, None, None)
    with pytest.raises(AssertionError, match="reads a tensor"), no_host_reads():
        NOISE.sum().item()  # the guard can fail


@pytest.mark.parametrize("solver", SOLVERS)
def test_autocast_around_a_pipeline_does_not_round_the_solver(solver):
    """People call pipelines under autocast, which would take a matrix product of the solver's to half precision."""

    def run():
        return sample(denoise, NOISE, SIGMAS, solver, generator=torch.Generator().manual_seed(1))

    exact = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(), exact)
        assert (NOISE[0, 0] @ NOISE[0, 0].mT).dtype == torch.bfloat16  # it does that


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_never_synchronises_with_the_gpu(solver):
    noise = NOISE.cuda()
    sample(denoise, noise, SIGMAS, solver)

    def model(x, sigma):
        torch.cuda.set_sync_debug_mode("error")
        return denoise(x, sigma)

    try:
        picture = sample(model, noise, SIGMAS, solver)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert picture.isfinite().all()
