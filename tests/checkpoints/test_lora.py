"""LoRAs of peft in kohya's format: the names, and that every reader changes the weights by the same."""

import json
import shutil
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints import inspect_checkpoint
from ztsnr.checkpoints.layouts import unet_modules
from ztsnr.checkpoints.lora import export_lora

from ..full_size import unet_shapes
from ..tiny_pipelines import make_tiny_sdxl

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny SDXL with v-prediction and zero terminal SNR; not to be changed."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny")


def load_unet(model):
    return diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet")


def make_adapter(model, folder, *, targets=ATTENTION, **config):
    """Save a LoRA of random weights, and return the changes that peft itself makes by it: layer -> difference."""
    config = {"r": 4, "lora_alpha": 8, **config}
    unet = load_unet(model)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(unet, peft.LoraConfig(target_modules=list(targets), **config))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(folder)
    after = wrapped.merge_and_unload().state_dict()
    assert before.keys() == after.keys()
    changes = {name: after[name] - before[name] for name in before}
    return {name.removesuffix(".weight"): change for name, change in changes.items() if change.any()}


def read_changes(file, unet):
    """The change of each layer by a file in kohya's format: up @ down * alpha / rank.  By the single file's names."""
    tensors = load_file(file)
    names = {f"lora_unet_{new.replace('.', '_')}": old for old, new in unet_modules(unet.state_dict()).items()}
    changes = {}
    for name in sorted({name.split(".")[0] for name in tensors}):
        down, up = tensors.pop(f"{name}.lora_down.weight"), tensors.pop(f"{name}.lora_up.weight")
        alpha = tensors.pop(f"{name}.alpha")
        assert (alpha.shape, alpha.dtype) == ((), torch.float32)
        product = (up.flatten(1).double() @ down.flatten(1).double()).reshape(len(up), *down.shape[1:])
        changes[names[name]] = alpha.item() / len(down) * product
    assert not tensors
    return changes


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn2.to_k": 16, "mid_block.*to_v": 1}},
        {"targets": ("conv1", "conv_shortcut", "conv", "proj_in", "proj_out", "time_emb_proj", "ff.net.0.proj")},
    ],
    ids=lambda config: "_".join(config) or "plain",
)
def test_the_weights_change_by_what_peft_changes_them(model, tmp_path, config):
    expected = make_adapter(model, tmp_path / "adapter", **config)
    export_lora(tmp_path / "adapter", tmp_path / "lora.safetensors", model=model)
    changes = read_changes(tmp_path / "lora.safetensors", load_unet(model))
    assert changes.keys() == expected.keys()
    assert len(changes) > 8
    for layer, change in changes.items():
        assert torch.allclose(change.float(), expected[layer], rtol=1e-5, atol=1e-5)


def test_diffusers_applies_it_the_same(model, tmp_path):
    expected = make_adapter(model, tmp_path / "adapter", lora_alpha=6)
    export_lora(tmp_path / "adapter", tmp_path / "lora.safetensors", model=model)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(model)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = pipeline.unet.state_dict()
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == expected.keys()
    for layer, change in expected.items():
        assert torch.allclose(after[f"{layer}.weight"] - before[f"{layer}.weight"], change, rtol=1e-4, atol=1e-4)


def test_names_of_sdxl_are_those_of_the_single_file(tmp_path, write_checkpoint):
    """As in every LoRA that sd-scripts trained for SDXL."""
    full = full_size(tmp_path / "sdxl", write_checkpoint, "SDXL base", prediction_type="v_prediction")
    block = "transformer_blocks"
    layers = {
        f"down_blocks.1.attentions.0.{block}.1.attn2.to_k": f"input_blocks_4_1_{block}_1_attn2_to_k",
        "down_blocks.2.resnets.0.conv_shortcut": "input_blocks_7_0_skip_connection",
        "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
        "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        f"up_blocks.1.attentions.2.{block}.0.ff.net.0.proj": f"output_blocks_5_1_{block}_0_ff_net_0_proj",
        "up_blocks.2.resnets.2.time_emb_proj": "output_blocks_8_0_emb_layers_1",
    }
    write_adapter(tmp_path / "adapter", layers, unet_shapes("SDXL base"))
    export_lora(tmp_path / "adapter", tmp_path / "lora.safetensors", model=full)
    assert modules(tmp_path / "lora.safetensors") == {f"lora_unet_{name}" for name in layers.values()}
    report = inspect_checkpoint(tmp_path / "lora.safetensors")
    assert (report.format, report.architecture) == ("LoRA", "SDXL base")
    assert report.metadata.pop("modelspec.hash_sha256").startswith("0x")
    assert report.metadata == {
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "sgm",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": "1024x1024",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "lora",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_alpha": "2.0",
        "ss_network_dim": "1",
        "ss_network_module": "networks.lora",
        "ss_v_parameterization": "True",
        "ss_zero_terminal_snr": "False",
    }


@pytest.mark.parametrize(("name", "width"), [("SD 1.x", 768), ("SD 2.x", 1024)])
def test_names_of_sd_are_those_of_diffusers(tmp_path, write_checkpoint, name, width):
    full = full_size(tmp_path / "sd", write_checkpoint, name)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    write_adapter(tmp_path / "adapter", [layer], unet_shapes(name))
    export_lora(tmp_path / "adapter", tmp_path / "lora.safetensors", model=full)
    assert modules(tmp_path / "lora.safetensors") == {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    }
    report = inspect_checkpoint(tmp_path / "lora.safetensors")
    assert (report.architecture, report.prediction_type) == (name, None)  # no scheduler says
    tensors = load_file(tmp_path / "lora.safetensors")
    assert [tensor.shape for key, tensor in tensors.items() if "down" in key.split(".")[1]] == [(1, width)]


def full_size(folder, write_checkpoint, name, **scheduler):
    """A folder with a U-Net that is all header."""
    write_checkpoint(folder / "unet" / "diffusion_pytorch_model.safetensors", unet_shapes(name))
    (folder / "scheduler").mkdir()
    if scheduler:
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def write_adapter(folder, layers, unet, config=None, prefix="base_model.model."):
    """A LoRA of rank 1 for some layers, of ones."""
    tensors = {}
    for layer in layers:
        outputs, *inputs = unet[f"{layer}.weight"]
        tensors[f"{prefix}{layer}.lora_A.weight"] = torch.ones(1, *inputs)
        tensors[f"{prefix}{layer}.lora_B.weight"] = torch.ones(outputs, 1, *(1 for _ in inputs[1:]))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config or {"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    return folder


def modules(file):
    return {name.split(".")[0] for name in load_file(file)}


def test_the_state_of_an_adapter_in_the_network(model, tmp_path):
    """As a trainer saves it that adds the adapter to diffusers' U-Net itself: without the prefix."""
    unet = load_unet(model)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"])
    unet.add_adapter(config)
    config.save_pretrained(tmp_path / "adapter")
    state = peft.get_peft_model_state_dict(unet)
    assert not any(name.startswith("base_model") for name in state)
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    export_lora(tmp_path / "adapter", tmp_path / "lora.safetensors", model=model)
    assert len(modules(tmp_path / "lora.safetensors")) == len(state) // 2 > 0


def test_precision(model, tmp_path):
    make_adapter(model, tmp_path / "adapter", lora_alpha=1.001)  # in half precision it would be 1.001 no more
    export_lora(tmp_path / "adapter", tmp_path / "whole.safetensors", model=model)
    export_lora(tmp_path / "adapter", tmp_path / "half.safetensors", model=model, dtype=torch.float16)
    whole, half = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "half.safetensors")
    for name, tensor in whole.items():
        assert torch.equal(half[name], tensor if name.endswith("alpha") else tensor.half())
    report = inspect_checkpoint(tmp_path / "whole.safetensors")
    assert (report.prediction_type, report.zero_terminal_snr) == ("v_prediction", True)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.fixture
def adapter(model, tmp_path):
    make_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


LAYER = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: edit_config(a, use_dora=True), "is the config of a DoRA"),
        (lambda a: edit_config(a, lora_alpha=None), "has no valid lora_alpha"),
        (lambda a: edit_config(a, lora_alpha=float("nan")), "has no valid lora_alpha"),
        (lambda a: edit_config(a, alpha_pattern={"to_q": "8"}), "has no valid lora_alpha"),
        (lambda a: edit_config(a, alpha_pattern={"to_q(": 8}), "not a regular expression"),
        (lambda a: edit_config(a, peft_type="LOKR"), "not a readable config of a peft LoRA"),
        (lambda a: (a / "adapter_config.json").unlink(), "not a readable config of a peft LoRA"),
        (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "is a pickle"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "there is no file"),
        (
            lambda a: edit_tensors(a, lambda t: t | {f"{LAYER}.lora_magnitude_vector": torch.ones(8)}),
            "more than a plain LoRA.*lora_magnitude_vector",
        ),
        (lambda a: edit_tensors(a, lambda t: {}), "has no tensors"),
        (
            lambda a: edit_tensors(a, lambda t: {n: x for n, x in t.items() if n != f"{LAYER}.lora_B.weight"}),
            "lacks lora_A or lora_B for 'mid_block",
        ),
        (
            lambda a: edit_tensors(a, lambda t: t | {f"{LAYER}.lora_B.weight": torch.ones(16, 5)}),
            r"is \(16, 16\) there, but the matrices of the LoRA are \(4, 16\) and \(16, 5\)",
        ),
        (
            lambda a: edit_tensors(a, lambda t: t | {f"{LAYER}.lora_A.weight": torch.ones(4, 9)}),
            r"is \(16, 16\) there, but the matrices of the LoRA are \(4, 9\) and \(16, 4\)",
        ),
        (
            lambda a: edit_tensors(a, lambda t: t | {f"{LAYER}.lora_A.weight": torch.ones(())}),
            r"but the matrices of the LoRA are \(\) and \(16, 4\)",
        ),
        (
            lambda a: edit_tensors(a, lambda t: {n.replace("mid_block", "mid_blocks"): x for n, x in t.items()}),
            "does not fit the U-Net of .*, which lacks 'mid_blocks",
        ),
        (
            lambda a: edit_tensors(
                a, lambda t: {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}
            ),
            "which lacks 'a'",
        ),
    ],
)
def test_adapters_that_are_refused(adapter, model, tmp_path, change, sentence):
    change(adapter)
    with pytest.raises(ValueError, match=sentence):
        export_lora(adapter, tmp_path / "lora.safetensors", model=model)
    assert not (tmp_path / "lora.safetensors").exists()


def test_arguments(adapter, model, tmp_path):
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(ValueError, match="already exists"):
        export_lora(adapter, tmp_path / "there.safetensors", model=model)
    with pytest.raises(ValueError, match="must end in"):
        export_lora(adapter, tmp_path / "lora.pt", model=model)
    with pytest.raises(ValueError, match=r"not torch\.int8"):
        export_lora(adapter, tmp_path / "lora.safetensors", model=model, dtype=torch.int8)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (unet,) = (other / "unet").glob("*.safetensors")
    unet.unlink()
    with pytest.raises(ValueError, match="not a diffusers folder of a model with a U-Net"):
        export_lora(adapter, tmp_path / "lora.safetensors", model=other)
