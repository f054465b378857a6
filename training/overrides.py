"""Settings of the command line, such as ``--optimizer.learning-rate 1e-6``, put into the content of a settings file.

Nothing is checked here but names: the values are checked where those of the file are.
"""

import dataclasses
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any, cast

from ..errors import UserError
from .ranges import allowed, bare, entry_of, expanded, fields_of, is_list, is_optional
from .setting_names import unknown_setting

TRUTH = {"true": True, "false": False}


def override(kind: type, content: dict[str, Any], arguments: Sequence[str]) -> None:
    """Put arguments into nested tables.

    A list takes several values, as in ``--watch.prompts "a cat" "a dog"``, or one in TOML, as in ``--stages '[{}]'``.
    ``none`` removes an optional setting.  A missing table is added with its defaults.

    Args:
        kind: dataclass of the settings.
        content: content of the settings file; changed in place.
        arguments: arguments of the command line.

    Raises:
        UserError: An unknown setting, a setting without a value, or an entry that a list does not have.
    """
    for option, values in _options(arguments):
        *outer, last = option.removeprefix("--").replace("-", "_").split(".")
        table, hint, place = content, kind, []
        for key in outer:
            outside, hint = hint, _hint_of(kind, hint, place, key, option)
            if isinstance(table, dict) and table.get(key) is None:
                table[key] = _default(outside, key) if is_list(hint) else {}
            place.append(key)
            table = table[_index(table, key, place[:-1], option)]
            is_table = dataclasses.is_dataclass(bare(hint))
            if (is_table and not isinstance(table, dict)) or (is_list(hint) and not isinstance(table, list)):
                raise UserError(f"{option}: {'.'.join(place)} must be {allowed(hint)}")
        hint = _hint_of(kind, hint, place, last, option)
        table[_index(table, last, place, option)] = expanded(hint, _value(hint, values, option))


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each ``--name`` and the values behind it; ``--name=value`` is one of each."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(argument)
        else:
            raise UserError(f"{argument} does not belong to a setting: write --NAME VALUE")
    yield from found


def _hint_of(kind: type, hint: Any, place: list[str], key: str, option: str) -> Any:
    """The type hint of what ``key`` names within ``hint``."""
    inner = bare(hint)
    if is_list(inner) and key.isdecimal():
        return entry_of(inner, int(key))
    fields = fields_of(inner) if dataclasses.is_dataclass(inner) else {}
    if key not in fields:
        raise unknown_setting(kind, place, key, list(fields), f"the command line has {option}", prefix="--")
    return fields[key]


def _default(kind: Any, name: str) -> list:
    """The default entries of a list in a dataclass."""
    (field,) = (one for one in dataclasses.fields(bare(kind)) if one.name == name)
    found = () if field.default is dataclasses.MISSING else field.default or ()
    return [dataclasses.asdict(cast(Any, one)) if dataclasses.is_dataclass(one) else one for one in found]


def _index(table: dict | list, key: str, place: list[str], option: str) -> Any:
    """``key`` as a key of a table or as an index of a list."""
    if isinstance(table, dict):
        return key
    if int(key) >= len(table):
        entries = f"{len(table)} {'entry' if len(table) == 1 else 'entries'}"
        name = ".".join(place)
        raise UserError(f"{option}: {name} has {entries}, numbered from 0; --{name} sets the whole list")
    return int(key)


def _value(hint: Any, values: list[str], option: str) -> Any:
    """The values as TOML would parse them."""
    if is_optional(hint) and [text.lower() for text in values] == ["none"]:
        return None
    if is_list(hint):
        if len(values) == 1 and values[0].startswith("["):
            return _toml(values[0], option)
        return [_plain_value(entry_of(hint, number), text, option) for number, text in enumerate(values)]
    if len(values) != 1:
        wrong = "needs a value" if not values else f"takes one value, not {len(values)}"
        raise UserError(f"{option} {wrong}: {allowed(hint)}")
    return _plain_value(hint, values[0], option)


def _plain_value(hint: Any, text: str, option: str) -> Any:
    """A text that its setting does not take stays a text, and is refused with the settings."""
    kind = bare(hint)
    if kind is bool:
        return TRUTH.get(text.lower(), text)
    if kind in (int, float):
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
    if dataclasses.is_dataclass(kind) and text.startswith("{"):
        return _toml(text, option)
    return text


def _toml(text: str, option: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{option}: {text} is not valid TOML: {error}") from None
