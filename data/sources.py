"""Where pictures and captions come from, and the index that they are gathered in.

A source is one of these:

- a folder: all pictures in it and below, with captions in NAME.txt and NAME.json beside them; names that begin with a
  dot are passed over.  If it has no pictures, the tars in it are taken, or else the Parquet files.
- a webdataset tar, not compressed: members that agree up to the first dot of their name belong together, so for 1.png
  captions are in 1.txt and 1.json; another 1.mask.png is not taken.
- a .jsonl file: each line an object that names a picture in ``path``, ``file_name`` or ``image``, relative to the file;
  the ``metadata.jsonl`` of an imagefolder is one.
- a .parquet file: each row a picture, named as in .jsonl, or the picture's file itself in a column of bytes, or of
  {bytes, path} as Hugging Face ``datasets`` has them.
- a folder that ``datasets`` wrote with ``save_to_disk``.

Captions are read from the members of a JSON object, or from the columns of a table, that ``Source.caption_fields``
names: each a text, or a list of several captions.  A number ``weight`` beside them multiplies the source's: it is how
often an epoch sees this picture.

The index is an Arrow table, so that ten million pictures do not become Python objects.
"""

import hashlib
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_write
from .arrow_file import open_arrow
from .pictures import SUFFIXES, PictureError, picture_size

CAPTION_FIELDS = ("caption", "captions", "text")
PICTURE_FIELDS = ("path", "file_name", "image")
CHUNK = 4096  # pictures that are Python objects at a time

SCHEMA = pa.schema(
    {
        "key": pa.string(),  # the source's name and the place inside it
        "path": pa.string(),  # the file on disk: the picture, or the tar, Parquet or Arrow file it lies in
        "offset": pa.int64(),  # bytes inside a tar, else -1
        "length": pa.int64(),  # the same
        "row": pa.int64(),  # of a Parquet or Arrow file, else -1
        "width": pa.int32(),  # upright
        "height": pa.int32(),
        "captions": pa.list_(pa.string()),
        "repeats": pa.float64(),
    }
)


@dataclass(frozen=True)
class Source:
    """Where pictures are.

    Attributes:
        path: of the folder or file.
        name: what the keys of its pictures begin with; by default the last part of the path.
        weight: how often an epoch sees each of its pictures.
        caption_fields: where captions are in JSON and in tables.
        outside: whether a list may name pictures outside of the folder that it is in.
    """

    path: str | Path
    name: str = ""
    weight: float = 1.0
    caption_fields: Sequence[str] = CAPTION_FIELDS
    outside: bool = False


def parse_source(text: str, *, outside: bool = False) -> Source:
    """The source that a text means: its path, or NAME=PATH, where no file has the whole text for its name."""
    name, equals, path = text.partition("=")
    if not equals or os.path.exists(text):
        return Source(text, outside=outside)
    return Source(path, name, outside=outside)


class PictureIndex:
    """The pictures of a data set, numbered from 0.

    Attributes:
        table: of SCHEMA.
    """

    def __init__(self, table: pa.Table):
        self.table = table
        self._path: str | None = None  # of the file that holds the same

    @classmethod
    def load(cls, path: str | Path) -> "PictureIndex":
        """Open a saved index; see ``open_arrow``.

        Raises:
            UserError: the file cannot be read, or is none.
        """
        with _reading(path):
            table = open_arrow(path)
        if table.schema != SCHEMA:
            raise UserError(f"{path} is no index of pictures: build it again")
        index = cls(table)
        index._path = os.path.abspath(path)
        return index

    def save(self, path: str | Path) -> None:
        """Write the index into one file (Arrow IPC), atomically."""
        with atomic_write(path) as file, pa.ipc.new_file(file, SCHEMA) as writer:
            writer.write_table(self.table, max_chunksize=CHUNK)
        self._path = os.path.abspath(path)

    def __reduce__(self):
        """A worker process maps the file itself, if there is one."""
        return (PictureIndex.load, (self._path,)) if self._path else (PictureIndex, (self.table,))

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32 width and height of the upright pictures."""
        return np.stack([self.table[side].to_numpy() for side in ("width", "height")], axis=1)

    @cached_property
    def repeats(self) -> np.ndarray:
        """(N,) float64: how often an epoch sees each picture."""
        return self.table["repeats"].to_numpy()

    def key(self, i: int) -> str:
        """The source's name and the place inside it, such as "cats/2021/a.png"."""
        return self.table["key"][i].as_py()

    def captions(self, i: int) -> tuple[str, ...]:
        """At least one."""
        return tuple(self.table["captions"][i].as_py())

    def read(self, i: int) -> bytes:
        """The picture's file.

        Raises:
            PictureError: it has vanished or cannot be read.
        """
        path, offset, length, row = (self.table[name][i].as_py() for name in ("path", "offset", "length", "row"))
        return _read_row(path, row) if row >= 0 else _read_bytes(path, max(offset, 0), length)

    def measure(self, i: int) -> tuple[int, int]:
        """(width, height) of the upright picture, from its file."""
        is_file = self.table["offset"][i].as_py() < 0 and self.table["row"][i].as_py() < 0
        return picture_size(self.table["path"][i].as_py() if is_file else self.read(i))


def build_index(sources: Sequence[Source], *, allow_missing_captions: bool = False) -> tuple[PictureIndex, pa.Table]:
    """Gather the pictures of all sources, in their order, and read the size of each from its header.

    Args:
        sources: where they are.
        allow_missing_captions: a picture without a caption gets an empty one.

    Returns:
        The index, and a table of those pictures that cannot be used: key, path, reason.

    Raises:
        UserError: a source without pictures, or one that cannot be read; pictures without captions; one that is there
            twice; a list that names pictures outside of its folder; no picture that can be used.
    """
    if not sources:
        raise UserError("there are no sources of pictures: give at least one")
    tables = [_listed(source, allow_missing_captions) for source in sources]
    table = pa.concat_tables(tables)
    _check_captions(table)
    _check_keys(table)

    sizes, reasons = _measured(PictureIndex(table))
    for side, values in zip(("width", "height"), sizes.T, strict=True):
        table = table.set_column(SCHEMA.get_field_index(side), side, pa.array(values, pa.int32()))
    refused = table.select(["key", "path"]).take(pa.array(list(reasons), pa.int64()))
    refused = refused.append_column("reason", pa.array(list(reasons.values()), pa.string()))
    if len(refused) == len(table):
        raise UserError(
            f"none of the {len(table)} pictures can be used; {refused['key'][0]}, for one: {refused['reason'][0]}"
        )
    if reasons:
        table = table.filter(pa.array(sizes[:, 0] > 0))
    return PictureIndex(table), refused


def split(index: PictureIndex, share: float, salt: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Hold out pictures for validation by a hash of their keys, so that further pictures change nothing for these.

    Args:
        index: of N pictures.
        share: of them that is held out, about; in [0, 1).
        salt: another one chooses others.

    Returns:
        The numbers of the pictures to train with, and of those held out, ascending int64; together all N.
    """
    if not 0 <= share < 1:
        raise UserError(f"share must be at least 0 and less than 1, not {share}")
    keys = (key for batch in _batches_of(index.table.select(["key"])) for key in batch["key"].to_pylist())
    hashes = (hashlib.blake2b(f"{salt}/{key}".encode(), digest_size=8).digest() for key in keys)
    numbers = np.fromiter((int.from_bytes(digest, "big") for digest in hashes), np.uint64, len(index))
    held_out = numbers < np.uint64(share * 2**64)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _check_captions(table: pa.Table) -> None:
    missing = table.filter(pc.equal(pc.list_value_length(table["captions"]), 0))["key"]
    if len(missing):
        names = ", ".join(missing[:3].to_pylist())
        raise UserError(
            f"{len(missing)} of {len(table)} pictures have no caption, the first are {names}: add captions, or allow "
            "that some are missing"
        )


def _check_keys(table: pa.Table) -> None:
    if pc.count_distinct(table["key"]).as_py() == len(table):
        return
    counts = pc.value_counts(table["key"])
    key = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()]
    raise UserError(f"{key} is there twice: name each picture once, and give each source its own name")


def _measured(index: PictureIndex) -> tuple[np.ndarray, dict[int, str]]:
    """(N, 2) width and height; and for those that have none, 0 x 0, the reason."""
    sizes, reasons = np.zeros((len(index), 2), np.int32), {}

    def measure(i: int) -> tuple[int, int] | str:
        try:
            return index.measure(i)
        except PictureError as error:
            return str(error)

    measured = tqdm(_in_threads(measure, range(len(index))), "sizes", len(index), unit=" pictures", disable=None)
    for i, result in enumerate(measured):
        if isinstance(result, str):
            reasons[i] = result
        else:
            sizes[i] = result
    return sizes, reasons


# ----------------------------------------------------------------------------------------------------------------------
# What a source holds


class _Found(NamedTuple):
    """A picture before its size is known."""

    key: str
    path: str
    captions: list[str]
    weight: float = 1.0
    offset: int = -1
    length: int = -1
    row: int = -1


def _listed(source: Source, allow_missing_captions: bool) -> pa.Table:
    """The pictures of a source as a table of SCHEMA, with 0 for the sizes."""
    if not _is_weight(source.weight):
        raise UserError(f"the weight of {source.path} must be a number of at least 0, not {source.weight!r}")
    batches = []
    found = iter(tqdm(_found(source), f"listing {source.path}", unit=" pictures", disable=None))
    while chunk := list(islice(found, CHUNK)):
        keys, paths, captions, weights, offsets, lengths, rows = map(list, zip(*chunk, strict=True))
        if allow_missing_captions:
            captions = [texts or [""] for texts in captions]
        zeros = [0] * len(chunk)
        repeats = [source.weight * weight for weight in weights]
        try:
            columns = [keys, paths, offsets, lengths, rows, zeros, zeros, captions, repeats]
            batches.append(pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA))
        except UnicodeEncodeError as error:
            raise UserError(f"a name or caption in {source.path} is not UTF-8: {error.object!r}") from None
    if not batches:
        raise UserError(f"there are no pictures in {source.path}")
    return pa.Table.from_batches(batches, SCHEMA)


def _found(source: Source) -> Iterator[_Found]:
    path = os.path.abspath(source.path)
    name = source.name or os.path.basename(path)
    if os.path.isdir(path):
        return _found_in_folder(source, path, name)
    if not os.path.exists(path):
        raise UserError(f"there is no folder or file {path}")
    if (kind := _kind(path)) not in READERS:
        raise UserError(f"{path} is no source of pictures: it must be a folder, .jsonl, .parquet or .tar")
    return READERS[kind](source, path, name)


def _kind(path: str) -> str | None:
    name = os.path.basename(path).lower()
    suffix = os.path.splitext(name)[1]
    if suffix in SUFFIXES:
        return "picture"
    if name.endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        return "tar"
    return {".jsonl": "jsonl", ".parquet": "table"}.get(suffix)


def _found_in_folder(source: Source, folder: str, name: str) -> Iterator[_Found]:
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        raise UserError(f"{folder} holds a dataset in splits: name the folder of one of them")
    if all(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_info.json")):
        kind, paths = "table", _saved_tables(folder)
    else:
        kinds = {_kind(path) for path in _walk(folder)}
        if {"picture", "tar"} <= kinds:
            raise UserError(f"{folder} holds pictures and tars: put them into folders of their own, each a source")
        kind = next((kind for kind in ("picture", "tar", "table") if kind in kinds), None)
        paths = (path for path in _walk(folder) if _kind(path) == kind)
    if kind == "picture":
        yield from _in_threads(lambda path: _found_beside(source, path, _key(name, path, folder)), paths)
    elif kind:
        for path in paths:
            yield from READERS[kind](source, path, _key(name, path, folder))


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files in a folder and below, by name.  Links are followed, but not back to a folder that one is in."""
    place = os.path.realpath(folder)
    if place in above:
        return
    with _reading(folder), os.scandir(folder) as entries:
        names = sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _walk(path, (*above, place))
        else:
            yield path


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _key(name: str, path: str, folder: str) -> str:
    inside = os.path.relpath(path, folder) if _is_inside(path, folder) else path
    return f"{name}/{inside.replace(os.sep, '/')}"


def _is_inside(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def _found_beside(source: Source, path: str, key: str) -> _Found:
    """A picture and the captions of its neighbours."""
    stem, captions, weight = os.path.splitext(path)[0], [], 1.0
    if os.path.exists(stem + ".txt"):
        captions.append(_text(stem + ".txt"))
    if os.path.exists(stem + ".json"):
        record = _json(_text(stem + ".json"), stem + ".json")
        captions += _captions(source, record, stem + ".json")
        weight = _weight(record, stem + ".json")
    return _Found(key, path, _distinct(captions), weight)


# ----------------------------------------------------------------------------------------------------------------------
# Tars


def _found_in_tar(source: Source, path: str, name: str) -> Iterator[_Found]:
    pictures: list[tuple[str, tarfile.TarInfo]] = []
    captions: dict[str, list[str]] = {}
    weights: dict[str, float] = {}
    with _reading(path), open(path, "rb") as file, _tar(file, path) as tar:
        for member in tar:
            sample, suffix = re.fullmatch(r"((?:.*/)?[^./]+)(\.[^/]*)|.*", member.name, re.DOTALL).groups()
            suffix = (suffix or "").lower()
            if suffix in SUFFIXES:
                if not member.isreg() or member.issparse():
                    raise UserError(f"{member.name} in {path} is a link or has holes: write it as a plain file")
                pictures.append((sample, member))
            elif suffix in (".txt", ".json") and member.isreg():
                where = f"{member.name} in {path}"
                text = _decoded(tar.extractfile(member).read(), where)
                if suffix == ".txt":
                    captions.setdefault(sample, []).append(text)
                else:
                    record = _json(text, where)
                    captions.setdefault(sample, []).extend(_captions(source, record, where))
                    weights[sample] = _weight(record, where)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # at which tarfile stops without a word
            raise UserError(f"{path} is cut short or damaged: it does not end with the mark of a tar's end")
    for sample, member in pictures:
        texts = _distinct(captions.get(sample, []))
        key, weight = f"{name}/{member.name}", weights.get(sample, 1.0)
        yield _Found(key, path, texts, weight, offset=member.offset_data, length=member.size)


@contextmanager
def _tar(file: Any, path: str) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise UserError(
            f"{path} cannot be read as a tar ({error}); if it is compressed, unpack it first: pictures are read "
            "from their place in it"
        ) from None


def _read_bytes(path: str, offset: int, length: int) -> bytes:
    """A part of a file, or all of it if length is -1."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise PictureError(f"it cannot be read: {error.strerror or error}") from None
    if len(data) < length:
        raise PictureError("it is cut short: the tar that it lies in has become shorter")
    return data


# ----------------------------------------------------------------------------------------------------------------------
# Lists and tables


def _found_in_jsonl(source: Source, path: str, name: str) -> Iterator[_Found]:
    with _reading(path), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            where = f"line {number} of {path}"
            if line.strip():
                yield _found_by_name(source, path, name, _json(line, where), where)


def _found_in_table(source: Source, path: str, name: str) -> Iterator[_Found]:
    """The rows of a Parquet file, or of an Arrow file of ``datasets``."""
    with _reading(path):
        schema = _schema(path)
        has_bytes = _bytes_column(schema, path) is not None
        wanted = (*source.caption_fields, "weight", *(() if has_bytes else PICTURE_FIELDS))
        columns = [column for column in dict.fromkeys(wanted) if column in schema.names]
        number = 0
        for batch in _batches(path, columns):
            for record in batch.to_pylist() if columns else [{}] * batch.num_rows:
                where = f"row {number} of {path}"
                if has_bytes:
                    captions, weight = _distinct(_captions(source, record, where)), _weight(record, where)
                    yield _Found(f"{name}/{number}", path, captions, weight, row=number)
                else:
                    yield _found_by_name(source, path, name, record, where)
                number += 1


def _found_by_name(source: Source, listed_in: str, name: str, record: dict, where: str) -> _Found:
    folder = os.path.dirname(listed_in)
    named = next((record[field] for field in PICTURE_FIELDS if isinstance(record.get(field), str)), None)
    if not named:
        raise UserError(f"{where} names no picture: it needs a text in one of {', '.join(PICTURE_FIELDS)}")
    path = os.path.normpath(os.path.join(folder, named))
    if not source.outside and not _is_inside(path, folder):
        raise UserError(
            f"{where} names a picture outside of its folder, {named}: if that is right, allow it by --outside, or for "
            "this source alone by outside = true"
        )
    return _Found(_key(name, path, folder), path, _distinct(_captions(source, record, where)), _weight(record, where))


def _saved_tables(folder: str) -> list[str]:
    """The Arrow files of a folder that ``datasets`` wrote, in order."""
    path = os.path.join(folder, "state.json")
    state = _json(_text(path), path)
    try:
        return [os.path.join(folder, os.path.basename(file["filename"])) for file in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{path} is not that of a dataset saved by save_to_disk: it lists no _data_files") from None


def _is_arrow(path: str) -> bool:
    return path.endswith(".arrow")


def _schema(path: str) -> pa.Schema:
    return _arrow_table(path).schema if _is_arrow(path) else pq.read_schema(path)


def _batches(path: str, columns: list[str]) -> Iterable[pa.RecordBatch]:
    if _is_arrow(path):
        return _batches_of(_arrow_table(path).select(columns))
    return pq.ParquetFile(path).iter_batches(CHUNK, columns=columns)


def _batches_of(table: pa.Table) -> Iterable[pa.RecordBatch]:
    return table.to_batches(max_chunksize=CHUNK)


def _bytes_column(schema: pa.Schema, path: str) -> str | None:
    """The column with the files of the pictures; None if they are only named."""

    def has_bytes(type: pa.DataType) -> bool:
        is_file = pa.types.is_struct(type) and type.get_field_index("bytes") >= 0
        return is_file or pa.types.is_binary(type) or pa.types.is_large_binary(type)

    columns = [field.name for field in schema if has_bytes(field.type)]
    if len(columns) > 1 and "image" not in columns:
        raise UserError(f"{path} has bytes in several columns, {', '.join(columns)}: call that of the pictures image")
    return next((column for column in columns if column == "image" or len(columns) == 1), None)


def _read_row(path: str, row: int) -> bytes:
    """The file of a picture in a Parquet or Arrow file.

    A Parquet file is read by groups of rows, which takes a while for each picture that is not of the last groups.
    """
    try:
        if _is_arrow(path):
            column = _arrow_table(path)[_bytes_column(_schema(path), path)]
        else:
            ends = _group_ends(path)
            group = int(np.searchsorted(ends, row, side="right"))
            column = _row_group(path, group)
            row -= int(ends[group - 1]) if group else 0
        value = column[row].as_py()
    except (OSError, pa.ArrowException, LookupError) as error:
        raise PictureError(f"it cannot be read from its row: {error}") from None
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        raise PictureError(f"its row holds no bytes, only {value!r}")
    return data


@lru_cache(maxsize=64)
def _arrow_table(path: str) -> pa.Table:
    """Mapped into memory, not read."""
    return pa.ipc.open_stream(pa.memory_map(path)).read_all()


@lru_cache(maxsize=1024)
def _group_ends(path: str) -> np.ndarray:
    metadata = pq.read_metadata(path)
    return np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])


@lru_cache(maxsize=2)
def _row_group(path: str, group: int) -> pa.ChunkedArray:
    column = _bytes_column(pq.read_schema(path), path)
    return pq.ParquetFile(path).read_row_group(group, columns=[column])[column]


READERS = {"jsonl": _found_in_jsonl, "table": _found_in_table, "tar": _found_in_tar}


# ----------------------------------------------------------------------------------------------------------------------
# Small parts


def _in_threads(function: Callable, items: Iterable) -> Iterator:
    """Like map, but waits for the disk many times at once; no more than CHUNK items are held."""
    items = iter(items)
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(items, CHUNK)):
            yield from pool.map(function, chunk)


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except pa.ArrowException as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def _text(path: str) -> str:
    with _reading(path), open(path, "rb") as file:
        return _decoded(file.read(), path)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text") from None


def _json(text: str, where: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a JSON object")
    return value


def _captions(source: Source, record: dict, where: str) -> list[str]:
    captions = []
    for field in source.caption_fields:
        value = record.get(field)
        texts = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{field} in {where} must be a text or a list of texts")
        captions += texts
    return captions


def _distinct(captions: list[str]) -> list[str]:
    """Without spaces around them, without empty ones, each once."""
    return [text for text in dict.fromkeys(caption.strip() for caption in captions) if text]


def _weight(record: dict, where: str) -> float:
    weight = record.get("weight")
    if weight is None:
        return 1.0
    if not _is_weight(weight):
        raise UserError(f"weight in {where} must be a number of at least 0, not {weight!r}")
    return float(weight)


def _is_weight(weight: object) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight <= sys.float_info.max
