"""Diffusers folders as single files and back: real networks, tiny and random, and the names of the full-size ones."""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints import inspect_checkpoint, stream
from ztsnr.checkpoints.header import read_header
from ztsnr.checkpoints.mark import mark_checkpoint
from ztsnr.checkpoints.single_file import _mark as mark
from ztsnr.checkpoints.single_file import single_file_tensors, to_folder, to_single_file

from ..full_size import networks, shapes, unet_shapes
from ..tiny_pipelines import make_tiny_sdxl, write_single_file

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
MODELS = ("SDXL", "SD 1.x", "SD 2.x")
UNET = "model.diffusion_model."


def make_tiny_sd(folder, sdxl, version):
    """A folder of SD 1.x or 2.x, with the tokenizer and one text encoder of a tiny SDXL."""
    donor = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    with torch.random.fork_rng():
        torch.manual_seed(version)
        unet = diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=24,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            use_linear_projection=version == 2,
        )
        config = {**donor.text_encoder_2.config.to_dict(), "hidden_act": "gelu" if version == 2 else "quick_gelu"}
        text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    diffusers.StableDiffusionPipeline(
        unet=unet.eval(),
        vae=donor.vae,
        text_encoder=text_encoder.eval(),
        tokenizer=donor.tokenizer,
        scheduler=diffusers.PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny folders of every architecture; not to be changed."""
    place = tmp_path_factory.mktemp("folders")
    sdxl = make_tiny_sdxl(place / "sdxl")
    made = {
        "SDXL": sdxl,
        "SD 1.x": make_tiny_sd(place / "sd1", sdxl, 1),
        "SD 2.x": make_tiny_sd(place / "sd2", sdxl, 2),
    }
    generator = torch.Generator().manual_seed(0)

    def randomize(tensors):  # new networks have many zeros and ones, which look alike wherever they are put
        return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}

    for folder in made.values():
        for part in PARTS:
            if (folder / part).is_dir():
                rewrite(folder, part, randomize)
    return made


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


def convert(folder, place, **options):
    place.mkdir(exist_ok=True)
    to_single_file(folder, place / "model.safetensors", **options)
    return place / "model.safetensors"


def weights(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def rewrite(folder, part, change):
    """Change the tensors of one network."""
    (file,) = (folder / part).glob("*.safetensors")
    save_file(change(load_file(file)), file)


def set_scheduler(folder, **changes):
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | changes))


def data_of(path, name):
    header = read_header(path)
    entry = header.tensors[name]
    return path.read_bytes()[header.data_start + entry.begin : header.data_start + entry.end]


# ----------------------------------------------------------------------------------------------------------------------
# The names of published files

PUBLISHED = {
    "SDXL base": {
        UNET: "SDXL U-Net",
        "first_stage_model.": "VAE",
        "conditioner.embedders.0.transformer.text_model.": "CLIP ViT-L",
        "conditioner.embedders.1.model.": "OpenCLIP ViT-bigG",
    },
    "SD 1.x": {
        UNET: "SD 1.x U-Net",
        "first_stage_model.": "VAE",
        "cond_stage_model.transformer.text_model.": "CLIP ViT-L",
    },
    "SD 2.x": {UNET: "SD 2.x U-Net", "first_stage_model.": "VAE", "cond_stage_model.model.": "OpenCLIP ViT-H"},
}


def published(name):
    """Names and shapes of the tensors of sd_xl_base_1.0, v1-5-pruned-emaonly and v2-1_768-ema-pruned, without the noise
    schedules of the latter two.  In published_names.json, {0-9} and {a|b} stand for each of what they name.
    """
    networks = json.loads((Path(__file__).parent / "published_names.json").read_text())
    return {
        prefix + tensor: tuple(shape)
        for prefix, network in PUBLISHED[name].items()
        for pattern, shape in networks[network].items()
        for tensor in expand(pattern)
    }


def expand(pattern):
    alternatives = []
    for i, part in enumerate(re.split(r"\{(.*?)\}", pattern)):
        named = part.split("|") if i % 2 else [part]
        ranges = [re.fullmatch(r"(\d+)-(\d+)", name) if i % 2 else None for name in named]
        alternatives.append(
            [
                str(value)
                for name, ends in zip(named, ranges, strict=True)
                for value in (range(int(ends[1]), int(ends[2]) + 1) if ends else [name])
            ]
        )
    return ["".join(choice) for choice in itertools.product(*alternatives)]


def write_full_size(folder, write_checkpoint, name, unet=None):
    """A folder of the full-size model whose files are all header."""
    for part, network in networks(name).items():
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        names = unet if unet and part == "unet" else shapes(network)
        write_checkpoint(folder / part / f"{stem}.safetensors", names)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(tmp_path, write_checkpoint, name):
    tensors = single_file_tensors(write_full_size(tmp_path, write_checkpoint, name))
    expected = published(name)
    assert len(expected) == {"SDXL base": 2515, "SD 1.x": 1131, "SD 2.x": 1228}[name]
    if name == "SD 2.x":  # of which diffusers drops what is not used
        unused = ("resblocks.23.", "text_projection", "logit_scale")
        expected = {key: shape for key, shape in expected.items() if not any(part in key for part in unused)}
        assert len(expected) == 1228 - 14
    assert {key: tensor.shape for key, tensor in tensors.items()} == expected


def test_smaller_relatives_of_sdxl(tmp_path, write_checkpoint):
    full = published("SDXL base")
    for name in ("SSD-1B", "Vega"):
        write_full_size(tmp_path / name, write_checkpoint, "SDXL base", unet=unet_shapes(name))
        tensors = single_file_tensors(tmp_path / name)
        assert len(tensors) == len(full) - 1680 + len(unet_shapes(name))
        # fewer transformer blocks, and besides nothing new
        assert {key for key in tensors if "transformer_blocks" not in key} <= full.keys()


# ----------------------------------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("model", MODELS)
def test_diffusers_reads_the_same_networks(folders, tmp_path, model):
    file = convert(folders[model], tmp_path)
    kind = diffusers.StableDiffusionXLPipeline if model == "SDXL" else diffusers.StableDiffusionPipeline
    pipeline = kind.from_single_file(str(file), config=str(folders[model]), local_files_only=True)
    plain = kind.from_pretrained(folders[model])
    for part in PARTS[: 4 if model == "SDXL" else 3]:
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(plain, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_and_there_again(folders, tmp_path, model):
    file = convert(folders[model], tmp_path)
    to_folder(file, tmp_path / "back", config=folders[model])
    for part in PARTS[: 4 if model == "SDXL" else 3]:
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
    tensors["model_ema.decay"] = torch.tensor(0.5)
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


def test_a_base_in_eight_bits_needs_a_word(base, trained, tmp_path):
    tensors = load_file(base)
    eight = {n: t.to(torch.float8_e4m3fn) if n.startswith(UNET) else t for n, t in tensors.items()}
    save_file(eight, tmp_path / "eight.safetensors")
    with pytest.raises(ValueError, match="keeps its U-Net in F8_E4M3: say which dtype"):
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
    with pytest.raises(ValueError, match="has no U-Net under the names of single files"):
        convert(trained, tmp_path, base=next((folders["SDXL"] / "vae").glob("*.safetensors")))
    with pytest.raises(ValueError, match="is a pickle"):
        convert(trained, tmp_path, base=tmp_path / "base.ckpt")
    assert not (tmp_path / "model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# To a folder


def test_the_scheduler_of_the_folder(folders, tmp_path):
    for model in MODELS:
        config = Path(shutil.copytree(folders[model], tmp_path / f"{model} config"))
        set_scheduler(config, prediction_type="v_prediction")
        file = convert(config, tmp_path / model)
        to_folder(file, tmp_path / f"{model} v", config=folders[model], zero_terminal_snr=True)
        report = inspect_checkpoint(tmp_path / f"{model} v")
        assert (report.prediction_type, report.zero_terminal_snr) == ("v_prediction", True)
        kind = diffusers.StableDiffusionXLPipeline if model == "SDXL" else diffusers.StableDiffusionPipeline
        scheduler = kind.from_pretrained(tmp_path / f"{model} v").scheduler
        assert type(scheduler) is diffusers.EulerDiscreteScheduler  # SD's PNDM cannot rescale
        scheduler.set_timesteps(28)
        assert scheduler.timesteps[0] == 999
        assert scheduler.sigmas[0] == pytest.approx(4096, rel=1e-3)


def test_a_folder_of_a_plain_model_keeps_its_scheduler(folders, tmp_path):
    file = convert(folders["SD 1.x"], tmp_path)
    to_folder(file, tmp_path / "back", config=folders["SD 1.x"])
    ours, theirs = (f / "scheduler" / "scheduler_config.json" for f in (tmp_path / "back", folders["SD 1.x"]))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text()) | {"rescale_betas_zero_snr": False}


def test_folders_keep_the_precision_of_the_file(sdxl, tmp_path):
    file = convert(sdxl, tmp_path, dtype=torch.float16)
    to_folder(file, tmp_path / "back", config=sdxl)
    for part in PARTS:
        assert {tensor.dtype for tensor in weights(tmp_path / "back", part).values()} == {torch.float16}
    to_folder(file, tmp_path / "wide", config=sdxl, dtype=torch.float32)
    assert {tensor.dtype for tensor in weights(tmp_path / "wide", "vae").values()} == {torch.float32}


def test_a_folder_that_cannot_be_written(sdxl, reference, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(reference)
    with pytest.raises(ValueError, match="is there already"):
        to_folder(tmp_path / "model.safetensors", sdxl, config=sdxl)
    with pytest.raises(ValueError, match="is a folder already"):
        to_folder(sdxl, tmp_path / "back", config=sdxl)
    with pytest.raises(ValueError, match="there is no folder"):
        to_folder(tmp_path / "model.safetensors", tmp_path / "nowhere" / "back", config=sdxl)

    def fill_the_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill_the_disk)
    with pytest.raises(ValueError, match="back cannot be written: No space left on device"):
        to_folder(tmp_path / "model.safetensors", tmp_path / "back", config=sdxl)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


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
            "the U-Net has what no single file has a place for: 'a.weight', 'b', 'c' and 2 more$",
        ),
        ("unet", drop_tensor("conv_out.bias"), "the U-Net lacks 'conv_out.bias'$"),
        ("unet", drop_tensor("mid_block.resnets.1.conv2.weight"), "lacks 'mid_block.resnets.1.conv2.weight'"),
        ("vae", drop_tensor("quant_conv.weight"), "the VAE lacks 'quant_conv.weight'"),
        ("vae", add_tensors("decoder.up_blocks.7.resnets.0.conv1.weight"), "the VAE has what no single file"),
        ("text_encoder", drop_tensor("final_layer_norm.bias"), "the text encoder lacks 'final_layer_norm.bias'"),
        ("text_encoder", add_tensors("encoder.layers.1.mlp.fc3.weight"), "the text encoder has what no single file"),
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
            r"a tensor of shape \(24,\) is no matrix",
        ),
        (
            "vae",
            lambda tensors: tensors | {"quant_conv.bias": torch.zeros(0)},
            r"'quant_conv.bias' has the shape \(0,\), which no weight has",
        ),
        (
            "text_encoder_2",
            lambda tensors: tensors | {"text_model.embeddings.position_embedding.weight": torch.zeros(())},
            r"has the shape \(\), which no weight has",
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


@pytest.mark.parametrize("part", PARTS)
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
    with pytest.raises(ValueError, match=r"is SDXL refiner, and only KOALA, SD 1\.x, .* are converted"):
        convert(refiner, tmp_path)
    flux = tmp_path / "flux"
    write_checkpoint(flux / "transformer" / "diffusion_pytorch_model.safetensors", {"a": (1,)})
    with pytest.raises(ValueError, match="is no diffusers folder of a model with a U-Net"):
        convert(flux, tmp_path)


def test_arguments(sdxl, reference, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(reference)
    with pytest.raises(ValueError, match="is there already"):
        to_single_file(sdxl, file)
    assert file.read_bytes() == reference
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        to_single_file(sdxl, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"not in torch\.int8"):
        to_single_file(sdxl, tmp_path / "other.safetensors", dtype=torch.int8)
    with pytest.raises(ValueError, match="is no diffusers folder but a single file"):
        to_single_file(file, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="there is no folder"):
        to_single_file(sdxl, tmp_path / "nowhere" / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: "{", "is no readable index"),
        (lambda text: '{"weight_map": [1]}', "is no readable index"),
        (lambda text: text.replace("diffusion_pytorch_model-00001", "../diffusion_pytorch_model-00001"), "outside"),
        (lambda text: text.replace("diffusion_pytorch_model-00001", "absent-00001"), "there is no file"),
        (lambda text: text.replace('"conv_in.bias"', '"conv_in.other"'), "differ, for one in 'conv_in.bias'"),
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


def grow(folder, words):
    """Make the tables of words larger: for the tests here it is enough that there are many bytes."""
    for part, width in (("text_encoder", 16), ("text_encoder_2", 24)):

        def enlarge(tensors, width=width):
            (name,) = (name for name in tensors if name.endswith("token_embedding.weight"))
            return tensors | {name: torch.randn(words, width, generator=torch.Generator().manual_seed(width))}

        rewrite(folder, part, enlarge)
    return folder


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


def convert_alone(folder, out):
    torch.set_num_threads(1)  # those of the parent are not in a forked process
    to_single_file(folder, out)


def test_killed_at_any_moment(copy, tmp_path):
    grow(copy, 250_000)  # 40 MB
    start = time.perf_counter()
    expected = convert(copy, tmp_path / "whole").read_bytes()
    duration = time.perf_counter() - start
    out = tmp_path / "killed" / "model.safetensors"
    out.parent.mkdir()
    moments = random.Random(0)
    unfinished = 0
    for delay in (0, *(moments.uniform(0, duration) for _ in range(11))):
        process = multiprocessing.get_context("fork").Process(target=convert_alone, args=(copy, out))
        process.start()
        while process.is_alive() and not any(out.parent.iterdir()):  # what the last one left is soon removed
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        if out.exists():
            assert out.read_bytes() == expected
            out.unlink()
        unfinished += any(out.parent.iterdir())
    assert unfinished
    convert(copy, out.parent)
    assert [path.name for path in out.parent.iterdir()] == ["model.safetensors"]  # what the killed left is gone
