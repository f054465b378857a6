"""The whole way: an epsilon SDXL of the real classes, small, becomes v-prediction with zero terminal SNR.

Real picture files go through the real data side, and what is exported is sampled by diffusers.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ztsnr.checkpoints import inspect_checkpoint, verify_checkpoint
from ztsnr.checkpoints.pipeline import load_pipeline
from ztsnr.data.captions import CaptionSettings
from ztsnr.demo.small_model import SmallModelSize, write_small_model
from ztsnr.samplers import ZTSNRScheduler
from ztsnr.training.config import FinetuneSettings
from ztsnr.training.networks import Denoiser, Tokenize, load_networks
from ztsnr.training.objective import Objective
from ztsnr.training.run_data import open_data
from ztsnr.training.settings_file import parse_settings
from ztsnr.training.trainer import run_finetune
from ztsnr.training.validation import Validation
from ztsnr.world import World

pytestmark = pytest.mark.xdist_group("main job")  # one worker trains for all tests here

STEPS = 200
COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "grey": (128, 128, 128),
}
SIZE = SmallModelSize(
    side=16, factor=2, widths=(16, 32), attention=(False, True), layers=1, text_widths=(16, 24), norm_groups=4
)
SIZES = [(20, 20), (33, 17), (18, 30)]


def caption(colour):
    return f"solid {colour} background"


def write_pictures(folder, count=90):
    """Grounds of one colour with a little light on them, as PNG, JPEG and WebP, of three shapes."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        name = list(COLOURS)[i % len(COLOURS)]
        width, height = SIZES[i // len(COLOURS) % len(SIZES)]
        light = random.normal(0, 8) + np.linspace(-6, 6, width)[None, :, None] * random.normal()
        picture = np.clip(np.array(COLOURS[name]) + light + np.zeros((height, 1, 1)), 0, 255).round().astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i:02}.{('png', 'jpg', 'webp')[i % 3]}", quality=95)
        (folder / f"{i:02}.txt").write_text(caption(name))
    return folder


def settings(place):
    return parse_settings(
        FinetuneSettings,
        {
            "out": str(place / "run"),
            "steps": STEPS,
            "save_every": STEPS,
            "model": {"base": str(place / "base"), "text_encoders": True, "dtype": "float32"},
            "data": {
                "sources": [{"path": str(place / "pictures")}],
                "batch_size": 16,
                "buckets": ["16x16,24x16,16x24"],
                "step": 8,
                "validation_share": 0.2,
                "workers": 0,
                "captions": {"caption_dropout": 0.1},
            },
            "objective": {"terminal_probability": 0.1, "high_noise_share": 0.2},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 20, "schedule": "cosine", "weight_decay": 0.0},
            "average": {"sigma_rel": [0.05]},
            "speed": {"device": "cpu", "checkpointing": "off"},
            "watch": {
                "log_every": 20,
                "validate_every": STEPS // 2,
                "preview_every": STEPS,
                "preview_steps": 8,
                "guidance": 1.0,
            },
            "export": {"dtype": "float32", "raw": False},
        },
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The place of it all, the settings, and what was written and said."""
    place = tmp_path_factory.mktemp("main")
    write_small_model(place / "base", {word for colour in COLOURS for word in caption(colour).split()}, SIZE)
    write_pictures(place / "pictures")
    chosen, said = settings(place), []
    written = run_finetune(chosen, say=said.append)
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    return place, chosen, written, said, lines


def sample(model, config=None, seed=0):
    """The mean colour, in levels of 255, of a picture for each colour's prompt, and all pictures."""
    pipe = load_pipeline(model, config=config).pipeline
    model_is = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipe.scheduler = ZTSNRScheduler.from_config(pipe.scheduler.config, latent_size=(8, 8), **model_is)
    pictures = [
        pipe(
            caption(colour),
            num_inference_steps=8,
            guidance_scale=1.0,
            height=16,
            width=16,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        for colour in COLOURS
    ]
    return 255 * np.stack([picture.mean((0, 1)) for picture in pictures]), np.stack(pictures)


def validation_of(model, chosen, place):
    """The errors of a model on the held-out pictures, as the run measures them."""
    world = World(0, 1, 1, torch.device("cpu"))
    data = open_data(chosen.data, chosen.seed, world, place / "index.arrow")
    networks, objective = load_networks(model), Objective(chosen.objective)

    def to_latents(pixels, number):
        with torch.no_grad():
            return networks.latent_scaling.to_model(networks.vae.encode(pixels).latent_dist.mean)

    validation = Validation(data, 64, CaptionSettings(), Tokenize(networks), objective, to_latents, world)
    return validation.measure(Denoiser(networks))


def test_the_loss_falls(run):
    _, _, _, _, lines = run
    losses = [line for line in lines if "loss" in line]
    first, last = losses[0], losses[-1]
    assert last["loss"] < 0.5 * first["loss"]
    # at t = T the answer is the picture itself: its caption says all of it but the light, unless it was dropped
    assert last["loss/t999"] < 0.4 * first["loss/t999"]


def test_the_validation_loss_falls(run):
    place, chosen, written, _, lines = run
    before = validation_of(place / "base", chosen, place)
    after = [line for line in lines if "validation" in line][-1]
    bound = 0.25  # at t = T, where the answer is the picture; pictures have a mean square of about 1.6
    assert before["validation/t999"] > 4 * bound
    assert after["validation/t999"] < bound
    assert after["validation"] < 0.5 * before["validation"]
    # the exported folder is what was measured, the average of the weights
    exported = validation_of(written[-1], chosen, place)
    assert exported["validation/t999"] == pytest.approx(after["validation/t999"], rel=0.05)


def test_the_table_is_printed_and_saved(run):
    place, chosen, _, said, _ = run
    table = next(text for text in said if "share of the loss" in text)
    assert "t >= 900 has 20.00% of the loss" in table
    rows = (place / "run" / "objective.csv").read_text().splitlines()
    assert len(rows) == 1001
    assert sum(float(row.split(",")[4]) for row in rows[901:]) == pytest.approx(0.2, abs=1e-9)
    assert (place / "run" / "config.toml").exists()
    assert chosen.objective.high_noise_share == 0.2


def test_previews_of_the_solid_colours(run):
    place, _, _, _, lines = run
    metrics = next(line for line in reversed(lines) if "leak/slope" in line)
    assert metrics["step"] == STEPS
    missed = [metrics[f"preview/{caption(colour)}"] for colour in COLOURS]
    assert np.mean(missed) < 30  # of 255 levels; 110 for grey throughout
    with Image.open(place / "run" / "previews" / f"step-{STEPS:08d}.png") as sheet:
        assert sheet.width == 4 * 16
    assert list((place / "run" / "tensorboard").iterdir())


def test_what_is_exported_is_v_prediction_with_zero_terminal_snr(run):
    _, _, (file, folder), _, _ = run
    for path in (file, folder):
        report = inspect_checkpoint(path)
        assert report.prediction_type == "v_prediction"
        assert report.zero_terminal_snr
        assert verify_checkpoint(path).sound


def test_file_and_folder_make_the_same_pictures_and_the_colours_that_are_asked_for(run):
    place, _, (file, folder), _, _ = run
    asked = np.array(list(COLOURS.values()))
    before, _ = sample(place / "base")
    after, pictures = sample(folder)
    assert np.array_equal(sample(file, config=folder)[1], pictures)
    missed = {"before": np.abs(before - asked).mean(1), "after": np.abs(after - asked).mean(1)}
    for number, colour in enumerate(COLOURS):
        if colour != "grey":  # which a network that knows nothing answers too
            assert missed["after"][number] < missed["before"][number] / 4, colour
    assert missed["after"].mean() < 30
