"""Sheets of pictures and their numbers, from networks whose answers are known."""

import math

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers import CLIPTextConfig, CLIPTextModel

from ztsnr.checkpoints.latent_scaling import LatentScaling
from ztsnr.data.tokens import batch_prompts, encode_prompts
from ztsnr.demo.small_model import SmallModelSize, write_small_model
from ztsnr.diagnostics.ideal_models import GaussianCanvas, v_network
from ztsnr.samplers import NoiseSchedule, ZTSNRScheduler
from ztsnr.training.config import WatchSettings
from ztsnr.training.networks import Tokenize, load_networks
from ztsnr.training.previews import LABEL, Previews

SIDE = 32
SIZE = SmallModelSize(
    side=SIDE, factor=2, widths=(16, 32), attention=(False, True), layers=1, text_widths=(16, 24), norm_groups=4
)
COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "grey": (128, 128, 128),
}
SETTINGS = WatchSettings(preview_steps=4, guidance=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small SDXL whose VAE is linear: a latent is the mean colour of 2 x 2 pixels."""
    return write_small_model(tmp_path_factory.mktemp("small") / "model", ["solid"], SIZE)


@pytest.fixture
def networks(folder):
    return load_networks(folder)


def latents_of(networks, colour):
    """The U-Net's latents (4, 1, 1) of a colour."""
    pixels = torch.tensor(colour).float()[None, :, None, None].expand(-1, -1, SIDE, SIDE) / 127.5 - 1
    with torch.no_grad():
        return networks.latent_scaling.to_model(networks.vae.encode(pixels).latent_dist.mean)[0, :, :1, :1]


def answer_by(networks, denoise, schedule):
    """A stand-in for the U-Net: one that answers as a model in closed form does."""
    network = v_network(denoise, schedule)

    def forward(sample, timestep, *args, **kwargs):
        return UNet2DConditionOutput(sample=network(sample, timestep))

    networks.unet.forward = forward


def constant(x0):
    return lambda x, sigma: x0.to(x).expand_as(x)


@pytest.mark.parametrize("colour", ["black", "red", "grey"])
def test_errors_of_a_network_that_always_answers_one_colour(networks, colour):
    schedule = NoiseSchedule.sdxl()
    answer_by(networks, constant(latents_of(networks, COLOURS[colour])), schedule)
    sheet, metrics = Previews(networks, schedule, "v_prediction", WatchSettings(preview_steps=4, leak=False)).make()
    assert list(metrics) == [f"preview/solid {name} background" for name in COLOURS]
    for name, asked in COLOURS.items():
        expected = np.abs(np.subtract(COLOURS[colour], asked)).mean()
        assert metrics[f"preview/solid {name} background"] == pytest.approx(expected, abs=0.6)
    # six of them, in rows of four, each below its label
    assert sheet.size == (4 * SIDE, 2 * (SIDE + LABEL))
    pixels = np.asarray(sheet).astype(int)
    first = pixels[LABEL : LABEL + SIDE, :SIDE]
    assert np.abs(first - COLOURS[colour]).max() <= 1
    assert (pixels[SIDE + LABEL :, 2 * SIDE :] == 255).all()  # where there is none
    assert (pixels[:LABEL, :SIDE] < 128).any()  # the label


def test_prompts_of_the_user_are_on_the_sheet_too(networks):
    settings = WatchSettings(preview_steps=2, leak=False, prompts=("a cat", "a dog=#102030"), preview_size=(48, 32))
    sheet, metrics = Previews(networks, NoiseSchedule.sdxl(), "v_prediction", settings).make()
    assert sheet.size == (4 * 48, 2 * (32 + LABEL))
    assert "preview/a dog" in metrics  # whose colour is told
    assert "preview/a cat" not in metrics


def test_the_same_every_time_and_from_pure_noise(networks):
    previews = Previews(networks, NoiseSchedule.sdxl(), "v_prediction", SETTINGS)
    seen = []
    own = networks.unet.forward

    def watched(sample, timestep, **kwargs):
        seen.append((float(timestep), sample.std().item()))
        return own(sample, timestep, **kwargs)

    networks.unet.forward = watched
    sheet, metrics = previews.make()
    torch.manual_seed(1)
    again, same = previews.make()
    assert np.array_equal(np.asarray(sheet), np.asarray(again))
    assert metrics == same
    assert seen[0][0] == 999
    assert seen[0][1] == pytest.approx(1, abs=0.1)
    assert isinstance(networks.pipeline.scheduler, ZTSNRScheduler)
    assert math.isinf(networks.pipeline.scheduler.schedule.sigma_max)


def test_the_leak_of_models_in_closed_form(networks):
    """Of zero terminal SNR there is none.  At sigma 14.6 x0 follows the noise mean by alpha V / (alpha^2 V + s^2)."""
    tau, count = 0.5, (SIDE // 2) ** 2
    canvas = GaussianCanvas(0.0, brightness_std=tau, texture_std=0.3)

    def exact_at_the_end(x, sigma):
        return torch.zeros_like(x) if math.isinf(sigma) else canvas(x, sigma)

    found = {}
    for zero in (True, False):
        schedule = NoiseSchedule.sdxl(zero_terminal_snr=zero)
        answer_by(networks, exact_at_the_end, schedule)
        _, metrics = Previews(networks, schedule, "v_prediction", SETTINGS).make()
        found[zero] = metrics["leak/slope"], metrics["leak/share of peak"]
    assert found[True] == pytest.approx((0, 0), abs=1e-6)
    abar = 1 / (1 + 14.614641**2)
    variance = tau**2 * count
    expected = abar**0.5 * variance / (abar * variance + 1 - abar)
    assert found[False][0] == pytest.approx(expected, rel=1e-4)
    assert found[False][1] > 0.1


def test_the_schedule_that_is_trained_is_sampled(networks):
    """A shifted one too, of which the betas alone tell; and epsilon."""
    shifted = NoiseSchedule.sdxl().shifted(2.0)
    Previews(networks, shifted, "v_prediction", SETTINGS)
    found = networks.pipeline.scheduler.schedule
    torch.testing.assert_close(found.alphas_cumprod, shifted.alphas_cumprod, rtol=1e-9, atol=1e-15)

    plain = NoiseSchedule.sdxl(zero_terminal_snr=False)
    Previews(networks, plain, "epsilon", SETTINGS)
    scheduler = networks.pipeline.scheduler
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.schedule.sigma_max == pytest.approx(14.614641, rel=1e-6)


def test_nothing_is_printed(networks, capfd):
    Previews(networks, NoiseSchedule.sdxl(), "v_prediction", SETTINGS).make()
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_sd_1_with_latents_scaled_channel_by_channel(networks, folder, tmp_path):
    """Whose pipeline of diffusers knows nothing of a mean: the previews decode by themselves, and rightly."""
    config = {**networks.text_encoders[0].config.to_dict(), "hidden_size": 40, "num_attention_heads": 2}
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=40,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    StableDiffusionPipeline(
        vae=networks.vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**config)),
        tokenizer=networks.tokenizers[0],
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "sd1")
    sd = load_networks(tmp_path / "sd1")
    assert not sd.is_sdxl
    scaling = LatentScaling((0.3, -0.2, 0.1, 0.05), (0.7, 0.5, 1.3, 0.9))
    sd.vae.register_to_config(**scaling.vae_config(sd.vae.config.scaling_factor))
    sd.latent_scaling = scaling
    schedule = NoiseSchedule.sdxl()
    answer_by(sd, constant(latents_of(sd, COLOURS["blue"])), schedule)
    _, metrics = Previews(sd, schedule, "v_prediction", WatchSettings(preview_steps=2, leak=False)).make()
    assert metrics["preview/solid blue background"] == pytest.approx(0, abs=0.6)
    assert metrics["preview/solid white background"] == pytest.approx(170, abs=0.6)


@pytest.mark.parametrize("empty_text", [True, False])
def test_prompts_are_encoded_as_captions_are_trained(networks, empty_text):
    """Of any length and unescaped; guidance subtracts the encoded empty text, or zeros where no caption is dropped."""
    settings = WatchSettings(preview_steps=2, leak=False, prompts=("a" + ", solid" * 60, r"solid \(cat\)"))
    previews = Previews(networks, NoiseSchedule.sdxl(), "v_prediction", settings, empty_text=empty_text)
    tokenize = Tokenize(networks)
    with torch.no_grad():
        for prompt in settings.prompts:
            hidden, pooled = encode_prompts(batch_prompts([tokenize(prompt)]), networks.text_encoders)
            empty, empty_pooled = encode_prompts(batch_prompts([tokenize("")]), networks.text_encoders)
            found = previews._encode(prompt)
            torch.testing.assert_close(found["prompt_embeds"], hidden)
            torch.testing.assert_close(found["pooled_prompt_embeds"], pooled)
            repeated = empty.repeat(1, hidden.shape[1] // 77, 1)
            torch.testing.assert_close(found["negative_prompt_embeds"], repeated * empty_text)
            torch.testing.assert_close(found["negative_pooled_prompt_embeds"], empty_pooled * empty_text)
    assert hidden.shape[1] == 77
    sheet, _ = previews.make()
    assert sheet.size == (4 * SIDE, 2 * (SIDE + LABEL))
