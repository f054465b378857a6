"""Pictures in webdataset tars, which are read from their place in the file."""

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from ..errors import UserError
from .pictures import SUFFIXES, PictureError, check_plain
from .records import (
    CAPTION_SUFFIXES,
    Found,
    Source,
    TextError,
    captions_of,
    decode,
    distinct,
    parse_json,
    reading,
    weight_of,
)


def found_in_tar(source: Source, path: str, name: str) -> Iterator[Found]:
    """The pictures in a tar.  Captions may come after their picture, so the whole tar is listed first."""
    pictures: list[tuple[str, tarfile.TarInfo]] = []
    captions: dict[str, list[str]] = {}
    weights: dict[str, float] = {}
    troubles: dict[str, str] = {}
    with reading(path), open(path, "rb") as file, _tar(file, path) as tar:
        for member in tar:
            parts = re.fullmatch(r"((?:.*/)?[^./]+)(\.[^/]*)|.*", member.name, re.DOTALL)
            assert parts is not None  # it matches every name
            sample, suffix = parts.groups()
            suffix = (suffix or "").lower()
            if suffix in SUFFIXES:
                if not member.isreg() or member.issparse():
                    raise UserError(f"{member.name} in {path} is a link or a sparse file: store it as a plain file")
                pictures.append((sample, member))
            elif suffix in (*CAPTION_SUFFIXES, ".json") and member.isreg():
                where = f"{member.name} in {path}"
                content = tar.extractfile(member)
                assert content is not None  # a regular file has one
                try:
                    text = decode(content.read(), where)
                except TextError as error:
                    troubles[sample] = str(error)
                    continue
                if suffix in CAPTION_SUFFIXES:
                    captions.setdefault(sample, []).append(text)
                else:
                    record = parse_json(text, where)
                    captions.setdefault(sample, []).extend(captions_of(source, record, where))
                    weights[sample] = weight_of(record, where)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # where tarfile stops silently
            raise UserError(f"{path} is cut short or damaged: it has no end-of-archive block; write it again")
    for sample, member in pictures:
        texts = distinct(captions.get(sample, []))
        key, weight = f"{name}/{member.name}", weights.get(sample, 1.0)
        trouble = troubles.get(sample)
        yield Found(key, path, texts, weight, offset=member.offset_data, length=member.size, trouble=trouble)


@contextmanager
def _tar(file: IO[bytes], path: str) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise UserError(
            f"{path} cannot be read as a tar ({error}); if it is compressed, decompress it first: pictures are "
            "read from their place in it"
        ) from None


def read_bytes(path: str, offset: int, length: int) -> bytes:
    """A part of a file, or all of it if length is -1.

    Raises:
        PictureError: it cannot be read.
    """
    try:
        check_plain(path)
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise PictureError(f"it cannot be read: {error.strerror or error}") from None
    if len(data) < length:
        raise PictureError("it is cut short: the tar that holds it has become shorter")
    return data
