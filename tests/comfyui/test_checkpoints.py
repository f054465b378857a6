"""Against a real ComfyUI: what it takes the same files for, and our loader in it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from ztsnr.checkpoints import inspect_checkpoint

pytestmark = pytest.mark.comfyui

SAME = {
    "SD15": "SD 1.x",
    "SD20": "SD 2.x",
    "SDXL": "SDXL base",
    "SDXLRefiner": "SDXL refiner",
    "SSD1B": "SSD-1B",
    "Segmind_Vega": "Vega",
    "KOALA_700M": "KOALA",
    "KOALA_1B": "KOALA",
}


def run(python, path, base, task) -> dict:
    program = Path(__file__).with_name("checkpoints_inside.py")
    done = subprocess.run(
        [python, program, path, base, task],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def unets(comfyui_python, comfyui_path, tmp_path_factory):
    return run(comfyui_python, comfyui_path, tmp_path_factory.mktemp("base"), "shapes")


def test_architectures_are_what_comfyui_takes_them_for(unets, tmp_path, write_checkpoint):
    seen = set()
    for name, layouts in unets.items():
        for layout, (taken_for, shapes) in layouts.items():
            report = inspect_checkpoint(write_checkpoint(tmp_path / "a.safetensors", shapes))
            assert report.architecture == SAME[taken_for], f"{name}, {layout}"
            assert (
                report.format == {"single-file": "U-Net only, bare names", "diffusers": "diffusers U-Net file"}[layout]
            )
            seen.add(taken_for)
    assert seen == set(SAME)


# ----------------------------------------------------------------------------------------------------------------------
# The loader

MARKS = {"v_pred": ("F32", 0), "ztsnr": ("F32", 0)}
EXACT = ["v_prediction", True, "8192.0"]
AS_TRAINED = ["v_prediction", False, "14.61"]
EPSILON = ["epsilon", False, "14.61"]
STOCK_ZERO_SNR = ["v_prediction", True, "4518.76"]
NO_VAE = "ERROR: VAE is invalid: None"


@pytest.fixture(scope="module")
def loaded(unets, comfyui_python, comfyui_path, tmp_path_factory, write_checkpoint):
    base = tmp_path_factory.mktemp("base")
    models = base / "models"
    bare = unets["small"]["single-file"][1]
    prefixed = {f"model.diffusion_model.{name}": shape for name, shape in bare.items()}
    (models / "checkpoints").mkdir(parents=True)
    (models / "checkpoints" / "old.ckpt").write_bytes(b"PK")
    for name, shapes, metadata in [
        ("checkpoints/marked", {**prefixed, **MARKS}, None),
        ("checkpoints/v_pred", {**prefixed, "v_pred": (0,)}, None),
        ("checkpoints/modelspec", prefixed, {"modelspec.prediction_type": "v-zsnr"}),
        ("checkpoints/epsilon", prefixed, {"modelspec.prediction_type": "epsilon"}),
        ("checkpoints/silent", prefixed, None),
        ("checkpoints/playground", {**prefixed, "edm_mean": ("F32", 4), "edm_std": ("F32", 4)}, None),
        ("checkpoints/half_scaled", prefixed, {"ztsnr.latent_mean": "[0, 0, 0, 0]"}),
        ("checkpoints/sixteen", prefixed, {"ztsnr.latent_mean": str([0] * 16), "ztsnr.latent_std": str([1] * 16)}),
        ("checkpoints/lora", {"lora_unet_a.lora_down.weight": (4, 2048)}, None),
        ("diffusion_models/prefixed", {**prefixed, **MARKS}, None),
        ("diffusion_models/bare", {**bare, **MARKS}, None),
        ("diffusion_models/folder/unet/diffusion_pytorch_model", unets["SDXS"]["diffusers"][1], None),
    ]:
        write_checkpoint(models / f"{name}.safetensors", shapes, metadata)
    scheduler = models / "diffusion_models" / "folder" / "scheduler"
    scheduler.mkdir()
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (scheduler / "scheduler_config.json").write_text(json.dumps(config))
    return run(comfyui_python, comfyui_path, base, "load")


def test_every_file_is_offered_once(loaded):
    assert len(loaded) == 14


@pytest.mark.parametrize(
    ("name", "ours", "stock"),
    [
        ("marked", EXACT, STOCK_ZERO_SNR),
        ("v_pred", AS_TRAINED, AS_TRAINED),
        ("modelspec", EXACT, EPSILON),
        ("epsilon", EPSILON, EPSILON),
        ("silent", EPSILON, EPSILON),
        ("diffusion_models/prefixed", EXACT, EPSILON),
        ("diffusion_models/bare", EXACT, STOCK_ZERO_SNR),
        ("diffusion_models/folder/unet/diffusion_pytorch_model", EXACT, EPSILON),
    ],
)
def test_models_are_what_their_files_say(loaded, name, ours, stock):
    found = loaded[f"{name}.safetensors"]
    assert (found["ours"], found["stock"]) == (ours, stock)
    assert f"Prediction: {'not stated' if name == 'silent' else ours[0]}." in found["report"]
    assert ("The model is patched" in found["report"]) == (ours != EPSILON)
    assert not found["clip"]
    assert found["vae"].startswith(NO_VAE)
    assert "No text encoders in the file" in found["report"]
    assert "No VAE in the file" in found["report"]


def test_other_noise_levels_are_left_alone(loaded):
    found = loaded["playground.safetensors"]
    assert found["ours"] == found["stock"]
    assert "The model is as ComfyUI loads it (EDM)" in found["report"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("old.ckpt", "is a pickle"),
        ("lora.safetensors", "is a LoRA"),
        ("gone.safetensors", "gone.safetensors is not in models/checkpoints"),
        ("half_scaled.safetensors", "have ztsnr.latent_mean alone"),
        ("sixteen.safetensors", "latent scaling has 16 channels, but this model has 4"),
    ],
)
def test_refusals(loaded, name, sentence):
    assert sentence in loaded[name]["refused"]
    assert loaded[name]["outputs"] == 4


# ----------------------------------------------------------------------------------------------------------------------
# Latents that the file scales


@pytest.fixture(scope="module")
def latents(comfyui_python, comfyui_path, tmp_path_factory):
    return run(comfyui_python, comfyui_path, tmp_path_factory.mktemp("base"), "latents")


@pytest.mark.parametrize("start", ["empty latent", "from a picture"])
def test_sampling_is_that_of_the_network_in_the_scale_of_the_vae(latents, start):
    """Beside a file of the same network without metadata: what comes out is std x + mean of its raw result x."""
    assert latents[start] < 1e-4  # of numbers up to 50, through a network in float32
    assert latents["stock scale"] > 1


def test_inpainting_keeps_what_it_shall_keep(latents):
    assert latents["kept by inpainting"] < 1e-5
    assert latents["painted"] > 1


def test_it_holds_wherever_latents_are_scaled(latents):
    for place in ("in, not loaded", "behind ZTSNR Model"):
        assert latents[place] < 1e-5, place
    assert latents.get("reloaded", 0) < 1e-5
    assert max(latents["previews"]) <= 1  # of 255; before the first run and after it
    assert "mean 4.812, 0.1607, 1.354, -1.775, std 9.918, 6.275, 7.598, 5.996" in latents["report"]


def test_other_models_and_loaders_are_as_comfyui_makes_them(latents):
    assert latents["plain"] < 1e-5
    assert latents["stock loader"] < 1e-5  # which the help page tells
    assert not latents["kept by Save Checkpoint"]  # and this
