import math

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as diffusers_rescale
from hypothesis import given
from hypothesis import strategies as st

from ztsnr.samplers import NoiseSchedule, make_betas, min_snr_weight, rescale_zero_terminal_snr

PLAIN, ZERO = NoiseSchedule.sdxl(zero_terminal_snr=False), NoiseSchedule.sdxl()

# computed once in float64 from the published formulas, outside this package
PUBLISHED = {
    0: (0.0291672, 0.0291672),
    500: (1.618279, 1.774557),
    900: (8.346597, 18.351919),
    962: (11.743405, 56.178239),
    990: (13.842598, 245.954562),
    998: (14.526276, 2254.237978),
    999: (14.614641, math.inf),
}


@pytest.mark.parametrize("t", PUBLISHED)
def test_sigma_table(t):
    assert PLAIN.sigma(t) == pytest.approx(PUBLISHED[t][0], rel=2e-6)
    assert ZERO.sigma(t) == pytest.approx(PUBLISHED[t][1], rel=2e-6)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_agree_with_diffusers(name):
    theirs = diffusers.DDPMScheduler(beta_schedule=name, beta_start=0.0007, beta_end=0.013, num_train_timesteps=500)
    ours = make_betas(name, beta_start=0.0007, beta_end=0.013, num_train_timesteps=500)
    assert torch.allclose(ours.float(), theirs.betas, rtol=1e-4, atol=1e-7)


def test_rescale_agrees_with_diffusers_and_is_idempotent():
    betas = make_betas()
    ours = rescale_zero_terminal_snr(betas)
    assert torch.allclose(ours, diffusers_rescale(betas), rtol=0, atol=1e-12)
    assert ours[-1] == 1
    assert torch.allclose(rescale_zero_terminal_snr(ours), ours, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_end_is_exact(name):
    schedule = NoiseSchedule.from_betas(make_betas(name), zero_terminal_snr=True)
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.sigma_max == math.inf
    assert schedule.zero_terminal_snr


@given(st.floats(0, 999))
def test_timestep_inverts_sigma(t):
    for schedule in (PLAIN, ZERO):
        assert schedule.timestep(schedule.sigma(t)) == pytest.approx(t, abs=1e-8)


@given(st.floats(0, 1).filter(lambda x: x > 1e-9))
def test_last_interval_is_finite_and_inverted(distance):
    t = 999 - distance
    sigma = ZERO.sigma(t)
    assert math.isfinite(sigma)
    assert 999 - ZERO.timestep(sigma) == pytest.approx(999 - t, rel=1e-6, abs=1e-12)


def test_sigma_is_strictly_increasing_throughout():
    t = torch.linspace(0, 999, 99_901, dtype=torch.float64)
    for schedule in (PLAIN, ZERO, ZERO.shifted(2)):
        assert (schedule.sigma(t)[1:] > schedule.sigma(t)[:-1]).all()


def test_one_over_sigma_is_linear_at_the_end():
    """Algorithm 1 shifts sqrt(alphas_cumprod), which is 1/sigma there."""
    t = torch.linspace(998, 999, 11, dtype=torch.float64)
    assert torch.allclose(1 / ZERO.sigma(t), (999 - t) / ZERO.sigma(998.0), rtol=1e-6, atol=0)


def test_vectorised():
    t = torch.tensor([[0, 12.5], [998.75, 999]])
    sigma = ZERO.sigma(t)
    assert sigma.shape == t.shape
    assert sigma.dtype == torch.float64
    assert sigma.flatten().tolist() == [ZERO.sigma(x) for x in t.flatten().tolist()]
    back = ZERO.timestep(sigma)
    assert torch.allclose(back, t.double(), atol=1e-9)
    assert ZERO.timestep(math.inf) == 999
    assert ZERO.timestep(0.0) == 0
    assert PLAIN.timestep(1e9) == 999


@pytest.mark.parametrize("ratio", [0.5, 1.5, 2, 4])
def test_shift_multiplies_every_sigma(ratio):
    t = torch.arange(1000)
    for schedule in (PLAIN, ZERO):
        shifted = schedule.shifted(ratio)
        assert torch.allclose(shifted.sigma(t), ratio * schedule.sigma(t), rtol=1e-10)
        assert torch.allclose(shifted.shifted(1 / ratio).alphas_cumprod, schedule.alphas_cumprod, rtol=1e-10, atol=0)
    # Hoogeboom et al.: the log SNR moves by -2 log ratio
    snr = -2 * shifted.sigma(t[:-1]).log()
    assert torch.allclose(snr, -2 * ZERO.sigma(t[:-1]).log() - 2 * math.log(ratio))


@pytest.mark.parametrize("ratio", [0, -1, math.inf, math.nan])
def test_shift_refuses(ratio):
    with pytest.raises(ValueError, match="resolution ratio"):
        ZERO.shifted(ratio)


@pytest.mark.parametrize(
    "scheduler", [diffusers.EulerDiscreteScheduler, diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler]
)
def test_from_config(scheduler):
    theirs = scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    ours = NoiseSchedule.from_config(theirs.config)
    assert ours.zero_terminal_snr
    assert torch.allclose(ours.alphas_cumprod, ZERO.alphas_cumprod)
    trained = scheduler(trained_betas=make_betas("linear").tolist())
    assert torch.allclose(
        NoiseSchedule.from_config(trained.config).alphas_cumprod, (1 - make_betas("linear")).cumprod(0), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, math.nan, 0.2], "NaN"),
        ([0.1, 0.0, 0.2], r"\(0, 1\]"),
        ([0.1, -0.1], r"\(0, 1\]"),
        ([0.1, 1.1], r"\(0, 1\]"),
        ([0.1, 1.0, 0.2], "only the last beta"),
        ([0.1], "at least two"),
        ([[0.1, 0.2]], "one dimension"),
    ],
)
def test_bad_betas_are_refused(betas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_betas(torch.tensor(betas))


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match="decrease strictly"):
        NoiseSchedule(torch.tensor([0.9, 0.9, 0.1]))
    with pytest.raises(ValueError, match="unknown beta_schedule"):
        make_betas("cosine")


def test_min_snr_weight():
    sigma = ZERO.sigma(torch.tensor([0.0, 500.0, 900.0, 990.0, 999.0]))
    snr = sigma**-2
    v = min_snr_weight(snr)
    assert v[-1] == 0
    assert v[3] == pytest.approx(1.65e-5, rel=0.01)  # 1 / (245.95^2 + 1)
    assert torch.allclose(v[1:4], snr[1:4] / (snr[1:4] + 1))
    assert v[0] == pytest.approx(5 / (snr[0] + 1))
    assert (min_snr_weight(snr, floor=0.1) >= 0.1).all()
    epsilon = min_snr_weight(snr[:-1], prediction_type="epsilon")
    assert torch.allclose(epsilon, snr[:-1].clamp(max=5) / snr[:-1])
    assert torch.equal(min_snr_weight(snr, prediction_type="sample"), snr.clamp(max=5))
    with pytest.raises(ValueError, match="prediction_type"):
        min_snr_weight(snr, prediction_type="v")


def test_a_config_that_says_nothing_of_zero_snr_has_none():
    assert NoiseSchedule.from_config({"beta_schedule": "scaled_linear"}).zero_terminal_snr is False
    assert NoiseSchedule.from_config({"rescale_betas_zero_snr": True}).zero_terminal_snr is True


def test_nearly_no_signal_is_not_zero_snr():
    schedule = NoiseSchedule(torch.tensor([0.9, 0.5, 1e-12]))
    assert not schedule.zero_terminal_snr
    assert schedule.sigma_max == pytest.approx(1e6)
