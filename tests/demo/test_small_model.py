"""The small model is SDXL in all but its numbers: words are tokens, the VAE is the linear map it should be."""

import numpy as np
import pytest
import torch

from ztsnr.checkpoints import inspect_checkpoint, to_single_file, verify_checkpoint
from ztsnr.checkpoints.pipeline import load_pipeline
from ztsnr.demo.composed import Composer
from ztsnr.demo.small_model import SCALING_FACTOR, SIZES, linear_vae, word_vocabulary, write_small_model
from ztsnr.training.networks import load_networks

COMPOSER = Composer()
WORDS = sorted({word for caption in COMPOSER.captions() for word in caption.split()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("small") / "model", WORDS, SIZES["cpu"], seed=1)


@pytest.fixture(scope="module")
def networks(folder):
    return load_networks(folder)


def test_it_loads_as_sdxl_and_is_sound(folder, networks, tmp_path):
    assert networks.is_sdxl
    assert networks.factor == SIZES["cpu"].factor
    assert load_pipeline(folder).prediction_type == "epsilon"
    assert verify_checkpoint(folder).sound
    to_single_file(folder, tmp_path / "model.safetensors")
    assert verify_checkpoint(tmp_path / "model.safetensors").sound
    assert inspect_checkpoint(folder).zero_terminal_snr is False


def test_equal_seeds_give_equal_weights(networks, tmp_path):
    same = load_networks(write_small_model(tmp_path / "same", WORDS, SIZES["cpu"], seed=1))
    other = load_networks(write_small_model(tmp_path / "other", WORDS, SIZES["cpu"], seed=2))
    for part in ("unet", "vae"):
        weights = [getattr(model, part).state_dict() for model in (networks, same)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(networks.unet.conv_in.weight, other.unet.conv_in.weight)


def test_every_word_is_a_token_of_its_own(networks):
    for tokenizer in networks.tokenizers:
        for word in WORDS:
            assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
        for caption in COMPOSER.captions()[::50]:
            tokens = tokenizer(caption, add_special_tokens=False).input_ids
            assert len(tokens) == len(caption.split())
            assert tokenizer.decode(tokens).strip() == caption


def test_other_words_are_spelled(networks):
    tokenizer = networks.tokenizers[0]
    tokens = tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(tokens) > 1
    assert tokenizer.unk_token_id not in tokens[:-1]
    assert tokenizer.decode(tokens).strip() == "zebra"


def test_words_that_break_each_other_up_are_spelled_and_not_refused():
    # "ab" needs (a, b) before (b, a), and "ba" the other way round, in "aba" and "bab"
    tokens, merges = word_vocabulary(["aba", "bab", "cat"])
    assert "cat</w>" in tokens
    assert len(merges) == len(set(merges))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_latent_is_the_mean_colour_of_its_pixels(factor):
    vae = linear_vae(factor, 16 * factor)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 8 * factor, 12 * factor, generator=generator) * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    assert posterior.std.max() < 1e-6
    red, green, blue = torch.nn.functional.avg_pool2d(pixels, factor).unbind(1)
    expected = torch.stack([red + green + blue, red - green - blue, green - red - blue, blue - red - green], 1) / 2
    torch.testing.assert_close(posterior.mean, expected, rtol=0, atol=1e-4)
    flat = torch.nn.functional.avg_pool2d(pixels, factor).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    torch.testing.assert_close(vae.decode(posterior.mean).sample, flat, rtol=0, atol=2e-4)


def test_latents_of_the_pictures_have_a_standard_deviation_near_1(networks):
    random = np.random.default_rng(0)
    pictures = np.stack([COMPOSER.picture(COMPOSER.draw(random), random) for _ in range(200)])
    pixels = torch.from_numpy(pictures).movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        latents = networks.latent_scaling.to_model(networks.vae.encode(pixels).latent_dist.mean)
    assert latents.square().mean().sqrt().item() == pytest.approx(1, abs=0.2)
    assert networks.latent_scaling.scaling_factor == pytest.approx(SCALING_FACTOR)


def test_a_factor_is_a_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        linear_vae(3, 48)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_its_pictures_fit_its_levels(size):
    latent = size.side // size.factor
    assert latent % (1 << len(size.widths) - 1) == 0
    assert all(width % size.norm_groups == 0 for width in size.widths)
    assert np.log2(size.factor) % 1 == 0
