"""Pictures in the rows of Parquet files, and of the Arrow files that ``datasets`` writes."""

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from .pictures import PictureError
from .records import (
    CHUNK,
    PICTURE_FIELDS,
    Found,
    Source,
    captions_of,
    distinct,
    found_by_name,
    parse_json,
    read_text,
    reading,
    weight_of,
)


def found_in_table(source: Source, path: str, name: str) -> Iterator[Found]:
    """The rows of a Parquet file, or of an Arrow file of ``datasets``."""
    with reading(path):
        schema = _schema(path)
        has_bytes = _bytes_column(schema, path) is not None
        wanted = (*source.caption_fields, "weight", *(() if has_bytes else PICTURE_FIELDS))
        columns = [column for column in dict.fromkeys(wanted) if column in schema.names]
        number = 0
        for batch in _batches(path, columns):
            for record in batch.to_pylist() if columns else [{}] * batch.num_rows:
                where = f"row {number} of {path}"
                if has_bytes:
                    captions, weight = distinct(captions_of(source, record, where)), weight_of(record, where)
                    yield Found(f"{name}/{number}", path, captions, weight, row=number)
                else:
                    yield found_by_name(source, path, name, record, where)
                number += 1


def saved_tables(folder: str) -> list[str]:
    """The Arrow files of a folder that ``datasets`` wrote, in the order of their rows."""
    path = os.path.join(folder, "state.json")
    state = parse_json(read_text(path), path)
    try:
        return [os.path.join(folder, os.path.basename(file["filename"])) for file in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{path} was not written by save_to_disk of datasets: it lists no _data_files") from None


def _is_arrow(path: str) -> bool:
    return path.endswith(".arrow")


def _schema(path: str) -> pa.Schema:
    return _arrow_table(path).schema if _is_arrow(path) else pq.read_schema(path)


def _batches(path: str, columns: list[str]) -> Iterable[pa.RecordBatch]:
    if _is_arrow(path):
        return batches_of(_arrow_table(path).select(columns))
    return pq.ParquetFile(path).iter_batches(CHUNK, columns=columns)


def batches_of(table: pa.Table) -> Iterable[pa.RecordBatch]:
    """The rows of a table, at most CHUNK at a time."""
    return table.to_batches(max_chunksize=CHUNK)


def _bytes_column(schema: pa.Schema, path: str) -> str | None:
    """The column that holds the pictures' files; None if the rows only name them."""

    def has_bytes(type: pa.DataType) -> bool:
        is_file = pa.types.is_struct(type) and type.get_field_index("bytes") >= 0
        return is_file or pa.types.is_binary(type) or pa.types.is_large_binary(type)

    columns = [field.name for field in schema if has_bytes(field.type)]
    if len(columns) > 1 and "image" not in columns:
        raise UserError(
            f"{path} has several columns of bytes, {', '.join(columns)}: rename the one with the pictures to image"
        )
    return next((column for column in columns if column == "image" or len(columns) == 1), None)


def read_row(path: str, row: int) -> bytes:
    """The file of a picture in a Parquet or Arrow file.

    A Parquet file is read one row group at a time, so a picture outside of the last groups takes a while.

    Raises:
        PictureError: it cannot be read.
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
