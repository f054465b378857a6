"""What a run leaves, read by the programs that it is for: this package, diffusers and peft."""

import json
import re
from dataclasses import replace
from functools import cache, partial

import diffusers
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints import inspect_checkpoint, to_single_file
from ztsnr.checkpoints.header import read_header
from ztsnr.checkpoints.latent_scaling import LatentScaling
from ztsnr.checkpoints.pipeline import load_pipeline
from ztsnr.samplers import NoiseSchedule, ZTSNRScheduler
from ztsnr.training.config import ExportSettings, FinetuneSettings
from ztsnr.training.export import export_model
from ztsnr.training.networks import AdapterSettings, Denoiser, add_adapter, load_networks, trained_names
from ztsnr.training.objective import Objective, ObjectiveSettings
from ztsnr.training.settings_file import parse_settings

from ..checkpoints.tiny_folders import make_tiny_folders
from ..small_files import error_under_limit

UNET = "model.diffusion_model."
KINDS = ("SDXL", "SD 1.x", "SD 2.x")
LORA = AdapterSettings("lora", rank=2, alpha=3.0)
LOKR = AdapterSettings("lokr", rank=2, alpha=3.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models that say epsilon."""
    made = make_tiny_folders(tmp_path_factory.mktemp("folders"))
    for folder in made.values():
        path = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text())
        config |= {"prediction_type": "epsilon"} | (
            {"rescale_betas_zero_snr": False} if "rescale_betas_zero_snr" in config else {}
        )
        path.write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def base_file(folders, tmp_path_factory):
    """A single file in float16, with tensors besides that nobody knows."""
    path = tmp_path_factory.mktemp("file") / "base.safetensors"
    to_single_file(folders["SDXL"], path, dtype=torch.float16)
    tensors = load_file(path)
    save_file(tensors | {"extra.words": torch.arange(7)}, path, {"author": "somebody"})
    return path


def settings(base, *, config=None, adapter=None, text_encoders=False, objective=None, **export):
    content = {
        "out": "run",
        "steps": 1,
        "model": {"base": str(base), "text_encoders": text_encoders},
        "data": {"batch_size": 1, "sources": [{"path": "p"}]},
    }
    made = parse_settings(FinetuneSettings, content)
    return replace(
        made,
        model=replace(made.model, config=config and str(config), adapter=adapter),
        objective=objective or ObjectiveSettings(),
        export=ExportSettings(**{"dtype": "float32"} | export),
    )


@cache
def _trained(base, config, adapter, text_encoders):
    networks = load_networks(base, config)
    scaling = networks.latent_scaling
    before = {name: parameter.detach().clone() for name, parameter in Denoiser(networks).named_parameters()}
    if adapter is not None:
        add_adapter(networks.unet, adapter)
    denoiser = Denoiser(networks)
    names = trained_names(denoiser, adapter=adapter is not None, text_encoders=text_encoders)
    own = dict(denoiser.named_parameters())
    random = torch.Generator().manual_seed(0)
    weights = {name: 0.9 * own[name].detach() + 0.05 * torch.randn(own[name].shape, generator=random) for name in names}
    return weights, before, networks.vae.state_dict(), scaling


def trained(chosen):
    """Weights such as training leaves them, other ones than the base's; the base's own, its VAE's, its scaling."""
    model = chosen.model
    weights, *rest = _trained(model.base, model.config, model.adapter, model.text_encoders)
    return dict(weights), *rest


def export(chosen, out, scaling=None, name="model", say=lambda line: None, **changed):
    weights, _, _, own_scaling = trained(chosen)
    objective = Objective(chosen.objective)
    return export_model(weights | changed, out, name, chosen, objective, scaling or own_scaling, say)


def bytes_of(path):
    header, content = read_header(path), path.read_bytes()
    return {
        name: (entry.dtype, entry.shape, content[header.data_start + entry.begin : header.data_start + entry.end])
        for name, entry in header.tensors.items()
    }


def picture(pipe, scheduler=None):
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return pipe("solid red", latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="latent").images


# ----------------------------------------------------------------------------------------------------------------------
# All weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_and_a_file_of_the_trained_weights(folders, tmp_path, kind):
    chosen = settings(folders[kind])
    weights = trained(chosen)[0]
    said = []
    written = export(chosen, tmp_path / "export", say=said.append)
    file, folder = tmp_path / "export" / "model.safetensors", tmp_path / "export" / "model"
    assert written == [file, folder]
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["model", "model.safetensors"]
    for path in written:
        report = inspect_checkpoint(path)
        assert report.prediction_type == "v_prediction"
        assert report.zero_terminal_snr
        assert f"Wrote {path}: v_prediction, zero terminal SNR; verified." in said

    from_folder, from_file = load_pipeline(folder), load_pipeline(file, config=folder)
    for loaded in (from_folder, from_file):
        assert (loaded.prediction_type, loaded.zero_terminal_snr) == ("v_prediction", True)
        for name, weight in loaded.pipeline.unet.named_parameters():
            assert torch.equal(weight, weights[f"unet.{name}"]), name
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"] is True
    assert config["timestep_spacing"] == "trailing"
    assert config.get("trained_betas") is None
    scheduler = partial(ZTSNRScheduler.from_config, from_folder.pipeline.scheduler.config)
    ours = picture(from_folder.pipeline, scheduler())
    assert ours.isfinite().all()
    torch.testing.assert_close(picture(from_file.pipeline, scheduler()), ours, rtol=0, atol=0)
    # and as diffusers alone loads it
    plain = diffusers.StableDiffusionXLPipeline if kind == "SDXL" else diffusers.StableDiffusionPipeline
    as_plain = plain.from_pretrained(folder)
    as_plain.unet.requires_grad_(
        False
    )  # as ours: on some processors torch takes another kernel for what may be trained
    torch.testing.assert_close(picture(as_plain, scheduler()), ours, rtol=0, atol=0)


def test_all_but_the_unet_is_the_bases_byte_by_byte(folders, base_file, tmp_path):
    dtype = "bfloat16"
    chosen = settings(base_file, config=folders["SDXL"], dtype=dtype, folder=False)
    weights = trained(chosen)[0]
    (file,) = export(chosen, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    base, made = bytes_of(base_file), bytes_of(file)
    others = {name for name in base if not name.startswith(UNET)}
    assert "extra.words" in others
    assert {name: made[name] for name in others} == {name: base[name] for name in others}
    assert made.keys() - base.keys() == {"v_pred", "ztsnr"}
    metadata = read_header(file).metadata
    assert metadata["author"] == "somebody"
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.hash_sha256"].startswith("0x")
    unet = {name: tensor for name, tensor in load_file(file).items() if name.startswith(UNET)}
    assert {tensor.dtype for tensor in unet.values()} == {getattr(torch, dtype)}
    first = weights["unet.conv_in.weight"].to(getattr(torch, dtype))
    assert torch.equal(unet[f"{UNET}input_blocks.0.0.weight"], first)


def test_text_encoders_that_are_trained_are_in_both(folders, base_file, tmp_path):
    chosen = settings(base_file, config=folders["SDXL"], text_encoders=True)
    weights, before, vae, _ = trained(chosen)
    file, folder = export(chosen, tmp_path)
    for loaded in (load_pipeline(folder), load_pipeline(file, config=folder)):
        pipe = loaded.pipeline
        for number, encoder in enumerate((pipe.text_encoder, pipe.text_encoder_2)):
            for name, weight in encoder.named_parameters():
                name = f"text_encoders.{number}.{name}"
                assert torch.equal(weight, weights.get(name, before[name])), name
        assert all(torch.equal(weight, vae[name]) for name, weight in pipe.vae.state_dict().items())
    assert any(name.startswith("text_encoders.1.") for name in weights)


def test_what_belongs_to_the_bases_own_network_is_left_out(folders, base_file, tmp_path):
    """A moving average of its weights, and the tables of its schedule; what nobody knows stays."""
    tensors, base = load_file(base_file), tmp_path / "base.safetensors"
    stale = {"model_ema.decay": torch.ones(()), "model_ema.diffusion_modelout2bias": torch.ones(4)}
    stale |= {name: torch.ones(1000) for name in ("betas", "alphas_cumprod", "posterior_mean_coef1")}
    save_file(tensors | stale | {"scale_factor": torch.ones(())}, base)
    said = []
    file, _ = export(settings(base, config=folders["SDXL"]), tmp_path / "out", say=said.append)
    written = read_header(file).tensors.keys()
    assert not stale.keys() & written
    assert tensors.keys() | {"scale_factor"} <= written
    (line,) = [line for line in said if line.startswith("Left out")]
    assert "2 tensors of its moving average (model_ema.*) and 3 tables of its noise schedule" in line


def test_nothing_is_left_out_of_a_base_without_them(folders, base_file, tmp_path):
    said = []
    export(settings(base_file, config=folders["SDXL"]), tmp_path, say=said.append)
    assert not any(line.startswith("Left out") for line in said)


def test_epsilon_stays_epsilon(folders, tmp_path):
    objective = ObjectiveSettings(prediction_type="epsilon", zero_terminal_snr=False)
    written = export(settings(folders["SDXL"], objective=objective), tmp_path)
    for path in written:
        report = inspect_checkpoint(path)
        assert report.prediction_type == "epsilon"
        assert not report.zero_terminal_snr
    assert not {"v_pred", "ztsnr"} & read_header(written[0]).tensors.keys()
    schedule = NoiseSchedule.from_config(load_pipeline(written[1]).pipeline.scheduler.config)
    assert schedule.sigma_max == pytest.approx(14.614641, rel=1e-6)


def test_what_the_base_said_of_itself_is_gone(folders, tmp_path):
    """Of a base that is marked as v-prediction with zero terminal SNR, epsilon is made."""
    (v,) = export(settings(folders["SDXL"], folder=False), tmp_path, name="v")
    assert inspect_checkpoint(v).zero_terminal_snr
    objective = ObjectiveSettings(prediction_type="epsilon", zero_terminal_snr=False)
    for path in export(settings(v, config=folders["SDXL"], objective=objective), tmp_path):
        report = inspect_checkpoint(path)
        assert report.prediction_type == "epsilon"
        assert not report.zero_terminal_snr


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def delta(tensors, name, adapter):
    """What an adapter adds to a layer's weight, by its definition, in float64."""
    tensors = {
        key.removeprefix(f"base_model.model.{name}."): t.double() for key, t in tensors.items() if f".{name}." in key
    }
    scale = adapter.alpha / adapter.rank
    if adapter.kind == "lora":
        return scale * tensors["lora_B.weight"] @ tensors["lora_A.weight"]
    first = tensors.get("lokr_w1")
    first = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"] if first is None else first
    second = tensors.get("lokr_w2")
    second = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"] if second is None else second
    return scale * torch.kron(first, second)


@pytest.mark.parametrize(
    ("kind", "adapter"), [("SDXL", LORA), ("SD 1.x", LORA), ("SDXL", LOKR)], ids=["SDXL", "SD 1.x", "SDXL LoKr"]
)
def test_an_adapter_by_itself_and_merged(folders, tmp_path, adapter, kind):
    chosen = settings(folders[kind], adapter=adapter)
    weights = trained(chosen)[0]
    written = export(chosen, tmp_path)
    names = [path.name for path in written]
    expected = ["model_adapter", "model_lora.safetensors", "model.safetensors", "model"]
    assert names == [name for name in expected if adapter.kind == "lora" or "lora" not in name]

    saved = load_file(tmp_path / "model_adapter" / "adapter_model.safetensors")
    assert len(saved) == len(weights)
    base, merged = load_networks(folders[kind]).unet, load_pipeline(tmp_path / "model").pipeline.unet
    plain = base.state_dict()
    assert merged.state_dict().keys() == plain.keys()
    changed = 0
    for name, weight in merged.state_dict().items():
        layer = name.removesuffix(".weight")
        if any(f".{layer}." in key for key in saved) and name.endswith(".weight"):
            torch.testing.assert_close(
                weight.double(), plain[name].double() + delta(saved, layer, adapter), rtol=1e-5, atol=1e-6
            )
            assert not torch.equal(weight, plain[name])
            changed += 1
        else:
            assert torch.equal(weight, plain[name]), name
    assert changed >= 8

    # the adapter's folder on the base, in peft
    peft = PeftModel.from_pretrained(base, tmp_path / "model_adapter")
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 16, 16, generator=random)
    hidden = torch.randn(1, 77, merged.config.cross_attention_dim, generator=random)
    added = {"text_embeds": torch.randn(1, 16), "time_ids": torch.ones(1, 6)} if kind == "SDXL" else None
    with torch.no_grad():
        answers = [
            unet(noisy, 500, encoder_hidden_states=hidden, added_cond_kwargs=added).sample for unet in (peft, merged)
        ]
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-3 * answers[1].abs().max().item())
    if adapter.kind == "lora":
        _check_kohyas_format(folders[kind], tmp_path)


def _check_kohyas_format(base, tmp_path):
    """The LoRA as ComfyUI reads it does the same on the base, in diffusers."""
    report = inspect_checkpoint(tmp_path / "model_lora.safetensors")
    assert report.prediction_type == "v_prediction"
    merged = load_pipeline(tmp_path / "model").pipeline
    scheduler = partial(ZTSNRScheduler.from_config, merged.scheduler.config)
    pipe = load_pipeline(base).pipeline
    if "force_zeros_for_empty_prompt" in merged.config:  # the export's: what guidance subtracts, as it was trained
        pipe.register_to_config(force_zeros_for_empty_prompt=merged.config["force_zeros_for_empty_prompt"])
    without = picture(pipe, scheduler())
    pipe.load_lora_weights(str(tmp_path / "model_lora.safetensors"))
    found, expected = picture(pipe, scheduler()), picture(merged, scheduler())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert (without - expected).abs().max() > 10 * (found - expected).abs().max()


def test_an_adapter_beside_trained_text_encoders(folders, tmp_path):
    chosen = settings(folders["SDXL"], adapter=LORA, text_encoders=True)
    weights = trained(chosen)[0]
    export(chosen, tmp_path)
    pipe = load_pipeline(tmp_path / "model").pipeline
    name = "text_encoders.1.text_projection.weight"
    assert torch.equal(pipe.text_encoder_2.text_projection.weight, weights[name])
    saved = load_file(tmp_path / "model_adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)


def test_an_adapter_alone(folders, tmp_path):
    chosen = settings(folders["SDXL"], adapter=LORA, single_file=False, folder=False)
    said = []
    written = export(chosen, tmp_path, say=said.append)
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    assert [path.name for path in written] == ["model_adapter", "model_lora.safetensors"]
    assert said == [f"Wrote {path}: the adapter alone." for path in written]


# ----------------------------------------------------------------------------------------------------------------------
# Latent scaling, and a schedule that is shifted


@pytest.mark.parametrize("base", ["folder", "file"])
def test_latent_scaling_is_in_the_folders_vae_and_in_the_files_metadata(folders, base_file, tmp_path, base):
    scaling = LatentScaling((4.8119, 0.1607, 1.3538, -1.7753), (9.9181, 6.2753, 7.5978, 5.9956))
    chosen = settings(folders["SDXL"] if base == "folder" else base_file, config=folders["SDXL"])
    file, folder = export(chosen, tmp_path, scaling=scaling)
    assert LatentScaling.from_metadata(read_header(file).metadata) == scaling
    found = LatentScaling.of_folder(folder)
    assert found.mean == scaling.mean
    assert found.std == pytest.approx(scaling.std, rel=1e-15)
    # diffusers' own SDXL pipeline decodes by it
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe = load_pipeline(folder).pipeline
    with torch.no_grad():
        expected = pipe.vae.decode(scaling.from_model(latents)).sample
    config = pipe.vae.config
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        torch.testing.assert_close(pipe.vae.decode(latents * std / config.scaling_factor + mean).sample, expected)


def test_the_published_scaling_needs_no_metadata(folders, tmp_path):
    file, folder = export(settings(folders["SDXL"]), tmp_path)
    assert LatentScaling.from_metadata(read_header(file).metadata) is None
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.13025


@pytest.mark.parametrize(("kind", "zero"), [("SDXL", True), ("SD 1.x", True), ("SDXL", False)])
def test_the_folder_says_a_shifted_schedule_to_diffusers(folders, tmp_path, kind, zero):
    objective = ObjectiveSettings(schedule_shift=2.0, zero_terminal_snr=zero)
    said = []
    file, folder = export(settings(folders[kind], objective=objective), tmp_path, say=said.append)
    assert any("Every sigma is 2 times the published one" in line and "canvas_shift" in line for line in said)
    expected = 2 * NoiseSchedule.sdxl(zero_terminal_snr=zero).sigma(torch.arange(1000.0))

    config = load_pipeline(folder).pipeline.scheduler.config
    assert config.trained_betas is not None
    torch.testing.assert_close(
        ZTSNRScheduler.from_config(config).schedule.sigma(torch.arange(1000.0)), expected, rtol=1e-9, atol=0
    )
    # diffusers' own Euler, in float32, ends at 4096 instead of infinity
    euler = diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    euler.set_timesteps(25)
    timesteps = euler.timesteps.long()
    assert timesteps[0] == 999
    torch.testing.assert_close(
        euler.sigmas[:-1].double()[int(zero) :], expected[timesteps][int(zero) :], rtol=2e-3, atol=0
    )
    if zero:
        assert euler.sigmas[0].item() == pytest.approx(4096, rel=1e-6)
    # the single file says it in its metadata
    assert NoiseSchedule.from_config(load_pipeline(file, config=folders[kind]).pipeline.scheduler.config).sigma(
        500.0
    ) == pytest.approx(expected[500].item(), rel=1e-9)


def test_a_schedule_that_is_hardly_shifted_is_said_too(folders, tmp_path):
    """Nearer to the published schedule than a loose comparison tells apart."""
    objective = ObjectiveSettings(schedule_shift=1.0001)
    file, folder = export(settings(folders["SDXL"], objective=objective), tmp_path)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    published, t = NoiseSchedule.sdxl(), torch.arange(999.0)
    ratios = NoiseSchedule.from_config(config).sigma(t) / published.sigma(t)
    torch.testing.assert_close(ratios, torch.full_like(ratios, 1.0001), rtol=1e-9, atol=0)
    assert read_header(file).metadata["ztsnr.schedule_shift"] == "1.0001"


def test_a_base_with_a_shifted_schedule_that_is_trained_without_one(folders, tmp_path):
    objective = ObjectiveSettings(schedule_shift=2.0)
    (shifted,) = export(settings(folders["SDXL"], objective=objective, single_file=False), tmp_path / "first")
    (folder,) = export(settings(shifted, single_file=False), tmp_path / "second")
    found = NoiseSchedule.from_config(load_pipeline(folder).pipeline.scheduler.config)
    torch.testing.assert_close(found.alphas_cumprod, NoiseSchedule.sdxl().alphas_cumprod, rtol=1e-9, atol=1e-15)


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_an_export_that_was_interrupted_is_done_again(folders, tmp_path):
    chosen = settings(folders["SDXL"])
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "half").write_text("of it")
    (tmp_path / "model.safetensors").write_bytes(b"half")
    (tmp_path / "model_adapter").write_text("of another kind")
    file, folder = export(chosen, tmp_path)
    assert not (folder / "half").exists()
    assert not (tmp_path / "model_adapter").exists()
    first = file.read_bytes()
    assert export(chosen, tmp_path) == [file, folder]
    assert file.read_bytes() == first


def test_a_place_that_cannot_be_written_to(folders, tmp_path):
    (tmp_path / "export").write_text("a file")
    with pytest.raises(ValueError, match="export cannot be written: ") as caught:
        export(settings(folders["SDXL"]), tmp_path / "export")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["all weights", "lora"])
def test_a_disk_that_is_full(folders, tmp_path, adapter):
    """Stands for it: a limit of the system on the size of files."""
    chosen = settings(folders["SDXL"], adapter=adapter)
    error = error_under_limit(2000, lambda: export(chosen, tmp_path))
    assert re.search(r"model\w* cannot be written: ", str(error))
    assert "\n" not in str(error)
    assert list(tmp_path.iterdir()) == []


def test_numbers_too_large_for_the_dtype_are_found(folders, tmp_path):
    chosen = settings(folders["SDXL"], dtype="float16", single_file=False)
    weights = trained(chosen)[0]
    large = {"unet.conv_in.weight": 1e6 * weights["unet.conv_in.weight"]}
    with pytest.raises(ValueError, match=r"NaN or infinite|too large"):
        export(chosen, tmp_path, **large)


def test_nothing_of_the_weights_is_changed(folders, tmp_path):
    """They are those of the run, which may go on."""
    chosen = settings(folders["SDXL"], dtype="bfloat16", single_file=False)
    weights = trained(chosen)[0]
    copies = {name: weight.clone() for name, weight in weights.items()}
    export(chosen, tmp_path)
    assert all(torch.equal(weights[name], copies[name]) for name in copies)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_pipeline_subtracts_what_caption_dropout_trained(folders, tmp_path, dropout):
    """The encoded empty text; without dropout it does as the base does."""
    made = settings(folders["SDXL"], single_file=False)
    captions = replace(made.data.captions, caption_dropout=dropout)
    made = replace(made, data=replace(made.data, captions=captions))
    networks = load_networks(folders["SDXL"])
    weights = {name: parameter.detach() for name, parameter in Denoiser(networks).named_parameters()}
    (folder,) = export_model(weights, tmp_path, "made", made, Objective(made.objective), networks.latent_scaling)
    assert json.loads((folder / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is (dropout == 0)
    assert diffusers.DiffusionPipeline.from_pretrained(folder).config.force_zeros_for_empty_prompt is (dropout == 0)
