"""The networks that come with the package are what their files say, and do what the demo shows of them."""

import math
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ztsnr.checkpoints import inspect_checkpoint, load_pipeline, verify_checkpoint
from ztsnr.checkpoints.schedule_shift import shift_of, shift_of_metadata
from ztsnr.cli import main as ztsnr
from ztsnr.demo import networks_sheet
from ztsnr.demo.composed import Asked, Composer
from ztsnr.demo.evaluation import START, STEPS, canvas_sigma
from ztsnr.demo.measures import brightness
from ztsnr.demo.networks_sheet import ASKED, show_networks
from ztsnr.demo.objectives import BASE, OURS, PLAIN
from ztsnr.demo.shipped import CONFIG, FILES, WEIGHTS, load_shipped, start_of
from ztsnr.demo.small_model import SIZES
from ztsnr.diagnostics import leak_run
from ztsnr.diagnostics.leak_run import steps_from
from ztsnr.samplers import NoiseSchedule

WHAT = {BASE: ("epsilon", False), PLAIN: ("v_prediction", False), OURS: ("v_prediction", True)}
NOISES = 4
GUIDANCE = 4.0


def test_they_are_small_and_all_there():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.name for path in WEIGHTS.glob("*.safetensors")} == set(FILES.values())
    assert not list(CONFIG.rglob("*.safetensors"))
    for path in CONFIG.rglob("*.json"):  # nothing of the machine that made them
        assert not any(f'"{root}' in path.read_text(encoding="utf-8") for root in ("/home", "/root", "/tmp", "/work"))


@pytest.mark.parametrize("name", FILES)
def test_files_say_what_they_are(name):
    report = inspect_checkpoint(WEIGHTS / FILES[name])
    assert (report.prediction_type, bool(report.zero_terminal_snr)) == WHAT[name]
    assert shift_of_metadata(report.metadata) == 0.25
    assert report.has_text_encoders
    assert report.has_vae
    assert verify_checkpoint(WEIGHTS / FILES[name]).sound


@pytest.mark.parametrize("name", FILES)
def test_they_load_on_their_own_schedule(name):
    network = load_shipped(name)
    assert (network.prediction_type, network.schedule.zero_terminal_snr) == WHAT[name]
    assert shift_of(network.schedule) == 0.25
    if name != OURS:
        assert network.schedule.sigma_max == pytest.approx(14.6146 / 4, rel=1e-5)
    assert network.shape == (4, SIZES["cpu"].side, SIZES["cpu"].side)
    assert load_shipped(name) is network


def test_as_diffusers_takes_them():
    loaded = load_pipeline(WEIGHTS / FILES[OURS], config=CONFIG)
    assert (loaded.prediction_type, loaded.zero_terminal_snr) == WHAT[OURS]
    assert shift_of(NoiseSchedule.from_config(loaded.pipeline.scheduler.config)) == 0.25
    options = {"num_inference_steps": 4, "guidance_scale": GUIDANCE, "output_type": "np", "height": 32, "width": 32}
    picture = loaded.pipeline("a frog on a black background", **options).images[0]
    assert picture.shape == (32, 32, 3)
    assert np.isfinite(picture).all()


def test_every_word_of_the_captions_is_known():
    pipe = load_shipped(BASE).pipe
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        for word in {word for caption in Composer().captions() for word in caption.split()}:
            assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_the_base_is_the_start_of_a_training():
    start = start_of(BASE)
    assert inspect_checkpoint(start.path).prediction_type == "epsilon"
    assert start.config == str(CONFIG)


def levels(network, caption, sigmas, solver):
    """Mean brightness of pictures of a caption, with guidance."""
    latents = network.sample([caption] * NOISES, network.noise(range(NOISES)), sigmas, solver, GUIDANCE)
    return brightness(network.pictures(latents).astype(float)).mean()


def test_black_is_black_and_white_is_white_from_infinity():
    network = load_shipped(OURS)
    sigmas = network.default_sigmas(20, 1.0)
    assert math.isinf(sigmas[0])
    assert levels(network, "completely black", sigmas, "euler") < 25
    assert levels(network, "completely white", sigmas, "euler") > 230


def test_black_is_grey_from_the_end_of_the_plain_schedule():
    network = load_shipped(PLAIN)
    sigmas = steps_from(network.schedule, min(canvas_sigma(START, 32), network.schedule.sigma_max), STEPS)
    assert levels(network, "completely black", sigmas, "euler") > 45


def test_the_demo_shows_them(tmp_path, monkeypatch):
    monkeypatch.setattr(networks_sheet, "STEPS", 8)
    monkeypatch.setattr(networks_sheet, "DEFAULT_STEPS", 8)
    said = []
    sheet = show_networks(tmp_path, said.append)
    assert sheet.table() in "\n".join(said)
    with Image.open(tmp_path / "networks.png") as picture:
        assert min(picture.size) > 600
    for asked in (Asked("black"), Asked("black", "frog")):
        published, *_, ours = sheet.grounds[1:, ASKED.index(asked)]
        assert ours < published - 15  # what a user sees at a glance


@pytest.mark.parametrize(
    ("name", "passes", "verdict"),
    [(OURS, True, "zero-SNR trained: x0 at t = T does not follow"), (BASE, False, "not zero-SNR trained: x0 at t = T")],
)
def test_the_gate_of_the_leak_test(name, passes, verdict, tmp_path, monkeypatch):
    """As a trainer runs it, but without figures and with a short sheet; the base is stopped, for the right reason."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(leak_run, "STARTS", ())
    monkeypatch.setattr(leak_run, "SHEET_STEPS", 2)
    options = [
        "--config",
        CONFIG,
        "--out",
        tmp_path,
        "--width",
        32,
        "--height",
        32,
        "--prompt",
        "completely black=black",
    ]
    numbers = ["--seeds", 8, "--steps", 10, "--reference-steps", 15, "--guidance", 1, "--gate", 6]
    result = CliRunner().invoke(ztsnr, ["leak", str(WEIGHTS / FILES[name]), *map(str, options + numbers)])
    assert f"Checkpoint: {verdict}" in result.output
    assert result.exit_code == (0 if passes else 1)
