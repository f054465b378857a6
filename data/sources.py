"""Where pictures and captions come from, and the index that they are gathered in.

A source is one of these:

- a folder: all pictures in it and below, with captions in NAME.txt, NAME.caption and NAME.json beside them, or else in
  the ``metadata.jsonl`` of their folder; names that begin with a dot, and the masks NAME-masklabel.png of OneTrainer,
  are skipped.  A folder without pictures is read for its tars, or else for its Parquet files.
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
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ..errors import UserError
from ..files import special_kind
from .arrow_file import pc
from .picture_index import SCHEMA, PictureIndex, split
from .pictures import SUFFIXES, PictureError
from .records import (
    CAPTION_FIELDS,
    CAPTION_SUFFIXES,
    CHUNK,
    PICTURE_FIELDS,
    Found,
    Source,
    TextError,
    captions_of,
    distinct,
    found_in_list,
    is_weight,
    key_of,
    parse_json,
    parse_source,
    read_text,
    reading,
    weight_of,
)
from .tables import found_in_table, saved_tables
from .tars import found_in_tar

__all__ = ["CAPTION_FIELDS", "CHUNK", "SCHEMA", "PictureIndex", "Source", "build_index", "parse_source", "split"]

METADATA = "metadata.jsonl"  # of Hugging Face's imagefolder
MASK = "-masklabel"  # what OneTrainer adds to a picture's name for its mask
READERS = {"jsonl": found_in_list, "table": found_in_table, "tar": found_in_tar}


def build_index(sources: Sequence[Source], *, allow_missing_captions: bool = False) -> tuple[PictureIndex, pa.Table]:
    """Gather the pictures of all sources, in their order, and read the size of each from its header.

    Args:
        sources: sources of the pictures.
        allow_missing_captions: give pictures without a caption an empty one, instead of refusing them.

    Returns:
        The index, and a table (key, path, reason) of the pictures that cannot be used.

    Raises:
        UserError: a source has no pictures or cannot be read; a picture has no caption, or occurs twice; a list names
            pictures outside of its folder; or no picture can be used.
    """
    if not sources:
        raise UserError("no picture source was given: give at least one")
    troubles: dict[str, str] = {}
    tables = [_listed(source, allow_missing_captions, troubles) for source in sources]
    table = pa.concat_tables(tables)
    _check_captions(table)
    _check_keys(table)

    sizes, reasons = _measured(PictureIndex(table), troubles)
    for side, values in zip(("width", "height"), sizes.T, strict=True):
        table = table.set_column(SCHEMA.get_field_index(side), side, pa.array(values, pa.int32()))
    refused = table.select(["key", "path"]).take(pa.array(list(reasons), pa.int64()))
    refused = refused.append_column("reason", pa.array(list(reasons.values()), pa.string()))
    if len(refused) == len(table):
        raise UserError(
            f"none of the {len(table)} pictures can be used; {refused['key'][0]}, for example: {refused['reason'][0]}"
        )
    if reasons:
        table = table.filter(pa.array(sizes[:, 0] > 0))
    return PictureIndex(table), refused


def _check_captions(table: pa.Table) -> None:
    missing = table.filter(pc.equal(pc.list_value_length(table["captions"]), 0))["key"]
    if len(missing):
        names = ", ".join(missing[:3].to_pylist())
        raise UserError(
            f"{len(missing)} of {len(table)} pictures have no caption, the first are {names}: add captions (in "
            "NAME.txt, NAME.caption or NAME.json beside NAME.png, or in a metadata.jsonl with file_name and text), or "
            "set allow_missing_captions"
        )


def _check_keys(table: pa.Table) -> None:
    if pc.count_distinct(table["key"]).as_py() == len(table):
        return
    counts = pc.value_counts(table["key"])
    key = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()]
    raise UserError(f"{key} occurs twice: list each picture once, and give each source its own name")


def _measured(index: PictureIndex, troubles: Mapping[str, str]) -> tuple[np.ndarray, dict[int, str]]:
    """(N, 2) width and height of each picture; and, for those whose size is 0 x 0, why it cannot be used.

    Args:
        troubles: reasons that are known already, by the picture's key.
    """
    sizes, reasons = np.zeros((len(index), 2), np.int32), {}

    def measure(i: int) -> tuple[int, int] | str:
        if troubles and (trouble := troubles.get(index.key(i))):
            return trouble
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


def _listed(source: Source, allow_missing_captions: bool, troubles: dict[str, str]) -> pa.Table:
    """The pictures of a source as a table of SCHEMA, whose sizes are still 0; adds to ``troubles``, key -> reason."""
    if not is_weight(source.weight):
        raise UserError(f"the weight of {source.path} must be a number of at least 0, not {source.weight!r}")
    batches = []
    found = iter(tqdm(_found(source), f"listing {source.path}", unit=" pictures", disable=None))
    while chunk := list(islice(found, CHUNK)):
        keys, paths, captions, weights, offsets, lengths, rows, reasons = map(list, zip(*chunk, strict=True))
        troubles.update({key: reason for key, reason in zip(keys, reasons, strict=True) if reason})
        captions = [
            texts or [""] if allow_missing_captions or reason else texts
            for texts, reason in zip(captions, reasons, strict=True)
        ]
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


def _found(source: Source) -> Iterator[Found]:
    path = os.path.abspath(source.path)
    name = source.name or os.path.basename(path)
    if os.path.isdir(path):
        return _found_in_folder(source, path, name)
    if not os.path.exists(path):
        raise UserError(f"there is no folder or file {path}")
    if kind := special_kind(path):
        raise UserError(f"{path} is a {kind} and not a picture source: give a folder or a file")
    if (kind := _kind(path)) not in READERS:
        raise UserError(f"{path} is not a picture source: give a folder, or a .jsonl, .parquet or .tar file")
    return READERS[kind](source, path, name)


def _kind(path: str) -> str | None:
    name = os.path.basename(path).lower()
    stem, suffix = os.path.splitext(name)
    if suffix in SUFFIXES:
        return None if stem.endswith(MASK) else "picture"
    if name.endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        return "tar"
    return {".jsonl": "jsonl", ".parquet": "table"}.get(suffix)


def _found_in_folder(source: Source, folder: str, name: str) -> Iterator[Found]:
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        raise UserError(f"{folder} holds a dataset with several splits: give the folder of one of them")
    if all(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_info.json")):
        kind, paths = "table", saved_tables(folder)
    else:
        kinds = {_kind(path) for path in _walk(folder)}
        if {"picture", "tar"} <= kinds:
            raise UserError(
                f"{folder} holds both pictures and tars: put them into two folders, and give each as a source"
            )
        kind = next((kind for kind in ("picture", "tar", "table") if kind in kinds), None)
        paths = (path for path in _walk(folder) if _kind(path) == kind)
    if kind == "picture":
        metadata = (path for path in _walk(folder) if os.path.basename(path) == METADATA)
        listed = dict(item for path in metadata for item in _captions_in_list(source, path))
        yield from _in_threads(lambda path: _found_beside(source, path, key_of(name, path, folder), listed), paths)
    elif kind:
        for path in paths:
            yield from READERS[kind](source, path, key_of(name, path, folder))


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files in a folder and below, sorted by name.  Follows links, but not back into a folder on the way."""
    place = os.path.realpath(folder)
    if place in above:
        return
    with reading(folder), os.scandir(folder) as entries:
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


def _captions_in_list(source: Source, path: str) -> Iterator[tuple[str, tuple[list[str], float]]]:
    """Path of a picture -> its captions and weight, from the metadata.jsonl of a folder of pictures."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"line {number} of {path}"
        record = parse_json(line, where) if line.strip() else {}
        if named := next((record[field] for field in PICTURE_FIELDS if isinstance(record.get(field), str)), None):
            picture = os.path.normpath(os.path.join(os.path.dirname(path), named))
            yield picture, (captions_of(source, record, where), weight_of(record, where))


def _found_beside(source: Source, path: str, key: str, listed: Mapping[str, tuple[list[str], float]]) -> Found:
    """A picture with the captions beside it; or, if there are none, with those that a list in its folder gives it."""
    stem, captions, weight = os.path.splitext(path)[0], [], None
    try:
        texts = (stem + suffix for known in CAPTION_SUFFIXES for suffix in (known, known.upper()))
        captions += [read_text(text) for text in texts if os.path.exists(text)]
        if os.path.exists(stem + ".json"):
            record = parse_json(read_text(stem + ".json"), stem + ".json")
            captions += captions_of(source, record, stem + ".json")
            weight = weight_of(record, stem + ".json")
    except TextError as error:
        return Found(key, path, [], trouble=str(error))
    if not captions and weight is None:
        captions, weight = listed.get(path, ([], 1.0))
    return Found(key, path, distinct(captions), 1.0 if weight is None else weight)


def _in_threads(function: Callable, items: Iterable) -> Iterator:
    """Like map, but with many reads of the disk at once; holds at most CHUNK items."""
    items = iter(items)
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(items, CHUNK)):
            yield from pool.map(function, chunk)
