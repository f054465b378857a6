"""Reading a safetensors header: what the library writes, and what an enemy writes."""

import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ztsnr.checkpoints import inspect_checkpoint, mark_checkpoint, to_folder, to_single_file, verify_checkpoint
from ztsnr.checkpoints.header import LONGEST_HEADER, parse_header, read_header
from ztsnr.checkpoints.published import published_names

from ..tiny_pipelines import make_tiny_sdxl

DTYPES = safetensors.torch._TYPES  # name in the file -> PyTorch's


def write(path, text: bytes, data_size: int = 0):
    """A file with this header, and nothing but holes for its data."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + data_size)
    return path


def entry(begin, end, dtype="U8", shape=None) -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


# ----------------------------------------------------------------------------------------------------------------------
# Against the safetensors library


@settings(deadline=None, max_examples=60)
@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    ),
    metadata=st.dictionaries(st.text(max_size=10), st.text(max_size=10), min_size=1, max_size=4),
)
def test_reads_what_safetensors_writes(tensors, metadata):
    empty = {name: torch.empty(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    tensors = {name: (torch.arange(t.nbytes) % 2).byte().view(t.dtype).view(t.shape) for name, t in empty.items()}
    content = safetensors.torch.save(tensors, metadata)
    length = int.from_bytes(content[:8], "little")
    header = parse_header(content[8 : 8 + length], len(content) - 8 - length)

    assert header.metadata == metadata
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = header.tensors[name]
        assert DTYPES[found.dtype] == tensor.dtype
        assert found.shape == tuple(tensor.shape)
        assert found.nbytes == tensor.nbytes
        data = content[header.data_start + found.begin : header.data_start + found.end]
        assert data == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


GOOD = json.dumps(
    {
        "__metadata__": {"format": "pt", "modelspec.prediction_type": "v"},
        "a.weight": entry(0, 48, "F32", [3, 4]),
        "b": entry(48, 50, "BF16", [1]),
        "v_pred": entry(50, 50, "F32", [0]),
        "c": entry(50, 52, "F16", []),
    }
).encode()


def header_or_refusal(read):
    """The header, or the sentence that refuses it; any other exception is a failure."""
    try:
        return read(), None
    except ValueError as error:
        return None, str(error)


def safetensors_reads(path) -> bool:
    try:
        with safetensors.safe_open(path, "pt"):
            return True
    except (safetensors.SafetensorError, MemoryError):
        return False


@settings(deadline=None, max_examples=600)
@given(
    start=st.integers(0, len(GOOD)),
    length=st.integers(0, 12),
    new=st.one_of(
        st.binary(max_size=8),
        st.text(alphabet='0123456789-.eE[]{}",:\\ntrue\x00 é', max_size=10).map(str.encode),
        st.just(b"[" * 3000),
    ),
    data_size=st.sampled_from([52, 52, 52, 51, 53, 0]),
)
def test_damaged_headers_are_refused_or_right(tmp_path_factory, start, length, new, data_size):
    text = GOOD[:start] + new + GOOD[start + length :]
    header, refusal = header_or_refusal(lambda: parse_header(text, data_size))
    if refusal is not None:
        assert "\n" not in refusal
        assert len(refusal) < 300
        return
    path = write(tmp_path_factory.getbasetemp() / "damaged.safetensors", text, data_size)
    assert safetensors_reads(path)
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == header.tensors.keys()


LEAVES = st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5) | st.just("U8")
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(content=JSON | st.dictionaries(st.text(max_size=3), st.fixed_dictionaries(dict.fromkeys(entry(0, 0), JSON))))
def test_any_json_is_refused_or_right(content):
    header, refusal = header_or_refusal(lambda: parse_header(json.dumps(content).encode(), 4))
    assert refusal is not None or sum(tensor.nbytes for tensor in header.tensors.values()) == 4


@settings(deadline=None, max_examples=300)
@given(content=st.binary(max_size=60))
def test_any_file_is_refused_or_right(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    _, refusal = header_or_refusal(lambda: read_header(path))
    assert str(path) in refusal if refusal is not None else safetensors_reads(path)


# ----------------------------------------------------------------------------------------------------------------------
# An enemy's headers


def one(**changes) -> bytes:
    return json.dumps({"a": {**entry(0, 4), **changes}}).encode()


@pytest.mark.parametrize(
    ("text", "data_size", "sentence"),
    [
        (b"", 0, "not a JSON object"),
        (b"[]", 0, "not a JSON object"),
        (b'{"a"', 0, "not JSON"),
        (b"{\xff}", 0, "not JSON"),
        (b'{"a":' * 2000, 0, "not JSON"),
        (b'{"a":' + b"[" * 3_000_000, 0, "not JSON"),
        (b'{"a":' + b"1" * 1_000_000 + b"}", 0, "as a size"),
        (b'{"a":NaN}', 0, "'NaN' as a size"),
        (b'{"a":{"dtype":"U8","shape":[],"shape":[1],"data_offsets":[0,1]}}', 1, "'shape' twice"),
        (b'{"a":1,"a":1}', 0, "'a' twice"),
        (b'{"\\ud800":1}', 0, "not Unicode"),
        (b'{"__metadata__":{"a":"\\udfff"}}', 0, "not Unicode"),
        (b'{"__metadata__":{"a":1}}', 0, "metadata are not all text"),
        (b'{"__metadata__":{"a":null}}', 0, "metadata are not all text"),
        (b'{"__metadata__":[]}', 0, "metadata are not all text"),
        (b'{"a":[]}', 0, "'a' is not described by"),
        (b'{"a":{"dtype":"U8","shape":[]}}', 0, "'a' is not described by"),
        (one(more=1), 4, "'a' is not described by"),
        (one(dtype="Q8"), 4, "an unknown type"),
        (one(dtype=[]), 4, "an unknown type"),
        (one(shape=4), 4, "an invalid shape"),
        (one(shape=[-4]), 4, "'-4' as a size"),
        (one(shape=[4.0]), 4, "'4.0' as a size"),
        (one(shape=[True]), 4, "an invalid shape"),
        (one(shape=["4"]), 4, "an invalid shape"),
        (one(shape=[1] * 65), 4, "an invalid shape"),
        (one(shape=[10**19]), 4, "as a size"),
        (one(shape=[2**62] * 64), 4, "does not fit its 4 bytes"),
        (one(shape=[5]), 4, "does not fit its 4 bytes"),
        (one(dtype="F4", shape=[9]), 4, "does not fit its 4 bytes"),
        (one(data_offsets=[0]), 4, "invalid data_offsets"),
        (one(data_offsets=[0, 4, 4]), 4, "invalid data_offsets"),
        (one(data_offsets=[4, 0]), 4, "invalid data_offsets"),
        (one(data_offsets=[-4, 0]), 4, "'-4' as a size"),
        (one(data_offsets=[1, 5]), 5, "do not begin where the previous tensor's end"),
        (one(), 3, "the download is incomplete"),
        (one(), 5, "1 bytes after the last tensor"),
        (json.dumps({"a": entry(0, 4), "b": entry(2, 6)}).encode(), 6, "'b' do not begin"),
        (json.dumps({"a": entry(0, 4), "b": entry(0, 4)}).encode(), 4, "do not begin"),
        (json.dumps({"a": entry(0, 4), "b": entry(6, 8)}).encode(), 8, "'b' do not begin"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_headers_end_in_a_sentence(tmp_path, text, data_size, sentence):
    path = write(tmp_path / "bad.safetensors", text, data_size)
    with pytest.raises(ValueError, match="cannot be read: ") as caught:
        read_header(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_cannot_write_on_the_terminal():
    name = "\x1b[2J\n" + "x" * 500
    with pytest.raises(ValueError, match="is not described by") as caught:
        parse_header(json.dumps({name: 1}).encode(), 0)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_zero_size_tensors_fit_anywhere_between_others():
    content = {"a": entry(0, 4), "v_pred": entry(4, 4, "F32", [0, 2**62]), "b": entry(4, 8), "ztsnr": entry(8, 8)}
    header = parse_header(json.dumps(content).encode(), 8)
    assert [header.tensors[name].nbytes for name in content] == [4, 0, 4, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def peak_memory(call) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bytes_read(call) -> int:
    """By all threads of this process, and from the system's cache too; 0 where only the memory can be watched."""
    counts = Path("/proc/self/io")
    if not counts.is_file():
        call()
        return 0
    before = counts.read_text()
    call()
    return int(counts.read_text().split()[1]) - int(before.split()[1])


PROCESS = """
import sys, time
from ztsnr.checkpoints import inspect_checkpoint
start = time.process_time()
try:
    inspect_checkpoint(sys.argv[1])
    sentence = ""
except ValueError as error:
    sentence = str(error)
print(time.process_time() - start)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
print(sentence)
"""


def inspect_in_a_process(path) -> tuple[float, float, str]:
    """What it costs in a process of its own: seconds of the processor, megabytes of memory; and the refusal."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("only Linux tells the peak of memory")
    done = subprocess.run([sys.executable, "-c", PROCESS, path], capture_output=True, text=True, check=True)
    seconds, kilobytes, sentence = done.stdout.split("\n", 2)
    return float(seconds), int(kilobytes) / 1e3, sentence.strip()


def test_only_the_header_is_read(tmp_path):
    size = 7_000_000_000
    path = write(tmp_path / "large.safetensors", json.dumps({"a": entry(0, size)}).encode(), size)
    assert peak_memory(lambda: read_header(path)) < 1_000_000


def test_a_whole_sdxl_is_told_in_50_ms_and_50_mb(tmp_path, write_checkpoint):
    shapes = {**published_names("SDXL base"), "v_pred": (0,), "ztsnr": (0,)}
    path = write_checkpoint(tmp_path / "noob.safetensors", shapes)
    assert path.stat().st_size > 6.9e9
    seconds = []
    for _ in range(5):
        start = time.process_time()
        report = inspect_checkpoint(path)
        seconds.append(time.process_time() - start)
    assert (report.architecture, report.format, report.zero_terminal_snr) == ("SDXL base", "single file", True)
    assert min(seconds) < 0.05  # what the work takes; more is other programs' doing, which share the caches
    _, megabytes, sentence = inspect_in_a_process(path)
    assert sentence == ""
    assert megabytes < 50


def fill(start: bytes, piece: str, end: bytes, length: int = LONGEST_HEADER) -> bytes:
    """A header of pieces, each of which may count itself, and about as long as is asked for."""
    count = (length - len(start) - len(end)) // len(piece % 0 if "%" in piece else piece)
    pieces = (piece % i for i in range(count)) if "%" in piece else [piece] * count
    return start + "".join(pieces).encode().rstrip(b",") + end


TENSORS = (b"{", '"%08d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b"}")


@pytest.mark.parametrize(
    ("start", "piece", "end", "sentence"),
    [
        (*TENSORS, ""),
        (b'{"__metadata__":{', '"%07x":"",', b"}}", ""),
        (b'{"a":[', "{},", b"]}", "is not described by"),
        (b'{"a":[', "[],", b"]}", "is not described by"),
        (b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[', "9999999999999999999,", b"]}}", "an invalid shape"),
    ],
    ids=["tensors", "metadata", "objects", "lists", "dimensions"],
)
def test_the_longest_headers_take_seconds_and_some_memory(tmp_path, start, piece, end, sentence):
    path = write(tmp_path / "long.safetensors", fill(start, piece, end))
    assert LONGEST_HEADER - 100 < path.stat().st_size <= LONGEST_HEADER + 8
    seconds, megabytes, refusal = inspect_in_a_process(path)
    assert sentence in refusal
    assert bool(refusal) == bool(sentence)
    assert seconds < 20
    assert megabytes < 400


@pytest.fixture(scope="module")
def hundred_megabytes(tmp_path_factory):
    """All of it JSON, and valid."""
    text = b'{"__metadata__":{"a":"' + b"a" * 100_000_000 + b'"}}'
    folder = tmp_path_factory.mktemp("hundred")
    yield write(folder / "huge.safetensors", text)
    (folder / "huge.safetensors").unlink()


def test_a_hundred_megabytes_of_json_are_refused_unread(hundred_megabytes, tmp_path):
    for call in (
        read_header,
        inspect_checkpoint,
        verify_checkpoint,
        lambda path: mark_checkpoint(path, v_pred=True, out=tmp_path / "out.safetensors"),
        lambda path: mark_checkpoint(path, v_pred=True, in_place=True),
        lambda path: to_folder(path, tmp_path / "out"),
    ):

        def refused(call=call):
            with pytest.raises(ValueError, match="more than any checkpoint needs"):
                call(hundred_megabytes)

        refused()  # which may import
        assert peak_memory(refused) < 1_000_000
        assert bytes_read(refused) < 1_000_000
    assert list(tmp_path.iterdir()) == []
    _, megabytes, sentence = inspect_in_a_process(hundred_megabytes)
    assert sentence
    assert megabytes < 50


def test_a_huge_header_is_refused_unread(tmp_path):
    path = write(tmp_path / "huge.safetensors", b"", LONGEST_HEADER + 1)
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", LONGEST_HEADER + 1))

    def read():
        with pytest.raises(ValueError, match="more than any checkpoint needs"):
            read_header(path)

    assert peak_memory(read) < 1_000_000


@pytest.mark.parametrize("content", [b"", b"1234567", b"<!DOCTYPE html><html>", b"\xff" * 8, b"\0" * 7])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a safetensors file|not a JSON object"):
        read_header(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_pickles_are_refused_unopened(tmp_path, suffix):
    with pytest.raises(ValueError, match=r"is a pickle.*never opened here: use the \.safetensors file"):
        read_header(tmp_path / f"not there{suffix}")


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    for name in ("missing.safetensors", "folder.safetensors", "pipe.safetensors", "loop.safetensors"):
        with pytest.raises(ValueError, match="there is no file"):
            read_header(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        read_header(tmp_path / f"{'x' * 300}.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint file"):
        read_header(tmp_path / "notes.txt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    path = write(tmp_path / "secret.safetensors", b"{}")
    path.chmod(0)
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        read_header(path)


# ----------------------------------------------------------------------------------------------------------------------
# Names that would be paths


PATHS = (
    "../escaped", "../../escaped", "/tmp/escaped-by-ztsnr", "..", ".", "", "a/b", "..\\escaped", "C:\\escaped",
    "nul\0nul", "~/escaped", "$HOME", "%s%n", "-rf", "\x1b]0;title\x07", "\u202egnp", "x" * 5000,
)  # fmt: skip


def everything_in(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def hostile(tmp_path, write_checkpoint, monkeypatch):
    """Models of names that would be paths, a single file and a folder; and the folder that holds all there is."""
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    named = [f"{prefix}{name}" for name in PATHS for prefix in ("", "model.diffusion_model.", "first_stage_model.")]
    unet = {"input_blocks.0.0.weight": (320, 4, 3, 3), "out.2.weight": (4, 320, 3, 3)}
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in unet.items()} | dict.fromkeys(named, (2,))
    metadata = {name: name for name in PATHS} | {"modelspec.title": "../escaped", "ot_config": "../escaped"}
    file = write_checkpoint(here / "hostile.safetensors", shapes, metadata)
    names = dict.fromkeys(("conv_in.weight", "conv_out.weight", "add_embedding.linear_1.weight", *PATHS), (2,))
    for part in ("unet", "vae"):
        write_checkpoint(here / "folder" / part / "diffusion_pytorch_model.safetensors", names, metadata)
    (here / "folder" / "scheduler").mkdir()
    (here / "folder" / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "../escaped"}))
    (here / "folder" / "model_index.json").write_text(json.dumps({"unet": ["../escaped", "../escaped"]}))
    return file, here / "folder", tmp_path


def test_names_that_would_be_paths_are_names(hostile):
    file, folder, everywhere = hostile
    before = everything_in(everywhere)
    header = read_header(file)
    assert set(PATHS) <= header.tensors.keys()
    for path in (file, folder):
        report = inspect_checkpoint(path)
        assert str(report).replace("\n", "").isprintable()
    verified = verify_checkpoint(file)
    assert all(line.isprintable() for line in str(verified).splitlines())
    assert everything_in(everywhere) == before  # reading writes nothing

    out = mark_checkpoint(file, v_pred=True, ztsnr=True, out=file.with_name("marked.safetensors"))
    marked = read_header(out)
    assert marked.tensors.keys() == header.tensors.keys() | {"v_pred", "ztsnr"}
    assert header.metadata.items() <= marked.metadata.items()
    assert everything_in(everywhere).keys() == before.keys() | {out}
    out.unlink()

    for convert in (
        lambda: to_single_file(folder, file.with_name("single.safetensors")),
        lambda: to_single_file(folder, file.with_name("single.safetensors"), base=file),
        lambda: to_folder(file, file.with_name("diffusers")),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 the sentences differ
            convert()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500
    assert everything_in(everywhere) == before
    assert not Path("/tmp/escaped-by-ztsnr").exists()


def test_a_base_keeps_such_names_and_no_other_file_is_written(tmp_path, monkeypatch):
    here = tmp_path / "a" / "b"
    folder = make_tiny_sdxl(here / "folder")
    monkeypatch.chdir(here)
    base, out, back = (here / name for name in ("base.safetensors", "out.safetensors", "back"))
    to_single_file(folder, base)
    tensors = safetensors.torch.load_file(base) | {name: torch.ones(2) for name in PATHS}
    safetensors.torch.save_file(tensors, base, {name: name for name in PATHS})
    before = everything_in(tmp_path)
    to_single_file(folder, out, base=base)
    assert set(PATHS) <= read_header(out).tensors.keys()
    assert everything_in(tmp_path).keys() == before.keys() | {out}
    assert verify_checkpoint(out, base).sound
    to_folder(out, back, config=folder)
    assert {path for path in everything_in(tmp_path) if back not in path.parents} == before.keys() | {out}
    assert {path.name for path in back.iterdir()} == {path.name for path in folder.iterdir()}
