"""The command line: what a newcomer types, and what a newcomer mistypes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import ztsnr
from ztsnr import extras, files
from ztsnr.cli import main, mistakes
from ztsnr.demo import exact_prompts, exact_runs


def ztsnr_command(*arguments) -> tuple[int, str]:
    """Exit code and everything printed; a crash that click did not turn into a sentence is raised."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def save(path: Path, pixels: np.ndarray, **kwargs) -> None:
    Image.fromarray(pixels).save(path, **kwargs)


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    """Where the networks that come with the package were to be shown; what they paint is tested in tests/demo."""
    shown = []
    monkeypatch.setattr("ztsnr.demo.networks_sheet.show_networks", lambda out, say: shown.append(out))
    return shown


# ----------------------------------------------------------------------------------------------------------------------


def test_help_and_version():
    assert ztsnr_command("--version") == (0, f"ztsnr, version {ztsnr.__version__}\n")
    code, text = ztsnr_command("--help")
    assert code == 0
    assert "demo" in text
    code, text = ztsnr_command("demo", "--help")
    assert code == 0
    assert "--images" in text


def test_what_one_process_alone_meets_it_says(monkeypatch):
    """Under torchrun the first process may know nothing of a mistake, for one of pictures that another one reads."""
    monkeypatch.setattr(mistakes, "PATIENCE", 0)
    monkeypatch.setenv("RANK", "3")
    code, text = ztsnr_command("buckets", "no-such-folder", "--buckets", "none")
    assert code == 2
    assert text == (
        "Error: process 3: there are no buckets called 'none': choose sdxl or novelai, or list sizes as WxH,WxH\n"
    )


def test_what_all_processes_meet_is_said_once(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "--no-python", sys.executable]
    program = "from ztsnr.cli import main, mistakes; mistakes.PATIENCE = 300; main(['buckets', 'no-such-folder'])"
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    assert done.stderr.count("Error: there is no folder or file") == 1, done.stderr
    assert "Error: process" not in done.stderr


def test_help_loads_nothing_heavy():
    heavy = "torch", "diffusers", "matplotlib", "numpy", "PIL"
    program = (
        "import sys; from click.testing import CliRunner; from ztsnr.cli import main\n"
        "assert CliRunner().invoke(main, ['demo', '--help']).exit_code == 0\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert answer.stdout.strip() == "[]"


def test_demo(tmp_path, networks):
    code, text = ztsnr_command("demo", "--out", tmp_path / "new" / "folder", "--size", 16, "--steps", 8)
    assert code == 0
    folder = tmp_path / "new" / "folder"
    assert networks == [folder]
    assert sorted(file.name for file in folder.iterdir()) == ["contact_sheet.png", "denoised_mean.png", "results.json"]
    for name in ("contact_sheet.png", "denoised_mean.png", "results.json"):
        assert str(folder / name) in text
    for name in ("contact_sheet.png", "denoised_mean.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 600
            assert np.asarray(image).std() > 10

    report = json.loads((folder / "results.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    for name in rows:
        assert name in text
    assert [row["start_sigma"] for row in report["rows"][:3]] == ["infinity", "infinity", pytest.approx(4096, rel=1e-6)]
    assert rows["finite start 14.6"]["start_sigma"] == pytest.approx(14.6146, abs=1e-3)
    for name in ("exact infinity", "exact infinity, Euler"):
        assert max(abs(error) for error in rows[name]["brightness_error"].values()) < 1e-3
    for name in ("finite start 14.6", "SDXL's leading steps"):
        errors = rows[name]["brightness_error"]
        assert errors["solid black"] > 5
        assert errors["solid white"] == pytest.approx(-errors["solid black"], abs=1e-3)
    assert abs(rows["exact infinity"]["mean_leak"]) < 1
    assert rows["exact infinity"]["right_picture"]["photograph"] > 0.9


def test_demo_repeats_itself(tmp_path):
    reports = []
    for folder in ("a", "b"):
        assert ztsnr_command("demo", "--out", tmp_path / folder, "--size", 16, "--steps", 2, "--seed", 7)[0] == 0
        reports.append((tmp_path / folder / "results.json").read_text())
    assert reports[0] == reports[1]


# ----------------------------------------------------------------------------------------------------------------------
# The numbers are measured, and are what theory says


@pytest.fixture(scope="module")
def rows():
    return exact_runs.make_rows()


def run_black(row: exact_runs.Row, steps: int, size: int = 16) -> tuple[float, float]:
    """Brightness error and mean leak, in levels, of solid black."""
    prompt = exact_prompts.make_prompts(torch.zeros(1, 3, size, size), size)[0]
    noise = torch.randn(prompt.seeds, 3, size, size, generator=torch.Generator().manual_seed(1))
    run = exact_runs.sample_with_scheduler(row, prompt.model, noise, steps)
    result = exact_runs.measure([prompt], [run], noise, [prompt.model.exact(noise)])
    return result["brightness_error"]["solid black"], result["mean_leak"]


def test_finite_start_has_the_error_of_its_limit(rows):
    for row in rows[3:]:
        error, leak = run_black(row, steps=500)
        sigma = float(row.scheduler.sigmas[0])
        noise = sigma / 16  # what is left of the noise in an average over 16 x 16 values
        share = exact_prompts.EXPOSURE / math.hypot(exact_prompts.EXPOSURE, noise)
        # from x = noise * z on: an average a has become m + share * (a - m)
        assert error == pytest.approx(share / exact_runs.LEVEL, rel=0.03)
        assert leak == pytest.approx((share * noise - exact_prompts.EXPOSURE) / exact_runs.LEVEL, abs=0.5)


def test_exact_infinity_has_no_error_whatever_the_steps(rows):
    for row in rows[:2]:
        for steps in (1, 3, 7, 30):
            assert abs(run_black(row, steps)[0]) < 1e-3


def test_the_network_is_told_the_noise_level_the_scheduler_means(rows):
    for row in rows:
        row.scheduler.set_timesteps(20)
        for t, sigma in zip(row.scheduler.timesteps, row.scheduler.sigmas, strict=False):
            known = row.schedule.sigma(float(t))
            # the trained network calls t = 999 infinity; diffusers makes 4096 of it
            assert known == pytest.approx(float(sigma), rel=2e-3) or (math.isinf(known) and sigma > 4095)


def test_intercept_and_slope():
    z = torch.randn(5, 3)
    intercept, slope = exact_runs.intercept_and_slope(3 - 2 * z, z)
    assert (intercept, slope) == pytest.approx((3, -2), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def test_library_photographs_are_there_without_a_download():
    photographs = exact_prompts.library_photographs(16)
    assert len(photographs) >= 4
    assert photographs.shape[1:] == (3, 16, 16)
    assert photographs.min() >= -1
    assert photographs.max() <= 1


def test_open_picture(tmp_path):
    halves = np.zeros((40, 40, 3), np.uint8)
    halves[:, :20] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise for display
    save(tmp_path / "turned.png", halves, exif=exif)
    turned = exact_prompts.open_picture(tmp_path / "turned.png", 8)
    assert turned[:, :2].min() > 0.9  # the left half is now the upper one
    assert turned[:, 6:].max() < -0.9

    save(tmp_path / "clear.png", np.full((9, 9, 4), (255, 0, 0, 0), np.uint8))
    assert exact_prompts.open_picture(tmp_path / "clear.png", 8).min() > 0.99

    save(tmp_path / "deep.png", np.full((9, 9), 32896, np.uint16))
    assert exact_prompts.open_picture(tmp_path / "deep.png", 8).abs().max() < 0.01

    Image.new("CMYK", (30, 9)).save(tmp_path / "cmyk.jpg")
    assert exact_prompts.open_picture(tmp_path / "cmyk.jpg", 8).min() > 0.9

    Image.new("P", (9, 9), 0).save(tmp_path / "palette.gif")
    assert exact_prompts.open_picture(tmp_path / "palette.gif", 8).shape == (3, 8, 8)


def test_own_pictures_and_a_bad_one(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        save(pictures / f"{i}.png", np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8))
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "caption.txt").write_text("a caption")
    (pictures / "folder.png").mkdir()
    code, text = ztsnr_command("demo", "--images", pictures, "--out", tmp_path / "out", "--size", 16, "--steps", 1)
    assert code == 0
    assert "Skipped broken.png" in text
    assert "caption.txt" not in text
    assert "folder.png" not in text
    assert json.loads((tmp_path / "out" / "results.json").read_text())["photographs"] == 3


DAMAGES = {
    "a JPEG without its end": ("JPEG", lambda data: data[: len(data) // 2]),
    "a PNG without its end": ("PNG", lambda data: data[: len(data) // 2]),
    "a PNG of another checksum": ("PNG", lambda data: data[:29] + b"\0\0\0\0" + data[33:]),
    "a GIF of 4 thousand million pixels": ("GIF", lambda data: data[:6] + b"\xff" * 4 + data[10:]),
    "a DDS without pixels": ("DDS", lambda data: data[:128]),
    "a DDS of an unknown form": ("DDS", lambda data: data[:80] + b"\0\x18\0\0" + data[84:]),
    "a TIFF without its end": ("TIFF", lambda data: data[: len(data) // 2]),
    "nothing": ("PNG", lambda data: b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_pictures_are_passed_over(tmp_path, damage):
    kind, harm = DAMAGES[damage]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    picture.save(tmp_path / "sound.png")
    path = tmp_path / f"damaged.{kind.lower()}"
    picture.save(path, kind)
    path.write_bytes(harm(path.read_bytes()))
    said = []
    assert len(exact_prompts.load_pictures(tmp_path, 16, said.append)) == 1
    (sentence,) = said
    assert sentence.startswith(f"Skipped {path.name}: ")
    assert "\n" not in sentence


@pytest.mark.parametrize("step", ["to_rgb", "to_tensor"])
def test_a_bug_is_not_taken_for_a_damaged_picture(tmp_path, monkeypatch, step):
    save(tmp_path / "sound.png", np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(exact_prompts, step, None)
    with pytest.raises(TypeError, match="not callable"):
        exact_prompts.load_pictures(tmp_path, 16, print)


def test_one_own_picture_has_a_known_brightness(tmp_path):
    save(tmp_path / "one.png", np.full((20, 20, 3), 60, np.uint8))
    code, _ = ztsnr_command("demo", "--images", tmp_path, "--out", tmp_path / "out", "--size", 16, "--steps", 1)
    assert code == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]
    assert abs(row["brightness_error"]["photograph"]) < 1e-3


def test_many_pictures_are_cut_to_the_first(tmp_path):
    for i in range(exact_prompts.MOST_PICTURES + 2):
        save(tmp_path / f"{i:03}.png", np.full((2, 2, 3), i, np.uint8))
    said = []
    pictures = exact_prompts.load_pictures(tmp_path, 16, said.append)
    assert len(pictures) == exact_prompts.MOST_PICTURES
    assert len(said) == 1
    assert pictures[-1].mean().item() == pytest.approx((exact_prompts.MOST_PICTURES - 1) / 127.5 - 1, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes end in one sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", 0], "'--steps': 0 is not in the range"),
        (["--steps", "many"], "'many' is not a valid integer"),
        (["--size", 5], "'--size': 5 is not in the range"),
        (["--size", 100_000], "'--size': 100000 is not in the range"),
        (["--seed", -1], "'--seed': -1 is not in the range"),
        (["--images", "missing"], "'--images': Directory 'missing' does not exist"),
        (["--images", __file__], "is a file"),
        (["--out", __file__], "is a file"),
        (["--out", Path(__file__) / "below"], "cannot write into"),
    ],
)
def test_mistakes(arguments, sentence):
    code, text = ztsnr_command("demo", *arguments)
    assert code == 2
    assert sentence in text
    assert "Traceback" not in text


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_no_usable_picture(tmp_path, content):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    if content:
        (pictures / "bad.jpg").write_bytes(content)
    code, text = ztsnr_command("demo", "--images", pictures, "--out", tmp_path / "out")
    assert code == 2
    assert text.strip().splitlines()[-1].startswith(f"Error: {pictures} contains no readable picture")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    code, text = ztsnr_command("demo", "--out", tmp_path / "out")
    tmp_path.chmod(0o700)
    assert code == 2
    assert "cannot write into" in text


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    files.write_atomically(file, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(files.UserError, match="No space"):
        files.write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_numbers_come_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    code, text = ztsnr_command("demo", "--out", tmp_path, "--steps", 2, "--size", 16)
    assert code == 0
    assert "pip install matplotlib" in text
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_settings_files_are_checked_in_a_sentence(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('out = "run"\nstepz = 3\n')
    for command in ("finetune", "finetune-vae"):
        code, text = ztsnr_command(command, path)
        assert (code, text) == (2, f"Error: {path} has stepz, which does not exist: did you mean steps?\n")
    code, text = ztsnr_command("finetune", tmp_path / "none.toml")
    assert (code, text) == (2, f"Error: {tmp_path / 'none.toml'} cannot be read: No such file or directory\n")


def test_finetune_lists_its_settings(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('out = "run"\nsteps = 3\nmodel.base = "m"\ndata = {batch_size = 2, sources = [{path = "p"}]}\n')
    code, text = ztsnr_command("finetune", path, "--list-settings")
    assert code == 0
    assert "steps  (a whole number of at least 1; required; now 3)" in text
    assert not (tmp_path / "run").exists()
    code, text = ztsnr_command("finetune", path, "--optimizer.learning-rat", 1)
    assert code == 2
    assert text.count("\n") == 1
    assert "did you mean --optimizer.learning-rate?" in text


@pytest.mark.parametrize("command", ["finetune", "finetune-vae"])
def test_settings_are_listed_without_a_file(command):
    code, text = ztsnr_command(command, "--list-settings")
    assert code == 0
    assert "steps  (a whole number of at least 1; " in text
    code, text = ztsnr_command(command, "--steps", 3)
    assert code == 2
    assert text.startswith(f"Error: the first argument must be a settings file; ztsnr {command} --init")
