"""What a data set says about one picture: where it is, its captions, and how often it is seen."""

import codecs
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from ..errors import UserError
from ..files import special_kind

CAPTION_SUFFIXES = (".txt", ".caption")  # of files that are a caption and nothing else
CAPTION_FIELDS = ("caption", "captions", "text")
PICTURE_FIELDS = ("path", "file_name", "image")
CHUNK = 4096  # pictures that are Python objects at a time


@dataclass(frozen=True)
class Source:
    """Where pictures are; see ``sources`` for the kinds.

    Attributes:
        path: path of the folder or file.
        name: first part of its pictures' keys; by default the last part of the path.
        weight: number of times that an epoch has each of its pictures.
        caption_fields: members of a JSON object, or columns of a table, that hold captions.
        outside: True if a list may name pictures outside of its own folder.
    """

    path: str | Path
    name: str = ""
    weight: float = 1.0
    caption_fields: Sequence[str] = CAPTION_FIELDS
    outside: bool = False


def parse_source(text: str, *, outside: bool = False) -> Source:
    """The source of a PATH or NAME=PATH; a text that is an existing path is taken as a path."""
    name, equals, path = text.partition("=")
    if not equals or os.path.exists(text):
        return Source(text, outside=outside)
    return Source(path, name, outside=outside)


class TextError(UserError):
    """A text cannot be read; if it is one picture's caption, this picture cannot be used."""


class Found(NamedTuple):
    """A picture before its size is known."""

    key: str
    path: str
    captions: list[str]
    weight: float = 1.0
    offset: int = -1
    length: int = -1
    row: int = -1
    trouble: str | None = None  # why it cannot be used, known from its captions


def found_in_list(source: Source, path: str, name: str) -> Iterator[Found]:
    """The pictures that the lines of a .jsonl file name."""
    with reading(path):
        check_text_file(path)
    with reading(path), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            where = f"line {number} of {path}"
            if line.strip():
                yield found_by_name(source, path, name, parse_json(line, where), where)


def found_by_name(source: Source, listed_in: str, name: str, record: dict, where: str) -> Found:
    """The picture that a record names, relative to the file that lists it."""
    folder = os.path.dirname(listed_in)
    named = next((record[field] for field in PICTURE_FIELDS if isinstance(record.get(field), str)), None)
    if not named:
        raise UserError(f"{where} names no picture: put its path into {' or '.join(PICTURE_FIELDS)}")
    path = os.path.normpath(os.path.join(folder, named))
    if not source.outside and not _is_inside(path, folder):
        raise UserError(
            f"{where} names a picture outside of its folder, {named}: to allow it, use --outside, or set "
            "outside = true for this source"
        )
    return Found(
        key_of(name, path, folder), path, distinct(captions_of(source, record, where)), weight_of(record, where)
    )


def key_of(name: str, path: str, folder: str) -> str:
    """The key of a picture: its source's name and its place inside the source."""
    inside = os.path.relpath(path, folder) if _is_inside(path, folder) else path
    return f"{name}/{inside.replace(os.sep, '/')}"


def _is_inside(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Captions and weights


def captions_of(source: Source, record: dict, where: str) -> list[str]:
    """All captions in a record, in the order of ``Source.caption_fields``."""
    captions = []
    for field in source.caption_fields:
        value = record.get(field)
        texts = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{field} in {where} must be a text or a list of texts")
        captions += texts
    return captions


def distinct(captions: list[str]) -> list[str]:
    """The captions without surrounding spaces, empty ones and repetitions."""
    return [text for text in dict.fromkeys(caption.strip() for caption in captions) if text]


def weight_of(record: dict, where: str) -> float:
    """The ``weight`` of a record; 1 if it has none."""
    weight = record.get("weight")
    if weight is None:
        return 1.0
    if not is_weight(weight):
        raise UserError(f"weight in {where} must be a number of at least 0, not {weight!r}")
    return float(weight)


def is_weight(weight: object) -> bool:
    """True for a finite number of at least 0."""
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight <= sys.float_info.max


# ----------------------------------------------------------------------------------------------------------------------
# Reading text


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Raise a UserError with the path for what goes wrong while the block reads the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except pa.ArrowException as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def read_text(path: str) -> str:
    """The text of a file; see ``decode``."""
    with reading(path):
        check_text_file(path)
        with open(path, "rb") as file:
            return decode(file.read(), path)


def check_text_file(path: str) -> None:
    """Refuse a FIFO, socket or device, which may never end.  Raises TextError, or OSError if nothing is there."""
    if kind := special_kind(path):
        raise TextError(f"{path} is a {kind} and not a file: remove it")


def decode(data: bytes, where: str) -> str:
    """UTF-8 text, with or without a byte order mark; or UTF-16 with one, as Windows programs write it.

    Raises:
        TextError: it is neither.
    """
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise TextError(f"{where} is not UTF-8 text") from None


def parse_json(text: str, where: str) -> dict:
    """The JSON object in a text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a JSON object")
    return value
