"""Settings as a TOML file and the command line give them: a dataclass tree, checked before anything is done.

Names that do not exist are mistakes, and the nearest that do are suggested.
"""

import dataclasses
import difflib
import io
import json
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import tomli_w
import tyro

from ..errors import UserError

T = TypeVar("T")


def read_settings(kind: type[T], path: str | Path, overrides: Sequence[str] = (), program: str = "ztsnr") -> T:
    """Settings from a TOML file, and from arguments such as ``--optimizer.learning-rate 1e-6`` above it.

    Paths are as they are written: relative to where the program is started.

    Args:
        kind: of settings, a dataclass.
        path: of the file.
        overrides: arguments of the command line.
        program: its name, for the help that ``--help`` prints.

    Raises:
        UserError: a file that cannot be read or is no TOML; a name that does not exist, with the nearest that does; a
            value of another type or out of range.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # Notepad writes a BOM
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}") from None
    settings = parse_settings(kind, content, str(path))
    listed = "--help" in overrides
    named = [t for t in _optional_tables(kind) if listed or any(_is_of(t, argument) for argument in overrides)]
    for table in named:  # with its defaults, where the file has none
        reduce(lambda outer, name: outer.setdefault(name, {}), table, content)
    if named:
        settings = parse_settings(kind, content, str(path))
    return _override(kind, settings, overrides, program) if overrides else settings


def parse_settings(kind: type[T], content: dict[str, Any], where: str = "the configuration") -> T:
    """Settings from nested tables; for what is raised see ``read_settings``."""
    for place, name, known in _unknown(kind, content):
        near = difflib.get_close_matches(name, known, 1)
        hint = f": did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
        raise UserError(f"{where} has {'.'.join((*place, name))}, which does not exist{hint}")
    try:
        # strictly, so that "2" and true are no numbers; as JSON, where strictness allows lists for tuples and text for
        # paths, and dates, which only TOML has, are text
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(content, default=str), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise UserError(f"{where} lacks {place}") from None
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {place + ': ' if place else ''}{reason}") from None


def write_settings(settings: Any) -> bytes:
    """Settings as TOML, with all that was left to the defaults."""
    return tomli_w.dumps(settings_content(settings)).encode()


def settings_content(settings: Any) -> dict[str, Any]:
    """Settings as nested tables of what TOML and JSON can hold."""
    return pydantic.TypeAdapter(type(settings)).dump_python(settings, mode="json", exclude_none=True)


def changed_settings(before: dict[str, Any], now: dict[str, Any], place: str = "") -> Iterator[str]:
    """What differs between two contents of settings, a line each."""
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changed_settings(old, new, f"{place}{name}.")
        elif old != new:
            yield f"{place}{name} was {old}, and is {new} from here on"


def _optional_tables(kind: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where the tables are that may be missing, and then mean that there is no such thing."""
    for name, hint in typing.get_type_hints(kind).items():
        for choice in typing.get_args(hint) or (hint,):
            if dataclasses.is_dataclass(choice) and typing.get_origin(hint) is not tuple:
                if types.NoneType in typing.get_args(hint):
                    yield (*place, name)
                yield from _optional_tables(choice, (*place, name))


def _is_of(table: tuple[str, ...], argument: str) -> bool:
    """Whether an argument of the command line sets something in a table."""
    return argument.replace("_", "-").startswith(f"--{'.'.join(table)}.".replace("_", "-"))


def _override(kind: type[T], settings: T, overrides: Sequence[str], program: str) -> T:
    said = io.StringIO()
    # values as in the file: true and false are said, and a table is there or not
    shown = tyro.conf.AvoidSubcommands[tyro.conf.FlagConversionOff[kind]]
    try:
        with redirect_stderr(said), redirect_stdout(sys.stdout if "--help" in overrides else said):
            return tyro.cli(shown, default=settings, args=list(overrides), prog=program)
    except SystemExit as stop:
        if not stop.code:  # after --help
            raise
        _title, *parts = re.split("[─-]{5,}", said.getvalue())  # of the box that tyro draws
        parts = [" ".join(part.replace("│", " ").split()) for part in parts]
        wanted = (
            part for part in parts if part.strip("╭╮╰╯ ") and not part.startswith(("Available", "For full", "Arg"))
        )
        sentence = "; ".join(part.removeprefix("Error parsing ") for part in wanted).removeprefix(f"{kind.__name__}: ")
        if match := re.match(r"Unrecognized options: ([^\s,]+)(?:.*Perhaps you meant: (--[^\s,]+))?", sentence):
            near = f": did you mean {match[2]}?" if match[2] else ""
            sentence = f"the command line has {match[1]}, which does not exist{near}"
        raise UserError(sentence) from None


def _unknown(kind: Any, content: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, list[str]]]:
    """Names in nested tables that dataclasses do not have: where, which, and the names there are."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            if dataclasses.is_dataclass(choice):
                yield from _unknown(choice, content, place)
    elif origin is tuple and isinstance(content, list):
        for number, item in enumerate(content):
            yield from _unknown(arguments[0], item, (*place, str(number)))
    elif dataclasses.is_dataclass(kind) and isinstance(content, dict):
        hints = typing.get_type_hints(kind)
        names = [one.name for one in dataclasses.fields(kind)]
        for name, value in content.items():
            if name not in names:
                yield place, name, names
            else:
                yield from _unknown(hints[name], value, (*place, name))
