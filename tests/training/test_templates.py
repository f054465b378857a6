"""``ztsnr finetune --init``: settings that run as soon as two paths are filled in."""

import tomllib

import pytest
from click.testing import CliRunner

from ztsnr.cli import main
from ztsnr.training.config import FinetuneSettings
from ztsnr.training.decoder.settings import VaeDecoderSettings
from ztsnr.training.decoder.trainer import run_finetune_vae
from ztsnr.training.settings_file import read_settings
from ztsnr.training.trainer import run_finetune

# what a tiny model and a processor need, and the template leaves to SDXL and a GPU
SMALL = (
    *("--steps", "2", "--data.batch-size", "4", "--data.buckets", "32x32,48x32,32x48", "--data.step", "16"),
    *("--data.validation-share", "0.1", "--data.workers", "0", "--speed.device", "cpu", "--speed.checkpointing", "off"),
    *("--watch.preview-steps", "2", "--watch.tensorboard", "false", "--optimizer.warmup-steps", "1"),
)


def printed(*arguments):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def filled_in(place, tmp_path):
    """Write a template with its two paths filled in."""

    def filled_in(text):
        assert text.count('"path/to/base.safetensors"') == text.count('"path/to/pictures"') == 1
        text = text.replace("path/to/base.safetensors", (place / "tiny").as_posix())
        path = tmp_path / "settings.toml"
        path.write_text(text.replace("path/to/pictures", (place / "pictures").as_posix()), encoding="utf-8")
        return path

    return filled_in


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_filled_in_template_is_read(place, filled_in, name):
    settings = read_settings(FinetuneSettings, filled_in(printed("finetune", "--init", name)))
    assert (settings.model.adapter is not None) == (name == "lora")
    assert settings.data.latents is None
    assert settings.data.sources[0].path == place / "pictures"


def test_the_template_of_a_decoder_is_that_of_both_commands(place, filled_in):
    text = printed("finetune", "--init", "decoder")
    assert printed("finetune-vae", "--init") == text
    settings = read_settings(VaeDecoderSettings, filled_in(text))
    assert settings.sources == (str(place / "pictures"),)
    written = tomllib.loads(text)
    defaults = VaeDecoderSettings(model="", sources=(), out="")
    assert {name: value for name, value in written.items() if value != getattr(defaults, name)}.keys() == {
        "model",
        "sources",
        "out",
    }


def test_templates_survive_a_redirection_of_powershell(filled_in):
    path = filled_in(printed("finetune", "--init", "lora"))
    settings = read_settings(FinetuneSettings, path)
    path.write_text(path.read_text(encoding="utf-8").replace("\n", "\r\n"), encoding="utf-16")
    assert read_settings(FinetuneSettings, path) == settings


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_filled_in_template_runs(filled_in, tmp_path, name):
    path = filled_in(printed("finetune", "--init", name))
    out = tmp_path / "run"
    run_finetune(read_settings(FinetuneSettings, path, ("--out", str(out), *SMALL)))
    assert any((out / "export").iterdir())


@pytest.mark.slow
def test_the_filled_in_template_of_a_decoder_runs(filled_in, tmp_path):
    path, out = filled_in(printed("finetune-vae", "--init")), tmp_path / "run"
    small = ("--steps", "2", "--size", "32", "--shorter-side", "32", "--batch-size", "4", "--held-out", "0.2")
    rest = ("--lpips-weight", "0", "--workers", "0", "--device", "cpu", "--out", str(out))
    report = run_finetune_vae(read_settings(VaeDecoderSettings, path, (*small, *rest)))
    assert report.merged is not None
