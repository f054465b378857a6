"""The reproduction: what is finished stays, other settings are refused, and the whole of it once, in small."""

import json
import math

import pytest
from PIL import Image

from ztsnr.cli import main as ztsnr
from ztsnr.training import reproduction as module
from ztsnr.training.objective import Objective
from ztsnr.training.reproduction import EPSILON, OURS, PLAIN, STARVED, TRAININGS, Recipe, Reproduction

TINY = Recipe(60, 1, 4, 8, 2e-3, 0.2, "float32")


def test_trainings_differ_in_the_objective_alone(tmp_path):
    made = Reproduction(tmp_path / "out", recipe=TINY)
    settings = {name: made.settings(name, 3, tmp_path / "run") for name in TRAININGS}
    others = [{field: getattr(one, field) for field in vars(one) if field != "objective"} for one in settings.values()]
    assert all(other == others[0] for other in others)
    objectives = {name: Objective(one.objective) for name, one in settings.items()}
    assert not any(objectives[name].schedule.zero_terminal_snr for name in (EPSILON, PLAIN))
    assert all(objectives[name].schedule.zero_terminal_snr for name in (STARVED, OURS))
    assert objectives[STARVED].high_noise_share < 0.0005  # of facts: 0.03 %
    assert objectives[OURS].high_noise_share == pytest.approx(0.1)
    assert objectives[STARVED].weight[-1] == 0


def test_a_folder_is_of_one_reproduction(tmp_path):
    Reproduction(tmp_path / "out", recipe=TINY)
    Reproduction(tmp_path / "out", recipe=TINY)
    with pytest.raises(ValueError, match="other settings"):
        Reproduction(tmp_path / "out", "gpu")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no reproduction"):
        Reproduction(tmp_path / "mine", recipe=TINY)
    with pytest.raises(ValueError, match="cannot be used"):
        Reproduction(tmp_path / "mine" / "letter.txt", recipe=TINY)


def test_data_needs_train():
    from click.testing import CliRunner

    result = CliRunner().invoke(ztsnr, ["demo", "--data", "."])
    assert (result.exit_code, result.output) == (2, "Error: --data does nothing without --train\n")


@pytest.mark.slow
def test_all_of_it_in_small(tmp_path, monkeypatch):
    from click.testing import CliRunner

    monkeypatch.setitem(module.RECIPES, "cpu", TINY)
    monkeypatch.setattr(module, "SEEDS", range(2))
    monkeypatch.setattr(module, "STEPS", (20, 28))
    monkeypatch.setattr(module, "LEAK_SEEDS", range(2))
    mine = tmp_path / "mine"
    mine.mkdir()
    for i in range(12):
        Image.new("RGB", (48, 48), (20 * i, 0, 0)).save(mine / f"{i}.png")
        (mine / f"{i}.txt").write_text("my red")
    out = tmp_path / "out"
    arguments = ["demo", "--train", "cpu", "--out", str(out), "--data", str(mine)]
    first = CliRunner().invoke(ztsnr, arguments, catch_exceptions=False)
    assert first.exit_code == 0
    for number in range(1, 6):
        assert f"\n{number}. " in first.output
    report = json.loads((out / "results.json").read_text())
    assert [claim["number"] for claim in report["claims"]] == [1, 2, 3, 4, 5]
    starts = {row["start"] for row in report["rows"] if row["training"] == OURS}
    assert starts == {"infinity", "20000", "4096", "56", "14.6", "leading (SDXL's)"}
    assert "infinity" not in {row["start"] for row in report["rows"] if row["training"] == EPSILON}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") > 40
    assert "http" not in page.replace("http-equiv", "")
    with Image.open(out / "sheet.png") as sheet:
        assert min(sheet.size) > 600

    changed = {path: path.stat().st_mtime_ns for path in out.glob("seed-0/*/measured/rows.json")}
    assert len(changed) == 4
    again = CliRunner().invoke(ztsnr, arguments, catch_exceptions=False)  # nothing is done twice
    assert "training" not in again.output.split("brightness error")[0].split("training   ")[0]
    assert {path: path.stat().st_mtime_ns for path in changed} == changed
    measured = Reproduction(out, "cpu", mine).run(0)
    assert [one.training for one in measured] == list(TRAININGS)
    assert all(math.isfinite(row.brightness_error) for one in measured for row in one.rows)
