"""Settings from a TOML file and from the command line above it, as a tree of dataclasses, checked once.

pydantic checks the types; the sentences are made from the settings' own type hints (``ranges``).
"""

import codecs
import json
import operator
import tomllib
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import tomli_w

from ..errors import UserError
from .overrides import override
from .ranges import allowed, bare, entry_of, expanded, fields_of, refusal
from .setting_names import unknown_names, unknown_setting

T = TypeVar("T")


def read_settings(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Settings from a TOML file, and from arguments such as ``--optimizer.learning-rate 1e-6`` above it.

    Paths stay as written: relative to the folder in which the command runs.

    Args:
        kind: dataclass of the settings.
        path: path of the file.
        overrides: arguments of the command line, see ``override``.

    Raises:
        UserError: A file that cannot be read or is not TOML; an unknown setting; a value that a setting may not have.
    """
    content = expanded(kind, _read_toml(path))
    override(kind, content, overrides)
    return parse_settings(kind, content, str(path))


def parse_settings(kind: type[T], content: dict[str, Any], where: str = "the configuration") -> T:
    """Settings from nested tables; for what is raised see ``read_settings``."""
    content = expanded(kind, content)
    for place, name, known in unknown_names(kind, content):
        raise unknown_setting(kind, place, name, known, f"{where} has {'.'.join((*place, name))}")
    try:
        # Strict, so that "2" and true do not pass as numbers.  Through JSON, where strict validation accepts lists for
        # tuples and text for paths; dates, which only TOML has, become text.
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(content, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise _sentence(kind, content, error.errors()[0], where) from None


def write_settings(settings: Any) -> bytes:
    """Settings as TOML, defaults included."""
    return tomli_w.dumps(settings_content(settings)).encode()


def settings_content(settings: Any) -> dict[str, Any]:
    """Settings as nested tables of what TOML and JSON can hold."""
    return pydantic.TypeAdapter(type(settings)).dump_python(settings, mode="json", exclude_none=True)


def changed_settings(before: dict[str, Any], now: dict[str, Any], place: str = "") -> Iterator[str]:
    """The differences between two contents of settings, a line each."""
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changed_settings(old, new, f"{place}{name}.")
        elif old != new:
            yield f"{place}{name} was {old}, and is {new} from here on"


def _read_toml(path: str | Path) -> dict[str, Any]:
    try:
        data = Path(path).read_bytes()
        # Notepad writes a byte order mark; ">" in Windows PowerShell writes UTF-16
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return tomllib.loads(data.decode("utf-16" if wide else "utf-8-sig").replace("\r\n", "\n"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _sentence(kind: type, content: Any, error: Any, where: str) -> UserError:
    """The sentence for the first error that pydantic found."""
    if error["type"] == "value_error":  # raised by the settings' own __post_init__
        cause = error["ctx"]["error"]
        if not isinstance(cause, UserError):
            raise cause
        place = ".".join(map(str, error["loc"]))
        return UserError(f"{place}: {cause}" if place else str(cause))
    place, missing = list(error["loc"]), error["type"] == "missing"
    if missing and isinstance(place[-1], int):  # a list is too short
        place, missing = place[:-1], False
    hint = reduce(
        lambda hint, key: entry_of(hint, key) if isinstance(key, int) else fields_of(bare(hint))[key], place, kind
    )
    name = ".".join(map(str, place))
    if missing:
        return UserError(f"{where} lacks {name}: set it to {allowed(hint)}")
    return refusal(name, hint, reduce(operator.getitem, place, content))
