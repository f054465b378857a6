import math
import time
import warnings

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ztsnr.diagnostics import GaussianMixture
from ztsnr.samplers import SOLVERS, SPACINGS, NoiseSchedule, ZTSNRWarning, make_betas, sample, step_schedule
from ztsnr.samplers.spectral import spectral_sigmas
from ztsnr.samplers.step_schedules import range_start

PLAIN, ZERO = NoiseSchedule.sdxl(zero_terminal_snr=False), NoiseSchedule.sdxl()
COSINE = NoiseSchedule.from_betas(make_betas("squaredcos_cap_v2"), zero_terminal_snr=True)
REACHING = [spacing for spacing in SPACINGS if spacing != "leading"]


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZTSNRWarning)
        return step_schedule(*args, **kwargs)


@settings(deadline=None, max_examples=150)
@given(
    steps=st.one_of(st.integers(1, 60), st.integers(61, 1500)),
    spacing=st.sampled_from(SPACINGS),
    schedule=st.sampled_from([PLAIN, ZERO, COSINE, ZERO.shifted(2), ZERO.shifted(0.5)]),
    side=st.integers(1, 512),
    denoise=st.one_of(st.just(1.0), st.floats(0.2, 1, exclude_max=True)),
)
def test_every_schedule_is_sound(steps, spacing, schedule, side, denoise):
    sigmas = quietly(schedule, steps, spacing, latent_size=(side, side), denoise=denoise)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float64
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all() or math.isinf(sigmas[0])
    assert (sigmas[1:].diff() < 0).all()
    assert sigmas[1:].isfinite().all()
    if denoise < 1:
        assert sigmas[0].isfinite()
    elif schedule.zero_terminal_snr and (spacing != "leading" or steps > 999):
        assert math.isinf(sigmas[0])
    else:
        assert sigmas[0].isfinite()
    assert sigmas[-2] >= schedule.sigma_min * (1 - 1e-9)


@settings(deadline=None, max_examples=100)
@given(
    steps=st.integers(1, 60),
    spacing=st.sampled_from(["spectral", "karras", "exponential", "polyexponential", "kl_optimal"]),
    schedule=st.sampled_from([ZERO, COSINE]),
    sigma_start=st.floats(0.03, 1e6),
    guidance=st.sampled_from([0.0, 1.0, 1.5, 5.0, 20.0]),
)
def test_every_start_is_sound(steps, spacing, schedule, sigma_start, guidance):
    sigma_start = max(sigma_start, 1.01 * schedule.sigma_min)
    sigmas = step_schedule(schedule, steps, spacing, sigma_start=sigma_start, guidance=guidance)
    assert math.isinf(sigmas[0])
    assert (sigmas[1:].diff() < 0).all()
    if spacing == "spectral":  # which keeps a little room for its last step
        sigma_start = max(sigma_start, 2 * schedule.sigma_min)
    if steps > 2:
        assert sigmas[1] == pytest.approx(sigma_start)
    assert sigmas[-1] == 0
    picture = sample(lambda x, sigma: torch.tanh(x), torch.randn(1, 1, 2, 2), sigmas)
    assert picture.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.sampled_from(REACHING), st.sampled_from(SOLVERS), st.integers(0, 2**31))
def test_every_solver_stays_finite_on_every_schedule(steps, spacing, solver, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 3, 4, 4, generator=generator)
    sigmas = step_schedule(ZERO, steps, spacing, latent_size=(4, 4))
    picture = sample(lambda x, sigma: torch.tanh(x), noise, sigmas, solver, generator=generator)
    assert picture.isfinite().all()


def test_trailing_is_diffusers_without_rounding():
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
    for steps in (1, 10, 20, 25, 28, 30, 50):
        theirs.set_timesteps(steps)
        ours = ZERO.timestep(step_schedule(ZERO, steps, "trailing")[:-1])
        assert np.abs(ours.numpy() - theirs.timesteps.numpy()).max() <= (0.5 if 1000 % steps else 1e-6)


@pytest.mark.parametrize("steps", [1, 10, 20, 28, 30, 1000])
def test_leading_is_what_sdxl_ships(steps):
    theirs = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(steps)
    ours = ZERO.timestep(quietly(ZERO, steps, "leading")[:-1])
    if steps < 1000:  # at 1000 steps diffusers asks for timestep 1000, which does not exist
        assert np.allclose(ours, theirs.timesteps, atol=1e-6)
        with pytest.warns(ZTSNRWarning, match="never runs t = 999"):
            step_schedule(ZERO, steps, "leading")
    else:
        assert math.isinf(step_schedule(ZERO, steps, "leading")[0])


def test_leading_does_not_warn_without_zero_snr():
    step_schedule(PLAIN, 20, "leading")  # ZTSNRWarning is an error in this suite


def test_karras_exponential_and_kl_optimal_closed_forms():
    sigmas = step_schedule(ZERO, 11, "karras", sigma_start=80.0)[1:-1].numpy()
    low, high = ZERO.sigma_min ** (1 / 7), 80 ** (1 / 7)
    assert np.allclose(sigmas, [(high + i / 9 * (low - high)) ** 7 for i in range(10)])
    ratios = step_schedule(ZERO, 11, "exponential", sigma_start=80.0)[1:-1].numpy()
    assert np.allclose(ratios[1:] / ratios[:-1], (ZERO.sigma_min / 80) ** (1 / 9))
    angles = np.arctan(step_schedule(ZERO, 11, "kl_optimal", sigma_start=80.0)[1:-1].numpy())
    assert np.allclose(np.diff(angles, 2), 0)
    poly = step_schedule(ZERO, 11, "polyexponential", sigma_start=80.0)
    assert np.allclose(poly[1:-1], ratios)
    steeper = step_schedule(ZERO, 11, "polyexponential", sigma_start=80.0, rho=2)[1:-1].log().numpy()
    assert np.allclose((steeper - steeper[-1]) / (steeper[0] - steeper[-1]), np.linspace(1, 0, 10) ** 2)


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_beta_agrees_with_scipy(steps):
    expected = 999 * scipy.stats.beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6)
    assert np.allclose(ZERO.timestep(step_schedule(ZERO, steps, "beta")[:-1]), expected, atol=1e-3)


def test_align_your_steps_keeps_its_published_timesteps():
    published = [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
    assert np.allclose(ZERO.timestep(step_schedule(ZERO, 10, "ays")[:-1]), published, atol=1e-6)
    # and, on the schedule it was made for, the sigmas that other programs tabulate
    sigmas = [
        14.6146412,
        6.3184485,
        3.768179,
        2.1811481,
        1.3405245,
        0.8620721,
        0.5550693,
        0.3798540,
        0.2332364,
        0.1114188,
    ]
    assert np.allclose(step_schedule(PLAIN, 10, "ays")[:-1], sigmas, rtol=1e-6)


@pytest.mark.parametrize(("steps", "lengths"), [(2, 1), (8, 1), (14, 3), (20, 5), (100, 5)])
def test_finite_range_starts_where_canvas_and_steps_ask(steps, lengths):
    for spacing in ("karras", "exponential", "polyexponential"):
        for size in ((128, 128), (64, 256)):
            assert step_schedule(ZERO, steps, spacing, latent_size=size)[1] == pytest.approx(lengths * 128)
    assert step_schedule(ZERO, steps, "kl_optimal", latent_size=(64, 256))[1] == pytest.approx(128)


@pytest.mark.parametrize("spacing", ["spectral", "karras", "exponential", "polyexponential", "kl_optimal"])
def test_a_range_starts_where_it_is_told(spacing):
    assert step_schedule(ZERO, 20, spacing, sigma_start=60.0)[1] == pytest.approx(60)
    assert step_schedule(ZERO, 20, spacing, sigma_start=60.0, latent_size=(128, 128))[1] == pytest.approx(60)
    assert step_schedule(PLAIN, 20, spacing, sigma_start=9.0)[0] == pytest.approx(9)
    assert step_schedule(PLAIN, 20, spacing)[0] == pytest.approx(PLAIN.sigma_max)


@pytest.mark.parametrize(("solver", "steps"), [("euler", 28), ("euler", 50), ("dpmpp_2m", 20), ("dpmpp_2m", 28)])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_nine_black_pictures_to_one_white_keep_their_share(spacing, solver, steps):
    """Brightness alone, as a coordinate of the canvas; the noise is the quantiles of a Gaussian."""
    side, value = 128, 2.4
    model = GaussianMixture(torch.tensor([[-value], [value]]) * side, [0.9, 0.1], 0.6)
    noise = torch.special.ndtri((torch.arange(2000, dtype=torch.float64)[:, None] + 0.5) / 2000)
    sigmas = step_schedule(ZERO, steps, spacing, latent_size=(side, side))
    assert (sample(model, noise.float(), sigmas, solver) < 0).double().mean() == pytest.approx(0.9, abs=0.02)
    # from one canvas length the step from infinity would have decided it
    sigmas = step_schedule(ZERO, steps, spacing, sigma_start=side)
    assert (sample(model, noise.float(), sigmas, solver) < 0).double().mean() > 0.98


def test_spectral_without_guidance_is_even_in_log_sigma():
    sigmas = step_schedule(ZERO, 20, latent_size=(128, 128), guidance=1)[1:-1].log()
    assert torch.allclose(sigmas.diff(), sigmas.diff()[0])
    assert sigmas[0].exp() == pytest.approx(5 * 128)
    assert step_schedule(ZERO, 10, latent_size=(128, 128), guidance=1)[1] == pytest.approx(3 * 128)  # span less


def test_spectral_is_denser_where_guidance_makes_the_flow_stiff():
    """The noise at which a prompt decides brightness, somewhat below the length of the canvas."""

    def steps_per_e_fold(guidance, low, high):
        sigmas = step_schedule(ZERO, 28, latent_size=(128, 128), guidance=guidance)[1:-1]
        return ((sigmas > low) & (sigmas < high)).sum().item() / math.log(high / low)

    assert steps_per_e_fold(1, 20, 90) == pytest.approx(steps_per_e_fold(1, 0.3, 3), rel=0.35)
    assert steps_per_e_fold(5, 20, 90) > 1.7 * steps_per_e_fold(5, 0.3, 3)
    for spacing in SPACINGS:  # and spectral alone
        plain, guided = (quietly(ZERO, 28, spacing, latent_size=(9, 9), guidance=scale) for scale in (1, 5))
        assert torch.equal(plain, guided) is (spacing != "spectral")


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 40, 100, 300])
def test_spectral_is_quick_deterministic_and_cached(steps):
    durations = []
    for _ in range(5):
        spectral_sigmas.cache_clear()
        start = time.process_time()
        first = step_schedule(ZERO, steps, latent_size=(128, 128))
        durations.append(time.process_time() - start)
        assert torch.equal(first, step_schedule(ZERO, steps, latent_size=(128, 128)))
        assert spectral_sigmas.cache_info().hits == 1
    assert min(durations) < 0.05


@pytest.mark.parametrize(
    ("steps", "denoise", "whole"), [(20, 0.5, 40), (14, 0.7, 20), (20, 0.8, 25), (20, 0.999, 21), (21, 0.7, 30)]
)
def test_denoise_drops_the_head(steps, denoise, whole):
    for spacing in REACHING:
        full = step_schedule(ZERO, whole, spacing, latent_size=(64, 64))
        assert torch.equal(
            step_schedule(ZERO, steps, spacing, latent_size=(64, 64), denoise=denoise), full[-steps - 1 :]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "whole number"),
        ({"steps": -3}, "whole number"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": True}, "whole number"),
        ({"spacing": "simple"}, "unknown spacing"),
        ({}, "needs latent_size"),
        ({"spacing": "karras"}, "needs latent_size"),
        ({"latent_size": (0, 64)}, "at least 1 x 1"),
        ({"latent_size": 64}, "height, width"),
        ({"latent_size": (64,)}, "height, width"),
        ({"sigma_start": math.inf}, "finite"),
        ({"sigma_start": 0.001}, "finite"),
        ({"sigma_start": math.nan}, "finite"),
        ({"latent_size": (8, 8), "guidance": -1.0}, "guidance must be a finite number of at least 0, not -1"),
        ({"latent_size": (8, 8), "guidance": math.nan}, "guidance must be a finite number"),
        ({"latent_size": (8, 8), "guidance": math.inf}, "guidance must be a finite number"),
        ({"spacing": "trailing", "sigma_start": 50.0}, "takes no sigma_start"),
        ({"spacing": "trailing", "rho": 7.0}, "takes no rho; leave it out, or choose karras and polyexponential"),
        ({"spacing": "karras", "sigma_start": 9.0, "rho": 0.0}, "positive"),
        ({"spacing": "trailing", "denoise": 0}, "denoise"),
        ({"spacing": "trailing", "denoise": 1.5}, "denoise"),
        ({"spacing": "trailing", "denoise": 1e-9}, "more than 100000"),
        ({"spacing": "trailing", "steps": 10**9}, "more than 100000"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        step_schedule(ZERO, **{"steps": 20, **arguments})


def test_schedulers_of_other_programs_start_at_the_canvas_length():
    """ComfyUI's, of which some have a name here and some have none."""
    assert range_start("linear_quadratic", 20) == 1
    assert range_start("kl_optimal", 20) == 1
    assert range_start("karras", 20) == 5
