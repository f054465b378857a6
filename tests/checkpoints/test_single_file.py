"""Diffusers folders as single files and back: real networks, tiny and random, and the names of the full-size ones."""

import filecmp
import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints import inspect_checkpoint, stream, to_folder
from ztsnr.checkpoints.header import read_header
from ztsnr.checkpoints.layouts import unet_layout
from ztsnr.checkpoints.mark import mark_checkpoint
from ztsnr.checkpoints.single_file import _mark as mark
from ztsnr.checkpoints.single_file import modelspec, single_file_tensors, to_single_file

from ..full_size import networks, shapes, unet_shapes
from ..tiny_pipelines import write_single_file
from .tiny_folders import PARTS, PIPELINES, convert, grow, make_tiny_folders, rewrite, run_alone, set_scheduler, weights

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_tiny_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def sdxl(folders):
    return folders["SDXL"]


@pytest.fixture
def copy(sdxl, tmp_path):
    """A folder of tiny SDXL, to be changed."""
    return Path(shutil.copytree(sdxl, tmp_path / "copy"))


@pytest.fixture(scope="module")
def reference(sdxl, tmp_path_factory):
    """The bytes of tiny SDXL's single file, named model.safetensors."""
    return convert(sdxl, tmp_path_factory.mktemp("reference")).read_bytes()


def data_of(path, name):
    header = read_header(path)
    entry = header.tensors[name]
    return path.read_bytes()[header.data_start + entry.begin : header.data_start + entry.end]


def write_full_size(folder, write_checkpoint, name):
    """A folder of the full-size model whose files are all header."""
    for part, network in networks(name).items():
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        write_checkpoint(folder / part / f"{stem}.safetensors", shapes(network))
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("model", PARTS)
def test_diffusers_reads_the_same_networks(folders, tmp_path, model):
    file = convert(folders[model], tmp_path)
    kind = PIPELINES[model]
    pipeline = kind.from_single_file(str(file), config=str(folders[model]), local_files_only=True)
    plain = kind.from_pretrained(folders[model])
    for part in PARTS[model]:
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(plain, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("model", PARTS)
def test_there_and_back_and_there_again(folders, tmp_path, model):
    file = convert(folders[model], tmp_path)
    to_folder(file, tmp_path / "back", config=folders[model])
    for part in PARTS[model]:
        ours, theirs = weights(tmp_path / "back", part), weights(folders[model], part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = convert(tmp_path / "back", tmp_path / "again")
    assert again.read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "back", "model.safetensors"]


def test_as_another_writer_writes_it(sdxl, reference, tmp_path):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    theirs = load_file(write_single_file(pipeline, tmp_path / "theirs.safetensors", marks=("v_pred", "ztsnr")))
    (tmp_path / "ours.safetensors").write_bytes(reference)
    ours = load_file(tmp_path / "ours.safetensors")
    positions = ours.pop("conditioner.embedders.0.transformer.text_model.embeddings.position_ids")
    assert torch.equal(positions, torch.arange(77)[None])
    assert ours.pop("conditioner.embedders.1.model.logit_scale").exp().item() == pytest.approx(100)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_projection_that_is_not_symmetric_is_turned(sdxl, reference, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(reference)
    projection = load_file(tmp_path / "model.safetensors")["conditioner.embedders.1.model.text_projection"]
    linear = weights(sdxl, "text_encoder_2")["text_projection.weight"]
    assert (projection.shape, linear.shape) == ((24, 16), (16, 24))
    assert torch.equal(projection, linear.T)


# ----------------------------------------------------------------------------------------------------------------------
# What folders look like


def test_sharded_networks(sdxl, reference, tmp_path):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*-of-*.safetensors"))) > 2
    assert convert(tmp_path / "sharded", tmp_path).read_bytes() == reference
    pipeline.save_pretrained(tmp_path / "both", max_shard_size="100KB", variant="fp16")
    assert not list((tmp_path / "both" / "unet").glob("diffusion_pytorch_model.safetensors*index.json"))
    assert convert(tmp_path / "both", tmp_path / "2").read_bytes() == reference


def test_one_version_only(sdxl, reference, tmp_path):
    diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl).save_pretrained(tmp_path / "fp16", variant="fp16")
    assert (tmp_path / "fp16" / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert convert(tmp_path / "fp16", tmp_path).read_bytes() == reference


def test_the_plain_files_go_before_versions(copy, reference, tmp_path):
    unet = copy / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(copy / "vae" / "diffusion_pytorch_model.safetensors", unet.with_name(f"{unet.stem}.fp16.safetensors"))
    assert convert(copy, tmp_path).read_bytes() == reference


def toggle_prefix(tensors):
    if any(name.startswith("text_model.") for name in tensors):
        return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return {f"text_model.{name}": tensor for name, tensor in tensors.items()}


def test_text_encoders_of_every_transformers(copy, reference, tmp_path):
    before = weights(copy, "text_encoder").keys()
    rewrite(copy, "text_encoder", toggle_prefix)
    assert not before & weights(copy, "text_encoder").keys()
    assert convert(copy, tmp_path).read_bytes() == reference
    rewrite(copy, "text_encoder_2", toggle_prefix)
    assert "encoder.layers.0.mlp.fc1.weight" in weights(copy, "text_encoder_2")
    assert convert(copy, tmp_path / "2").read_bytes() == reference


def test_old_folders(copy, reference, tmp_path):
    """diffusers before 0.12 named the VAE's attention otherwise; transformers before 4.31 kept the position numbers."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for new, before in old.items():
            tensors = {name.replace(f"0.{new}.", f"0.{before}."): tensor for name, tensor in tensors.items()}
        return tensors

    rewrite(copy, "vae", rename)
    assert "decoder.mid_block.attentions.0.query.weight" in weights(copy, "vae")
    for part in ("text_encoder", "text_encoder_2"):
        root = "text_model." if "text_model.final_layer_norm.bias" in weights(copy, part) else ""
        numbers = {f"{root}embeddings.position_ids": torch.arange(77)[None]}
        rewrite(copy, part, lambda tensors, numbers=numbers: tensors | numbers)
    assert convert(copy, tmp_path).read_bytes() == reference


# ----------------------------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float32, "F32")])
def test_precision(sdxl, reference, tmp_path, dtype, name):
    (tmp_path / "whole.safetensors").write_bytes(reference)
    whole, cast = load_file(tmp_path / "whole.safetensors"), load_file(convert(sdxl, tmp_path, dtype=dtype))
    assert whole.keys() == cast.keys()
    for key, tensor in whole.items():
        expected = tensor.to(dtype) if tensor.numel() and tensor.is_floating_point() else tensor
        assert cast[key].dtype == expected.dtype
        assert torch.equal(cast[key], expected)
    assert inspect_checkpoint(tmp_path / "model.safetensors").precision[name] > 0.99
    if dtype == torch.float32:
        assert (tmp_path / "model.safetensors").read_bytes() == reference


def test_each_tensor_keeps_its_own_precision(copy, tmp_path):
    rewrite(copy, "unet", lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    file = convert(copy, tmp_path)
    types = {name.split(".")[0]: entry.dtype for name, entry in read_header(file).tensors.items() if entry.nbytes}
    assert types == {"model": "F16", "first_stage_model": "F32", "conditioner": "F32"}
    with safe_open(file, "pt") as opened:
        header = read_header(file)
        assert header.data_start % 8 == 0
        widths = {"F16": 2, "F32": 4, "I64": 8}
        assert all(entry.begin % widths[entry.dtype] == 0 for entry in header.tensors.values())
        assert set(opened.keys()) == set(header.tensors)


def test_numbers_too_large_for_half_precision(copy, tmp_path):
    def enlarge(tensors):
        tensors["conv_out.bias"][1] = 1e6
        return tensors

    rewrite(copy, "unet", enlarge)
    with pytest.raises(ValueError, match=r"out\.2\.bias has numbers that F16 cannot hold"):
        convert(copy, tmp_path, dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    file = convert(copy, tmp_path, dtype=torch.bfloat16)
    assert load_file(file)[f"{UNET}out.2.bias"][1] == torch.tensor(1e6).bfloat16()


def test_what_is_no_number_stays_so(copy, tmp_path):
    def spoil(tensors):
        tensors["conv_out.bias"][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        return tensors

    rewrite(copy, "unet", spoil)
    bias = load_file(convert(copy, tmp_path, dtype=torch.float16))[f"{UNET}out.2.bias"]
    assert bias[0].isnan()
    assert bias[1:3].tolist() == [float("inf"), -float("inf")]


# ----------------------------------------------------------------------------------------------------------------------
# Marks


def test_marks_and_metadata(sdxl, reference, tmp_path):
    file = tmp_path / "noob v-pred.safetensors"
    to_single_file(sdxl, file)
    report = inspect_checkpoint(file)
    assert (report.prediction_type, report.zero_terminal_snr) == ("v_prediction", True)
    assert report.warnings == ()
    header = read_header(file)
    assert all(
        (header.tensors[name].dtype, header.tensors[name].shape) == ("F32", (0,)) for name in ("v_pred", "ztsnr")
    )
    digest = hashlib.sha256(file.read_bytes()[header.data_start :]).hexdigest()
    assert header.metadata == {
        "modelspec.hash_sha256": f"0x{digest}",
        "modelspec.prediction_type": "v",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "noob v-pred",
    }


def test_marking_it_once_more_changes_nothing(sdxl, reference, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(reference)
    (tmp_path / "again").mkdir()
    mark_checkpoint(
        tmp_path / "model.safetensors", v_pred=True, ztsnr=True, out=tmp_path / "again" / "model.safetensors"
    )
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == reference


@pytest.mark.parametrize(
    ("config", "marks", "prediction_type"),
    [
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}, {"v_pred"}, "v"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": False}, set(), "epsilon"),
    ],
)
def test_marks_are_what_the_scheduler_says(copy, tmp_path, config, marks, prediction_type):
    set_scheduler(copy, **config)
    header = read_header(convert(copy, tmp_path))
    assert header.tensors.keys() & {"v_pred", "ztsnr"} == marks
    assert header.metadata["modelspec.prediction_type"] == prediction_type


@pytest.mark.parametrize("channels", [8, 9])
def test_models_that_edit_are_not_named(tmp_path, write_checkpoint, channels):
    """ModelSpec has other names for them, where it has any."""
    unet = shapes(networks("SD 1.x")["unet"])
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    for width, named in ((4, True), (channels, False)):
        write_checkpoint(file, unet | {"conv_in.weight": (320, width, 3, 3)})
        report = inspect_checkpoint(tmp_path)
        assert report.architecture == "SD 1.x"
        assert ("modelspec.architecture" in modelspec(report, "title")) == named
        assert ("modelspec.resolution" in modelspec(report, "title")) == named


def test_full_size_models_are_named(tmp_path, write_checkpoint):
    folder = write_full_size(tmp_path, write_checkpoint, "SDXL base")
    (folder / "scheduler").mkdir()
    set_scheduler(folder, prediction_type="v_prediction")
    _, metadata = mark({}, {}, inspect_checkpoint(folder), "noob")  # not the 7 GB of it
    assert metadata == {
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "sgm",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": "1024x1024",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "noob",
    }


# ----------------------------------------------------------------------------------------------------------------------
# Into the user's own file


@pytest.fixture(scope="module")
def base(sdxl, tmp_path_factory):
    """A half-precision epsilon file of tiny SDXL, with a tensor of its own and in an order of its own."""
    place = tmp_path_factory.mktemp("base")
    file = convert(sdxl, place, dtype=torch.float16)
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in ("v_pred", "ztsnr")}
    tensors["scale_factor"] = torch.tensor(0.5)
    metadata = {"modelspec.title": "Base", "modelspec.predict_key": "epsilon", "author": "Ölaf"}
    save_file(tensors, place / "base.safetensors", metadata=metadata)
    return place / "base.safetensors"


@pytest.fixture
def trained(copy):
    """A folder with another U-Net and the scheduler, and nothing else."""
    rewrite(copy, "unet", lambda tensors: {name: tensor + 0.125 for name, tensor in tensors.items()})
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(copy / part)
    return copy


def test_the_trained_network_is_merged_and_nothing_else_changes(sdxl, base, trained, tmp_path):
    file = convert(trained, tmp_path, base=base)
    ours, theirs = read_header(file), read_header(base)
    assert ours.tensors.keys() - theirs.tensors.keys() == {"v_pred", "ztsnr"}
    alone = load_file(convert(sdxl, tmp_path / "alone", dtype=torch.float16))
    merged = load_file(file)
    for name, entry in theirs.tensors.items():
        new = ours.tensors[name]
        # even the places are the same
        assert (new.dtype, new.shape, new.begin, new.end) == (entry.dtype, entry.shape, entry.begin, entry.end)
        if name.startswith(UNET):
            assert not torch.equal(merged[name], alone[name])
        else:
            assert data_of(file, name) == data_of(base, name)
    mapped = load_file(convert_unet_alone(sdxl, trained, tmp_path / "whole"))
    assert all(torch.equal(merged[name], mapped[name]) for name in merged if name.startswith(UNET))
    report = inspect_checkpoint(file)
    assert (report.prediction_type, report.zero_terminal_snr, report.warnings) == ("v_prediction", True, ())
    assert report.metadata["author"] == "Ölaf"
    assert report.metadata["modelspec.title"] == "model"
    digest = hashlib.sha256(file.read_bytes()[ours.data_start :]).hexdigest()
    assert report.metadata["modelspec.hash_sha256"] == f"0x{digest}"


def test_what_belongs_to_the_bases_own_network_is_not_merged(base, trained, tmp_path):
    stale = {"model_ema.decay", "model_ema.diffusion_modelout2bias", "alphas_cumprod", "denoiser.sigmas"}
    save_file(load_file(base) | {name: torch.ones(4) for name in stale}, tmp_path / "stale.safetensors")
    names = read_header(convert(trained, tmp_path, base=tmp_path / "stale.safetensors")).tensors.keys()
    assert names == read_header(base).tensors.keys() | {"v_pred", "ztsnr"}


def convert_unet_alone(sdxl, trained, place):
    """The same network by way of a whole folder."""
    whole = Path(shutil.copytree(sdxl, place))
    shutil.copytree(trained / "unet", whole / "unet", dirs_exist_ok=True)
    return convert(whole, place / "out", dtype=torch.float16)


def test_the_merged_network_has_the_precision_that_is_asked_for(base, trained, tmp_path):
    file = convert(trained, tmp_path, base=base, dtype=torch.float32)
    types = {
        (name.startswith(UNET), entry.dtype) for name, entry in read_header(file).tensors.items() if entry.nbytes > 8
    }
    assert types == {(True, "F32"), (False, "F16"), (False, "I64")}
    assert all(data_of(file, n) == data_of(base, n) for n in read_header(base).tensors if not n.startswith(UNET))
    merged, whole = load_file(file), weights(trained, "unet")
    assert torch.equal(merged[f"{UNET}out.2.bias"], whole["conv_out.bias"])


def test_a_base_keeps_its_marks_where_the_folder_says_nothing(base, trained, tmp_path):
    marked = convert(trained, tmp_path, base=base)
    shutil.rmtree(trained / "scheduler")
    again = convert(trained, tmp_path / "2", base=marked)
    assert again.read_bytes() == marked.read_bytes()
    (trained / "scheduler").mkdir()
    set_scheduler(trained, prediction_type="epsilon")
    third = convert(trained, tmp_path / "3", base=marked)
    assert not {"v_pred", "ztsnr"} & read_header(third).tensors.keys()
    assert inspect_checkpoint(third).prediction_type == "epsilon"


def test_a_base_that_is_marked_for_swarm_stays_so(base, trained, tmp_path):
    swarm = mark_checkpoint(base, v_pred=True, ztsnr=True, swarm=True, out=tmp_path / "swarm.safetensors")
    assert read_header(swarm).metadata["modelspec.prediction_type"] == "v-zsnr"
    for i, (changes, expected) in enumerate(
        (
            ({}, "v-zsnr"),
            ({"rescale_betas_zero_snr": False}, "v"),
            ({"prediction_type": "epsilon"}, "epsilon"),
        )
    ):
        set_scheduler(trained, **changes)
        file = convert(trained, tmp_path / str(i), base=swarm)
        assert read_header(file).metadata["modelspec.prediction_type"] == expected


def test_a_base_in_eight_bits_needs_a_word(base, trained, tmp_path):
    tensors = load_file(base)
    eight = {n: t.to(torch.float8_e4m3fn) if n.startswith(UNET) else t for n, t in tensors.items()}
    save_file(eight, tmp_path / "eight.safetensors")
    with pytest.raises(ValueError, match="keeps its U-Net in F8_E4M3: set dtype"):
        convert(trained, tmp_path, base=tmp_path / "eight.safetensors")
    convert(trained, tmp_path, base=tmp_path / "eight.safetensors", dtype=torch.bfloat16)


def test_bases_that_do_not_match(folders, base, trained, tmp_path):
    with pytest.raises(ValueError, match=r"has another kind of U-Net than .*only one of them has 'model"):
        convert(folders["SD 1.x"], tmp_path, base=base)
    tensors = load_file(base)
    tensors[f"{UNET}out.2.bias"] = torch.zeros(9)
    save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"out\.2\.bias is \(9,\), not \(4,\)"):
        convert(trained, tmp_path, base=tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="has no U-Net with the names of single files"):
        convert(trained, tmp_path, base=next((folders["SDXL"] / "vae").glob("*.safetensors")))
    with pytest.raises(ValueError, match="is a pickle"):
        convert(trained, tmp_path, base=tmp_path / "base.ckpt")
    assert not (tmp_path / "model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


def add_tensors(*names):
    return lambda tensors: tensors | {name: torch.zeros(2) for name in names}


def drop_tensor(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        (
            "unet",
            add_tensors("a.weight", "b", "c", "d", "e"),
            "the U-Net has tensors that a single file has no place for: 'a.weight', 'b', 'c' and 2 more$",
        ),
        ("unet", drop_tensor("conv_out.bias"), "the U-Net lacks 'conv_out.bias'$"),
        ("unet", drop_tensor("mid_block.resnets.1.conv2.weight"), "lacks 'mid_block.resnets.1.conv2.weight'"),
        ("vae", drop_tensor("quant_conv.weight"), "the VAE lacks 'quant_conv.weight'"),
        ("vae", add_tensors("decoder.up_blocks.7.resnets.0.conv1.weight"), "the VAE has tensors that a single file"),
        ("text_encoder", drop_tensor("final_layer_norm.bias"), "the text encoder lacks 'final_layer_norm.bias'"),
        (
            "text_encoder",
            add_tensors("encoder.layers.1.mlp.fc3.weight"),
            "the text encoder has tensors that a single file",
        ),
        (
            "text_encoder_2",
            drop_tensor("text_model.encoder.layers.1.self_attn.k_proj.bias"),
            "lacks 'text_model.encoder.layers.1.self_attn.k_proj.bias'",
        ),
        (
            "text_encoder_2",
            drop_tensor("text_model.final_layer_norm.weight"),
            "the text encoder lacks 'text_model.final_layer_norm.weight'$",
        ),
        (
            "text_encoder_2",
            lambda tensors: tensors | {"text_projection.weight": torch.zeros(24)},
            r"a tensor of shape \(24,\) is not a matrix",
        ),
        (
            "vae",
            lambda tensors: tensors | {"quant_conv.bias": torch.zeros(0)},
            r"'quant_conv.bias' has the shape \(0,\), which weights cannot have",
        ),
        (
            "text_encoder_2",
            lambda tensors: tensors | {"text_model.embeddings.position_embedding.weight": torch.zeros(())},
            r"has the shape \(\), which weights cannot have",
        ),
        (
            "text_encoder_2",
            lambda tensors: tensors | {"text_model.encoder.layers.1.self_attn.k_proj.bias": torch.zeros(24).half()},
            "differ in type or width",
        ),
    ],
)
def test_networks_that_are_not_whole(copy, tmp_path, part, change, sentence):
    if part == "text_encoder" and "text_model.final_layer_norm.bias" in weights(copy, part):
        rewrite(copy, part, toggle_prefix)
    rewrite(copy, part, change)
    with pytest.raises(ValueError, match=sentence):
        convert(copy, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_upsampler_behind_no_layer_has_no_place():
    ends = ("conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    names = [f"{end}.{leaf}" for end in ends for leaf in ("weight", "bias")]
    with pytest.raises(ValueError, match=r"no place for: 'up_blocks\.0\.upsamplers\.0\.conv\.weight'$"):
        unet_layout([*names, "up_blocks.0.upsamplers.0.conv.weight"])


@pytest.mark.parametrize("part", PARTS["SDXL"])
def test_a_missing_network(copy, tmp_path, part):
    shutil.rmtree(copy / part)
    with pytest.raises(ValueError, match=f"no .*{part}/(diffusion_pytorch_)?model.safetensors"):
        convert(copy, tmp_path)


def test_pickles(copy, tmp_path):
    (file,) = (copy / "vae").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is a pickle"):
        convert(copy, tmp_path)


def test_other_architectures(tmp_path, write_checkpoint):
    refiner = tmp_path / "refiner"
    write_checkpoint(refiner / "unet" / "diffusion_pytorch_model.safetensors", unet_shapes("SDXL refiner"))
    with pytest.raises(ValueError, match=r"is SDXL refiner, but only KOALA, SD 1\.x, .* can be converted"):
        convert(refiner, tmp_path)
    flux = tmp_path / "flux"
    write_checkpoint(flux / "transformer" / "diffusion_pytorch_model.safetensors", {"a": (1,)})
    with pytest.raises(ValueError, match="is not a diffusers folder of a model with a U-Net"):
        convert(flux, tmp_path)


def test_arguments(sdxl, reference, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(reference)
    with pytest.raises(ValueError, match="already exists"):
        to_single_file(sdxl, file)
    assert file.read_bytes() == reference
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        to_single_file(sdxl, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"not torch\.int8"):
        to_single_file(sdxl, tmp_path / "other.safetensors", dtype=torch.int8)
    with pytest.raises(ValueError, match="is not a diffusers folder but a single file"):
        to_single_file(file, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="there is no folder"):
        to_single_file(sdxl, tmp_path / "nowhere" / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: "{", "is not a readable index"),
        (lambda text: '{"weight_map": [1]}', "is not a readable index"),
        (lambda text: text.replace("diffusion_pytorch_model-00001", "../diffusion_pytorch_model-00001"), "outside"),
        (lambda text: text.replace("diffusion_pytorch_model-00001", "absent-00001"), "there is no file"),
        (
            lambda text: text.replace('"conv_in.bias"', '"conv_in.other"'),
            "list different tensors, for example 'conv_in.bias'",
        ),
    ],
)
def test_indices_that_are_wrong(sdxl, tmp_path, change, sentence):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    pipeline.unet.save_pretrained(tmp_path / "folder" / "unet", max_shard_size="100KB")
    index = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    text = index.read_text()
    assert change(text) != text
    index.write_text(change(text))
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "folder", tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def test_pieces_of_any_size_make_the_same_file(sdxl, reference, tmp_path, monkeypatch):
    half = convert(sdxl, tmp_path / "half", dtype=torch.float16).read_bytes()
    monkeypatch.setattr(stream, "CHUNK", 64)
    assert convert(sdxl, tmp_path / "pieces").read_bytes() == reference
    assert convert(sdxl, tmp_path / "half pieces", dtype=torch.float16).read_bytes() == half


def test_numbers_are_aligned(tmp_path):
    tensors = {"a": torch.ones(3).half(), "b": torch.tensor([1.5, 2.5]), "c": torch.tensor([7]), "d": torch.zeros(0)}
    with (tmp_path / "a.safetensors").open("w+b") as file:
        types = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
        stream.write_tensors(file, {n: stream.made(t, types[t.dtype]) for n, t in tensors.items()}, {"key": "Wört"})
    header = read_header(tmp_path / "a.safetensors")
    assert [entry.begin for entry in map(header.tensors.get, "cbda")] == [0, 8, 16, 16]
    assert header.metadata["key"] == "Wört"
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_source_that_becomes_shorter(copy, tmp_path):
    tensors = single_file_tensors(copy)
    (file,) = (copy / "vae").glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match="became shorter"), (tmp_path / "a.safetensors").open("w+b") as out:
        stream.write_tensors(out, tensors, {})
    file.unlink()
    with pytest.raises(ValueError, match=r"safetensors cannot be read: No such file"):
        next(tensors["first_stage_model.quant_conv.bias"].read())


# ----------------------------------------------------------------------------------------------------------------------
# Large files


@pytest.mark.slow
def test_memory(copy, tmp_path):
    """1.6 GB pass through; the largest tensor is 0.96 GB."""
    grow(copy, 10_000_000)
    program = (
        "import sys, torch\n"
        "from ztsnr.checkpoints.single_file import to_single_file\n"
        "to_single_file(sys.argv[1], sys.argv[2], dtype=torch.bfloat16)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, copy, tmp_path / "model.safetensors"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (tmp_path / "model.safetensors").stat().st_size > 0.8e9
    assert int(done.stdout) * 1024 < 500e6  # torch itself takes most of it


@pytest.mark.parametrize(("kills", "words"), [(8, 250_000), pytest.param(50, 1_000_000, marks=pytest.mark.slow)])
def test_killed_at_any_moment(copy, tmp_path, kills, words):
    grow(copy, words)  # by 40 MB a 250,000
    whole, out = tmp_path / "whole" / "model.safetensors", tmp_path / "killed" / "model.safetensors"
    whole.parent.mkdir()
    out.parent.mkdir()
    seconds = run_alone(to_single_file, copy, whole, writes_in=whole.parent)
    left = 0
    for i in range(kills):
        moment = random.uniform(i, i + 1) / kills * seconds * 1.2
        run_alone(to_single_file, copy, out, writes_in=out.parent, killed_after=moment)
        if out.exists():
            assert filecmp.cmp(out, whole, shallow=False)
            out.unlink()
        assert len(list(out.parent.iterdir())) <= 1  # each run cleans up behind the one before
        left += any(out.parent.iterdir())
    assert left, "no run was killed while it wrote"
    to_single_file(copy, out)
    assert [path.name for path in out.parent.iterdir()] == ["model.safetensors"]
