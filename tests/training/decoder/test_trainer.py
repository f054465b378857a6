"""The decoder gets better and the encoder stays; runs go on where they were stopped; losses are what they should be."""

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny_pipelines import make_tiny_sdxl, write_single_file
from ztsnr.checkpoints.vae import hash_encoder, load_vae
from ztsnr.checkpoints.verify import verify_checkpoint
from ztsnr.data.sources import Source, build_index, split
from ztsnr.errors import Stopped
from ztsnr.files import lock_folder
from ztsnr.training.decoder import step as decoder_training
from ztsnr.training.decoder import trainer as vae_decoder
from ztsnr.training.decoder.perceptual import PatchDiscriminator, adaptive_weight
from ztsnr.training.decoder.pictures import read_pictures
from ztsnr.training.decoder.settings import VaeDecoderSettings
from ztsnr.training.decoder.step import DecoderTraining
from ztsnr.training.decoder.trainer import run_finetune_vae
from ztsnr.training.ema import ConstantDecay
from ztsnr.training.settings_file import read_settings

from ..tiny_run import metrics

TRAINED = ("decoder.", "post_quant_conv.")


class StandInForLpips(torch.nn.Module):
    """A small network called as LPIPS is, whose weights are random: distances of features, as a map of the picture."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        generator = torch.Generator().manual_seed(5)
        torch.nn.init.normal_(self.layer.weight, 0, 0.3, generator=generator)

    def forward(self, a, b):
        return (self.layer(a).tanh() - self.layer(b).tanh()).square().mean(1, keepdim=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Blurred noise of many sizes in "pictures", a tiny SDXL in "folder", and the same in "single.safetensors".

    Its decoder has random weights, so there is much to be learned.
    """
    place = tmp_path_factory.mktemp("vae_decoder")
    (place / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        width, height = (int(side) for side in rng.integers(40, 80, 2))
        noise = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        noise.resize((width, height), Image.Resampling.BICUBIC).save(place / "pictures" / f"{i:02}.png")
    make_tiny_sdxl(place / "folder")
    write_single_file(
        StableDiffusionXLPipeline.from_pretrained(place / "folder"), place / "single.safetensors", ("v_pred", "ztsnr")
    )
    return place


def settings_for(place, out, **options):
    defaults = {
        "model": str(place / "folder"),
        "sources": (str(place / "pictures"),),
        "out": str(out),
        "size": 32,
        "shorter_side": 48,
        "held_out": 0.2,
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "lpips_weight": 0.0,
        "discriminator_start": 4,
        "discriminator_width": 8,
        "ema_decay": 0.9,
        "workers": 0,
        "log_every": 1,
        "save_every": 5,
    }
    return VaeDecoderSettings(**defaults | options)


# ----------------------------------------------------------------------------------------------------------------------
# A whole run


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    settings = settings_for(
        place,
        out,
        model=str(place / "single.safetensors"),
        config=str(place / "folder"),
        steps=40,
        discriminator_start=28,
        log_every=10,
    )
    said = []
    return settings, run_finetune_vae(settings, say=said.append), said


def test_held_out_pictures_come_out_better(run):
    """By more than 1.5 dB, the adversary taking part in the last 12 of 40 steps."""
    _, report, said = run
    assert report.after.psnr > report.before.psnr + 1.5
    assert report.after.l1 < 0.85 * report.before.l1
    assert report.before.pictures == report.after.pictures == 11
    scores = json.loads((report.vae.parent / "scores.json").read_text())
    assert scores["after"] == dataclasses.asdict(report.after)
    assert scores["before"] == dataclasses.asdict(report.before)
    assert f"After 40 steps: {report.after}." in said
    assert "discriminator" not in next(line for line in said if line.startswith("step 20: "))
    assert "discriminator" in next(line for line in said if line.startswith("step 30: "))
    sheet = np.asarray(Image.open(report.vae.parent / "pictures.png"))
    assert sheet.shape == (16 + 8 * 32, 3 * 32, 3)
    original, before, after = (sheet[16:, 32 * i : 32 * (i + 1)].astype(float) for i in range(3))
    assert np.square(after - original).mean() < 0.8 * np.square(before - original).mean()


def test_the_settings_are_with_the_run(run):
    settings, report, _ = run
    assert read_settings(VaeDecoderSettings, report.vae.parent / "config.toml") == settings


def test_the_encoder_is_the_same(run, place):
    _, report, _ = run
    base, vae = load_vae(place / "folder"), load_vae(report.vae)
    assert hash_encoder(vae) == hash_encoder(base)
    before, after = base.state_dict(), vae.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.startswith(TRAINED)
    }


def test_the_merged_model(run, place):
    settings, report, _ = run
    assert report.merged.name == "merged.safetensors"
    changes = {change.name for change in verify_checkpoint(report.merged, settings.model).changes}
    state = load_file(settings.model)
    assert changes == {name for name in state if name.startswith(tuple("first_stage_model." + t for t in TRAINED))}
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(report.merged), config=str(place / "folder"), local_files_only=True
    )
    alone = load_vae(report.vae).state_dict()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in pipeline.vae.state_dict().items())


def test_the_result_is_the_average_of_the_weights(run, place):
    """Of the state it is seen that the weights have moved on from it."""
    _, report, _ = run
    state, vae = state_of(report.vae.parent, 40), load_vae(report.vae).state_dict()
    name, profile = "decoder.conv_out.weight", ConstantDecay(0.9).name
    assert torch.equal(vae[name], state[f"ema/{profile}.{name}"])
    assert not torch.equal(vae[name], state[f"weights/{name}"])


def test_metrics_are_recorded(run):
    _, report, _ = run
    lines = metrics(report.vae.parent)
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert all({"step", "reconstruction", "l1"} <= line.keys() for line in lines)
    assert ["discriminator" in line for line in lines] == [False, False, True, True]


def test_a_run_that_is_done_is_exported_again(run, tmp_path):
    """As one is that was killed in its export: with the results half there, or not."""
    settings, report, _ = run
    out = shutil.copytree(report.vae.parent, tmp_path / "out")
    shutil.rmtree(out / "vae")
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=f"^{out} holds a run at step 40: continue it with --resume auto"):
        run_finetune_vae(dataclasses.replace(settings, out=str(out)), say=lambda line: None)
    again = run_finetune_vae(dataclasses.replace(settings, out=str(out)), resume=True, say=lambda line: None)
    assert (again.before, again.after) == (report.before, report.after)
    ours, theirs = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (again.vae, report.vae))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path for path in before if path.read_bytes() != before[path]} == {out / "config.toml"}


def test_what_is_of_no_run_is_not_overwritten(place, tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(ValueError, match=r"vae (is there already|already exists)"):
        run_finetune_vae(settings_for(place, tmp_path), resume=True, say=lambda line: None)


def test_a_folder_in_use_is_refused(place, tmp_path):
    with lock_folder(tmp_path), pytest.raises(ValueError, match=f"^{tmp_path} is in use by process"):
        run_finetune_vae(settings_for(place, tmp_path), say=lambda line: None)


def test_held_out_pictures_are_not_trained_with(place, tmp_path):
    settings = settings_for(place, tmp_path)
    dataset, examples = read_pictures(settings, load_vae(place / "folder"), print)
    index, _ = build_index([Source(place / "pictures")], allow_missing_captions=True)
    _, held_out = split(index, 0.2)
    assert examples.shape == (len(held_out), 4, 32, 32)
    assert set(np.flatnonzero(dataset.plan.assignment == 0)) == set(range(40)) - set(held_out.tolist())


# ----------------------------------------------------------------------------------------------------------------------
# Stopping and going on


def state_of(out, step):
    """The tensors of a state."""
    (path,) = (out / "states" / f"step-{step:08d}").glob("*.safetensors")
    return load_file(path)


def finished(settings, say=lambda line: None, **options):
    try:
        report = run_finetune_vae(settings, say=say, **options)
    except Stopped:
        return None
    return (load_vae(report.vae).state_dict(), state_of(report.vae.parent, settings.steps))


def test_a_stopped_run_goes_on_bit_for_bit(place, tmp_path, monkeypatch):
    """With LPIPS's stand-in, the adversary, mirrored pictures and boxes; stopped in the middle of the second epoch."""
    monkeypatch.setattr(vae_decoder, "load_lpips", lambda backbone: StandInForLpips().requires_grad_(False))
    boxes = tmp_path / "boxes.jsonl"
    boxes.write_text("".join(f'{{"picture": "pictures/{i:02}.png", "boxes": [[5, 5, 25, 20]]}}\n' for i in range(30)))
    options = {"steps": 15, "lpips_weight": 1.0, "boxes": str(boxes)}
    weights, state = finished(settings_for(place, tmp_path / "whole", **options))

    def stop(line):
        if line.startswith("step 11: "):
            os.kill(os.getpid(), signal.SIGTERM)

    assert finished(settings_for(place, tmp_path / "parts", **options), say=stop) is None
    assert not (tmp_path / "parts" / "vae").exists()
    with pytest.raises(ValueError, match="holds a run at step 12: continue it with --resume auto"):
        finished(settings_for(place, tmp_path / "parts", **options))
    said = []
    resumed = settings_for(place, tmp_path / "parts", **options, resume=True, workers=1)
    weights_of_parts, state_of_parts = finished(resumed, said.append)
    assert "resuming at step 12" in said
    assert [line for line in said if line.endswith("from here on")] == ["workers was 0, and is 1 from here on"]
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert state.keys() == state_of_parts.keys()
    assert all(torch.equal(state[name], state_of_parts[name]) for name in state)
    assert all(torch.equal(weights[name], weights_of_parts[name]) for name in weights)
    assert state["optimizer/decoder.conv_out.weight/step"] == 15
    assert state["discriminator_optimizer/0.weight/step"] == 11


def test_the_state_of_another_run_is_refused(place, tmp_path):
    settings = settings_for(place, tmp_path, steps=3)

    def stop(line):
        if line.startswith("step 1: "):
            os.kill(os.getpid(), signal.SIGTERM)

    finished(settings, stop)
    assert not (tmp_path / "vae").exists()
    with pytest.raises(ValueError, match="another learning_rate"):
        finished(dataclasses.replace(settings, resume=True, learning_rate=1e-4))
    fewer = tmp_path / "fewer" / "pictures"
    fewer.mkdir(parents=True)
    for i in range(0, 40, 2):
        (fewer / f"{i:02}.png").symlink_to(place / "pictures" / f"{i:02}.png")
    with pytest.raises(ValueError, match="with another set of pictures"):
        finished(dataclasses.replace(settings, resume=True, sources=(str(fewer),)))
    (path,) = (tmp_path / "states").iterdir()
    (path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the state of such a run"):
        finished(settings, resume=True)


def test_a_state_of_the_first_version(place, tmp_path):
    """One file, in which weights that were not trained yet have no moments; the run is the same behind it."""
    settings = settings_for(place, tmp_path / "whole", steps=6, save_every=3)
    weights, state = finished(settings)
    old = tmp_path / "old"
    old.mkdir()
    early = state_of(tmp_path / "whole", 3)
    early = {name: t for name, t in early.items() if not name.startswith("discriminator_optimizer/")}
    said = json.loads((tmp_path / "whole" / "states" / "step-00000003" / "state.json").read_text())
    about = {"steps": 3, "settings": said["settings"]}
    save_file(early, old / "state.safetensors", {"ztsnr.vae_decoder": json.dumps(about)})
    with pytest.raises(ValueError, match="holds a run: continue it with --resume auto"):
        finished(dataclasses.replace(settings, out=str(old)))
    weights_of_old, state_of_old = finished(dataclasses.replace(settings, out=str(old)), resume=True)
    assert all(torch.equal(weights[name], weights_of_old[name]) for name in weights)
    assert all(torch.equal(state[name], state_of_old[name]) for name in state)
    (old / "state.safetensors").write_bytes((place / "single.safetensors").read_bytes())
    shutil.rmtree(old / "states")
    with pytest.raises(ValueError, match="is not the state of such a run"):
        finished(dataclasses.replace(settings, out=str(old)), resume=True)


def test_numbers_that_are_not_finite_end_the_run(place, tmp_path):
    settings = settings_for(place, tmp_path, learning_rate=1e30, discriminator_weight=0)
    with pytest.raises(ValueError, match="was not finite by step 1, and the run has stopped: lower learning_rate"):
        finished(settings)
    assert not (tmp_path / "states").exists()
    assert not (tmp_path / "vae").exists()


def test_an_encoder_that_changes_is_noticed(place, tmp_path, monkeypatch):
    step = DecoderTraining.step

    def step_and_touch(self, data, noise):
        with torch.no_grad():
            self.vae.quant_conv.bias += 1e-6
        return step(self, data, noise)

    monkeypatch.setattr(DecoderTraining, "step", step_and_touch)
    with pytest.raises(RuntimeError, match="the encoder has changed"):
        finished(settings_for(place, tmp_path, steps=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "metrics.jsonl", "states", "unusable"]


# ----------------------------------------------------------------------------------------------------------------------
# The step


def training_of(place, perceptual=None, **options):
    return DecoderTraining(load_vae(place / "folder"), settings_for(place, "nowhere", **options), perceptual)


def batch(marked=True):
    generator = torch.Generator().manual_seed(0)
    data = torch.cat([torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1, torch.zeros(2, 1, 32, 32)], dim=1)
    if marked:
        data[0, 3, 4:12, 8:24] = 1
    return data, torch.randn(2, 4, 16, 16, generator=generator)


def test_losses_inside_boxes_are_weighted(place):
    training = training_of(place, lambda a, b: (a - b).square().mean(1, keepdim=True), box_weight=5.0, lpips_weight=0.5)
    data, _ = batch()
    decoded = data[:, :3] + torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    losses = training.reconstruction_losses(decoded, data[:, :3], data[:, 3:])
    difference = (decoded - data[:, :3]).double().numpy()
    inside = data[:, 3].numpy() > 0
    l1, squares = [], []
    for of_picture, mask in zip(difference, inside, strict=True):
        count = mask.sum() * 5 + (~mask).sum()
        l1.append((5 * np.abs(of_picture)[:, mask].sum() + np.abs(of_picture)[:, ~mask].sum()) / (3 * count))
        squares.append((5 * (of_picture**2)[:, mask].sum() + (of_picture**2)[:, ~mask].sum()) / (3 * count))
    assert losses["l1"].item() == pytest.approx(np.mean(l1), rel=1e-5)
    assert losses["lpips"].item() == pytest.approx(np.mean(squares), rel=1e-5)
    assert losses["reconstruction"].item() == pytest.approx(np.mean(l1) + 0.5 * np.mean(squares), rel=1e-5)
    assert losses["l1"].item() != pytest.approx(np.abs(difference).mean(), rel=1e-3)


def test_the_decoder_sees_samples_of_the_posterior(place):
    """The first loss is that of the decoder on mean + std * noise, computed apart."""
    training = training_of(place, discriminator_weight=0.0)
    data, noise = batch(marked=False)
    vae = load_vae(place / "folder")
    with torch.no_grad():
        mean, log_variance = vae.quant_conv(vae.encoder(data[:, :3])).chunk(2, dim=1)
        decoded = vae.decoder(vae.post_quant_conv(mean + (log_variance.clamp(-30, 20) / 2).exp() * noise))
    assert training.step(data, noise)["l1"].item() == pytest.approx(
        (decoded - data[:, :3]).abs().mean().item(), rel=1e-5
    )


def test_the_adversary_pulls_with_its_share(place, monkeypatch):
    """The gradient of the last layer is that of L1, and of the adversary's, which is as long times its weight."""
    training = training_of(place, discriminator_start=0, discriminator_weight=0.3)
    data, noise = batch()
    last, seen = training.vae.decoder.conv_out.weight, {}

    def spy(reconstruction, adversarial, weight):
        seen["l1"], seen["adversary"] = (
            torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (reconstruction, adversarial)
        )
        return adaptive_weight(reconstruction, adversarial, weight)

    monkeypatch.setattr(decoder_training, "adaptive_weight", spy)
    encoder, adversary = hash_encoder(training.vae), training.discriminator[0].weight.clone()
    losses = training.step(data, noise)
    added = last.grad - seen["l1"]
    assert added.norm().item() == pytest.approx(0.3 * seen["l1"].norm().item(), rel=1e-3)
    assert torch.cosine_similarity(added.flatten(), seen["adversary"].flatten(), dim=0) > 0.999
    assert 0 < losses["discriminator"] < 3
    assert not torch.equal(training.discriminator[0].weight, adversary)
    assert hash_encoder(training.vae) == encoder


def test_the_adversary_learns_from_its_own_loss_alone(place):
    """Its gradient is that of the hinge loss, and nothing of what went through it into the decoder."""
    training = training_of(place, discriminator_start=0)
    data, noise = batch()
    copy = PatchDiscriminator(8, generator=torch.Generator().manual_seed(training.settings.seed))
    with torch.no_grad():
        posterior = training.vae.encode(data[:, :3]).latent_dist
        decoded = training.vae.decode(posterior.mean + posterior.std * noise).sample
    real, fake = copy(data[:, :3]), copy(decoded)
    (((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2).backward()
    training.step(data, noise)
    for ours, wanted in zip(training.discriminator.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-3, atol=1e-6)


def test_the_adversary_begins_late(place):
    training = training_of(place, discriminator_start=2)
    first = training.discriminator[0].weight.clone()
    names = [set(training.step(*batch())) for _ in range(3)]
    assert [("discriminator" in those, "adversarial" in those) for those in names] == [(False,) * 2] * 2 + [(True,) * 2]
    assert not torch.equal(training.discriminator[0].weight, first)


def test_bfloat16_keeps_weights_in_float32(place):
    training = training_of(place, StandInForLpips(), dtype="bfloat16", lpips_weight=1.0, discriminator_start=0)
    exact = training_of(place, StandInForLpips(), lpips_weight=1.0, discriminator_start=0)
    losses, wanted = (t.step(*batch()) for t in (training, exact))
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert losses["l1"].item() == pytest.approx(wanted["l1"].item(), rel=2e-2)
    assert losses["l1"] != wanted["l1"]
    assert {weight.dtype for weight in training.weights.values()} == {torch.float32}


def test_lpips_takes_part(place, tmp_path, monkeypatch):
    """The stand-in's distance goes down where it alone is trained for, and is among the scores."""
    monkeypatch.setattr(vae_decoder, "load_lpips", lambda backbone: StandInForLpips().requires_grad_(False))
    report = run_finetune_vae(
        settings_for(place, tmp_path, steps=15, l1_weight=0.0, lpips_weight=1.0, discriminator_weight=0.0),
        say=lambda line: None,
    )
    assert report.after.lpips < 0.8 * report.before.lpips
    assert (tmp_path / "merged" / "model_index.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a whole number of at least 1, not 0"),
        ({"flip": 1.5}, r"flip must be a number from 0 to 1, not 1\.5"),
        ({"held_out": 0.0}, "held_out must be a number between 0 and 1"),
        ({"box_weight": -1.0}, "box_weight must be a number of at least 0"),
        ({"dtype": "float16"}, 'dtype must be "float32" or "bfloat16", not "float16"'),
        ({"l1_weight": 0.0}, "nothing would hold the decoder to the picture"),
    ],
)
def test_settings_that_cannot_be(place, options, message):
    with pytest.raises(ValueError, match=message):
        settings_for(place, "nowhere", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 33}, "size must be a multiple of 2"),
        ({"size": 64, "shorter_side": 64, "batch_size": 40}, "fewer than a batch of 40"),
        ({"held_out": 1e-9}, "none of the 40 pictures is held out"),
        ({"model": "nothing.safetensors"}, "there is no file"),
        ({"sources": ("nowhere",)}, "there is no folder or file"),
        (
            {"device": "gpu"},
            "^device = 'gpu' is not a device: give auto, cpu, cuda, xpu, mps, or a number as in cuda:1$",
        ),
        ({"device": "cuda:99"}, "^the device cuda:99 cannot be used: (there is no CUDA|this machine has [0-9]+ GPUs)"),
    ],
)
def test_what_cannot_be_done(place, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_finetune_vae(settings_for(place, tmp_path / "out", **options), say=lambda line: None)
