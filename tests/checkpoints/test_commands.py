"""``ztsnr mark`` and ``ztsnr convert``: that they call what they should, and say what is wrong."""

import pytest
from click.testing import CliRunner

from ztsnr.checkpoints import inspect_checkpoint, verify_checkpoint
from ztsnr.cli import main

from ..tiny_pipelines import make_tiny_sdxl
from .test_inspect import ldm_unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_sdxl(tmp_path_factory.mktemp("convert") / "tiny")


def run(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_there_and_back_and_marked(folder, tmp_path):
    file, back, marked = tmp_path / "a.safetensors", tmp_path / "back", tmp_path / "b.safetensors"
    assert run("convert", folder, file).exit_code == 0
    report = inspect_checkpoint(file)
    assert (report.prediction_type, report.zero_terminal_snr) == ("v_prediction", True)
    assert run("convert", file, back, "--config", folder).exit_code == 0
    assert verify_checkpoint(back, folder).changes == ()

    assert run("mark", file, "--no-v-pred", "--no-ztsnr", "--out", marked).exit_code == 0
    assert inspect_checkpoint(marked).prediction_type == "epsilon"
    assert verify_checkpoint(marked).sound  # the hash is right
    assert run("mark", marked, "--v-pred", "--ztsnr", "--swarm", "--in-place").exit_code == 0
    assert inspect_checkpoint(marked).metadata["modelspec.prediction_type"] == "v-zsnr"
    assert verify_checkpoint(marked, file).changes == ()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("mark", "{folder}", "--v-pred"), "--in-place"),
        (("mark", "{out}", "--v-pred", "--in-place"), "no file"),
        (("convert", "{folder}", "{out}", "--config", "x"), "--config"),
        (("convert", "{out}", "{out}2", "--base", "x"), "--base"),
        (("convert", "{out}", "{out}2"), "no file"),
    ],
)
def test_mistakes_end_in_a_sentence(folder, tmp_path, arguments, sentence):
    places = {"folder": folder, "out": tmp_path / "out.safetensors"}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_after_marking_it_says_who_misreads_the_file(tmp_path, write_checkpoint):
    file = write_checkpoint(
        tmp_path / "sdxl.safetensors", ldm_unet() | {"first_stage_model.decoder.conv_in.weight": (1,)}
    )
    result = run("mark", file, "--v-pred", "--ztsnr", "--in-place")
    assert "Misread by SwarmUI: " in result.stdout
    assert "Misread by InvokeAI: " in result.stdout
    assert "ComfyUI: v" not in result.stdout
    result = run("mark", file, "--v-pred", "--ztsnr", "--swarm", "--in-place")
    assert "SwarmUI" not in result.stdout
