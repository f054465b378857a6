"""The networks that training works on, beside the pipelines of diffusers that hold them; tiny, of all three kinds."""

import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ztsnr.checkpoints import to_single_file
from ztsnr.checkpoints.latent_scaling import LatentScaling
from ztsnr.data.tokens import batch_prompts
from ztsnr.errors import UserError
from ztsnr.training.networks import (
    AdapterSettings,
    Denoiser,
    Tokenize,
    add_adapter,
    check_finite,
    in_groups,
    load_networks,
    trained_names,
)
from ztsnr.training.precision import MixedPrecision

from ..checkpoints.tiny_folders import make_tiny_folders, rewrite
from ..tiny_pipelines import make_tiny_sdxl

KINDS = ("SDXL", "SD 1.x", "SD 2.x")
PROMPT = "solid red background"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_tiny_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny SDXL as networks come out of their constructors, with answers of about 1."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "tiny")


def question(networks, batch=2):
    unet = networks.unet.config
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(batch, unet.in_channels, 16, 16, generator=random)
    return noisy, torch.tensor([999, 500][:batch]), torch.tensor([[32.0, 32, 0, 0, 32, 32]] * batch)


def tokens_of(networks, *prompts):
    tokenize = Tokenize(networks)
    return batch_prompts([tokenize(prompt) for prompt in prompts])


@torch.no_grad()
def asked_by_diffusers(networks, prompt):
    """The U-Net's answer as the pipeline's own loop asks for it."""
    pipe = networks.pipeline
    noisy, t, time_ids = question(networks)
    encoded = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=len(t), do_classifier_free_guidance=False)
    added = {"text_embeds": encoded[2], "time_ids": time_ids} if networks.is_sdxl else None
    return pipe.unet(noisy, t, encoder_hidden_states=encoded[0], added_cond_kwargs=added).sample


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_the_pipelines_from_a_folder_and_from_a_file(folders, kind, tmp_path):
    networks = load_networks(folders[kind])
    assert networks.is_sdxl == (kind == "SDXL")
    assert networks.factor == 2  # of the tiny VAE
    assert networks.pipeline.unet is networks.unet
    assert networks.pipeline.text_encoder is networks.text_encoders[0]
    expected = asked_by_diffusers(networks, PROMPT)

    to_single_file(folders[kind], tmp_path / "model.safetensors")
    for loaded in (networks, load_networks(tmp_path / "model.safetensors", folders[kind])):
        noisy, t, time_ids = question(loaded)
        with torch.no_grad():
            answer = Denoiser(loaded)(noisy, t, tokens_of(loaded, PROMPT, PROMPT), time_ids)
        torch.testing.assert_close(answer, expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())


def test_prompts_and_sizes_reach_the_answer(folders):
    networks = load_networks(folders["SDXL"])
    noisy, t, time_ids = question(networks)
    with torch.no_grad():
        denoiser = Denoiser(networks)
        answer = denoiser(noisy, t, tokens_of(networks, PROMPT, PROMPT), time_ids)
        other_prompt = denoiser(noisy, t, tokens_of(networks, PROMPT, "blue"), time_ids)
        other_size = denoiser(noisy, t, tokens_of(networks, PROMPT, PROMPT), time_ids + torch.tensor([[0.0], [8]]))
    for other in (other_prompt, other_size):
        torch.testing.assert_close(other[0], answer[0], rtol=1e-4, atol=1e-3)
        assert (other[1] - answer[1]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sizes_stay_whole_numbers_in_half_precision(trained, dtype):
    networks = load_networks(trained)
    denoiser = Denoiser(networks)
    precise = MixedPrecision(denoiser, dtype, trained_names(denoiser, adapter=False, text_encoders=False))
    seen = []
    networks.unet.add_time_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    noisy, t, time_ids = question(networks, batch=1)
    time_ids[0, :2] = torch.tensor([1215.0, 2049.0])  # of which bfloat16 makes 1216 and 2048, float16 2048 of the last
    assert time_ids.to(dtype).float().ne(time_ids).any()
    answer = precise(noisy.to(dtype), t, tokens_of(networks, PROMPT), time_ids)
    assert answer.dtype == dtype
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == [1215, 2049, 0, 0, 32, 32]


def test_tokens_are_padded_as_comfyui_pads_them(trained):
    networks = load_networks(trained)
    first, second = Tokenize(networks)("a!")
    begin, end = networks.tokenizers[0].bos_token_id, networks.tokenizers[0].eos_token_id
    words = networks.tokenizers[0]("a!", add_special_tokens=False).input_ids
    assert first.shape == second.shape == (1, 77)
    for chunk, pad in ((first, end), (second, 0)):  # CLIP ViT-L by its end, OpenCLIP by "!"
        assert chunk[0].tolist() == [begin, *words, end] + [pad] * (75 - len(words))
    assert [chunks.shape for chunks in Tokenize(networks, max_chunks=2)("a" * 400)] == [(2, 77)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_scaled_as_the_model_is_published(folders, kind):
    networks = load_networks(folders[kind])
    factor = networks.vae.config.scaling_factor
    assert networks.latent_scaling == LatentScaling.of_vae_config({"scaling_factor": factor})
    z = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(networks.latent_scaling.to_model(z), z * factor)


# ----------------------------------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_blocks_share_out_the_unet(folders, kind):
    denoiser = Denoiser(load_networks(folders[kind]))
    names = trained_names(denoiser, adapter=False, text_encoders=False)
    groups = {group: in_groups(names, [group]) for group in ("time", "down", "mid", "up")}
    assert sum(map(len, groups.values())) == len(names)
    assert set().union(*groups.values()) == set(names) == in_groups(names, ["all"])
    blocks = {int(match[1]) for name in names if (match := re.match(r"unet\.up_blocks\.(\d)", name))}
    last = max(blocks)
    of_blocks = set().union(*(in_groups(names, [f"up.{number}"]) for number in blocks))
    assert of_blocks == {name for name in groups["up"] if ".up_blocks." in name}
    assert in_groups(names, ["up.0"]).isdisjoint(in_groups(names, [f"up.{last}"]))
    attention = in_groups(names, ["attention"])
    assert attention
    assert all(".attentions." in name for name in attention)
    assert in_groups(names, ["mid", "up"]) == groups["mid"] | groups["up"]
    assert {"unet.conv_out.weight", "unet.conv_norm_out.bias"} <= groups["up"]
    assert "unet.conv_in.weight" in groups["down"]


def test_groups_that_do_not_exist(trained):
    denoiser = Denoiser(load_networks(trained))
    names = trained_names(denoiser, adapter=False, text_encoders=False)
    for group in ("uup", "up.7", "text", ""):
        with pytest.raises(
            ValueError, match=f"nothing that is trained belongs to '{group}': choose from all, text, time"
        ):
            in_groups(names, ["mid", group])
    both = trained_names(denoiser, adapter=False, text_encoders=True)
    assert {name.split(".")[1] for name in in_groups(both, ["text"])} == {"0", "1"}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_has_a_gradient_is_trained(folders, kind):
    """And nothing else, which DistributedDataParallel would wait for: the U-Net does not see the last layer of SDXL's
    first text encoder.
    """
    networks = load_networks(folders[kind])
    denoiser = Denoiser(networks).requires_grad_(True)
    noisy, t, time_ids = question(networks)
    denoiser(noisy, t, tokens_of(networks, PROMPT, "blue"), time_ids).square().mean().backward()
    reached = {name for name, parameter in denoiser.named_parameters() if parameter.grad is not None}
    assert set(trained_names(denoiser, adapter=False, text_encoders=True)) == reached
    assert reached < set(dict(denoiser.named_parameters())) or kind != "SDXL"


@pytest.mark.parametrize("text_encoders", [False, True])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_adapters_change_nothing_at_first_and_are_all_that_is_trained(trained, kind, text_encoders):
    networks = load_networks(trained)
    denoiser = Denoiser(networks)
    noisy, t, time_ids = question(networks)
    tokens = tokens_of(networks, PROMPT, "")
    with torch.no_grad():
        before = denoiser(noisy, t, tokens, time_ids)
    add_adapter(networks.unet, AdapterSettings(kind, rank=2, alpha=4.0))
    names = trained_names(denoiser, adapter=True, text_encoders=text_encoders)
    assert all(f"{kind}_" in name or (text_encoders and name.startswith("text_encoders.")) for name in names)
    assert any(name.startswith("text_encoders.") for name in names) == text_encoders

    denoiser.requires_grad_(False)
    precise = MixedPrecision(denoiser, torch.float32, names)
    after = precise(noisy, t, tokens, time_ids)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    after.square().mean().backward()
    for name, parameter in precise.masters.items():
        assert parameter.grad is not None, name
    adapters = [p.grad for name, p in precise.masters.items() if f"{kind}_" in name]
    assert any(grad.abs().max() > 0 for grad in adapters)
    rest = [parameter for name, parameter in denoiser.named_parameters() if name not in precise.masters]
    assert rest
    assert all(parameter.grad is None for parameter in rest)


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "lokr"])
def test_with_an_adapter_the_unet_is_one_graph_and_draws_nothing(trained, kind):
    """peft's LoKr would draw a random number in each layer, at which torch.compile ends a graph."""
    networks = load_networks(trained)
    add_adapter(networks.unet, AdapterSettings(kind, rank=2))
    denoiser = Denoiser(networks).train().eval().train()
    assert networks.unet.training
    torch._dynamo.reset()
    networks.unet.compile(backend="eager", fullgraph=True)
    noisy, t, time_ids = question(networks)
    torch.manual_seed(3)
    denoiser(noisy, t, tokens_of(networks, PROMPT, ""), time_ids).sum().backward()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_adapters_begin_alike_on_all_ranks_and_leave_the_random_numbers_alone(trained):
    made = []
    for seed in (1, 2):
        networks = load_networks(trained)
        torch.manual_seed(seed)
        add_adapter(networks.unet, AdapterSettings(rank=2))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))
        made.append({name: p for name, p in networks.unet.named_parameters() if "lora_" in name})
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(parameter, made[1][name]) for name, parameter in made[0].items())


def test_an_adapter_of_layers_that_do_not_exist(trained):
    with pytest.raises(ValueError, match="has no layer named to_nothing or nor_this"):
        add_adapter(load_networks(trained).unet, AdapterSettings(target_modules=("to_nothing", "nor_this")))


def test_loading_leaves_the_files_alone_and_everything_in_float32(trained):
    networks = load_networks(trained)
    assert {parameter.dtype for parameter in Denoiser(networks).parameters()} == {torch.float32}
    (file,) = (trained / "unet").glob("*.safetensors")
    there = load_file(file)
    assert all(torch.equal(parameter, there[name]) for name, parameter in networks.unet.named_parameters())


@pytest.mark.parametrize(
    ("part", "tensor"),
    [("unet", "conv_in.weight"), ("text_encoder_2", "text_projection.weight"), ("vae", "decoder.conv_out.bias")],
)
def test_weights_that_are_not_finite_are_named(trained, tmp_path, part, tensor):
    folder = shutil.copytree(trained, tmp_path / "broken")

    def spoil(tensors):
        spoilt = tensors[tensor].clone()
        spoilt.view(-1)[1] = math.nan
        return tensors | {tensor: spoilt}

    rewrite(folder, part, spoil)
    with pytest.raises(UserError, match=rf"^1 of the \d+ numbers of {part}\.{tensor} in .*broken are not finite"):
        load_networks(folder)


def test_large_weights_are_no_broken_ones():
    layer = torch.nn.Linear(2, 2)
    layer.weight.data.fill_(3e38)
    check_finite("model", unet=layer)
