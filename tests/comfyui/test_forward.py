"""Checkpoints that we convert, run in ComfyUI and in diffusers: the same numbers come out of both."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints import mark_checkpoint, to_single_file, verify_checkpoint
from ztsnr.checkpoints.forward import LIMIT

from ..full_size import SMALLEST_UNETS, write_folder

pytestmark = pytest.mark.comfyui


@pytest.fixture
def tokenizer(comfyui_path):
    """CLIP's."""
    return comfyui_path / "comfy" / "sd1_tokenizer"


@pytest.fixture(autouse=True)
def this_comfyui(comfyui_path, comfyui_python, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui_path))
    monkeypatch.setenv("COMFYUI_PYTHON", str(comfyui_python))


@pytest.fixture(scope="module")
def koala(comfyui_path, tmp_path_factory):
    """The smallest of the SDXL family, zero-SNR v-prediction: its folder and its single file."""
    place = tmp_path_factory.mktemp("koala")
    clip = comfyui_path / "comfy" / "sd1_tokenizer"
    folder = write_folder(place / "folder", "SDXL base", clip, unet=SMALLEST_UNETS["KOALA"])
    to_single_file(folder, place / "koala.safetensors")
    yield folder, place / "koala.safetensors"
    shutil.rmtree(place)


def wrong(report):
    """The problems, besides that the smallest U-Nets are not of a published size."""
    return [problem for problem in report.problems if "missing or have another shape" not in problem]


def compared(report):
    return {(agreement.program.split()[0], agreement.what) for agreement in report.agreements}


def test_the_sdxl_family(koala):
    folder, file = koala
    report = verify_checkpoint(file, folder, run=True)
    assert wrong(report) == []
    assert compared(report) == {
        *(("diffusers,", what) for what in ("text", "pooled", "prediction", "picture")),
        *(("ComfyUI", what) for what in ("sigma table", "text", "pooled", "denoised", "picture")),
    }
    assert all(agreement.difference <= LIMIT for agreement in report.agreements)


def test_a_file_without_marks_is_found_out(koala, tmp_path):
    folder, file = koala
    bare = mark_checkpoint(file, v_pred=False, ztsnr=False, out=tmp_path / "bare.safetensors")
    report = verify_checkpoint(folder, bare, run=True)
    assert any("loads it as epsilon, but it is v_prediction" in problem for problem in report.problems)
    assert any("sigma table differs" in problem for problem in report.problems)
    bare.unlink()


def test_a_projection_that_was_not_turned_is_found_out(koala, tmp_path):
    """The mistake that makes SDXL files that load without a word and ignore half of the prompt."""
    folder, file = koala
    tensors = load_file(file)
    name = "conditioner.embedders.1.model.text_projection"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, tmp_path / "turned.safetensors")
    report = verify_checkpoint(folder, tmp_path / "turned.safetensors", run=True)
    (tmp_path / "turned.safetensors").unlink()
    differing = {(found.program.split()[0], found.what) for found in report.agreements if not found.holds}
    assert ("ComfyUI", "pooled") in differing
    assert ("ComfyUI", "text") not in differing


@pytest.mark.parametrize("name", ["SD 1.x", "SD 2.x"])
def test_stable_diffusion(tokenizer, tmp_path, name):
    """Of SD 2.x's 24 text layers the file has the 23 that are used."""
    folder = write_folder(
        tmp_path / "folder", name, tokenizer, unet=SMALLEST_UNETS[name], prediction_type="epsilon", zero_snr=False
    )
    to_single_file(folder, tmp_path / "file.safetensors")
    report = verify_checkpoint(tmp_path / "file.safetensors", folder, run=True)
    assert wrong(report) == []
    in_comfyui = {what for program, what in compared(report) if program == "ComfyUI"}
    assert in_comfyui == {"sigma table", "text", "denoised", "picture"}
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_sdxl_of_full_size(tokenizer, tmp_path):
    folder = write_folder(tmp_path / "folder", "SDXL base", tokenizer)
    to_single_file(folder, tmp_path / "sdxl.safetensors")
    report = verify_checkpoint(tmp_path / "sdxl.safetensors", folder, run=True)
    shutil.rmtree(tmp_path)
    assert report.sound, report.problems
    assert len(report.agreements) == 9
