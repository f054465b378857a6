"""What job queues see of commands that a signal stops: 128 + its number, in real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ztsnr.training.config import FinetuneSettings
from ztsnr.training.decoder.settings import VaeDecoderSettings
from ztsnr.training.settings_file import parse_settings, write_settings

from ..tiny_pipelines import make_tiny_sdxl
from .tiny_run import free_port, make_content, states, write_pictures

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The base model and the pictures."""
    place = tmp_path_factory.mktemp("place")
    make_tiny_sdxl(place / "tiny")
    write_pictures(place / "pictures")
    return place


def stopped(arguments, number, sign):
    """Status, standard output and standard error of a command that gets a signal when the file ``sign`` appears."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "ztsnr", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])},
    )
    try:
        while process.poll() is None and not sign.exists():
            time.sleep(0.01)
        process.send_signal(number)
        output, errors = process.communicate()
    finally:
        process.kill()
    return process.returncode, output, errors


def settings_file(path, settings):
    path.write_bytes(write_settings(settings))
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_finetune_before_its_first_step(place, tmp_path, number):
    content = make_content(place, tmp_path / "run", steps=10**6)
    path = settings_file(tmp_path / "settings.toml", parse_settings(FinetuneSettings, content))
    status, _, errors = stopped(["finetune", path], number, tmp_path / "run" / "index.arrow")
    assert status == 128 + number, errors
    assert errors.splitlines()[-1] == f"stopped by {number.name}; continue with --resume auto"
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "states").exists()


def test_finetune_behind_a_step(place, tmp_path):
    content = make_content(place, tmp_path / "run", steps=10**6)
    path = settings_file(tmp_path / "settings.toml", parse_settings(FinetuneSettings, content))
    status, output, errors = stopped(["finetune", path], signal.SIGTERM, tmp_path / "run" / "metrics.jsonl")
    assert status == 143, errors
    step = max(states(tmp_path / "run"))
    assert f"stopped by SIGTERM at step {step}; continue with --resume auto" in output.splitlines()
    assert "Traceback" not in errors


@pytest.mark.parametrize("sign", [pytest.param("pictures", marks=pytest.mark.slow), "metrics.jsonl"])
def test_finetune_vae(place, tmp_path, sign):
    """While it measures the decoder, and behind a step."""
    out = tmp_path / "run"
    settings = VaeDecoderSettings(
        sources=(str(place / "pictures"),),
        model=str(place / "tiny"),
        out=str(out),
        size=32,
        batch_size=4,
        steps=10**6,
        lpips_weight=0.0,
        device="cpu",
        dtype="float32",
        log_every=1,
        workers=0,
    )
    path = settings_file(tmp_path / "settings.toml", settings)
    waited = out / sign if sign == "metrics.jsonl" else out
    status, output, errors = stopped(["finetune-vae", path], signal.SIGTERM, waited)
    assert status == 143, errors
    told = output if sign == "metrics.jsonl" else errors
    assert "stopped by SIGTERM" in told
    assert "continue with --resume auto" in told
    assert "Traceback" not in errors


def test_cache(place, tmp_path):
    arguments = ["cache", place / "pictures", "--vae", place / "tiny", "--out", tmp_path / "latents", "--device", "cpu"]
    options = ["--buckets", "32x32,48x32,32x48", "--step", 16]
    first = tmp_path / "latents" / "latents-00000.safetensors"
    status, _, errors = stopped([*arguments, *options], signal.SIGINT, first)
    assert status == 130, errors
    sentence = "stopped by SIGINT; the same command continues with the shards that are missing"
    assert errors.splitlines()[-1] == sentence
    assert "Traceback" not in errors


def test_demo_train(tmp_path):
    out = tmp_path / "demo"
    arguments = ["demo", "--train", "cpu", "--quick", "--out", out]
    status, _, errors = stopped(arguments, signal.SIGTERM, out / "trainings.json")
    assert status == 143, errors
    assert errors.splitlines()[-1] == "stopped by SIGTERM; the same command resumes"


def test_a_process_that_is_lost_ends_the_others_with_a_sentence(place, tmp_path):
    """Without torchrun, which would end them too, and without a word."""
    content = make_content(place, tmp_path / "run", steps=10**6)
    path = settings_file(tmp_path / "settings.toml", parse_settings(FinetuneSettings, content))
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    world |= {"PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])}
    log = tmp_path / "first.log"
    ranks = []
    try:
        for rank in "01":
            with (log if rank == "0" else Path(os.devnull)).open("w") as said:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "ignore", "-m", "ztsnr", "finetune", path],
                        env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"},
                        stdout=said,
                        stderr=subprocess.STDOUT,
                    )
                )
        while ranks[0].poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        ranks[1].kill()
        assert ranks[0].wait(timeout=30) == 2, log.read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert (
        log.read_text().splitlines()[-1].startswith("Error: another process of the run has ended without a message: ")
    )
