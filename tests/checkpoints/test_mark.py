"""Marking changes what a checkpoint says, and not a byte of what it holds."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import safetensors
import torch

from ztsnr.checkpoints import inspect_checkpoint, mark
from ztsnr.checkpoints.header import read_header
from ztsnr.checkpoints.mark import mark_checkpoint

from .tiny_folders import wait_for_a_new_name

UNET = "model.diffusion_model."
VAE = {"first_stage_model.decoder.conv_in.weight": (2, 4, 3, 3)}
CLIP = {"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,)}
LORA = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048)}
DIFFUSERS = {"conv_in.weight": (320, 4, 3, 3), "conv_out.weight": (4, 8), "time_embedding.linear_1.weight": (8, 8)}
HASH = {"modelspec.hash_sha256": f"0x{'0' * 64}"}  # of something else
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}


def unet(text=2048, sizes=2816, depths=(0, 0, 2, 2, 10, 10), width=320, channels=4, prefix=UNET):
    """The names and shapes by which a U-Net is told apart; narrow where that does not matter."""
    shapes = {"input_blocks.0.0.weight": (width, channels, 3, 3), "out.2.weight": (4, 8, 3, 3)}
    if sizes:
        shapes["label_emb.0.0.weight"] = (2, sizes)
    for block, depth in enumerate(depths, 1):
        shapes[f"input_blocks.{block}.0.in_layers.0.weight"] = (8,)
        for i in range(depth):
            shapes[f"input_blocks.{block}.1.transformer_blocks.{i}.attn2.to_k.weight"] = (2, text)
    return {prefix + name: shape for name, shape in shapes.items()}


SDXL = {**unet(), **CLIP, **VAE}
SD2 = unet(text=1024, sizes=None, depths=(1, 1, 1, 1, 1, 1, 0, 0))


@pytest.fixture
def write(tmp_path, write_checkpoint):
    """write(shapes, metadata=None, name="model.safetensors") -> path of a file of random data."""

    def write_random(shapes, metadata=None, name="model.safetensors"):
        path = write_checkpoint(tmp_path / name, shapes, metadata)
        header = read_header(path)
        with path.open("r+b") as file:
            file.seek(header.data_start)
            file.write(random.randbytes(path.stat().st_size - header.data_start))
        return path

    return write_random


def data_of(path) -> bytes:
    return path.read_bytes()[read_header(path).data_start :]


def said(path) -> tuple:
    report = inspect_checkpoint(path)
    assert not any("disagree" in warning for warning in report.warnings)
    return report.prediction_type, report.zero_terminal_snr


# ----------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("shapes", [SDXL, unet(), unet(prefix=""), {UNET + "a": (3,), "z": ("U8", 5)}])
@pytest.mark.parametrize("metadata", [None, {"format": "pt", "ü": "説明\n\"'\\ \x00", "z": "", "a": "x" * 5000}])
def test_marks_are_added_and_all_else_is_kept(tmp_path, write, shapes, metadata):
    path = write(shapes, metadata)
    before = path.read_bytes()
    out = mark_checkpoint(path, v_pred=True, ztsnr=True, out=tmp_path / "out.safetensors")
    assert out == tmp_path / "out.safetensors"
    assert path.read_bytes() == before
    assert said(out) == ("v_prediction", True)
    old, new = read_header(path), read_header(out)
    assert list(new.tensors) == [*old.tensors, "v_pred", "ztsnr"]
    assert {name: new.tensors[name] for name in old.tensors} == old.tensors
    assert list(new.metadata.items())[: len(old.metadata)] == list(old.metadata.items())
    assert data_of(out) == data_of(path)
    assert new.data_start % 8 == 0
    with safetensors.safe_open(path, "pt") as one, safetensors.safe_open(out, "pt") as other:
        assert other.metadata() == new.metadata
        assert set(other.keys()) == {*one.keys(), "v_pred", "ztsnr"}
        for name in one.keys():  # noqa: SIM118 (it is no mapping)
            assert torch.equal(one.get_tensor(name).view(torch.uint8), other.get_tensor(name).view(torch.uint8))
        for name in ("v_pred", "ztsnr"):
            assert (other.get_tensor(name).dtype, other.get_tensor(name).shape) == (torch.float32, (0,))


def test_a_file_without_data(tmp_path, write):
    path = write({UNET + "a": (0,)})
    mark_checkpoint(path, v_pred=True, in_place=True)
    assert said(path) == ("v_prediction", None)
    assert data_of(path) == b""


@pytest.mark.parametrize(
    ("arguments", "tensors", "prediction_type", "expected"),
    [
        ({"v_pred": True}, {"v_pred"}, "v", ("v_prediction", None)),
        ({"v_pred": True, "ztsnr": True}, {"v_pred", "ztsnr"}, "v", ("v_prediction", True)),
        ({"v_pred": True, "ztsnr": True, "swarm": True}, {"v_pred", "ztsnr"}, "v-zsnr", ("v_prediction", True)),
        ({"v_pred": True, "ztsnr": False}, {"v_pred"}, "v", ("v_prediction", None)),
        ({"v_pred": False}, set(), "epsilon", ("epsilon", None)),
        ({"v_pred": False, "ztsnr": False}, set(), "epsilon", ("epsilon", None)),
        ({"ztsnr": False}, set(), None, (None, None)),
    ],
)
def test_each_way_to_mark(write, arguments, tensors, prediction_type, expected):
    path = write(SDXL)
    assert mark_checkpoint(str(path), in_place=True, **arguments) == path
    header = read_header(path)
    assert header.tensors.keys() - SDXL.keys() == tensors
    assert header.metadata.get("modelspec.prediction_type") == prediction_type
    assert said(path) == expected


def test_what_is_not_asked_for_stays(write):
    path = write({**SDXL, "v_pred": ("F32", 0)})
    mark_checkpoint(path, ztsnr=True, in_place=True)
    assert said(path) == ("v_prediction", True)
    mark_checkpoint(path, swarm=True, in_place=True)
    assert read_header(path).metadata["modelspec.prediction_type"] == "v-zsnr"
    mark_checkpoint(path, ztsnr=False, in_place=True)
    assert said(path) == ("v_prediction", None)
    # what only the metadata say is no mark, and no reason to call it epsilon
    path = write(SDXL, {"modelspec.prediction_type": "v"}, "other.safetensors")
    mark_checkpoint(path, ztsnr=False, in_place=True)
    assert read_header(path).metadata["modelspec.prediction_type"] == "v"


def test_marking_again_changes_nothing(write):
    path = write(SDXL, {"format": "pt"})
    marked = mark_checkpoint(path, v_pred=True, ztsnr=True, in_place=True).read_bytes()
    assert mark_checkpoint(path, v_pred=True, ztsnr=True, in_place=True).read_bytes() == marked


def test_marks_between_other_tensors(write):
    shapes = {"a": (3,), "v_pred": ("U8", 2, 0), UNET + "b": (4,), "ztsnr": ("F32", 0), "c": (5,)}
    path = write(shapes)
    data = data_of(path)
    mark_checkpoint(path, v_pred=True, ztsnr=False, in_place=True)
    header = read_header(path)
    assert list(header.tensors) == ["a", "v_pred", UNET + "b", "c"]
    assert header.tensors["v_pred"].shape == (2, 0)  # only its name counts
    assert data_of(path) == data
    mark_checkpoint(path, v_pred=False, in_place=True)
    assert list(read_header(path).tensors) == ["a", UNET + "b", "c"]
    assert data_of(path) == data


# ----------------------------------------------------------------------------------------------------------------------
# Metadata

MODELSPEC = ("sai_model_spec", "architecture", "implementation", "title", "resolution")


@pytest.mark.parametrize(
    ("shapes", "v_pred", "architecture", "resolution"),
    [
        (SDXL, True, "stable-diffusion-xl-v1-base", "1024x1024"),
        (SDXL, False, "stable-diffusion-xl-v1-base", "1024x1024"),
        (SD2, True, "stable-diffusion-v2-768-v", "768x768"),
        (SD2, False, "stable-diffusion-v2-512", "512x512"),
        (unet(text=768, sizes=None), True, "stable-diffusion-v1", "512x512"),
        # ModelSpec has no names for these
        (unet(depths=(0, 0, 2, 2, 4, 4)), True, None, None),  # SSD-1B
        (unet(depths=(1, 2, 3)), True, None, None),
        (unet(text=768, sizes=None, channels=9), True, None, None),  # for inpainting
        ({UNET + "input_blocks.0.0.weight": (320,)}, True, None, None),
    ],
)
def test_modelspec(write, shapes, v_pred, architecture, resolution):
    path = write(shapes)
    mark_checkpoint(path, v_pred=v_pred, in_place=True)
    expected = {"modelspec.prediction_type": "v" if v_pred else "epsilon"}
    if architecture:
        expected |= {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": architecture,
            "modelspec.implementation": "sgm",
            "modelspec.title": "model",
            "modelspec.resolution": resolution,
        }
    assert read_header(path).metadata == expected


def test_modelspec_of_others_is_kept(tmp_path, write):
    metadata = {f"modelspec.{key}": f"their {key}" for key in MODELSPEC} | {"modelspec.hash_md5": "0x0"}
    out = mark_checkpoint(write(SDXL, metadata), v_pred=True, out=tmp_path / "out.sft")
    marked = read_header(out).metadata
    assert marked.pop("modelspec.prediction_type") == "v"
    assert marked == metadata


@pytest.mark.parametrize("stale", ["0x" + "f" * 64, "", "x" * 1000])
def test_a_hash_is_computed_again(write, stale):
    path = write({**SDXL, "large": ("U8", 3 * mark.BUFFER + 1)}, {"modelspec.hash_sha256": stale, "last": "kept"})
    data = data_of(path)
    mark_checkpoint(path, v_pred=True, in_place=True)
    assert data_of(path) == data
    metadata = read_header(path).metadata
    assert list(metadata)[:2] == ["modelspec.hash_sha256", "last"]
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"


def test_the_title_is_the_new_name(tmp_path, write):
    out = mark_checkpoint(write(SDXL), v_pred=True, out=tmp_path / "noob-v.1.0.safetensors")
    assert read_header(out).metadata["modelspec.title"] == "noob-v.1.0"


@pytest.mark.parametrize(("v_pred", "ztsnr"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("before", [True, False])
def test_no_program_is_told_otherwise(write, v_pred, ztsnr, before):
    metadata = {
        "modelspec.prediction_type": "v-zsnr" if before else "epsilon",
        "modelspec.predict_key": "v" if before else "epsilon",
        "ss_v_parameterization": str(before),
        "ss_zero_terminal_snr": str(before),
    }
    path = write(SDXL, metadata)
    mark_checkpoint(path, v_pred=v_pred, ztsnr=ztsnr, in_place=True)
    assert said(path) == ("v_prediction" if v_pred else "epsilon", ztsnr)


# ----------------------------------------------------------------------------------------------------------------------
# Diffusers folders


@pytest.fixture
def folder(tmp_path, write_checkpoint):
    write_checkpoint(tmp_path / "noob" / "unet" / "diffusion_pytorch_model.safetensors", DIFFUSERS)
    (tmp_path / "noob" / "scheduler").mkdir()
    (tmp_path / "noob" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return tmp_path / "noob"


def test_a_diffusers_folder(folder):
    config = folder / "scheduler" / "scheduler_config.json"
    assert mark_checkpoint(folder, v_pred=True, ztsnr=True, in_place=True) == folder
    assert said(folder) == ("v_prediction", True)
    assert json.loads(config.read_text()) == SCHEDULER | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999
    assert scheduler.sigmas[0] == pytest.approx(4096, rel=1e-4)

    mark_checkpoint(folder, ztsnr=False, in_place=True)
    assert said(folder) == ("v_prediction", False)
    mark_checkpoint(folder, v_pred=False, in_place=True)
    assert said(folder) == ("epsilon", False)
    assert [path.name for path in config.parent.iterdir()] == [config.name]


def test_a_folder_that_cannot_be_marked(folder, tmp_path):
    config = folder / "scheduler" / "scheduler_config.json"
    before = config.read_text()
    for arguments, sentence in (
        ({"v_pred": True}, "can only be marked in place"),
        ({"v_pred": True, "in_place": True, "out": tmp_path / "other"}, "can only be marked in place"),
        ({"ztsnr": True, "in_place": True}, "does nothing without v-prediction"),
        ({"v_pred": True, "ztsnr": True, "swarm": True, "in_place": True}, "which SwarmUI does not read"),
    ):
        with pytest.raises(ValueError, match=sentence):
            mark_checkpoint(folder, **arguments)
        assert config.read_text() == before
    config.write_text("[]")
    with pytest.raises(ValueError, match="is not a scheduler's settings"):
        mark_checkpoint(folder, v_pred=True, in_place=True)
    config.unlink()
    with pytest.raises(ValueError, match=r"has no scheduler/scheduler_config\.json"):
        mark_checkpoint(folder, v_pred=True, in_place=True)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "nothing to mark"),
        ({"ztsnr": True}, "does nothing without v-prediction"),
        ({"v_pred": False, "ztsnr": True}, "an epsilon model cannot have it"),
        ({"swarm": True}, "set v_pred and ztsnr"),
        ({"v_pred": True, "swarm": True}, "set v_pred and ztsnr"),
        ({"v_pred": False, "swarm": True}, "set v_pred and ztsnr"),
    ],
)
def test_contradictions(write, arguments, sentence):
    path = write(SDXL)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=sentence):
        mark_checkpoint(path, in_place=True, **arguments)
    assert path.read_bytes() == before


def test_a_mark_is_not_left_alone(write):
    path = write({**SDXL, "v_pred": ("F32", 0), "ztsnr": ("F32", 0)})
    with pytest.raises(ValueError, match="or remove ztsnr too"):
        mark_checkpoint(path, v_pred=False, in_place=True)
    assert said(path) == ("v_prediction", True)


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (LORA, "is a LoRA, and no program looks for marks there"),
        (DIFFUSERS, "is a U-Net with diffusers' names"),
        (VAE, "has no U-Net"),
        ({}, "has no U-Net"),
        (unet(width=384, text=1280, sizes=2560, depths=(0, 0, 4, 4)), "is SDXL refiner, but marks are only for"),
        ({UNET + "double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "is Flux, but marks are only for"),
        ({**SDXL, "v_pred": ("F32", 1)}, "the tensor v_pred of .* holds data"),
    ],
)
def test_files_that_marks_are_not_for(write, shapes, sentence):
    path = write(shapes)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=sentence):
        mark_checkpoint(path, v_pred=False, in_place=True)
    assert path.read_bytes() == before


def test_pickles_and_damaged_files(tmp_path, write):
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(ValueError, match="is a pickle"):
        mark_checkpoint(tmp_path / "a.ckpt", v_pred=True, in_place=True)
    with pytest.raises(ValueError, match="there is no file"):
        mark_checkpoint(tmp_path / "missing.safetensors", v_pred=True, in_place=True)
    path = write(SDXL)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match="the download is incomplete"):
        mark_checkpoint(path, v_pred=True, in_place=True)


def test_nothing_is_replaced_without_leave(tmp_path, write):
    path = write(SDXL)
    other = write(SDXL, name="other.safetensors")
    link, dangling, hard = (tmp_path / f"{name}.safetensors" for name in ("link", "dangling", "hard"))
    link.symlink_to(path)
    dangling.symlink_to(tmp_path / "nothing")
    contents = path.read_bytes(), other.read_bytes()
    for arguments, sentence in (
        ({}, r"model\.safetensors would be replaced: name another file with out, or allow it with in_place"),
        ({"out": path}, "would be replaced"),
        ({"out": link}, "would be replaced"),
        ({"out": other}, "already exists"),
        ({"out": dangling}, "already exists"),
        ({"out": tmp_path}, "already exists"),
        ({"out": other, "in_place": True}, "out and in_place exclude each other"),
        ({"out": tmp_path / "new.safetensors", "in_place": True}, "out and in_place exclude each other"),
        ({"out": tmp_path / "new.ckpt"}, r"end its name in \.safetensors or \.sft"),
        ({"out": tmp_path / "missing" / "new.sft"}, "there is no folder"),
    ):
        with pytest.raises(ValueError, match=sentence):
            mark_checkpoint(path, v_pred=True, **arguments)
    hard.hardlink_to(path)
    with pytest.raises(ValueError, match="several names"):
        mark_checkpoint(path, v_pred=True, in_place=True)
    path.chmod(0o444)
    hard.unlink()
    with pytest.raises(ValueError, match="is read-only"):
        mark_checkpoint(path, v_pred=True, in_place=True)
    assert (path.read_bytes(), other.read_bytes()) == contents
    assert len(list(tmp_path.iterdir())) == 4


def test_in_place(tmp_path, write):
    path = write(SDXL)
    path.chmod(0o640)
    link = tmp_path / "link.safetensors"
    link.symlink_to(path.name)
    assert mark_checkpoint(link, v_pred=True, in_place=True, out=path) == path
    assert mark_checkpoint(link, ztsnr=True, in_place=True) == link
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert said(path) == said(link) == ("v_prediction", True)
    assert len(list(tmp_path.iterdir())) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Copying


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the fallback is what runs here")
@pytest.mark.parametrize("first", [0, 5000], ids=["never", "in part"])
def test_where_the_kernel_does_not_copy(write, monkeypatch, first):
    path = write(SDXL)
    data = data_of(path)
    copy_file_range, calls = os.copy_file_range, []

    def fail(source, target, count):
        calls.append(count)
        if len(calls) == 1 and first:
            return copy_file_range(source, target, first)
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", fail)
    mark_checkpoint(path, v_pred=True, in_place=True)
    assert calls
    assert data_of(path) == data
    monkeypatch.delattr(os, "copy_file_range")
    mark_checkpoint(path, ztsnr=True, in_place=True)
    assert data_of(path) == data


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_changes_meanwhile(write, monkeypatch, change):
    path = write(SDXL)

    def read_then_change(path):
        header = read_header(path)
        os.truncate(path, path.stat().st_size + change)
        return header

    monkeypatch.setattr(mark, "read_header", read_then_change)
    with pytest.raises(ValueError, match="was changed while it was read"):
        mark_checkpoint(path, v_pred=True, in_place=True)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_nobody_waits_for_the_hash_when_copying_fails(tmp_path, write_checkpoint, monkeypatch):
    path = write_checkpoint(tmp_path / "a.safetensors", {UNET + "a": ("U8", 2_000_000_000)}, HASH)
    hash_rest, started, finished = mark.hash_data, [], []

    def interrupted(*arguments):
        raise KeyboardInterrupt

    def watched(data):
        started.append(data)
        finished.append(hash_rest(data))

    monkeypatch.setattr(mark, "_copy_data", interrupted)
    monkeypatch.setattr(mark, "hash_data", watched)
    with pytest.raises(KeyboardInterrupt):
        mark_checkpoint(path, v_pred=True, in_place=True)
    assert started
    assert not finished
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("padding", [0, 8, 65528, 100_000])
def test_data_begin_where_they_did_in_a_block(write, padding):
    path = write({UNET + "a": ("U8", 300_001)})
    content = path.read_bytes()
    length = read_header(path).data_start - 8
    padding += -length % 8
    path.write_bytes(
        (length + padding).to_bytes(8, "little") + content[8 : 8 + length] + b" " * padding + content[8 + length :]
    )
    before, data = read_header(path).data_start, data_of(path)
    mark_checkpoint(path, v_pred=True, in_place=True)
    after = read_header(path).data_start
    assert (after - before) % mark.BLOCK == after % 8 == 0
    assert after < 2 * mark.BLOCK
    assert data_of(path) == data


def run(program, *arguments, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], text=True, **options)


def test_memory_does_not_grow_with_the_file(tmp_path, write_checkpoint):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    path = write_checkpoint(tmp_path / "a.safetensors", {UNET + "a": ("U8", 400_000_000)}, HASH)
    program = """
import sys
from ztsnr.checkpoints.mark import mark_checkpoint
mark_checkpoint(sys.argv[1], v_pred=True, in_place=True)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    with run(program, path, stdout=subprocess.PIPE) as process:
        _, kilobytes, unit = process.communicate()[0].split()
    assert unit == "kB"
    assert int(kilobytes) < 100_000
    assert said(path) == ("v_prediction", None)


def test_too_large_a_file(tmp_path, write):
    path = write(SDXL)
    before = path.read_bytes()
    program = """
import resource, sys
from ztsnr.checkpoints.mark import mark_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for arguments in ({"in_place": True}, {"out": sys.argv[2]}):
    try:
        mark_checkpoint(sys.argv[1], v_pred=True, **arguments)
    except ValueError as error:
        print(error)
"""
    out = tmp_path / "out.safetensors"
    with run(program, path, out, stdout=subprocess.PIPE) as process:
        sentences = process.communicate()[0].splitlines()
    assert sentences == [f"{file} cannot be written: File too large" for file in (path, out)]
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_full_disk(tmp_path, write):
    path = write(SDXL)
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={path.stat().st_size + 10_000}", "tmpfs", small]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        shutil.copy(path, small)
        with pytest.raises(ValueError, match="cannot be written: No space left on device"):
            mark_checkpoint(small / path.name, v_pred=True, in_place=True)
        assert (small / path.name).read_bytes() == path.read_bytes()
        assert len(list(small.iterdir())) == 1
    finally:
        subprocess.run(["umount", "-l", small], check=True)


# ----------------------------------------------------------------------------------------------------------------------
# Kill -9

MARK = """
import sys
from ztsnr.checkpoints.mark import mark_checkpoint
print("ready", flush=True)
sys.stdin.readline()
mark_checkpoint(sys.argv[1], v_pred=True, ztsnr=True, in_place=True)
"""


def mark_elsewhere(path, killed_after=None) -> float:
    """Mark a file in another program, to be killed so many seconds after it began to write.

    Returns how long it wrote.
    """
    before = set(os.listdir(path.parent))
    with run(MARK, path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        start = wait_for_a_new_name(path.parent, before, lambda: process.poll() is None)
        if killed_after is not None:
            time.sleep(killed_after)
            process.send_signal(signal.SIGKILL)
        process.wait()
        return time.perf_counter() - start


def digest(path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")
@pytest.mark.parametrize(("kills", "size"), [(8, 20_000_000), pytest.param(50, 200_000_000, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path, write, kills, size):
    original = write({UNET + "a": ("U8", size)}, HASH)
    path = tmp_path / "models" / "a.safetensors"
    path.parent.mkdir()
    shutil.copy(original, path)
    seconds = mark_elsewhere(path)
    old, new = digest(original), digest(path)
    assert said(path) == ("v_prediction", True)

    shutil.copy(original, path)
    left, outcomes = 0, []
    for i in range(kills):
        mark_elsewhere(path, killed_after=random.uniform(i, i + 1) / kills * seconds * 1.2)
        files = {file.name for file in path.parent.iterdir()}
        assert path.name in files
        assert len(files) <= 2  # each run cleans up behind the one before
        left += len(files) - 1
        outcomes.append(digest(path))
        assert outcomes[-1] in (old, new)
        if outcomes[-1] == new:
            shutil.copy(original, path)
    assert old in outcomes
    assert left, "no run was killed while it wrote"
    mark_elsewhere(path)
    assert digest(path) == new
    assert list(path.parent.iterdir()) == [path]
