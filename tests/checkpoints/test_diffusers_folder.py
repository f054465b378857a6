"""Single files as diffusers folders: what diffusers' own loader makes of them, and nothing else."""

import json
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

from ztsnr.checkpoints import inspect_checkpoint, stream
from ztsnr.checkpoints.diffusers_folder import to_folder
from ztsnr.checkpoints.header import read_header

from .tiny_folders import PARTS, PIPELINES, convert, grow, make_tiny_folders, run_alone, set_scheduler, weights

CLIP = {"SDXL": "conditioner.embedders.0.transformer.text_model.", "SD 1.x": "cond_stage_model.transformer.text_model."}
OPEN_CLIP = {"SDXL": "conditioner.embedders.1.model.", "SD 2.x": "cond_stage_model.model."}
VAE = "first_stage_model."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Settings of every architecture; not to be changed."""
    return make_tiny_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    """Single files of every architecture; not to be changed."""
    place = tmp_path_factory.mktemp("files")
    return {model: convert(folder, place / model) for model, folder in folders.items()}


@pytest.fixture(scope="module")
def references(folders, files, tmp_path_factory):
    """What is made of them."""
    place = tmp_path_factory.mktemp("references")
    for model, file in files.items():
        to_folder(file, place / model, config=folders[model], prediction_type="v_prediction")
    return {model: place / model for model in files}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(file, out, change):
    """A single file with other tensors."""
    save_file(change(load_file(file)), out, metadata={"modelspec.prediction_type": "v"})
    return out


def edit(path, **changes):
    """Change a JSON file; None removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# As diffusers does it


def as_published(folder):
    """Settings alone, as older versions wrote them, and with parts that are not converted."""
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    for path in folder.glob("text_encoder*/config.json"):
        edit(path, dtype=None, torch_dtype="float32", architectures=None, _name_or_path="clip")
    edit(folder / "unet" / "config.json", _diffusers_version="0.6.0", mid_block_type=None, _name_or_path="somewhere")
    others = {"image_encoder": None, "requires_safety_checker": None}
    if (folder / "text_encoder_2").is_dir():
        edit(folder / "model_index.json", _diffusers_version="0.19.0", **others)
    else:
        others["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        others["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        edit(folder / "model_index.json", _diffusers_version="0.6.0", **others)
    return folder


@pytest.mark.parametrize("settings", [Path, as_published])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("model", PARTS)
def test_the_folder_is_what_diffusers_makes(folders, files, tmp_path, model, dtype, settings):
    config = settings(Path(shutil.copytree(folders[model], tmp_path / "config")))
    cast = {name: tensor.to(dtype) for name, tensor in load_file(files[model]).items()}
    file = changed(files[model], tmp_path / "model.safetensors", lambda tensors: cast)
    to_folder(file, tmp_path / "ours", config=config, zero_terminal_snr=False)
    left_out = {} if model == "SDXL" else {"safety_checker": None, "requires_safety_checker": False}
    theirs = PIPELINES[model].from_single_file(
        str(file), config=str(config), torch_dtype=dtype, local_files_only=True, feature_extractor=None, **left_out
    )
    theirs.save_pretrained(tmp_path / "theirs")

    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    written = {path for path in theirs if not path.parts[0].startswith("tokenizer")}
    assert {path for path in ours if not path.parts[0].startswith("tokenizer")} == written
    for path in written:
        if path.suffix == ".safetensors":
            tensors, expected = load_file(tmp_path / "ours" / path), load_file(tmp_path / "theirs" / path)
            assert tensors.keys() == expected.keys()
            assert all(bits(tensors[name]) == bits(expected[name]) for name in expected)
            with safe_open(tmp_path / "ours" / path, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}
        elif path.name == "scheduler_config.json":  # all but what diffusers does not look for
            said = json.loads(theirs[path]) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}
            assert json.loads(ours[path]) == said
        else:
            assert ours[path] == theirs[path], path


@pytest.mark.parametrize("model", PARTS)
def test_diffusers_loads_it(folders, references, model):
    pipeline = PIPELINES[model].from_pretrained(references[model])
    plain = PIPELINES[model].from_pretrained(folders[model])
    for part in PARTS[model]:
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(plain, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    words = [pipe.tokenizer("solid black background").input_ids for pipe in (pipeline, plain)]
    assert words[0] == words[1]


# ----------------------------------------------------------------------------------------------------------------------
# What single files look like


def rename(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def reshape_attention(dimensions):
    def change(tensors):
        for name, tensor in tensors.items():
            if ".mid.attn_1." in name and tensor.ndim == 4:
                assert tensor.shape[2:] == (1, 1)
                tensors[name] = tensor.reshape(*tensor.shape[:2], *[1] * (dimensions - 2))
        return tensors

    return change


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("SDXL", rename(VAE, "vae.")),
        ("SD 1.x", reshape_attention(3)),
        ("SD 2.x", reshape_attention(2)),
        ("SDXL", rename(CLIP["SDXL"], CLIP["SDXL"].removesuffix("text_model."))),
        ("SD 1.x", rename(CLIP["SD 1.x"], CLIP["SD 1.x"].removesuffix("text_model."))),
    ],
    ids=["vae", "conv1d", "matrix", "text_model SDXL", "text_model SD 1.x"],
)
def test_other_spellings(folders, files, references, tmp_path, model, change):
    file = changed(files[model], tmp_path / "model.safetensors", change)
    before, after = read_header(files[model]).tensors, read_header(file).tensors
    assert {name: entry.shape for name, entry in after.items()} != {name: e.shape for name, e in before.items()}
    to_folder(file, tmp_path / "out", config=folders[model])
    assert contents(tmp_path / "out") == contents(references[model])


def add_what_is_not_used(tensors):
    extra = {
        "model_ema.decay": torch.tensor(0.5),
        "model_ema.diffusion_modelout2bias": torch.ones(4),
        "alphas_cumprod": torch.ones(1000),
        "betas": torch.ones(1000).double(),
        "v_pred": torch.zeros(0),
        "__index_timestep_zero__": torch.zeros(0),
        "cond_stage_model.logit_scale": torch.tensor(1.0),
    }
    for prefix in (*CLIP.values(), *OPEN_CLIP.values()):
        if any(name.startswith(prefix) for name in tensors):
            extra[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None].float()
            extra[f"{prefix}logit_scale"] = torch.tensor(4.6)
    if "cond_stage_model.model.ln_final.bias" in tensors:  # SD 2.x: its last layer, and what comes behind that
        unused = {
            name.replace("resblocks.1.", "resblocks.2."): tensor + 1
            for name, tensor in tensors.items()
            if "model.transformer.resblocks.1." in name
        }
        assert len(unused) == 12
        extra |= unused | {"cond_stage_model.model.text_projection": torch.ones(24, 24)}
    return tensors | extra


@pytest.mark.parametrize("model", PARTS)
def test_what_is_not_used_is_left_out(folders, files, references, tmp_path, model):
    file = changed(files[model], tmp_path / "model.safetensors", add_what_is_not_used)
    to_folder(file, tmp_path / "out", config=folders[model])
    assert contents(tmp_path / "out") == contents(references[model])


def test_the_other_suffix(folders, files, references, tmp_path):
    file = changed(files["SDXL"], tmp_path / "model.sft", dict)
    to_folder(file, tmp_path / "out", config=folders["SDXL"])
    assert contents(tmp_path / "out") == contents(references["SDXL"])


# ----------------------------------------------------------------------------------------------------------------------
# Precision


def test_each_tensor_keeps_its_own_type(folders, files, tmp_path):
    def mix(tensors):
        types = {"model.": torch.float16, VAE: torch.float32, CLIP["SDXL"]: torch.bfloat16}
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(next((t for prefix, t in types.items() if name.startswith(prefix)), tensor.dtype))
        tensors["model.diffusion_model.out.0.weight"] = tensors["model.diffusion_model.out.0.weight"].float()
        for name in ("ln_final.weight", "transformer.resblocks.1.attn.in_proj_weight"):
            tensors[OPEN_CLIP["SDXL"] + name] = tensors[OPEN_CLIP["SDXL"] + name].half()
        return tensors

    file = changed(files["SDXL"], tmp_path / "model.safetensors", mix)
    to_folder(file, tmp_path / "out", config=folders["SDXL"])
    found = {part: weights(tmp_path / "out", part) for part in PARTS["SDXL"]}
    assert found["unet"].pop("conv_norm_out.weight").dtype == torch.float32
    assert {tensor.dtype for tensor in found["unet"].values()} == {torch.float16}
    assert {tensor.dtype for tensor in found["vae"].values()} == {torch.float32}
    assert {tensor.dtype for tensor in found["text_encoder"].values()} == {torch.bfloat16}
    halves = [name for name, tensor in found["text_encoder_2"].items() if tensor.dtype == torch.float16]
    attention = [f"text_model.encoder.layers.1.self_attn.{which}_proj.weight" for which in "kqv"]
    assert sorted(halves) == [*attention, "text_model.final_layer_norm.weight"]
    said = [json.loads((tmp_path / "out" / part / "config.json").read_text()) for part in PARTS["SDXL"][2:]]
    assert [config.get("dtype", config.get("torch_dtype")) for config in said] == ["bfloat16", "float32"]

    back = load_file(convert(tmp_path / "out", tmp_path / "back", dtype=torch.float32))
    expected = load_file(file)
    assert all(torch.equal(back[name], expected[name].float()) for name in expected)


@pytest.mark.parametrize("narrow", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_types_that_no_folder_is_in(folders, files, tmp_path, narrow):
    def change(tensors):
        return {name: tensor.to(narrow) if name.startswith("model.") else tensor for name, tensor in tensors.items()}

    file = changed(files["SD 1.x"], tmp_path / "model.safetensors", change)
    to_folder(file, tmp_path / "out", config=folders["SD 1.x"])
    found, whole = weights(tmp_path / "out", "unet"), weights(folders["SD 1.x"], "unet")
    assert all(bits(tensor) == bits(whole[name].to(narrow).float()) for name, tensor in found.items())


def test_the_type_that_is_asked_for(folders, files, tmp_path):
    to_folder(files["SDXL"], tmp_path / "half", config=folders["SDXL"], dtype=torch.bfloat16)
    for part in PARTS["SDXL"]:
        whole = weights(folders["SDXL"], part)
        assert all(bits(t) == bits(whole[name].bfloat16()) for name, t in weights(tmp_path / "half", part).items())
    with pytest.raises(ValueError, match=r"dtype must be one of .*, not torch\.int8"):
        to_folder(files["SDXL"], tmp_path / "out", config=folders["SDXL"], dtype=torch.int8)

    large = {torch.float16: torch.full((8,), 1e6), torch.float32: torch.full((8,), 1e300, dtype=torch.float64)}
    for dtype, bias in large.items():
        file = changed(
            files["SDXL"], tmp_path / "model.safetensors", lambda t, b=bias: t | {f"{VAE}quant_conv.bias": b}
        )
        with pytest.raises(ValueError, match=r"^quant_conv\.bias has numbers that F(16|32) cannot hold"):
            to_folder(file, tmp_path / "out", config=folders["SDXL"], dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "model.safetensors"]


# ----------------------------------------------------------------------------------------------------------------------
# The scheduler


def test_the_scheduler_of_the_folder(folders, tmp_path):
    for model in PARTS:
        config = Path(shutil.copytree(folders[model], tmp_path / f"{model} config"))
        set_scheduler(config, prediction_type="v_prediction")
        file = convert(config, tmp_path / model)
        to_folder(file, tmp_path / f"{model} v", config=folders[model], zero_terminal_snr=True)
        report = inspect_checkpoint(tmp_path / f"{model} v")
        assert (report.prediction_type, report.zero_terminal_snr) == ("v_prediction", True)
        scheduler = PIPELINES[model].from_pretrained(tmp_path / f"{model} v").scheduler
        assert type(scheduler) is diffusers.EulerDiscreteScheduler  # SD's PNDM cannot rescale
        scheduler.set_timesteps(28)
        assert scheduler.timesteps[0] == 999
        assert scheduler.sigmas[0] == pytest.approx(4096, rel=1e-3)


def test_a_folder_of_a_plain_model_keeps_its_scheduler(folders, tmp_path):
    file = convert(folders["SD 1.x"], tmp_path)
    to_folder(file, tmp_path / "back", config=folders["SD 1.x"])
    ours, theirs = (f / "scheduler" / "scheduler_config.json" for f in (tmp_path / "back", folders["SD 1.x"]))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text()) | {"rescale_betas_zero_snr": False}


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("model", "name", "tensor", "sentence"),
    [
        ("SDXL", "model.diffusion_model.out.2.bias", None, "lacks 'model.diffusion_model.out.2.bias', which the"),
        ("SD 1.x", f"{VAE}quant_conv.weight", None, "lacks 'first_stage_model.quant_conv.weight', which the settings"),
        (
            "SD 1.x",
            f"{CLIP['SD 1.x']}final_layer_norm.bias",
            None,
            "lacks 'cond_stage_model.transformer.text_model.fin",
        ),
        ("SD 2.x", f"{OPEN_CLIP['SD 2.x']}ln_final.weight", None, "lacks 'cond_stage_model.model.ln_final.weight', wh"),
        ("SDXL", f"{OPEN_CLIP['SDXL']}text_projection", None, "lacks 'conditioner.embedders.1.model.text_projection'"),
        (
            "SDXL",
            "model.diffusion_model.out.2.bias",
            torch.zeros(5),
            r"out\.2\.bias has the shape \(5,\), but the settings require \(4,\)$",
        ),
        ("SDXL", f"{OPEN_CLIP['SDXL']}text_projection", torch.zeros(16, 24), r"shape \(16, 24\), but .* \(24, 16\)$"),
        (
            "SDXL",
            f"{OPEN_CLIP['SDXL']}transformer.resblocks.0.attn.in_proj_weight",
            torch.zeros(72, 23),
            r"in_proj_weight has the shape \(72, 23\), but .* \(72, 24\)$",
        ),
        ("SD 1.x", f"{VAE}decoder.mid.attn_1.q.weight", torch.zeros(16, 16, 3, 3), r"shape \(16, 16, 3, 3\), but"),
        (
            "SD 1.x",
            "model.diffusion_model.input_blocks.0.0.bias",
            torch.zeros(()),
            r"bias has the shape \(\), but .* \(8,\)$",
        ),
        ("SD 1.x", f"{VAE}quant_conv.bias", torch.zeros(8, dtype=torch.int8), "bias has the type I8, which weights"),
    ],
)
def test_tensors_that_are_missing_or_others(folders, files, tmp_path, model, name, tensor, sentence):
    def change(tensors):
        assert name in tensors
        kept = {key: value for key, value in tensors.items() if key != name}
        return kept if tensor is None else kept | {name: tensor}

    file = changed(files[model], tmp_path / "model.safetensors", change)
    with pytest.raises(ValueError, match=rf"^[^\n]*model\.safetensors:? [^\n]*{sentence}"):
        to_folder(file, tmp_path / "out", config=folders[model])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_settings_that_do_not_fit(folders, files, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"lacks 'model\.diffusion_model\..* more, which the settings in .*sd1 require$"
    ):
        to_folder(files["SDXL"], out, config=folders["SD 1.x"], prediction_type="epsilon", zero_terminal_snr=False)
    config = Path(shutil.copytree(folders["SDXL"], tmp_path / "config"))
    edit(config / "unet" / "config.json", class_embed_type="timestep")
    with pytest.raises(ValueError, match=r"config do not fit any single file: the U-Net has .* 'class_embedding\."):
        to_folder(files["SDXL"], out, config=config)
    edit(config / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(ValueError, match=r"config names .* for its part 'vae': only AutoencoderKL is allowed there"):
        to_folder(files["SDXL"], out, config=config)
    edit(config / "model_index.json", vae=[None, None])
    shutil.rmtree(config / "tokenizer")
    with pytest.raises(ValueError, match="config has no tokenizer and no vae: give a whole model"):
        to_folder(files["SDXL"], out, config=config)
    (config / "scheduler" / "mine.py").touch()
    with pytest.raises(ValueError, match="config has a program"):
        to_folder(files["SDXL"], out, config=config)
    (folder := tmp_path / "damaged").mkdir()
    shutil.copytree(folders["SDXL"], folder, dirs_exist_ok=True)
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^[^\n]*damaged.vae.config\.json is not a network's settings$"):
        to_folder(files["SDXL"], out, config=folder)
    assert not out.exists()


def test_arguments(folders, files, tmp_path):
    file, config = files["SDXL"], folders["SDXL"]
    with pytest.raises(ValueError, match="already exists"):
        to_folder(file, config, config=config)
    with pytest.raises(ValueError, match="is already a folder"):
        to_folder(config, tmp_path / "out", config=config)
    with pytest.raises(ValueError, match="there is no folder"):
        to_folder(file, tmp_path / "nowhere" / "out", config=config)
    with pytest.raises(ValueError, match="unknown prediction_type 'velocity'"):
        to_folder(file, tmp_path / "out", config=config, prediction_type="velocity")
    with pytest.raises(ValueError, match="which cannot work"):
        to_folder(file, tmp_path / "out", config=config, prediction_type="epsilon", zero_terminal_snr=True)
    assert not any(tmp_path.iterdir())


def test_a_full_disk(folders, files, tmp_path, monkeypatch):
    def fill_the_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill_the_disk)
    with pytest.raises(ValueError, match=r"out cannot be written: No space left on device$"):
        to_folder(files["SDXL"], tmp_path / "out", config=folders["SDXL"])
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Large files


def test_pieces_of_any_size_make_the_same_folder(folders, files, references, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 64)
    to_folder(files["SDXL"], tmp_path / "out", config=folders["SDXL"], prediction_type="v_prediction")
    assert contents(tmp_path / "out") == contents(references["SDXL"])


@pytest.fixture
def large(folders, tmp_path):
    """A function that makes a settings folder and a single file with so many words."""

    def make(words):
        folder = grow(Path(shutil.copytree(folders["SDXL"], tmp_path / "large")), words)
        return folder, convert(folder, tmp_path / "file")

    return make


@pytest.mark.slow
def test_memory(large, tmp_path):
    """1.6 GB pass through; the largest tensor is 0.96 GB."""
    folder, file = large(10_000_000)
    program = (
        "import sys\n"
        "from ztsnr.checkpoints import settings, to_folder\n"
        "settings.LARGEST_VOCABULARY = 10_000_000\n"  # here many words stand for many bytes
        "def peak(): return next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "before = peak()\n"
        "to_folder(sys.argv[1], sys.argv[2], config=sys.argv[3])\n"
        "print(before, peak())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, file, tmp_path / "out", folder],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*")) > 1.6e9
    before, after = (1024 * int(kilobytes) for kilobytes in done.stdout.split())
    assert after < 0.96e9 + 500e6
    assert after - before < 150e6  # pieces of tensors; diffusers and transformers take the rest


@pytest.mark.parametrize(("kills", "words"), [(8, 250_000), pytest.param(50, 1_000_000, marks=pytest.mark.slow)])
def test_killed_at_any_moment(large, tmp_path, kills, words):
    folder, file = large(words)
    whole, out = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    whole.parent.mkdir()
    out.parent.mkdir()
    seconds = run_alone(to_folder, file, whole, config=folder, writes_in=whole.parent)
    expected = contents(whole)
    left = 0
    for i in range(kills):
        moment = random.uniform(i, i + 1) / kills * seconds * 1.2
        run_alone(to_folder, file, out, config=folder, writes_in=out.parent, killed_after=moment)
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(out)
        assert len(list(out.parent.iterdir())) <= 1  # each run cleans up behind the one before
        left += any(out.parent.iterdir())
    assert left, "no run was killed while it wrote"
    to_folder(file, out, config=folder)
    assert list(out.parent.iterdir()) == [out]
