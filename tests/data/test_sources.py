"""Folders, lists, tables, saved datasets and tars give the same index of the same pictures."""

import io
import json
import os
import pickle
import re
import socket
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ztsnr.data.pictures import PictureError, picture_size
from ztsnr.data.sources import CHUNK, SCHEMA, PictureIndex, Source, build_index, parse_source, split
from ztsnr.data.tars import read_bytes

SIZES = {"a.png": (20, 10), "b.jpg": (16, 24), "c.webp": (8, 8), "d.png": (30, 10)}
CAPTIONS = {name: (f"caption of {name}", "ünïcode 猫") for name in SIZES}


def picture(size, format="PNG"):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x112] = 6
    turned = {"exif": exif} if format == "JPEG" else {}  # whose size in the file is on its side
    Image.new("RGB", size[::-1] if turned else size, (200, 100, 50)).save(file, format, **turned)
    return file.getvalue()


def file_of(name):
    return picture(SIZES[name], {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[Path(name).suffix])


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def build(*sources, **options):
    index, refused = build_index([s if isinstance(s, Source) else Source(s) for s in sources], **options)
    assert index.table.schema == SCHEMA
    index.table.validate(full=True)
    return index, refused


def keys(index):
    return [index.key(i) for i in range(len(index))]


def sentence(*sources, **options):
    with pytest.raises(ValueError, match=r"\w") as caught:
        build(*sources, **options)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# One data set in every form


def as_folder(place):
    files = {name: file_of(name) for name in SIZES}
    for name, captions in CAPTIONS.items():
        files[Path(name).stem + ".json"] = json.dumps({"captions": captions})
    return write(place / "set", files)


def as_jsonl(place):
    write(place, {f"pictures/{name}": file_of(name) for name in SIZES})
    lines = [json.dumps({"file_name": f"pictures/{name}", "captions": CAPTIONS[name]}) for name in SIZES]
    return write(place, {"set.jsonl": "\n".join(lines) + "\n\n"}) / "set.jsonl"


def as_parquet_of_names(place):
    write(place, {f"pictures/{name}": file_of(name) for name in SIZES})
    table = {"path": [f"pictures/{name}" for name in SIZES], "captions": list(CAPTIONS.values())}
    pq.write_table(pa.table(table), place / "set.parquet")
    return place / "set.parquet"


def as_parquet_of_bytes(place):
    table = {"jpg": [file_of(name) for name in SIZES], "captions": list(CAPTIONS.values())}
    pq.write_table(pa.table(table), place / "set.parquet", row_group_size=3)
    return place / "set.parquet"


def huggingface(place):
    datasets = pytest.importorskip("datasets")
    folder = write(place / "files", {name: file_of(name) for name in SIZES})
    columns = {"image": [str(folder / name) for name in SIZES], "captions": list(map(list, CAPTIONS.values()))}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def as_saved_dataset(place):
    huggingface(place).save_to_disk(place / "set", num_shards=2)
    return place / "set"


def as_parquet_of_datasets(place):
    datasets = pytest.importorskip("datasets")
    features = huggingface(place).features
    pictures = [{"bytes": file_of(name), "path": name} for name in SIZES]
    table = {"image": pictures, "captions": list(map(list, CAPTIONS.values()))}
    (place / "set").mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(place / "set" / "train-0.parquet")
    return place / "set"


def as_tar(place):
    files = {}
    for name in SIZES:
        first, second = CAPTIONS[name]
        files |= {f"{Path(name).stem}.txt": first, name: file_of(name)}
        files |= {f"{Path(name).stem}.json": json.dumps({"caption": second}), f"{Path(name).stem}.cls": "3"}
    return write_tar(place / "set.tar", files)


@pytest.mark.parametrize(
    "form",
    [
        as_folder,
        as_jsonl,
        as_parquet_of_names,
        as_parquet_of_bytes,
        as_saved_dataset,
        as_parquet_of_datasets,
        as_tar,
    ],
)
def test_every_form(form, tmp_path):
    index, refused = build(Source(form(tmp_path), weight=1.5))
    assert len(refused) == 0
    assert len(index) == len(set(keys(index))) == 4
    assert index.sizes.dtype == np.int32
    assert index.sizes.tolist() == list(map(list, SIZES.values()))
    assert [index.captions(i) for i in range(4)] == list(CAPTIONS.values())
    assert index.repeats.tolist() == [1.5] * 4
    assert [index.read(i) for i in range(4)] == list(map(file_of, SIZES))
    for i, size in enumerate(SIZES.values()):
        assert index.measure(i) == size


def test_saved_datasets_are_read_as_the_library_reads_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.load_from_disk(as_saved_dataset(tmp_path)).cast_column("image", datasets.Image(decode=False))
    index, _ = build(tmp_path / "set")
    assert [index.read(i) for i in range(4)] == [row["image"]["bytes"] for row in saved]
    assert [list(index.captions(i)) for i in range(4)] == list(saved["captions"])


def test_names_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source("some/cats") == Source("some/cats")
    assert parse_source("cats=some/a=b", outside=True) == Source("some/a=b", "cats", outside=True)
    (tmp_path / "seed=3").mkdir()
    assert parse_source("seed=3") == Source("seed=3")


def test_splits_of_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": huggingface(tmp_path)}).save_to_disk(tmp_path / "all")
    assert "holds a dataset with several splits" in sentence(tmp_path / "all")
    assert len(build(tmp_path / "all" / "train")[0]) == 4


def test_webdatasets_are_read_as_the_library_reads_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(as_tar(tmp_path)), shardshuffle=False))
    index, _ = build(tmp_path / "set.tar")
    assert [index.read(i) for i in range(4)] == [
        next(sample[suffix] for suffix in ("png", "jpg", "webp") if suffix in sample) for sample in samples
    ]
    assert [index.captions(i)[0] for i in range(4)] == [sample["txt"].decode() for sample in samples]


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def test_folders_are_walked_in_order(tmp_path):
    dot = picture((5, 5))
    write(tmp_path / "set", dict.fromkeys(("z.png", "b/2.PNG", "b/10.png", "a/x.y.png", "é.png", "B.tar.png"), dot))
    write(tmp_path / "set", dict.fromkeys((".hidden.png", ".cache/a.png", "._z.png"), dot))
    write(tmp_path / "set", {"notes.md": "no picture", "a/x.y.txt": "ends at the last dot"})
    index, _ = build(tmp_path / "set", allow_missing_captions=True)
    assert keys(index) == ["set/B.tar.png", "set/a/x.y.png", "set/b/10.png", "set/b/2.PNG", "set/z.png", "set/é.png"]
    assert [index.captions(i) for i in range(2)] == [("",), ("ends at the last dot",)]
    assert keys(build(tmp_path / "set", allow_missing_captions=True)[0]) == keys(index)


def test_captions_beside_a_picture(tmp_path):
    write(
        tmp_path,
        {
            "1.png": picture((5, 5)),
            "1.txt": "\ufeff first \n",
            "1.json": json.dumps({"text": ["third", "first", " "], "caption": "second", "tags": "no"}),
        },
    )
    assert build(tmp_path)[0].captions(0) == ("first", "second", "third")
    assert build(Source(tmp_path, caption_fields=["tags"]))[0].captions(0) == ("first", "no")


def test_missing_captions(tmp_path):
    write(tmp_path / "set", {f"{n}.png": picture((5, 5)) for n in range(7)} | {"3.txt": "yes", "4.txt": " \n"})
    assert sentence(tmp_path / "set") == (
        "6 of 7 pictures have no caption, the first are set/0.png, set/1.png, set/2.png: add captions (in "
        "NAME.txt, NAME.caption or NAME.json beside NAME.png, or in a metadata.jsonl with file_name and text), or set "
        "allow_missing_captions"
    )
    index, _ = build(tmp_path / "set", allow_missing_captions=True)
    assert [index.captions(i) for i in (3, 4, 5)] == [("yes",), ("",), ("",)]


def test_captions_of_other_trainers(tmp_path):
    """.caption and .TXT; metadata.jsonl of imagefolder; a mask is no picture; films and documents are none either."""
    names = ["kohya", "shouting", "listed", "both", "below/listed"]
    files = {f"{name}.png": picture((5, 5)) for name in names}
    files |= {"kohya-masklabel.png": picture((5, 5)), "a.pdf": b"%PDF", "b.mpg": b"film", "c.h5": b"numbers"}
    files |= {"kohya.caption": "a cat", "shouting.TXT": "A DOG", "both.txt": "beside"}
    lines = [{"file_name": "listed.png", "text": "in a list", "weight": 2}, {"file_name": "both.png", "text": "no"}, {}]
    files["metadata.jsonl"] = "\n".join(map(json.dumps, lines))
    files["below/metadata.jsonl"] = json.dumps({"file_name": "listed.png", "text": "in another"})
    index, refused = build(write(tmp_path / "set", files))
    assert len(refused) == 0
    found = {index.key(i).removeprefix("set/").removesuffix(".png"): index.captions(i) for i in range(len(index))}
    expected = ["a cat", "A DOG", "in a list", "beside", "in another"]
    assert found == {name: (caption,) for name, caption in zip(names, expected, strict=True)}
    assert index.repeats[keys(index).index("set/listed.png")] == 2


@pytest.mark.parametrize("in_tar", [False, True])
def test_captions_in_other_encodings(tmp_path, in_tar):
    """UTF-16 with a byte order mark is read; what is not UTF-8 is listed as broken pictures are."""
    files = {f"{n}.png": picture((5, 5)) for n in range(4)}
    files |= {"0.txt": "猫".encode("utf-16"), "1.txt": "katze: süß".encode("cp1252"), "2.txt": "plain"}
    files["3.txt"] = "hund: groß".encode("cp1252")
    place = write_tar(tmp_path / "set.tar", files) if in_tar else write(tmp_path / "set", files)
    for options in ({}, {"allow_missing_captions": True}):
        index, refused = build(place, **options)
        assert [index.captions(i) for i in range(len(index))] == [("猫",), ("plain",)]
        assert [key[-5:] for key in refused["key"].to_pylist()] == ["1.png", "3.png"]
        assert all(re.fullmatch(r".*[13]\.txt.* is not UTF-8 text", line) for line in refused["reason"].to_pylist())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
@pytest.mark.timeout(20)
def test_what_could_be_waited_for_forever(tmp_path):
    """FIFOs, sockets and devices with the names of pictures, captions and lists."""
    folder = write(tmp_path / "set", {f"{n}.png": picture((5, 5)) for n in (1, 2)} | {"1.txt": "one", "4.txt": "four"})
    os.mkfifo(folder / "2.txt")
    os.mkfifo(folder / "3.png")
    (folder / "3.txt").write_text("three")
    (folder / "4.png").symlink_to("/dev/zero")
    index, refused = build(folder)
    assert keys(index) == ["set/1.png"]
    assert dict(zip(refused["key"].to_pylist(), refused["reason"].to_pylist(), strict=True)) == {
        "set/2.png": f"{folder / '2.txt'} is a FIFO and not a file: remove it",
        "set/3.png": "it is a FIFO and not a file",
        "set/4.png": "it is a device and not a file",
    }
    os.mkfifo(tmp_path / "list.jsonl")
    assert "list.jsonl is a FIFO and not a picture source" in sentence(tmp_path / "list.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.png"))
        with pytest.raises(PictureError, match="it is a socket"):
            picture_size(tmp_path / "s.png")
        with pytest.raises(PictureError, match="it is a socket"):
            read_bytes(str(tmp_path / "s.png"), 0, -1)


def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path):
    folder = write(
        tmp_path / "set",
        {
            "bad.png": b"no picture",
            "empty.jpg": b"",
            "good.png": picture((5, 7)),
            "old.psd": b"8BPS",
            "new.heic": b"ftypheic",
        },
    )
    (folder / "link.png").symlink_to("gone.png")
    (folder / "self.png").symlink_to("self.png")
    index, refused = build(folder, allow_missing_captions=True)
    assert keys(index) == ["set/good.png"]
    assert index.sizes.tolist() == [[5, 7]]
    reasons = {row["key"]: row["reason"] for row in refused.to_pylist()}
    no_picture = "it is damaged, or is not a picture in one of the formats"
    assert reasons.pop("set/bad.png").startswith(no_picture)
    assert reasons.pop("set/old.psd").startswith(no_picture)
    assert reasons.pop("set/new.heic").startswith(no_picture)
    assert reasons.pop("set/self.png").startswith("it cannot be read: Too many levels")
    assert reasons == {
        "set/empty.jpg": "it is empty",
        "set/link.png": "it cannot be read: No such file or directory",
    }
    assert refused["path"].to_pylist()[0] == str(folder / "bad.png")


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    write(tmp_path, {"set/a/1.png": picture((5, 5)), "elsewhere/2.png": picture((5, 5))})
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "other").symlink_to(tmp_path / "elsewhere")
    assert keys(build(tmp_path / "set", allow_missing_captions=True)[0]) == ["set/a/1.png", "set/other/2.png"]


def test_folder_of_tars(tmp_path):
    for shard in ("01", "00"):
        write_tar(tmp_path / f"{shard}.tar", {f"x/{shard}7.jpg": file_of("b.jpg"), f"x/{shard}7.txt": shard})
    write(tmp_path, {"00_stats.json": "{}", "00.parquet": b"as img2dataset writes beside its tars"})
    index, _ = build(Source(tmp_path, name="web"))
    assert keys(index) == ["web/00.tar/x/007.jpg", "web/01.tar/x/017.jpg"]
    assert [index.captions(i) for i in range(2)] == [("00",), ("01",)]
    assert index.read(1) == file_of("b.jpg")
    write(tmp_path, {"stray.png": picture((5, 5))})
    assert "holds both pictures and tars" in sentence(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Tars


def test_pictures_in_a_tar_are_read_by_their_place(tmp_path):
    path = as_tar(tmp_path)
    index, _ = build(path)
    data = path.read_bytes()
    for i, name in enumerate(SIZES):
        row = index.table.slice(i, 1).to_pylist()[0]
        assert data[row["offset"] : row["offset"] + row["length"]] == file_of(name)
    path.write_bytes(data[: row["offset"] + 5])
    with pytest.raises(PictureError, match="it is cut short: the tar that holds it has become shorter"):
        index.read(3)
    path.unlink()
    with pytest.raises(PictureError, match="it cannot be read: No such file"):
        index.read(0)


def test_names_in_a_tar(tmp_path):
    """One sample is what agrees up to the first dot of the last part; what begins with a dot belongs to none."""
    dot = picture((5, 5))
    files = {"./a.b/1.png": dot, "./a.b/1.seg.png": dot, "./a.b/1.txt": "one", "./a.b/._1.png": b"", "2.JPG": dot}
    index, _ = build(write_tar(tmp_path / "x.tar", files | {"2.txt": "two", "notes": "nothing"}))
    assert keys(index) == ["x.tar/./a.b/1.png", "x.tar/2.JPG"]
    assert [index.captions(i) for i in range(2)] == [("one",), ("two",)]


@pytest.mark.parametrize(
    ("name", "mode"), [("x.tar.gz", "w:gz"), ("x.tgz", "w:gz"), ("X.TAR.XZ", "w:xz"), ("x.tar", "w:bz2")]
)
def test_compressed_tars_are_refused(tmp_path, name, mode):
    path = write_tar(tmp_path / name, {"1.png": picture((5, 5))}, mode)
    assert "if it is compressed, decompress it first" in sentence(path)
    assert "if it is compressed, decompress it first" in sentence(tmp_path)


def test_tars_that_end_too_early_are_refused(tmp_path):
    files = {f"{n}.png": picture((n + 5, 5)) for n in range(4)}
    path = write_tar(tmp_path / "x.tar", files)
    index, _ = build(path, allow_missing_captions=True)
    whole, last = path.read_bytes(), index.table["offset"][3].as_py()
    for length in (0, 100, last - 600, last - 512, last - 100, last, last + 10, last + 512):
        path.write_bytes(whole[:length])
        assert str(path) in sentence(path, allow_missing_captions=True)
    damaged = bytearray(whole)
    damaged[last - 512 : last] = b"x" * 512
    path.write_bytes(damaged)
    assert "is cut short or damaged" in sentence(path, allow_missing_captions=True)


def test_links_in_a_tar_are_refused(tmp_path):
    write(tmp_path, {"1.png": picture((5, 5))})
    os.link(tmp_path / "1.png", tmp_path / "2.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "1.png", "1.png")
        tar.add(tmp_path / "2.png", "2.png")
    assert "2.png in" in sentence(tmp_path / "x.tar")


# ----------------------------------------------------------------------------------------------------------------------
# Lists and tables


def listing(place, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return write(place, {"list.jsonl": text}) / "list.jsonl"


def test_weights_multiply(tmp_path):
    write(tmp_path, {"1.png": picture((5, 5)), "2.png": picture((5, 5))})
    path = listing(tmp_path, {"path": "1.png", "text": "x", "weight": 3}, {"image": "2.png", "text": "x"})
    index, _ = build(Source(path, weight=0.5))
    assert index.repeats.tolist() == [1.5, 0.5]
    pq.write_table(
        pa.table({"path": ["1.png", "2.png"], "text": ["x", "x"], "weight": [0.0, None]}), tmp_path / "x.parquet"
    )
    assert build(Source(tmp_path / "x.parquet", weight=0.5))[0].repeats.tolist() == [0, 0.5]
    for weight in (-1, "2", True, float("nan"), 10**400):
        assert "must be a number of at least 0" in sentence(listing(tmp_path, {"path": "1.png", "weight": weight}))
    assert "must be a number of at least 0" in sentence(Source(path, weight=-1))


def test_weights_beside_a_picture(tmp_path):
    """As in lists and tables, so that a folder or a tar can repeat one of its pictures."""
    files = {"1.png": picture((5, 5)), "1.json": '{"text": "x", "weight": 3}', "2.png": picture((5, 5)), "2.txt": "x"}
    for source in (write(tmp_path / "set", files), write_tar(tmp_path / "set.tar", files)):
        assert build(Source(source, weight=0.5))[0].repeats.tolist() == [1.5, 0.5]
    files["1.json"] = '{"text": "x", "weight": "much"}'
    for source in (write(tmp_path / "set", files), write_tar(tmp_path / "set.tar", files)):
        assert "must be a number of at least 0, not 'much'" in sentence(source)


def test_a_file_of_another_program_makes_no_saved_dataset(tmp_path):
    write(tmp_path / "set", {"state.png": picture((5, 5)), "state.json": json.dumps({"caption": "of a state"})})
    assert build(tmp_path / "set")[0].captions(0) == ("of a state",)
    write(tmp_path / "set", {"dataset_info.json": "{}"})
    assert "was not written by save_to_disk" in sentence(tmp_path / "set")


@pytest.mark.parametrize("name", ["../../etc/passwd", "../set2/1.png", "/etc/passwd", "a/../../b.png"])
def test_lists_name_no_picture_outside_of_their_folder(tmp_path, name):
    write(tmp_path, {"set/1.png": picture((5, 5))})
    path = listing(tmp_path / "set", {"path": "1.png", "text": "x"}, {"path": name, "text": "x"})
    assert sentence(path) == (
        f"line 2 of {path} names a picture outside of its folder, {name}: to allow it, use --outside, or "
        "set outside = true for this source"
    )
    pq.write_table(pa.table({"path": [name], "text": ["x"]}), tmp_path / "set" / "x.parquet")
    assert sentence(tmp_path / "set" / "x.parquet").startswith("row 0 of ")


def test_pictures_outside_when_asked(tmp_path):
    write(tmp_path, {"set/1.png": picture((5, 5)), "set2/2.png": picture((6, 5))})
    inside = str(tmp_path / "set" / "1.png")  # absolute, but inside
    assert keys(build(listing(tmp_path / "set", {"path": inside, "text": "x"}))[0]) == ["list.jsonl/1.png"]
    path = listing(tmp_path / "set", {"path": "../set2/2.png", "text": "x"})
    index, _ = build(Source(path, outside=True))
    assert index.sizes.tolist() == [[6, 5]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 of .* is not JSON: "),
        ("[1]", "line 2 of .* must hold a JSON object"),
        ("[" * 10**5, "line 2 of .* is not JSON: maximum recursion depth"),
        ({"text": "x"}, "line 2 of .* names no picture: put its path into path or file_name or image"),
        ({"path": 3}, "line 2 of .* names no picture"),
        ({"path": "1.png", "text": 3}, "text in line 2 of .* must be a text or a list of texts"),
        ({"path": "1.png", "text": ["a", None]}, "text in line 2 of .* must be a text or a list of texts"),
        ({"path": "1.png", "text": "\ud800"}, "a name or caption in .* is not UTF-8"),
        ({"path": "1.png", "text": "again"}, "list.jsonl/1.png occurs twice"),
    ],
)
def test_bad_lines(tmp_path, line, reason):
    write(tmp_path, {"1.png": picture((5, 5))})
    with pytest.raises(ValueError, match=reason):
        build(listing(tmp_path, {"path": "1.png", "text": "x"}, line))


def test_files_that_are_not_what_their_name_says(tmp_path):
    write(
        tmp_path, {"x.parquet": "no", "x.jsonl": b"\xff\xfe", "x.tar": "no", "x.zip": "no", "b/1.png": picture((5, 5))}
    )
    for name in ("x.parquet", "x.tar"):
        assert f"{tmp_path / name} cannot be read" in sentence(tmp_path / name)
    assert sentence(tmp_path / "x.jsonl") == f"{tmp_path / 'x.jsonl'} is not UTF-8 text"
    assert "is not a picture source" in sentence(tmp_path / "x.zip")
    assert sentence(tmp_path / "gone") == f"there is no folder or file {tmp_path / 'gone'}"
    for name, content in (("1.txt", b"\xff"), ("1.json", "{")):
        write(tmp_path / "b", {name: content})
        assert str(tmp_path / "b" / name) in sentence(tmp_path / "b")
        (tmp_path / "b" / name).unlink()


def test_rows_without_a_picture(tmp_path):
    rows = [{"bytes": picture((5, 5)), "path": None}, {"bytes": None, "path": "/far/away.png"}, None]
    pq.write_table(pa.table({"image": rows, "text": ["x"] * 3}), tmp_path / "x.parquet")
    index, refused = build(tmp_path / "x.parquet")
    assert keys(index) == ["x.parquet/0"]
    assert "/far/away.png" in refused["reason"][0].as_py()
    assert refused["key"].to_pylist() == ["x.parquet/1", "x.parquet/2"]


def test_several_columns_of_bytes(tmp_path):
    data = [picture((5, 5))]
    pq.write_table(pa.table({"mask": [b""], "image": data, "text": ["x"]}), tmp_path / "x.parquet")
    assert build(tmp_path / "x.parquet")[0].read(0) == data[0]
    pq.write_table(pa.table({"mask": [b""], "photo": data}), tmp_path / "y.parquet")
    assert "has several columns of bytes, mask, photo" in sentence(tmp_path / "y.parquet")


def test_a_parquet_without_captions(tmp_path):
    pq.write_table(
        pa.table({"image": [picture((n + 1, 5)) for n in range(9)]}), tmp_path / "x.parquet", row_group_size=2
    )
    index, _ = build(tmp_path / "x.parquet", allow_missing_captions=True)
    assert index.sizes[:, 0].tolist() == list(range(1, 10))
    assert [Image.open(io.BytesIO(index.read(i))).width for i in (8, 0, 3, 4)] == [9, 1, 4, 5]


# ----------------------------------------------------------------------------------------------------------------------
# Several sources, the saved index


def test_several_sources(tmp_path):
    for name in ("cats", "dogs"):
        write(tmp_path / name, {"1.png": picture((5, 5)), "1.txt": name})
    index, _ = build(Source(tmp_path / "dogs", weight=2), Source(tmp_path / "cats", name="felines", weight=0.5))
    assert keys(index) == ["dogs/1.png", "felines/1.png"]
    assert index.repeats.tolist() == [2, 0.5]
    assert "dogs/1.png occurs twice" in sentence(tmp_path / "dogs", tmp_path / "dogs")


def test_no_pictures(tmp_path):
    assert sentence(tmp_path) == f"there are no pictures in {tmp_path}"
    assert sentence(write(tmp_path / "texts", {"a.txt": "x"})) == f"there are no pictures in {tmp_path / 'texts'}"
    assert sentence() == "no picture source was given: give at least one"
    assert "there are no pictures" in sentence(listing(tmp_path))
    write(tmp_path / "bad", {"1.png": b"", "1.txt": "x"})
    assert sentence(tmp_path / "bad") == "none of the 1 pictures can be used; bad/1.png, for example: it is empty"


def test_more_pictures_than_are_held_at_a_time(tmp_path):
    count = CHUNK + 5
    rows = {
        "image": [picture((1 + n % 7, 1)) for n in range(7)] * (count // 7 + 1),
        "text": ["x"] * (count // 7 + 1) * 7,
    }
    pq.write_table(pa.table(rows).slice(0, count), tmp_path / "x.parquet")
    index, _ = build(tmp_path / "x.parquet")
    assert len(index) == count
    assert index.sizes[:, 0].tolist() == [1 + n % 7 for n in range(count)]
    index.save(tmp_path / "index")
    again = PictureIndex.load(tmp_path / "index")
    assert again.table == index.table
    assert again.key(count - 1) == f"x.parquet/{count - 1}"


def test_save_and_load(tmp_path):
    index, _ = build(as_tar(tmp_path))
    index.save(tmp_path / "index.arrow")
    again = PictureIndex.load(tmp_path / "index.arrow")
    assert again.table == index.table
    for copy in (again, pickle.loads(pickle.dumps(again)), pickle.loads(pickle.dumps(build(tmp_path / "set.tar")[0]))):
        assert (copy.sizes == index.sizes).all()
        assert copy.read(2) == index.read(2)
        assert copy.captions(1) == index.captions(1)
    assert len(pickle.dumps(again)) < 300  # the path, and not the table


def test_bad_indexes(tmp_path):
    write(tmp_path, {"no": "no index"})
    with pa.ipc.new_file(str(tmp_path / "other"), pa.schema({"key": pa.string()})):
        pass
    for name, reason in (("no", "cannot be read"), ("other", "is not a picture index"), ("gone", "cannot be read")):
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            PictureIndex.load(tmp_path / name)


# ----------------------------------------------------------------------------------------------------------------------
# Validation


def made_up(names):
    columns = {field.name: pa.nulls(len(names), field.type) for field in SCHEMA}
    return PictureIndex(pa.table(columns | {"key": pa.array(names, pa.string())}, schema=SCHEMA))


def test_split_is_of_the_size_and_stable():
    names = [f"set/{n}.png" for n in range(20000)]
    train, validation = split(made_up(names), 0.1, "a")
    assert train.dtype == validation.dtype == np.int64
    assert sorted([*train, *validation]) == list(range(20000))
    assert abs(len(validation) - 2000) < 4 * np.sqrt(20000 * 0.1 * 0.9)
    held_out = {names[i] for i in validation}

    more = [f"new/{n}.png" for n in range(500)] + names[::-1]
    assert {more[i] for i in split(made_up(more), 0.1, "a")[1]} & set(names) == held_out
    assert held_out < {names[i] for i in split(made_up(names), 0.2, "a")[1]}
    other = {names[i] for i in split(made_up(names), 0.1, "b")[1]}
    assert abs(len(other & held_out) - 200) < 60  # independent of it


def test_split_nothing_and_too_much():
    train, validation = split(made_up(["a", "b"]), 0)
    assert train.tolist() == [0, 1]
    assert validation.tolist() == []
    for share in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match="share must be at least 0 and less than 1"):
            split(made_up(["a"]), share)
