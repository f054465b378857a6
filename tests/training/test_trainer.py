"""A run that is stopped, killed or has no room goes on as if nothing had been; on one process.

For more of them see test_parallel.py.
"""

import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import types
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ztsnr.data.make_latent_cache import run_cache
from ztsnr.files import lock_folder
from ztsnr.training import progress, run, run_data, step
from ztsnr.training.config import FinetuneSettings
from ztsnr.training.settings_file import parse_settings
from ztsnr.training.trainer import run_finetune

from ..checkpoints.tiny_folders import rewrite
from ..samplers.conftest import NoHostReads
from .tiny_run import assert_same, at, losses, make_content, metrics, poison, sends, state, states, train

# stages, a learned weight, trained encoders and all kinds of averages in one
MUCH = {
    "stages": [{"groups": ["up"], "steps": 4, "learning_rate": 0.5}, {"groups": ["all"]}],
    "objective__weighting": "learned",
    "model__text_encoders": True,
    "average__decay": 0.9,
    "average__on_cpu": True,
    "average__every": 2,
    "optimizer__accumulation": 2,
    "data__flip": 0.5,
    "watch__log_every": 4,  # no divisor of where it is stopped
    "watch__validate_every": 8,
    "data__validation_share": 0.2,
}


ADAPTER = {
    "model__adapter": {"kind": "lora", "rank": 2},
    "model__dtype": "bfloat16",
    "data__workers": 1,
    "average__decay": 0.9,
}


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    """12 steps at once, with the usual settings."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train(make_content(place, out))
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Stopped


@pytest.mark.parametrize(
    ("number", "changes"),
    [(signal.SIGTERM, MUCH), pytest.param(signal.SIGINT, ADAPTER, marks=pytest.mark.slow)],
)
def test_stopped_and_resumed(place, tmp_path, number, changes):
    """12 steps at once, and 5, a signal, and the rest: the same to the last bit."""
    whole, parts, said = tmp_path / "whole", tmp_path / "parts", []
    train(make_content(place, whole, **changes))
    content = make_content(place, parts, save_every=100, **changes)
    with at({4: sends(number)}) as taken:
        assert train(content, say=said.append) == []
    assert taken == [0, 1, 2, 3, 4]
    assert said[-1] == f"stopped by {signal.Signals(number).name} at step 5; continue with --resume auto"
    assert states(parts) == [5]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    exported = train(content, resume=True, say=said.append)
    assert "resuming at step 5" in said
    assert not any("from here on" in line for line in said)
    assert_same(parts, whole)
    assert {parts / "export" / name for name in ("parts", "parts_decay_0.9")} <= set(exported)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw8bit", "adamw4bit", "adafactor"])
@pytest.mark.parametrize("rounds", [False, True])
def test_other_optimizers_resume(place, tmp_path, name, rounds):
    """torchao's in 8 and 4 bits, with and without stochastic rounding of bfloat16 weights."""
    if rounds and name == "adafactor":
        pytest.skip("it does not round stochastically")
    changes = {"optimizer__name": name, "optimizer__bf16_stochastic_round": rounds}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_content(place, whole, **changes))
    with at({4: sends(signal.SIGTERM)}):
        train(make_content(place, parts, **changes))
    train(make_content(place, parts, **changes), resume=True)
    assert_same(parts, whole)
    assert any(key.endswith(".codes") for key in state(whole, 12)) == (name != "adafactor")  # some are large enough
    if rounds:
        assert state(whole, 12)["parameter.unet.conv_in.weight"].dtype == torch.bfloat16


def test_asked_twice(place, tmp_path, monkeypatch):
    """At once is one request, as torchrun passes a signal on; later it ends the run on the spot."""
    content = make_content(place, tmp_path / "run", save_every=100)
    with at({1: lambda batch: sends(signal.SIGINT)(sends(signal.SIGTERM)(batch))}):
        train(content)
    assert states(tmp_path / "run") == [2]
    monkeypatch.setattr("ztsnr.training.stopping.ONE_REQUEST", 0.0)
    twice = {3: lambda batch: sends(signal.SIGINT)(sends(signal.SIGINT)(batch))}
    with at(twice), pytest.raises(KeyboardInterrupt):
        train(content, resume=True)
    assert states(tmp_path / "run") == [2]


# ----------------------------------------------------------------------------------------------------------------------
# Killed


def signalled(content, number, seconds):
    """A run that goes on in processes of its own, all of which get a signal so long after its first metrics line.

    What it ended with.
    """
    child = os.fork()
    if not child:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            train(content, resume=True)
            os._exit(0)
        finally:
            os._exit(1)
    path = Path(content["out"]) / "metrics.jsonl"
    before = path.stat().st_size if path.exists() else 0
    try:
        while not path.exists() or path.stat().st_size <= before:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.002)
        time.sleep(seconds)
    except BaseException:  # pytest's own limit: none goes on without the test
        os.killpg(child, signal.SIGKILL)
        raise
    os.killpg(child, number)
    return os.waitpid(child, 0)[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes(place, tmp_path, number):
    """Ctrl-C reaches the workers that read pictures too: they leave it to the run, which stops behind its step."""
    content = make_content(place, tmp_path / "run", steps=500, save_every=500, data__workers=2)
    assert signalled(content, number, 0.1) == 0
    (step,) = states(tmp_path / "run")
    assert step == len(losses(tmp_path / "run")) < 500


@pytest.mark.parametrize(("kills", "steps"), [(2, 12), pytest.param(25, 100, marks=pytest.mark.slow)])
def test_killed(place, plain, tmp_path, kills, steps):
    """At random moments; half of the time of such a run goes into the writing of states."""
    draw = random.Random(kills)
    content = make_content(place, tmp_path / "killed", save_every=1, steps=steps)
    best = 0
    for _ in range(kills):
        signalled(content, signal.SIGKILL, draw.uniform(0, 0.3))
        now = states(tmp_path / "killed")
        assert not now or max(now) >= best  # never behind where it was
        best = max(now, default=0)
    train(content, resume=True)
    if steps != 12:
        train(content | {"out": str(plain := tmp_path / "whole")})
    assert_same(tmp_path / "killed", plain, steps)
    names = {path.name for path in (tmp_path / "killed" / "states").iterdir()}
    assert names == {f"step-{step:08d}" for step in (steps - 1, steps)}


# ----------------------------------------------------------------------------------------------------------------------
# No room


class SmallDisk:
    """A file system of its own that a file fills and whose removal makes room again."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip("only root may mount")

    def fill(self):
        with (self.folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def empty(self):
        (self.folder / "filler").unlink()

    def close(self):
        subprocess.run(["umount", "-l", self.folder], check=True)


def test_full_disk(place, plain, tmp_path):
    """From step 6 to step 11 nothing can be written: the run says so, keeps what it has, and trains on."""
    disk, said = SmallDisk(tmp_path / "disk"), []
    try:
        there = []

        def fill(batch):
            disk.fill()
            return batch

        def look(batch):
            disk.empty()
            there.extend(states(disk.folder / "run"))
            return batch

        with at({5: fill, 10: look}):
            train(make_content(place, disk.folder / "run", save_every=3), say=said.append)
        assert there == [3]
        (sentence,) = (line for line in said if line.startswith("the state at step 6"))
        assert re.search(
            r"could not be written: .*(No space left|os error 28).*; the state of step 3 is kept$", sentence
        )
        assert (
            sum("training continues" in line for line in said) == 0
        )  # lines of metrics: a page of their file has room still
        ours, theirs = state(disk.folder / "run", 12), state(plain, 12)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    finally:
        disk.close()


# ----------------------------------------------------------------------------------------------------------------------
# Gradients that are no numbers


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_bad_step_is_left_out(place, tmp_path, dtype):
    """Weights, moments and counts are those of the step before; the averages see these weights again."""
    out = tmp_path / "run"
    with at({2: poison}):
        train(make_content(place, out, model__dtype=dtype, steps=4, save_every=1, keep=9))
    before, behind = state(out, 2), state(out, 3)
    for name, tensor in before.items():
        if name.startswith(("parameter.", "optimizer.")):
            assert torch.equal(tensor, behind[name])
        elif name == "average.step":
            assert behind[name] == tensor + 1
        elif name.startswith("average."):
            parameter = before["parameter." + name.removeprefix("average.power_0.05.")]
            assert ((behind[name] - parameter).abs() <= (tensor - parameter).abs()).all()
    assert not torch.equal(behind["parameter.unet.conv_in.weight"], state(out, 4)["parameter.unet.conv_in.weight"])
    assert [path.name for path in (out / "bad_batches").iterdir()] == ["step-00000002-rank-0.safetensors"]
    assert [line["steps left out"] for line in metrics(out)] == [0, 0, 1, 1]
    assert metrics(out)[2]["gradient norm"] is None
    assert all(math.isfinite(loss) for loss in losses(out))


def test_too_many_bad_steps_end_the_run(place, tmp_path):
    content = make_content(place, tmp_path / "run", optimizer__max_skipped=3)
    sentence = r"not finite in 3 steps in a row, up to step 7, .* is in .*step-00000007"
    with at(dict.fromkeys((2, 3, 5, 6, 7), poison)), pytest.raises(ValueError, match=sentence):
        train(content)
    assert states(tmp_path / "run") == [5]


@pytest.mark.parametrize(
    "changes",
    [
        {"objective__weighting": "learned", "model__text_encoders": True, "model__dtype": "bfloat16"},
        pytest.param({"model__dtype": "float16", "optimizer__accumulation": 2}, marks=pytest.mark.slow),
        pytest.param({"model__adapter": {"rank": 2}, "average__on_cpu": True}, marks=pytest.mark.slow),
    ],
)
def test_a_step_reads_nothing_on_the_host(place, tmp_path, monkeypatch, changes):
    """On a GPU it would be waited for."""
    call = step.TrainingStep.__call__

    def watched(take_step, batch):
        with NoHostReads():
            return call(take_step, batch)

    monkeypatch.setattr(step.TrainingStep, "__call__", watched)
    train(make_content(place, tmp_path / "run", steps=2, **changes))
    assert len(losses(tmp_path / "run")) == 2


def test_weights_change_when_they_are_copied(place, tmp_path, monkeypatch):
    """Averages in the main memory: a GPU copies the weights while the next step computes, and not while it is taken."""
    said, take = [], torch.optim.AdamW.step
    take = getattr(take, "__wrapped__", take)  # without the calls of hooks, which torch puts around it
    monkeypatch.setattr(run.Ema, "settle", lambda ema: said.append("settled"))
    monkeypatch.setattr(run.Ema, "update", lambda ema, step: said.append("update"))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (said.append("step"), take(self)))
    train(make_content(place, tmp_path / "run", steps=2, average__on_cpu=True, average__sigma_rel=[], export__raw=True))
    assert said == ["settled", "step", "update"] * 2


@pytest.mark.slow
def test_float16(place, plain, tmp_path):
    """It trains as float32 does; and a step that overflows halves the scale and is left out, also behind a resume."""
    content = make_content(place, tmp_path / "float16", model__dtype="float16", steps=6, save_every=1, keep=9)
    out = tmp_path / "float16"
    with at({3: poison, 4: sends(signal.SIGTERM)}):
        train(content)
    train(content, resume=True)
    assert [state(out, step)["loss_scale.scale"].item() for step in range(1, 7)] == [2.0**16] * 3 + [2.0**15] * 3
    assert metrics(out)[-1]["steps left out"] == 1
    assert losses(out)[:3] == pytest.approx(losses(plain)[:3], rel=5e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Watching


def test_weights_and_biases_gets_all_settings(place, tmp_path, monkeypatch):
    """A stand-in, for it takes an account: a mapping, since a text would be the name of a file to it."""
    given, logged = {}, []
    run = types.SimpleNamespace(log=lambda line, step: logged.append((step, line)), finish=lambda: None)
    stand_in = types.SimpleNamespace(init=lambda **more: given.update(more) or run, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    train(make_content(place, tmp_path / "run", steps=2, watch__wandb="project"))
    assert given["project"] == "project"
    assert given["config"] == tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert [step for step, line in logged if "loss" in line] == [1, 2]


def test_the_progress_bar_shows_the_loss_by_bands(place, tmp_path, monkeypatch):
    shown = []

    class Bar(progress.tqdm):
        def set_postfix_str(self, text, refresh=True):
            shown.append(text)

    monkeypatch.setattr(progress, "tqdm", Bar)
    train(make_content(place, tmp_path / "run", steps=3, watch__log_every=3, objective__terminal_probability=0.4))
    (line,) = metrics(tmp_path / "run")
    bands = [name for name in line if name.startswith("loss/t")]
    assert "loss/t999" in bands
    (text,) = shown
    for name in bands:
        assert f"{name.removeprefix('loss/')} {line[name]:.3g}" in text
    assert text.startswith(f"loss {line['loss']:.3g}, img/s ")


def test_without_a_terminal_there_is_a_line_each_interval(place, tmp_path, monkeypatch):
    read = run.Speed.read
    monkeypatch.setattr(run.Speed, "read", lambda speed: read(speed) | {"MFU": 0.41, "peak memory (GiB)": 97.25})
    said = []
    train(make_content(place, tmp_path / "run", steps=4, watch__log_every=2), say=said.append)
    lines = [line for line in said if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == ["step 2", "step 4"]
    assert all(", img/s " in line and ", MFU 0.41, GiB 97.2, t" in line for line in lines)


# ----------------------------------------------------------------------------------------------------------------------
# One sentence each


def test_out_of_memory(place, tmp_path, monkeypatch):
    """A stand-in: where there is no GPU there is no such error."""

    def out_of_memory_stand_in(take_step, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(step.TrainingStep, "__call__", out_of_memory_stand_in)
    with pytest.raises(ValueError, match=r"^the device has too little memory: try speed\.checkpointing = \"full\", "):
        train(make_content(place, tmp_path / "run"))


def test_a_device_that_is_none(place, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"^speed\.device = 'gpu' is not a device: give auto, cpu, cuda, xpu, mps, or a number as in cuda:1$",
    ):
        train(make_content(place, tmp_path / "run", speed__device="gpu"))


def test_folders_that_cannot_be_those_of_a_run(place, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file cannot be the folder of a run: it is a file; choose another out$"):
        train(make_content(place, tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be the folder of a run: Not a directory; choose another out$"):
        train(make_content(place, tmp_path / "file" / "inside"))


def test_a_read_only_folder(place, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("nothing is read-only here")
    try:
        for out in (folder, folder / "run"):
            with pytest.raises(ValueError, match=r"Read-only file system|Permission denied"):
                train(make_content(place, out))
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True)
        folder.chmod(0o700)


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    """A run of 2 steps, and its settings."""
    out = tmp_path_factory.mktemp("done") / "run"
    content = make_content(place, out, steps=2)
    train(content)
    return out, content


def test_a_folder_with_a_run(done):
    out, content = done
    with pytest.raises(ValueError, match=f"^{out} holds a run at step 2: continue it with --resume auto, or"):
        train(content)


def test_a_folder_in_use(done):
    """By another run: nothing is done there, be it a resume or a dry run."""
    out, content = done
    with lock_folder(out):
        for options in ({"resume": True}, {"dry_run": True}, {}):
            with pytest.raises(ValueError, match=f"^{out} is in use by process {os.getpid()} on "):
                run_finetune(parse_settings(FinetuneSettings, content), say=lambda line: None, **options)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "other pictures, buckets, another batch_size or another seed"),
        ({"data__batch_size": 2}, "other pictures, buckets, another batch_size or another seed"),
        ({"optimizer__name": "adafactor"}, r"tensors by which it differs .* optimizer, trained parameters"),
        ({"model__adapter": {"rank": 2}}, r"tensors by which it differs .* trained parameters"),
        ({"average__sigma_rel": (0.1,)}, r"average\.power_0\.\d+\..* and averages that the run had"),
        ({"objective__weighting": "learned"}, r"lacks optimizer\.learned_weight"),
    ],
)
def test_other_settings_at_a_resume(place, done, changes, sentence):
    """The run stays as it was, and can go on with the settings it had."""
    out, _ = done
    before = (out / "config.toml").read_bytes()
    with pytest.raises(ValueError, match=sentence):
        train(make_content(place, out, steps=4, **changes), resume=True)
    assert (out / "config.toml").read_bytes() == before


def test_what_is_other_at_a_resume_is_told(place, done, tmp_path):
    shutil.copytree(done[0], tmp_path / "run")
    content = make_content(place, tmp_path / "run", steps=3, objective__high_noise_share=0.05)
    said = []
    train(content, resume=True, say=said.append)
    assert [line for line in said if line.endswith("from here on")] == [
        f"out was {done[0]}, and is {tmp_path / 'run'} from here on",
        "steps was 2, and is 3 from here on",
        "objective.high_noise_share was 0.1, and is 0.05 from here on",
    ]


def test_a_run_that_is_done_is_exported_again(done):
    out, content = done
    shutil.rmtree(out / "export")
    assert train(content, resume=True) == [out / "export" / "run"]


def test_a_dry_run(place, tmp_path):
    settings = parse_settings(FinetuneSettings, make_content(place, tmp_path / "run"))
    said = []
    assert run_finetune(settings, dry_run=True, say=said.append) == []
    assert {"config.toml", "objective.csv"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not (tmp_path / "run" / "states").exists()
    train(make_content(place, tmp_path / "run", steps=1))  # the folder is free still
    before = (tmp_path / "run" / "config.toml").read_bytes()
    other = parse_settings(FinetuneSettings, make_content(place, tmp_path / "run", optimizer__learning_rate=1e-5))
    assert run_finetune(other, resume=True, dry_run=True, say=said.append) == []
    assert (tmp_path / "run" / "config.toml").read_bytes() == before  # what it was trained with


def test_latents_of_another_vae(place, tmp_path):
    """Which look like latents, and would teach the network the wrong pictures."""
    another = shutil.copytree(place / "tiny", tmp_path / "another")
    rewrite(another, "vae", lambda tensors: tensors | {"encoder.conv_in.bias": tensors["encoder.conv_in.bias"] + 0.1})
    buckets = [[(32, 32), (48, 32), (32, 48)]]
    run_cache([place / "pictures"], tmp_path / "latents", buckets, vae=another, margin=0, say=lambda line: None)
    content = make_content(place, tmp_path / "run", steps=1, data__latents=str(tmp_path / "latents"))
    with pytest.raises(ValueError, match=r"latents .*another VAE"):
        train(content)
    train(make_content(place, tmp_path / "run", steps=1, data=content["data"], model__base=str(another)))


def test_a_dry_run_finds_a_prompt_that_cannot_be_followed(place, tmp_path):
    """And not the first sheet of pictures, when a thousand steps are done."""
    wrong = make_content(place, tmp_path / "run", watch__preview_every=1000, watch__prompts=["a cat=purplish"])
    with pytest.raises(ValueError, match="purplish"):
        run_finetune(parse_settings(FinetuneSettings, wrong), dry_run=True, say=lambda line: None)


def test_a_dry_run_finds_what_is_not_installed(place, tmp_path, monkeypatch):
    """And loads no model for it."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(run, "load_networks", None)
    content = make_content(place, tmp_path / "run", watch__wandb="project")
    with pytest.raises(ValueError, match="needs wandb: pip install wandb"):
        run_finetune(parse_settings(FinetuneSettings, content), dry_run=True)


def test_in_the_folder_where_one_is(place, tmp_path, monkeypatch):
    """Which names what is exported, though it is written as a dot."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert train(make_content(place, Path(), steps=1)) == [Path("export/mine")]


# ----------------------------------------------------------------------------------------------------------------------
# Pictures whose headers alone are sound


def with_half_pictures(place, tmp_path, count):
    """A copy of the set in which some pictures end in the middle."""
    copied = shutil.copytree(place / "pictures", tmp_path / "pictures")
    for path in sorted(copied.glob("*.png"))[:count]:
        path.write_bytes(path.read_bytes()[:60])
    return {"data__sources": [{"path": str(copied)}]}


def test_too_many_end_the_run_behind_a_saved_state(place, tmp_path):
    """And five of forty do not end it, though they are more than 1 %."""
    few = with_half_pictures(place, tmp_path / "few", 5)
    train(make_content(place, tmp_path / "few" / "run", steps=11, **few))
    assert states(tmp_path / "few" / "run")[-1] == 11

    many = with_half_pictures(place, tmp_path / "many", 6)
    out = tmp_path / "many" / "run"
    content = make_content(place, out, save_every=100, **many)
    with pytest.raises(ValueError, match=r"^6 of .* more than data\.max_unusable = 0\.01 allows"):
        train(content)
    (step,) = states(out)
    assert step == len(losses(out)) > 0
    content["data"]["max_unusable"] = 0.5
    said = []
    train(content, resume=True, say=said.append)
    assert f"resuming at step {step}" in said


def test_a_dry_run_decodes_a_small_set(place, tmp_path, monkeypatch):
    few = with_half_pictures(place, tmp_path / "few", 1)
    said = []
    content = make_content(place, tmp_path / "few" / "run", **few)
    run_finetune(parse_settings(FinetuneSettings, content), dry_run=True, say=said.append)
    assert "decoded all 40 pictures; 1 of them cannot be used" in said
    assert said[-1].startswith("pictures/00.png cannot be used: it cannot be decoded: ")

    many = with_half_pictures(place, tmp_path / "many", 6)
    content = make_content(place, tmp_path / "many" / "run", **many)
    with pytest.raises(ValueError, match=r"^6 of the 40 pictures cannot be used, more than data\.max_unusable = 0\.01"):
        run_finetune(parse_settings(FinetuneSettings, content), dry_run=True, say=said.append)
    monkeypatch.setattr(run_data, "DECODED", 39)
    run_finetune(parse_settings(FinetuneSettings, content), dry_run=True, resume=True, say=said.append)
    assert said[-1] == "only the headers of the 40 pictures were read; up to 39 would be decoded here"
