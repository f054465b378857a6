"""A whole SDXL of random weights, 6.9 GB, through all the tools."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest

from ztsnr.checkpoints import inspect_checkpoint, mark_checkpoint, to_single_file, verify_checkpoint
from ztsnr.checkpoints.header import read_header

from ..full_size import write_folder
from ..tiny_pipelines import make_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("large files")]

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with sdxl, in diffusers' layout."""
    place = tmp_path_factory.mktemp("full_size")
    if shutil.disk_usage(place).free < 30e9:
        pytest.skip("30 GB of free disk are needed")
    make_tokenizer(place / "words", pad="!")
    write_folder(place / "sdxl", "SDXL base", place / "words")
    to_single_file(place / "sdxl", place / "sdxl.safetensors")
    yield place
    shutil.rmtree(place)


def run_measured(program, *arguments):
    """What a program of its own prints, and its peak memory in bytes."""
    program += "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    *printed, kilobytes = done.stdout.split()
    return printed, 1024 * int(kilobytes)


def data_hash(path):
    with path.open("rb") as file:
        file.seek(read_header(path).data_start)
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_the_header_is_read_in_no_time(place):
    program = (
        "import sys, time\n"
        "from ztsnr.checkpoints import inspect_checkpoint\n"
        "start = time.perf_counter()\n"
        "report = inspect_checkpoint(sys.argv[1])\n"
        "print(time.perf_counter() - start, report.architecture.replace(' ', '_'))"
    )
    runs = [run_measured(program, place / "sdxl.safetensors") for _ in range(5)]
    assert runs[0][0][1] == "SDXL_base"
    assert min(float(printed[0]) for printed, _ in runs) < 0.05
    assert max(memory for _, memory in runs) < 50e6


def test_marking_leaves_the_data_as_they_are(place):
    marked = mark_checkpoint(place / "sdxl.safetensors", v_pred=False, ztsnr=False, out=place / "plain.safetensors")
    assert inspect_checkpoint(marked).prediction_type == "epsilon"
    before, after = read_header(place / "sdxl.safetensors"), read_header(marked)
    assert before.tensors.keys() - after.tensors.keys() == {"v_pred", "ztsnr"}
    digest = data_hash(marked)
    assert digest == data_hash(place / "sdxl.safetensors")
    assert after.metadata["modelspec.hash_sha256"] == f"0x{digest}"
    report = verify_checkpoint(marked, place / "sdxl.safetensors")
    marked.unlink()
    assert report.sound, report.problems
    assert report.changes == ()
    assert report.only_there == ("v_pred", "ztsnr")


def convert(way, *arguments):
    """Peak memory of a conversion, in bytes."""
    program = f"import sys\nfrom ztsnr.checkpoints import {way}\n"
    options = ", config=sys.argv[3]" if way == "to_folder" else ""
    _, memory = run_measured(f"{program}{way}(sys.argv[1], sys.argv[2]{options})", *arguments)
    return memory


@pytest.fixture
def memory_limit(place):
    largest = max(tensor.nbytes for tensor in read_header(place / "sdxl.safetensors").tensors.values())
    assert largest == 49408 * 1280 * 2
    return largest + 500e6


def test_to_a_single_file(place, memory_limit):
    assert convert("to_single_file", place / "sdxl", place / "again.safetensors") < memory_limit
    assert data_hash(place / "again.safetensors") == data_hash(place / "sdxl.safetensors")
    (place / "again.safetensors").unlink()


def test_to_a_folder(place, memory_limit):
    assert convert("to_folder", place / "sdxl.safetensors", place / "again", place / "sdxl") < memory_limit
    for network in NETWORKS:
        (ours,), (theirs,) = ((folder / network).glob("*.safetensors") for folder in (place / "again", place / "sdxl"))
        report = verify_checkpoint(ours, theirs)
        assert (report.changes, report.only_here, report.only_there) == ((), (), ())
    scheduler = json.loads((place / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    shutil.rmtree(place / "again")
