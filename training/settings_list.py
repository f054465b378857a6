"""``--list-settings``: every setting, what it may be, its default, and what it does."""

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from inspect import cleandoc
from pathlib import Path
from typing import Any

from .ranges import allowed, bare, entry_of, fields_of, is_list, is_optional, shown

WIDTH = 100


@cache
def explanations(kind: type) -> dict[str, str]:
    """What each setting of a dataclass does, from the ``Attributes`` of its docstring and of those it inherits from."""
    found = {}
    for one in reversed(kind.__mro__):
        _, _, attributes = cleandoc(one.__doc__ or "").partition("Attributes:\n")
        section = re.match(r"(?:    .*\n?|\n)*", attributes)  # up to the next heading
        assert section is not None  # it matches nothing, too
        for names, text in re.findall(r"^    ([\w, ]+): (.+(?:\n {5,}.+)*)", section[0], re.MULTILINE):
            words = " ".join(text.replace("``", "").split())
            found |= dict.fromkeys(names.split(", "), words[:1].upper() + words[1:])
    return {name: found[name] for name in fields_of(kind) if name in found}


def list_settings(kind: type, settings: Any = None, *, place: str = "") -> Iterator[str]:
    """The lines of ``--list-settings``.

    Args:
        kind: dataclass of the settings.
        settings: settings of a run, whose values are printed too.
        place: prefix of the names.
    """
    heading = cleandoc(kind.__doc__ or "").splitlines()[0]
    yield f"[{place.removesuffix('.')}]  {heading}" if place else heading
    yield ""
    tables = []
    for field, (name, hint) in zip(dataclasses.fields(kind), fields_of(kind).items(), strict=True):
        value = getattr(settings, name, None)
        if is_list(hint) and dataclasses.is_dataclass(bare(entry_of(hint, 0))):
            tables += _entries(place + name, bare(entry_of(hint, 0)), value)
        elif dataclasses.is_dataclass(bare(hint)):
            tables.append((f"{place}{name}.", bare(hint), value))
            if not is_optional(hint):
                continue
        facts = [allowed(hint), _default(field)]
        if settings is not None:
            facts.append(f"now {_written(value)}")
        yield f"{place}{name}  ({'; '.join(facts)})"
        yield from textwrap.wrap(
            explanations(kind).get(name, ""), WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4
        )
    for name, table, value in tables:
        yield ""
        yield from list_settings(table, value, place=name)


def _entries(name: str, kind: type, value: Any) -> list[tuple[str, type, Any]]:
    """A table for each entry of a list; one where nothing is known of a run."""
    if value is None:
        return [(f"{name}.0.", kind, None)]
    return [(f"{name}.{number}.", kind, one) for number, one in enumerate(value)]


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"default {_written(value)}"


def _written(value: Any) -> str:
    """A value as TOML has it."""
    if dataclasses.is_dataclass(value):
        return "a table"
    if isinstance(value, tuple):
        count = f"{len(value)} {'table' if len(value) == 1 else 'tables'}"
        return count if value and dataclasses.is_dataclass(value[0]) else shown(value)
    return shown(value.as_posix() if isinstance(value, Path) else value)
