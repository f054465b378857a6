"""A trained network is asked as diffusers asks it, picture by picture, from any start, with and without guidance."""

import math

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from ztsnr.checkpoints import to_single_file
from ztsnr.demo import networks as module
from ztsnr.demo.networks import DemoNetwork
from ztsnr.demo.small_model import COLOUR_TO_LATENT, SCALING_FACTOR
from ztsnr.samplers import NoiseSchedule

from .tiny_network import SIDE, write_tiny_network

CAPTIONS = ("a red frog", "completely black", "a white frog on black")
LIMIT = 2e-5  # of the norm; float32 differs by 1e-6, another caption by 1e-3
KINDS = {
    "epsilon": {},
    "v": {"prediction_type": "v_prediction"},
    "v, shifted": {"prediction_type": "v_prediction", "shift": 0.25},
    "v, zero SNR": {"prediction_type": "v_prediction", "zero_snr": True, "shift": 0.25},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("networks")
    return {
        kind: write_tiny_network(place / str(number), **options) for number, (kind, options) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def networks(folders):
    return {kind: DemoNetwork(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def network(networks):
    return networks["v, zero SNR"]


def plainly(pipe, x, t, caption):
    """The U-Net's answer to one state, by its own call."""
    hidden, _, pooled, _ = pipe.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[SIDE, SIDE, 0.0, 0, SIDE, SIDE]])}
    with torch.no_grad():
        return pipe.unet(x[None], t, encoder_hidden_states=hidden, added_cond_kwargs=added).sample[0]


# ----------------------------------------------------------------------------------------------------------------------
# What it is, and its answers


def test_it_is_what_its_files_say(networks):
    for kind, options in KINDS.items():
        network = networks[kind]
        assert network.prediction_type == options.get("prediction_type", "epsilon")
        zero = options.get("zero_snr", False)
        assert network.schedule.zero_terminal_snr == zero
        expected = options.get("shift", 1) * NoiseSchedule.sdxl(zero_terminal_snr=zero).sigma(500.0)
        assert network.schedule.sigma(500.0) == pytest.approx(expected, rel=1e-9)
        assert network.shape == (4, SIDE, SIDE)


def test_a_single_file_is_the_same_network(folders, network, tmp_path):
    to_single_file(folders["v, zero SNR"], tmp_path / "model.safetensors")
    for config in ("epsilon", "v, zero SNR"):  # what the settings say of the schedule does not matter
        same = DemoNetwork(tmp_path / "model.safetensors", folders[config])
        assert same.prediction_type == "v_prediction"
        t = torch.arange(999.0)
        torch.testing.assert_close(same.schedule.sigma(t), network.schedule.sigma(t), rtol=1e-9, atol=0)
        x, t = network.noise([0]), torch.tensor([999.0])
        torch.testing.assert_close(same.predict(x, t, CAPTIONS[:1]), network.predict(x, t, CAPTIONS[:1]))


def test_the_noise_of_a_seed_is_always_the_same(network):
    noise = network.noise([5, 6, 5])
    assert noise.shape == (3, 4, SIDE, SIDE)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[1], network.noise([6])[0])
    assert not torch.equal(noise[0], noise[1])
    many = network.noise(range(200))
    assert many.mean().item() == pytest.approx(0, abs=5 / many.numel() ** 0.5)
    assert many.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_each_state_is_asked_about_with_its_own_caption_and_timestep(networks, monkeypatch, batch):
    monkeypatch.setattr(module, "BATCH", batch)
    network = networks["epsilon"]
    x, t = network.noise(range(3)), torch.tensor([10.0, 400, 999])
    found = network.predict(x, t, CAPTIONS)
    expected = torch.stack([plainly(network.pipe, *row) for row in zip(x, t, CAPTIONS, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # it can be told when a caption or a timestep is another one's
    for other in (network.predict(x, t, CAPTIONS[::-1]), network.predict(x, t.flip(0), CAPTIONS)):
        assert (found - other)[0].abs().max() > 0.01


def test_in_bfloat16_the_answers_are_nearly_the_same(folders, network):
    half = DemoNetwork(folders["v, zero SNR"], dtype=torch.bfloat16)
    assert half.pipe.unet.dtype == torch.bfloat16
    x, t = network.noise(range(3)), torch.tensor([10.0, 400, 999])
    found, expected = half.predict(x, t, CAPTIONS), network.predict(x, t, CAPTIONS)
    assert found.dtype == torch.float32
    assert 0 < relative(found, expected) < 0.02
    latents = half.sample(CAPTIONS, x, [math.inf, 2.0, 0.0], "euler", 4.0)
    assert latents.dtype == torch.float32
    assert half.pictures(latents).shape == (3, SIDE, SIDE, 3)


@pytest.mark.parametrize(("kind", "t"), [("epsilon", 999), ("v", 700), ("v, zero SNR", 700), ("v, zero SNR", 999)])
def test_what_is_denoised_is_the_picture_that_the_answer_stands_for(networks, kind, t):
    network = networks[kind]
    x = network.noise(range(3))
    output = torch.stack([plainly(network.pipe, row, t, text) for row, text in zip(x, CAPTIONS, strict=True)])
    abar = float(published(zero="zero" in kind)[t])
    sigma = KINDS[kind].get("shift", 1) * ((1 - abar) / abar) ** 0.5 if abar else math.inf
    alpha, s = (1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)) if abar else (0.0, 1.0)
    expected = (x - s * output) / alpha if kind == "epsilon" else alpha * x - s * output
    assert relative(network.denoise(CAPTIONS)(x, sigma), expected) < LIMIT


def published(zero):
    """(1000,) alphas_cumprod of SDXL, with Algorithm 1 of arXiv 2305.08891 or without."""
    roots = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2) ** 0.5
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 if zero else roots**2


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


def test_guidance_of_1_is_the_conditional_answer(network):
    x = network.noise(range(3))
    for sigma in (math.inf, 2.0):
        conditional = network.denoise(CAPTIONS)(x, sigma)
        assert torch.equal(network.denoise(CAPTIONS, 1.0)(x, sigma), conditional)
        # and nobody asks the unconditional one
        never = network.denoise(CAPTIONS, 1, join=None)
        assert torch.equal(never(x, sigma), conditional)


@pytest.mark.parametrize("scale", [0.0, 4.0, 7.5])
@pytest.mark.parametrize("sigma", [math.inf, 2.0])
def test_guidance_leads_away_from_the_empty_caption(network, scale, sigma):
    x = network.noise(range(3))
    conditional, unconditional = (network.denoise(texts)(x, sigma) for texts in (CAPTIONS, [""] * 3))
    expected = unconditional + scale * (conditional - unconditional)
    found = network.denoise(CAPTIONS, scale)(x, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - conditional).abs().max() > 0.01


def test_another_way_to_join_is_given_both_and_the_scale(network):
    x, seen = network.noise([0]), []

    def join(*arguments):
        seen.append(arguments)
        return arguments[1]

    answer = network.denoise(["a red frog"], 3.0, join)(x, 1.0)
    assert torch.equal(answer, network.denoise([""])(x, 1.0))
    assert torch.equal(seen[0][0], network.denoise(["a red frog"])(x, 1.0))
    assert seen[0][2] == 3.0


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def test_a_start_at_infinity_is_the_noise_and_a_finite_one_its_part(network):
    noise = network.noise(range(2))
    texts = CAPTIONS[:2]
    # one step ends at the first prediction
    for sigma, scale in ((math.inf, 1.0), (2.0, 2 / 5**0.5)):
        found = network.sample(texts, noise, [sigma, 0.0], "euler")
        torch.testing.assert_close(found, network.denoise(texts)(scale * noise, sigma), rtol=1e-5, atol=1e-5)


def test_sampling_shows_each_prediction(network):
    seen = []
    sigmas = [math.inf, 4.0, 1.0, 0.0]
    network.sample(["a frog"], network.noise([0]), sigmas, "euler", 4.0, lambda *shown: seen.append(shown))
    assert [(number, sigma) for number, sigma, *_ in seen] == list(enumerate(sigmas[:-1]))
    torch.testing.assert_close(seen[0][3], network.denoise(["a frog"], 4.0)(network.noise([0]), math.inf))


def test_default_steps_begin_at_infinity(network):
    sigmas = network.default_sigmas(7, 1.0)
    assert len(sigmas) == 8
    assert sigmas[0] == math.inf
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_pictures_of_a_batch_are_those_of_each_alone(network):
    noise = network.noise(range(3))
    together = network.sample(CAPTIONS, noise, [math.inf, 3.0, 0.5, 0.0], "euler", 4.0)
    for i, caption in enumerate(CAPTIONS):
        alone = network.sample([caption], noise[i : i + 1], [math.inf, 3.0, 0.5, 0.0], "euler", 4.0)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_as_published_is_what_diffusers_own_pipeline_makes(folders, networks, kind, guidance):
    pipe = StableDiffusionXLPipeline.from_pretrained(folders[kind], add_watermarker=False)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", steps_offset=1
    )
    pipe.set_progress_bar_config(disable=True)
    network, steps = networks[kind], 5
    noise = network.noise(range(3))
    options = {"latents": noise, "num_inference_steps": steps, "height": SIDE, "width": SIDE, "output_type": "latent"}
    empty = {"negative_prompt": [""] * 3} if guidance != 1 else {}
    expected = pipe(list(CAPTIONS), guidance_scale=guidance, **empty, **options).images
    found = network.sample_as_published(CAPTIONS, noise, steps, guidance)
    assert relative(found, expected) < LIMIT
    others = network.sample_as_published(CAPTIONS[::-1], noise, steps, guidance)
    assert relative(others, expected) > 50 * LIMIT


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def test_levels_of_latents(network):
    colours = torch.rand(2, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0)) * 400 - 60
    latents = SCALING_FACTOR * (colours / 127.5 - 1) @ COLOUR_TO_LATENT.T
    found = network.levels(latents.movedim(-1, 1))
    assert (found.dtype, found.shape) == (np.float32, (2, SIDE, SIDE, 3))
    np.testing.assert_allclose(found, colours, atol=0.1)  # beyond 0 and 255 too
    pictures = network.pictures(latents.movedim(-1, 1))
    assert pictures.dtype == np.uint8
    np.testing.assert_allclose(pictures, colours.clamp(0, 255), atol=0.6)


def test_another_side(folders):
    network = DemoNetwork(folders["epsilon"], side=32)
    assert network.shape == (4, 32, 32)
    latents = network.sample_as_published(["a frog"], network.noise([0]), 2)
    assert network.pictures(latents).shape == (1, 32, 32, 3)
