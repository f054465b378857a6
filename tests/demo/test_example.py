"""``ztsnr example`` writes what ``ztsnr finetune`` trains with at once."""

import pytest
from click.testing import CliRunner

from ztsnr.cli import main as ztsnr
from ztsnr.demo import example
from ztsnr.training.config import FinetuneSettings
from ztsnr.training.settings_file import read_settings


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "PICTURES", 40)
    result = CliRunner().invoke(ztsnr, ["example", str(tmp_path / "first")])
    assert result.exit_code == 0, result.output
    assert f"Next:  ztsnr finetune {tmp_path / 'first' / 'settings.toml'}" in result.output
    return tmp_path / "first"


def test_everything_is_there(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"pictures", "base.safetensors", "config", "settings.toml", "NOTICE.md"}
    assert len(list((folder / "pictures").glob("*.png"))) == len(list((folder / "pictures").glob("*.txt"))) == 40


def test_a_dry_run_passes(folder):
    settings = read_settings(FinetuneSettings, folder / "settings.toml")
    assert settings.objective.schedule_shift == 0.25
    result = CliRunner().invoke(ztsnr, ["finetune", str(folder / "settings.toml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "t = 999 has" in result.output


def test_a_folder_that_exists_is_left_alone(folder):
    before = sorted(path.name for path in folder.rglob("*"))
    result = CliRunner().invoke(ztsnr, ["example", str(folder)])
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert sorted(path.name for path in folder.rglob("*")) == before
