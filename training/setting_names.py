"""The names of settings, and what to say to one that does not exist."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import UserError
from .ranges import bare, entry_of, fields_of, is_list


def all_names(kind: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The place and the type hint of every setting in a tree, tables included; entry 0 of a list stands for all."""
    for name, hint in fields_of(kind).items():
        yield (*place, name), hint
        inner, below = bare(hint), (*place, name)
        if is_list(hint):
            inner, below = bare(entry_of(hint, 0)), (*place, name, "0")
        if dataclasses.is_dataclass(inner):
            yield from all_names(inner, below)


def unknown_names(
    kind: Any, content: Any, place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, list[str]]]:
    """Names in nested tables that are not settings: the place of each, the name, and the names that exist there."""
    kind = bare(kind)
    if is_list(kind) and isinstance(content, list):
        for number, item in enumerate(content):
            yield from unknown_names(entry_of(kind, number), item, (*place, str(number)))
    elif dataclasses.is_dataclass(kind) and isinstance(content, dict):
        fields = fields_of(kind)
        for name, value in content.items():
            if name not in fields:
                yield place, name, list(fields)
            else:
                yield from unknown_names(fields[name], value, (*place, name))


def unknown_setting(
    kind: type, place: Sequence[str], name: str, known: list[str], found: str, prefix: str = ""
) -> UserError:
    """The error for a name that does not exist, with the nearest one that does.

    Args:
        kind: dataclass of the settings.
        place: place of the table that has the name.
        name: name as it is written there.
        known: the settings of that table.
        found: the first words, such as "settings.toml has stepz".
        prefix: prefix of names in the suggestion, such as "--".
    """
    if near := difflib.get_close_matches(name, known, 1):
        return UserError(f"{found}, which does not exist: did you mean {prefix}{_written((*place, near[0]), prefix)}?")
    # a setting of another table
    elsewhere = {path[-1]: path for path, _ in reversed(list(all_names(kind)))}
    if near := difflib.get_close_matches(name, elsewhere, 1, cutoff=0.8):
        return UserError(f"{found}, which does not exist: did you mean {prefix}{_written(elsewhere[near[0]], prefix)}?")
    if known:
        return UserError(f"{found}, which does not exist: choose from {', '.join(known)}")
    return UserError(f"{found}, which does not exist: --list-settings prints every setting")


def _written(place: Sequence[str], prefix: str) -> str:
    name = ".".join(place)
    return name.replace("_", "-") if prefix else name
