"""``ztsnr demo --train``: what is finished is measured and judged, and the whole of it once, in small."""

import json
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ztsnr.cli import main as ztsnr
from ztsnr.demo import evaluation, ideal_solids, networks_sheet
from ztsnr.demo import reproduction as module
from ztsnr.demo import trainings as trainings_module
from ztsnr.demo.objectives import BASE, EPSILON, OBJECTIVES, OURS, PLAIN, STARVED, Start
from ztsnr.demo.report import WAYS
from ztsnr.demo.shipped import start_of
from ztsnr.demo.trainings import QUICK, Recipe, Trainings
from ztsnr.errors import Stopped

from .synthetic import as_claimed

TINY = Recipe(60, True, 8, 4, 4, 1e-3, 8e-4, 0.1, "float32")


@pytest.fixture
def trainings(tmp_path):
    return Trainings(tmp_path / "out", recipe=TINY, say=lambda line: None)


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


@pytest.fixture
def measured(monkeypatch):
    """What is measured of which folder, in place of measuring it."""
    asked = []

    def evaluation_of(network, composer, path):
        def all_of(long):
            asked.append((network, path, long))
            return {"of": network}

        return SimpleNamespace(all=all_of)

    monkeypatch.setattr(module, "DemoNetwork", lambda path, config=None, **options: (path, config))
    monkeypatch.setattr(module, "Evaluation", evaluation_of)
    return asked


def test_what_is_finished_is_measured(trainings, measured):
    for name in (OURS, EPSILON):
        trainings.exported(name, 2).mkdir(parents=True)
    trainings.exported(PLAIN, 1).mkdir(parents=True)  # of another seed
    found = module.measure(trainings, 2)
    assert list(found) == [EPSILON, OURS]
    assert found[OURS] == {"of": (trainings.exported(OURS, 2), None)}
    assert [path for _, path, _ in measured] == [trainings.folder(name, 2) / "measured.npz" for name in (EPSILON, OURS)]
    assert [long for *_, long in measured] == [False, True]  # what a longer canvas shows is asked of ours alone


def test_the_base_is_that_which_was_fine_tuned(tmp_path, measured):
    def base_of(base):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        trainings = Trainings(place, base=base, recipe=TINY)
        return trainings, module.load_base(trainings, 1)

    trainings, network = base_of(None)
    assert network == (trainings.exported(BASE, 1), None)
    _, network = base_of(Start("base.safetensors", "config"))
    assert tuple(map(str, network)) == ("base.safetensors", "config")
    _, network = base_of(Start("folder"))
    assert (str(network[0]), network[1]) == ("folder", None)


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def command(monkeypatch, tmp_path):
    """``reproduce`` with trainings that take no time; what it does is kept."""
    done = SimpleNamespace(made=[], ran=[], said=[], stops_at=None)

    class Fake:
        def __init__(self, out, size="cpu", base=None, recipe=None, say=print):
            done.made.append((size, base, recipe))
            self.recipe = recipe or trainings_module.RECIPES[size]

        def run(self, seed):
            done.ran.append(seed)
            if seed == done.stops_at:
                raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(module, "Trainings", Fake)
    monkeypatch.setattr(module, "measure", lambda trainings, seed: as_claimed())
    monkeypatch.setattr(module, "write_sheet", lambda trainings, seed, path: path)
    monkeypatch.setattr(ideal_solids, "SHADES", 20)
    done.reproduce = lambda **options: module.reproduce(tmp_path, say=done.said.append, **options)
    return done


def test_it_reports_what_was_measured(command, tmp_path):
    command.reproduce(seeds=(4, 5))
    assert command.made == [("cpu", None, None)]
    assert command.ran == [4, 5]
    text = "\n".join(command.said)
    for number in ("1", "2", "2b", "3", "4", "5"):
        assert re.search(rf"^{number}\. .*: yes$", text, re.MULTILINE)
    assert all(f"{name} " in text for name in OBJECTIVES)
    assert str(tmp_path / "report.html") in text
    assert (tmp_path / "report.html").exists()
    assert str(tmp_path / "sheet.png") in text
    assert json.loads((tmp_path / "results.json").read_text())["training seeds"] == [4, 5]


def test_without_matplotlib_there_is_no_sheet(command, monkeypatch):
    monkeypatch.setattr(module, "no_matplotlib", lambda: "No sheet: pip install matplotlib")
    monkeypatch.setattr(module, "write_sheet", None)
    command.reproduce()
    assert "No sheet: pip install matplotlib" in command.said


def test_a_stopped_run_says_how_it_resumes(command, tmp_path):
    command.stops_at = 5
    with pytest.raises(Stopped):
        command.reproduce(seeds=(4, 5, 6))
    assert command.ran == [4, 5]
    assert command.said[-1] == f"stopped by SIGTERM; the same command resumes from {tmp_path}"
    assert not (tmp_path / "report.html").exists()


def test_quick_fine_tunes_the_base_that_comes_with_the_package(command):
    command.reproduce(quick=True)
    assert command.made == [("cpu", start_of(BASE), QUICK)]


@pytest.mark.parametrize("arguments", [[], ["--train", "gpu"]])
def test_quick_goes_with_cpu(arguments):
    result = CliRunner().invoke(ztsnr, ["demo", "--quick", *arguments])
    assert (result.exit_code, result.output) == (2, "Error: --quick needs --train cpu: add it, or leave --quick out\n")


def test_the_command_passes_on_what_it_is_asked(monkeypatch, tmp_path):
    asked = []

    def reproduce(*arguments, say):
        asked.append(arguments)
        if len(asked) == 2:
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(module, "reproduce", reproduce)
    arguments = ["demo", "--train", "cpu", "--quick", "--seed", "3", "--out", str(tmp_path)]
    assert CliRunner().invoke(ztsnr, arguments).exit_code == 0
    assert CliRunner().invoke(ztsnr, ["demo", "--train", "gpu"]).exit_code == 143  # stopped by a signal
    assert asked[0] == (tmp_path, "cpu", True, [3])
    assert (str(asked[1][0]), *asked[1][1:]) == ("ztsnr_reproduction", "gpu", False, [0])


def test_a_folder_of_something_else_ends_in_a_sentence(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    result = CliRunner().invoke(ztsnr, ["demo", "--train", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output == f"Error: {tmp_path} is not empty and holds no trainings: choose another folder\n"


# ----------------------------------------------------------------------------------------------------------------------
# All of it


@pytest.mark.slow
def test_all_of_it_in_small(tmp_path, monkeypatch):
    monkeypatch.setitem(trainings_module.RECIPES, "cpu", TINY)
    for name, value in {
        "NOISES": 2,
        "OBJECTS": 4,
        "LONG_PICTURES": 4,
        "LITERAL_PICTURES": 2,
        "ERROR_PICTURES": 8,
        "STEPS": 2,
    }.items():
        monkeypatch.setattr(evaluation, name, value)
    monkeypatch.setattr(networks_sheet, "STEPS", 2)
    monkeypatch.setattr(ideal_solids, "SHADES", 50)
    out = tmp_path / "out"
    arguments = ["demo", "--train", "cpu", "--out", str(out), "--seed", "1"]
    first = CliRunner().invoke(ztsnr, arguments, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    for number in ("1", "2", "2b", "3", "4", "5"):  # four steps teach nothing, so nothing can be said
        assert re.search(rf"^{number}\. .*: cannot tell$", first.output, re.MULTILINE)

    trainings = Trainings.open(out)
    assert trainings.exported(BASE, 1).exists()
    report = json.loads((out / "results.json").read_text())
    assert [(row["training"], row["from"]) for row in report["rows"]] == list(WAYS)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") > 80
    with Image.open(out / "sheet.png") as sheet:
        assert min(sheet.size) > 600
    kept = {name: dict(np.load(trainings.folder(name, 1) / "measured.npz")) for name in OBJECTIVES}
    assert all(np.isfinite(values).all() for numbers in kept.values() for values in numbers.values())
    starts = {
        name: {key.split("/")[1] for key in numbers if key.startswith("solids/")} for name, numbers in kept.items()
    }
    both = {"14.6", "infinity"}
    assert starts == {EPSILON: {"14.6"}, PLAIN: {"14.6"}, STARVED: both, OURS: both}
    # each begins from the base, and what is measured differs
    black = [kept[name]["solids/14.6/1/brightness/black"] for name in OBJECTIVES]
    assert len({values.tobytes() for values in black}) == 4

    changed = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".npz", ".safetensors")}
    assert len(changed) > 20
    again = CliRunner().invoke(ztsnr, arguments, catch_exceptions=False)  # nothing is done twice
    assert again.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in changed} == changed
    assert json.loads((out / "results.json").read_text()) == report
