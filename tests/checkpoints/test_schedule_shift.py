"""A noise schedule that is a multiple of the published one: in folders, in files, in diffusers, and back."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints import inspect_checkpoint, load_pipeline, mark_checkpoint, to_folder, to_single_file
from ztsnr.checkpoints.schedule_shift import METADATA, shift_of, shift_of_folder, shift_of_metadata, with_shift
from ztsnr.samplers import NoiseSchedule, ZTSNRScheduler, make_betas

from .tiny_folders import convert, make_tiny_folders, set_scheduler

SHIFTS = (0.25, 2.0, 150 / 128, 1 / 3)
DIGITS = 2e-7  # relative: a number is kept with seven digits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny diffusers folders of each architecture, as published; not to be changed."""
    return make_tiny_folders(tmp_path_factory.mktemp("folders"))


def published_sigmas(zero):
    """(1000,) by the definition: sqrt((1 - abar) / abar), with Algorithm 1 of arXiv 2305.08891 or without; the last
    may be infinite."""
    roots = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2) ** 0.5
    if zero:
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - roots**2) / roots**2)


def betas_of(sigmas):
    """Betas whose schedule has these sigmas."""
    abar = 1 / (1 + sigmas**2)
    return (1 - abar / np.concatenate([[1], abar[:-1]])).tolist()


def shifted_folder(folder, out, shift, zero):
    """A copy of a folder whose scheduler says v-prediction on a shifted schedule."""
    shutil.copytree(folder, out)
    betas = betas_of(shift * published_sigmas(zero))
    set_scheduler(out, prediction_type="v_prediction", rescale_betas_zero_snr=zero, trained_betas=betas)
    return out


def sigmas_of(scheduler):
    """What the scheduler of a pipeline, or of a folder, says."""
    config = json.loads((scheduler / "scheduler_config.json").read_text()) if hasattr(scheduler, "joinpath") else None
    schedule = NoiseSchedule.from_config(config or scheduler.config)
    return schedule.sigma(torch.arange(1000.0)).numpy()


def metadata_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# ----------------------------------------------------------------------------------------------------------------------
# The number of a schedule


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("shift", [*SHIFTS, 1.0, 0.03, 50.0])
def test_the_number_is_found_in_the_betas(shift, zero):
    schedule = NoiseSchedule.from_betas(torch.tensor(betas_of(shift * published_sigmas(zero)), dtype=torch.float64))
    assert shift_of(schedule) == pytest.approx(shift, rel=DIGITS)
    assert shift_of(NoiseSchedule.sdxl(zero_terminal_snr=zero).shifted(shift)) == pytest.approx(shift, rel=DIGITS)
    in_float32 = NoiseSchedule.from_betas(schedule.betas.float()) if not zero else schedule
    assert shift_of(in_float32) == pytest.approx(shift, rel=DIGITS)


def test_the_published_schedule_is_exactly_1():
    for zero in (True, False):
        assert shift_of(NoiseSchedule.sdxl(zero_terminal_snr=zero)) == 1.0


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.from_betas(make_betas("linear", 1e-4, 0.02)),
        NoiseSchedule.from_betas(make_betas("squaredcos_cap_v2")),
        NoiseSchedule.from_betas(make_betas(num_train_timesteps=500)),
        NoiseSchedule.from_betas(make_betas(beta_end=0.0121)),
        NoiseSchedule.from_betas(make_betas(beta_end=0.0121), zero_terminal_snr=True),
    ],
    ids=["linear", "cosine", "500", "nearly", "nearly, zero"],
)
def test_other_schedules_have_none(schedule):
    assert shift_of(schedule) is None


def test_one_sigma_that_differs_is_another_schedule():
    for zero in (True, False):
        for t in (0, 1, 500, 998):
            sigmas = 2 * published_sigmas(zero)
            sigmas[t] *= 1 + 1e-5
            betas = torch.tensor(betas_of(sigmas), dtype=torch.float64)
            assert shift_of(NoiseSchedule.from_betas(betas)) is None


# ----------------------------------------------------------------------------------------------------------------------
# Metadata


@pytest.mark.parametrize(
    ("metadata", "shift"), [({}, 1), ({"other": "3"}, 1), ({METADATA: "0.25"}, 0.25), ({METADATA: "2"}, 2)]
)
def test_metadata_that_say_it(metadata, shift):
    assert shift_of_metadata(metadata) == shift


@pytest.mark.parametrize("shift", [*SHIFTS, 0.03, 123.456, 1.000123])
def test_metadata_there_and_back(shift):
    metadata = with_shift({"other": "word"}, shift)
    assert metadata.keys() == {"other", METADATA}
    assert shift_of_metadata(metadata) == pytest.approx(shift, rel=DIGITS)


@pytest.mark.parametrize("shift", [1, 1.0, None])
def test_what_is_not_shifted_says_nothing(shift):
    assert with_shift({"other": "word"}, shift) == {"other": "word"}
    # and takes away what is not so any more
    assert with_shift({"other": "word", METADATA: "2"}, shift) == {"other": "word"}


NONSENSE = ("abc", "-1", "0", "nan", "inf", "-inf", "", "1e999", "2,5", "x" * 5000)


@pytest.mark.parametrize("text", NONSENSE)
def test_metadata_that_are_no_number(text):
    with pytest.raises(
        ValueError, match=r"^ztsnr\.schedule_shift of the metadata, .*, is not a number above 0$"
    ) as caught:
        shift_of_metadata({METADATA: text})
    assert len(str(caught.value)) < 200


# ----------------------------------------------------------------------------------------------------------------------
# Folders and files


@pytest.mark.parametrize(
    ("shift", "zero"), [(0.25, True), (0.25, False), (2.0, True), (2.0, False), (150 / 128, True), (1 / 3, False)]
)
def test_a_folder_becomes_a_file_and_a_folder_again(folders, tmp_path, shift, zero):
    """All sigmas, whatever the settings are that complete the file; to 1e-9 where the number is a short one."""
    limit = DIGITS if shift == 1 / 3 else 1e-9
    folder = shifted_folder(folders["SDXL"], tmp_path / "folder", shift, zero)
    expected = shift * published_sigmas(zero)
    np.testing.assert_allclose(sigmas_of(load_pipeline(folder).pipeline.scheduler), expected, rtol=1e-9)
    assert shift_of_folder(folder) == pytest.approx(shift, rel=limit)

    file = convert(folder, tmp_path / "file")
    assert float(metadata_of(file)[METADATA]) == pytest.approx(shift, rel=limit)
    for config in (folders["SDXL"], folder) if shift == 0.25 else (folders["SDXL"],):
        loaded = load_pipeline(file, config=config)
        assert loaded.zero_terminal_snr == zero
        np.testing.assert_allclose(sigmas_of(loaded.pipeline.scheduler), expected, rtol=limit)
        # as our own scheduler and diffusers' have it
        own = ZTSNRScheduler.from_config(loaded.pipeline.scheduler.config)
        np.testing.assert_allclose(own.schedule.sigma(torch.arange(999.0)).numpy(), expected[:999], rtol=limit)
        theirs = loaded.pipeline.scheduler.alphas_cumprod.double().numpy()
        np.testing.assert_allclose(theirs[:999], 1 / (1 + expected[:999] ** 2), rtol=1e-3, atol=1e-6)

    to_folder(file, tmp_path / "back", config=folders["SDXL"])
    np.testing.assert_allclose(sigmas_of(tmp_path / "back" / "scheduler"), expected, rtol=limit)
    again = convert(tmp_path / "back", tmp_path / "again")
    assert metadata_of(again)[METADATA] == metadata_of(file)[METADATA]


@pytest.mark.parametrize(("shift", "zero"), [(0.25, True), (2.0, False)])
@pytest.mark.parametrize("model", ["SD 1.x", "SD 2.x"])
def test_other_architectures(folders, tmp_path, model, shift, zero):
    """The schedulers of SD 1.x and 2.x are PNDM's, which knows nothing of zero terminal SNR."""
    folder = shifted_folder(folders[model], tmp_path / "folder", shift, zero)
    file = convert(folder, tmp_path / "file")
    assert metadata_of(file)[METADATA] == f"{shift:g}"
    expected = shift * published_sigmas(zero)
    loaded = load_pipeline(file, config=folders[model])
    np.testing.assert_allclose(sigmas_of(loaded.pipeline.scheduler), expected, rtol=1e-9)
    to_folder(file, tmp_path / "back", config=folders[model])
    np.testing.assert_allclose(sigmas_of(tmp_path / "back" / "scheduler"), expected, rtol=1e-9)
    assert load_pipeline(tmp_path / "back").zero_terminal_snr == zero


def test_the_scheduler_keeps_the_rest_of_its_settings(folders, tmp_path):
    folder = shifted_folder(folders["SDXL"], tmp_path / "folder", 0.25, False)
    loaded = load_pipeline(convert(folder, tmp_path / "file"), config=folders["SDXL"])
    before, after = load_pipeline(folders["SDXL"]).pipeline.scheduler, loaded.pipeline.scheduler
    assert type(after) is type(before)
    for name in ("timestep_spacing", "steps_offset", "num_train_timesteps"):
        assert after.config[name] == before.config[name]
    assert after.config.prediction_type == loaded.prediction_type == "v_prediction"


@pytest.mark.parametrize("zero", [True, False])
def test_the_settings_of_another_model_do_not_shift_a_file(folders, tmp_path, zero):
    plain = tmp_path / "plain"
    shutil.copytree(folders["SDXL"], plain)
    set_scheduler(plain, prediction_type="v_prediction", rescale_betas_zero_snr=zero)
    file = convert(plain, tmp_path / "model.safetensors")
    config = shifted_folder(folders["SDXL"], tmp_path / "settings of another", 0.25, zero)
    loaded = load_pipeline(file, config=config).pipeline.scheduler
    np.testing.assert_allclose(sigmas_of(loaded)[:-1], published_sigmas(zero)[:-1], rtol=1e-5)
    to_folder(file, tmp_path / "back", config=config)
    np.testing.assert_allclose(sigmas_of(tmp_path / "back" / "scheduler")[:-1], published_sigmas(zero)[:-1], rtol=1e-5)


def test_folders_that_are_not_shifted_write_no_metadata(folders, tmp_path):
    assert shift_of_folder(folders["SDXL"]) is None
    assert METADATA not in metadata_of(convert(folders["SDXL"], tmp_path / "plain"))
    # nor one that spells the published betas out, or another schedule that no number gives
    said = shifted_folder(folders["SDXL"], tmp_path / "said", 1.0, True)
    assert shift_of_folder(said) == 1
    assert METADATA not in metadata_of(convert(said, tmp_path / "1"))
    set_scheduler(said, trained_betas=make_betas("linear", 1e-4, 0.02).tolist(), rescale_betas_zero_snr=False)
    assert shift_of_folder(said) is None
    assert METADATA not in metadata_of(convert(said, tmp_path / "other"))
    (said / "scheduler" / "scheduler_config.json").unlink()
    assert shift_of_folder(said) is None


def test_betas_that_a_folder_is_to_rescale_are_taken_as_they_become(folders, tmp_path):
    """The published betas with rescale_betas_zero_snr are the published zero-SNR schedule."""
    folder = shutil.copytree(folders["SDXL"], tmp_path / "folder")
    set_scheduler(folder, rescale_betas_zero_snr=True, trained_betas=betas_of(published_sigmas(False)))
    assert shift_of_folder(folder) == 1


@pytest.mark.parametrize("betas", [[0.5, "x"], [2.0] * 1000, [0.0] * 1000, 3, [[0.1], [0.2]], "abc", {"a": 1}])
def test_betas_that_are_no_schedule(folders, tmp_path, betas):
    folder = shutil.copytree(folders["SDXL"], tmp_path / "folder")
    set_scheduler(folder, trained_betas=betas)
    with pytest.raises(ValueError, match=r"^[^\n]*scheduler has trained_betas that are not a noise schedule$"):
        shift_of_folder(folder)
    with pytest.raises(ValueError, match="not a noise schedule"):
        to_single_file(folder, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_merging_into_a_base(folders, tmp_path):
    """The schedule is that of the folder whose U-Net it is, and not of the base."""
    folder = shifted_folder(folders["SDXL"], tmp_path / "folder", 0.25, True)
    plain, shifted = convert(folders["SDXL"], tmp_path / "plain"), convert(folder, tmp_path / "shifted")
    assert metadata_of(convert(folder, tmp_path / "1", base=plain))[METADATA] == "0.25"
    assert METADATA not in metadata_of(convert(folders["SDXL"], tmp_path / "2", base=shifted))


def test_marking_keeps_it(folders, tmp_path):
    folder = shifted_folder(folders["SDXL"], tmp_path / "folder", 0.25, True)
    file = convert(folder, tmp_path / "file")
    marked = mark_checkpoint(file, v_pred=True, ztsnr=False, out=tmp_path / "marked.safetensors")
    assert metadata_of(marked)[METADATA] == "0.25"
    found = sigmas_of(load_pipeline(marked, config=folders["SDXL"]).pipeline.scheduler)
    np.testing.assert_allclose(found, 0.25 * published_sigmas(False), rtol=1e-9)


def test_what_is_set_by_hand_is_shifted_too(folders, tmp_path):
    file = convert(shifted_folder(folders["SDXL"], tmp_path / "folder", 2.0, True), tmp_path / "file")
    loaded = load_pipeline(file, config=folders["SDXL"], zero_terminal_snr=False)
    np.testing.assert_allclose(sigmas_of(loaded.pipeline.scheduler), 2 * published_sigmas(False), rtol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# What is told


def test_the_report_says_it(folders, tmp_path):
    file = convert(shifted_folder(folders["SDXL"], tmp_path / "folder", 0.25, True), tmp_path / "file")
    report = inspect_checkpoint(file)
    assert "Noise schedule: 0.25 times the published sigmas." in str(report).splitlines()
    assert report.warnings == ()
    assert json.loads(json.dumps(report.to_dict()))["metadata"][METADATA] == "0.25"
    assert "Noise schedule" not in str(inspect_checkpoint(convert(folders["SDXL"], tmp_path / "plain")))


@pytest.mark.parametrize("text", ["abc", "-1", "nan", "inf", "0"])
def test_nonsense_is_told_and_not_followed(folders, tmp_path, text):
    tensors = load_file(convert(folders["SDXL"], tmp_path / "file"))
    file = tmp_path / "bad.safetensors"
    save_file(tensors, file, {"modelspec.prediction_type": "v", METADATA: text})
    sentence = rf"^ztsnr\.schedule_shift of the metadata, '?{text}'?, is not a number above 0$"
    with pytest.raises(ValueError, match=sentence):
        load_pipeline(file, config=folders["SDXL"])
    with pytest.raises(ValueError, match=sentence):
        to_folder(file, tmp_path / "out", config=folders["SDXL"])
    assert not (tmp_path / "out").exists()
    report = inspect_checkpoint(file)
    (warning,) = (one for one in report.warnings if "noise schedule is unknown" in one)
    assert warning.startswith("Its noise schedule is unknown: ztsnr.schedule_shift")
    assert "\n" not in warning
