"""Latents of mean 0 and standard deviation 1 in each channel: in tensors, in diffusers, in files, and back."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ztsnr.checkpoints import inspect_checkpoint, load_pipeline, mark_checkpoint, to_folder
from ztsnr.checkpoints.latent_scaling import MEAN, STD, LatentScaling

from .tiny_folders import convert, make_tiny_folders

# of raw SDXL-VAE latents of drawn pictures; and numbers that no short decimal is
SCALING = LatentScaling((4.8119, 0.1607, 1.3538, -1.7753), (9.9181, 6.2753, 7.5978, 5.9956))
AWKWARD = LatentScaling(
    (1 / 3, -0.1, 1e-17, 2**0.5), (1 / 0.13025, 0.1 + 0.2, 5e-324**0.5, np.nextafter(1.0, 2).item())
)
METADATA = {MEAN: "[4.8119, 0.1607, 1.3538, -1.7753]", STD: "[9.9181, 6.2753, 7.5978, 5.9956]"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny diffusers folders of each architecture, as published; not to be changed."""
    return make_tiny_folders(tmp_path_factory.mktemp("folders"))


def set_vae(folder, out, **changes):
    """A copy of a folder whose VAE's config says something else."""
    shutil.copytree(folder, out)
    path = out / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return out


@pytest.fixture
def scaled(folders, tmp_path):
    """A folder of a tiny SDXL whose latents are scaled."""
    return set_vae(folders["SDXL"], tmp_path / "scaled", **SCALING.vae_config(0.13025))


def metadata_of(file):
    with safe_open(file, "pt") as opened:
        return {key: value for key, value in opened.metadata().items() if key in METADATA}


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def test_latents_come_to_mean_0_and_standard_deviation_1():
    random = np.random.default_rng(0)
    z = random.normal(size=(64, 4, 32, 32)) * np.array(SCALING.std)[:, None, None]
    z += np.array(SCALING.mean)[:, None, None]
    x = SCALING.to_model(torch.from_numpy(z)).numpy()
    error = 5 / (64 * 32 * 32) ** 0.5  # five standard errors of a mean
    assert np.abs(x.mean((0, 2, 3))).max() < error
    assert np.abs(x.std((0, 2, 3)) - 1).max() < error


@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 4, 3, 5), (3, 2, 4, 3, 5)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-15), (torch.float32, 3e-7), (torch.bfloat16, 2**-8)])
def test_each_channel_has_its_own_numbers(shape, dtype, error):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = SCALING.to_model(z)
    assert (x.dtype, x.shape) == (dtype, z.shape)
    for channel in range(4):
        exact = (z.double().numpy()[..., channel, :, :] - SCALING.mean[channel]) / SCALING.std[channel]
        # bfloat16 rounds the result alone, to half of its last bit
        np.testing.assert_allclose(x[..., channel, :, :].double(), exact, rtol=error, atol=error if error < 1e-5 else 0)
    back = SCALING.from_model(x.double())
    assert back.dtype == torch.float64
    torch.testing.assert_close(back, z.double(), rtol=0, atol=20 * error)


def test_a_device_is_sent_the_numbers_from_pinned_memory_without_waiting(monkeypatch):
    """On a GPU without data; what is sent in another way waits for all that the GPU has to do, in every step."""
    sent = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if "device" in kwargs and torch.device(kwargs["device"]).type == "cuda":
                sent.append((function.overloadpacket.__name__, kwargs.get("non_blocking")))
            return function(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: sent.append("pinned") or tensor)
    with FakeTensorMode(allow_non_fake_inputs=True):
        latents = torch.empty(2, 2, 4, 4, device="cuda")
        with Watched():
            assert LatentScaling((1.0, 2.0), (3.0, 4.0)).to_model(latents).device.type == "cuda"
    assert sent == ["pinned", ("_to_copy", True)]


@pytest.mark.parametrize(
    ("mean", "std", "sentence"),
    [
        ((0.0,) * 4, (1.0,) * 3, "not 4 means and 3 standard deviations"),
        ((), (), "not 0 means"),
        ((0.0, float("nan")), (1.0, 1.0), "must be finite"),
        ((0.0, 0.0), (1.0, float("inf")), "must be finite"),
        ((0.0, 0.0), (1.0, 0.0), "above 0, not 0"),
        ((0.0, 0.0), (-2.5, 1.0), "above 0, not -2.5"),
    ],
)
def test_numbers_that_nothing_can_be_scaled_by(mean, std, sentence):
    with pytest.raises(ValueError, match=sentence):
        LatentScaling(mean, std)


@pytest.mark.parametrize("scaling", [SCALING, AWKWARD])
def test_metadata_keep_every_bit(scaling, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", scaling.to_metadata())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert LatentScaling.from_metadata(file.metadata()) == scaling


BAD = [
    ({MEAN: "[0, 0, 0, 0]"}, "have ztsnr.latent_mean alone"),
    ({MEAN: "[0, 0, 0]", STD: "[1, 1, 1, 1]"}, "not 3 means and 4 standard deviations"),
    ({MEAN: "[0, 0, 0, NaN]", STD: "[1, 1, 1, 1]"}, r"ztsnr.latent_mean of the metadata, '\[0, 0, 0, NaN\]', is not"),
    ({MEAN: "[0, 0, 0, 0]", STD: "[1, 1, 1, 1e999]"}, "ztsnr.latent_std of the metadata"),
    ({MEAN: "[0, 0, 0, 0]", STD: f"[1, 1, 1, 1{'0' * 400}]"}, "is not a list of finite numbers"),
    ({MEAN: "[0, 0, 0, 0]", STD: f"[1, 1, 1, 1{'0' * 5000}]"}, "is not a list of finite numbers"),
    ({MEAN: "[0, 0, 0, true]", STD: "[1, 1, 1, 1]"}, "is not a list of finite numbers"),
    ({MEAN: "4.8", STD: "[1, 1, 1, 1]"}, "is not a list of finite numbers"),
    ({MEAN: "[" * 100_000, STD: "[1]"}, "is not a list of finite numbers"),
    ({MEAN: "[0, 0, 0, 0]", STD: "[1, 1, 1, 0]"}, "above 0, not 0"),
]


@pytest.mark.parametrize(("metadata", "sentence"), BAD)
def test_metadata_that_say_nothing_useful(metadata, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        LatentScaling.from_metadata(metadata)
    assert len(str(error.value)) < 250


def test_other_metadata_say_nothing():
    assert LatentScaling.from_metadata({"modelspec.title": "a"}) is None


# ----------------------------------------------------------------------------------------------------------------------
# The config of a VAE


def test_the_ordinary_case():
    assert LatentScaling.of_vae_config(AutoencoderKL().config).std == (1 / 0.18215,) * 4
    sdxl = LatentScaling.of_vae_config({"scaling_factor": 0.13025, "shift_factor": None, "latents_mean": [1.0] * 4})
    assert sdxl == LatentScaling((0.0,) * 4, (1 / 0.13025,) * 4)  # a mean without a std is nothing to diffusers
    assert sdxl.vae_config(0.13025) == {"scaling_factor": 0.13025, "latents_mean": None, "latents_std": None}
    assert sdxl.vae_config(0.18215)["scaling_factor"] == pytest.approx(0.13025, rel=1e-15)


@pytest.mark.parametrize("scaling", [SCALING, LatentScaling((0.0, 0.0, 0.0, 1.0), (1.0,) * 4)])
def test_configs_come_back(scaling):
    vae = AutoencoderKL()
    vae.register_to_config(**scaling.vae_config(0.13025))
    back = LatentScaling.of_vae_config(vae.config)
    assert back.mean == scaling.mean
    np.testing.assert_allclose(back.std, scaling.std, rtol=3e-16)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"shift_factor": 0.1159}, "shift_factor"),
        ({"scaling_factor": 0}, "has '0' for scaling_factor"),
        ({"scaling_factor": "1"}, "for scaling_factor"),
        ({"latent_channels": 10**12}, "for latent_channels"),
        ({"latents_mean": [0, 0], "latents_std": [1, 1]}, "has 2 numbers for latents_mean, but 4 channels"),
        ({"latents_mean": [0, 0, 0, None], "latents_std": [1] * 4}, "is not a list of finite numbers"),
        ({"latents_mean": [0] * 4, "latents_std": [1, 1, 1, -1]}, "above 0, not -5.48998"),
    ],
)
def test_configs_that_cannot_be_followed(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        LatentScaling.of_vae_config(config)


# ----------------------------------------------------------------------------------------------------------------------
# In diffusers' own pipelines

RUN = {"prompt": "a", "num_inference_steps": 2, "guidance_scale": 1.0}


def run(pipeline, output_type, **more):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**RUN, **more, output_type=output_type, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture
def pipeline(scaled):
    return StableDiffusionXLPipeline.from_pretrained(scaled)


def test_sdxl_decodes(pipeline):
    latents, pictures = run(pipeline, "latent", height=32, width=48), run(pipeline, "pt", height=32, width=48)
    with torch.no_grad():
        decoded = pipeline.vae.decode(SCALING.from_model(latents)).sample
        otherwise = pipeline.vae.decode(latents / 0.13025).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)
    assert (expected - (otherwise / 2 + 0.5).clamp(0, 1)).abs().max() > 0.1


def encode(vae, picture, seed):
    with torch.no_grad():
        return vae.encode(picture).latent_dist.sample(torch.Generator().manual_seed(seed))


def test_sdxl_encodes_the_picture_it_begins_with(pipeline):
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    from_picture = StableDiffusionXLImg2ImgPipeline(**pipeline.components)
    with torch.no_grad():
        found = from_picture.prepare_latents(
            picture, None, 1, 1, torch.float32, "cpu", torch.Generator().manual_seed(2), add_noise=False
        )
    torch.testing.assert_close(found, SCALING.to_model(encode(pipeline.vae, picture, 2)), rtol=1e-6, atol=1e-6)


def test_sdxl_inpainting_encodes_by_the_factor_alone(pipeline):
    """A limit of diffusers that the docstring of vae_config tells; should this fail, diffusers has mended it."""
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    inpainting = StableDiffusionXLInpaintPipeline(**pipeline.components)
    with torch.no_grad():
        found = inpainting._encode_vae_image(picture, torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, encode(pipeline.vae, picture, 2) * 0.13025, rtol=1e-6, atol=1e-6)


def test_sd_1_decodes_by_the_factor_alone(folders, tmp_path):
    """Another one, which the report warns of."""
    folder = set_vae(folders["SD 1.x"], tmp_path / "sd", **SCALING.vae_config(0.18215))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    latents, pictures = run(pipeline, "latent", height=32, width=32), run(pipeline, "pt", height=32, width=32)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(pictures, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_one_factor_is_enough_for_sd_1(folders, tmp_path):
    scaling = LatentScaling((0.0,) * 4, (2.5,) * 4)
    pipeline = StableDiffusionPipeline.from_pretrained(
        set_vae(folders["SD 1.x"], tmp_path / "sd", **scaling.vae_config(0.18215))
    )
    latents, pictures = run(pipeline, "latent", height=32, width=32), run(pipeline, "pt", height=32, width=32)
    with torch.no_grad():
        decoded = pipeline.vae.decode(scaling.from_model(latents)).sample
    torch.testing.assert_close(pictures, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Files and folders


def test_ordinary_models_carry_nothing(folders, tmp_path):
    file = convert(folders["SDXL"], tmp_path / "file")
    assert metadata_of(file) == {}
    for path in (folders["SDXL"], file):
        report = inspect_checkpoint(path)
        assert report.latent_scaling is None
        assert report.to_dict()["latent_scaling"] is None
        assert "Latents" not in str(report)


def test_what_is_ordinary_depends_on_the_model(folders, tmp_path):
    """0.13025 is right for SDXL and must be said of an SD 1.x, as 0.18215 of an SDXL."""
    for model, factor in (("SDXL", 0.18215), ("SD 1.x", 0.13025)):
        folder = set_vae(folders[model], tmp_path / model, scaling_factor=factor)
        assert metadata_of(convert(folder, tmp_path / f"{model} file")) == {
            MEAN: "[0.0, 0.0, 0.0, 0.0]",
            STD: json.dumps([1 / factor] * 4),
        }
    ordinary = set_vae(folders["SD 1.x"], tmp_path / "ordinary", scaling_factor=0.18215)
    assert metadata_of(convert(ordinary, tmp_path / "ordinary file")) == {}


def test_there_and_back(folders, scaled, tmp_path):
    file = convert(scaled, tmp_path / "file")
    said = LatentScaling.from_metadata(metadata_of(file))
    assert said.mean == SCALING.mean
    np.testing.assert_allclose(said.std, SCALING.std, rtol=3e-16)
    to_folder(file, tmp_path / "back", config=folders["SDXL"])
    settings, back = (json.loads((path / "vae" / "config.json").read_text()) for path in (scaled, tmp_path / "back"))
    assert back["latents_mean"] == settings["latents_mean"]
    np.testing.assert_allclose(back["latents_std"], settings["latents_std"], rtol=3e-16)
    assert back["scaling_factor"] == 0.13025


def test_settings_do_not_overrule_the_file(folders, scaled, tmp_path):
    """A file that says the ordinary case, completed by a folder that says another."""
    file = convert(folders["SDXL"], tmp_path / "file")
    tensors = load_file(file)
    metadata = {"modelspec.prediction_type": "v", **LatentScaling.ordinary(sdxl=True).to_metadata()}
    save_file(tensors, tmp_path / "said.safetensors", metadata)
    to_folder(tmp_path / "said.safetensors", tmp_path / "back", config=scaled)
    assert inspect_checkpoint(tmp_path / "back").latent_scaling is None


def test_the_report_says_it(scaled, tmp_path):
    for path in (scaled, convert(scaled, tmp_path / "file"), scaled / "unet" / "diffusion_pytorch_model.safetensors"):
        report = inspect_checkpoint(path)
        assert report.latent_scaling.mean == SCALING.mean
        assert "mean 4.812, 0.1607, 1.354, -1.775, std 9.918, 6.275, 7.598, 5.996" in str(report)
        assert json.loads(json.dumps(report.to_dict()))["latent_scaling"]["mean"] == list(SCALING.mean)
        assert report.warnings == ()


@pytest.mark.parametrize("model", ["SD 1.x", "SDXL"])
def test_the_report_warns_where_diffusers_does_not_look(tmp_path, write_checkpoint, model):
    width, sizes = (768, {}) if model == "SD 1.x" else (2048, {"label_emb.0.0.weight": (2, 2816)})
    depths = (1, 1, 1, 1, 1, 1) if model == "SD 1.x" else (0, 0, 2, 2, 10, 10)
    unet = {"input_blocks.0.0.weight": (320, 4, 3, 3), "out.2.weight": (4, 8, 3, 3), **sizes}
    for block, depth in enumerate(depths, 1):
        unet[f"input_blocks.{block}.0.in_layers.0.weight"] = (8,)
        for i in range(depth):
            unet[f"input_blocks.{block}.1.transformer_blocks.{i}.attn2.to_k.weight"] = (2, width)
    metadata = {"modelspec.prediction_type": "epsilon", **METADATA}
    report = inspect_checkpoint(write_checkpoint(tmp_path / "a.safetensors", unet, metadata))
    assert report.architecture.startswith(model)
    assert any("pipelines of SD 1.x and 2.x ignore" in warning for warning in report.warnings) == (model == "SD 1.x")


def test_pipelines_of_files_and_folders_are_the_same(folders, scaled, tmp_path):
    file = convert(scaled, tmp_path / "file")
    loaded = [load_pipeline(scaled).pipeline, load_pipeline(file, config=folders["SDXL"]).pipeline]
    ours, theirs = (run(pipeline, "pt", height=32, width=32) for pipeline in loaded)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    ordinary = run(load_pipeline(folders["SDXL"]).pipeline, "pt", height=32, width=32)
    assert (ours - ordinary).abs().max() > 0.1


def test_marking_keeps_it(scaled, tmp_path):
    file = convert(scaled, tmp_path / "file")
    before = metadata_of(file)
    marked = mark_checkpoint(file, v_pred=True, ztsnr=False, out=tmp_path / "marked.safetensors")
    assert metadata_of(marked) == before
    assert len(before) == 2


def test_merging_into_a_base(folders, scaled, tmp_path):
    """What the folder's VAE says counts; a folder without one leaves it to the base."""
    plain_base, scaled_base = convert(folders["SDXL"], tmp_path / "plain"), convert(scaled, tmp_path / "base")
    said = metadata_of(scaled_base)
    assert metadata_of(convert(scaled, tmp_path / "1", base=plain_base)) == said
    assert metadata_of(convert(folders["SDXL"], tmp_path / "2", base=scaled_base)) == {}
    bare = shutil.copytree(folders["SDXL"], tmp_path / "bare")
    shutil.rmtree(bare / "vae")
    assert metadata_of(convert(bare, tmp_path / "3", base=scaled_base)) == said
    assert metadata_of(convert(bare, tmp_path / "4", base=plain_base)) == {}


def test_bad_metadata_are_told_and_not_followed(folders, tmp_path):
    tensors = load_file(convert(folders["SDXL"], tmp_path / "file"))
    for i, (metadata, sentence) in enumerate([*BAD, ({MEAN: "[0.5]", STD: "[1]"}, "but the VAE has 4")]):
        file = tmp_path / f"{i}.safetensors"
        save_file(tensors, file, metadata)
        with pytest.raises(ValueError, match=sentence):
            to_folder(file, tmp_path / "out", config=folders["SDXL"])
        with pytest.raises(ValueError, match=sentence):
            load_pipeline(file, config=folders["SDXL"])
        report = inspect_checkpoint(file)
        if i < len(BAD):
            assert report.latent_scaling is None
            assert any("Its latent scaling is unknown" in warning for warning in report.warnings)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"scaling_factor": -1}', '{"latents_mean": 1, "latents_std": 2}'])
def test_bad_configs_are_told_and_not_followed(scaled, tmp_path, text):
    (scaled / "vae" / "config.json").write_text(text)
    assert any("vae/config.json" in warning for warning in inspect_checkpoint(scaled).warnings)
    with pytest.raises(ValueError, match=r"vae/config\.json"):
        convert(scaled, tmp_path / "file")
