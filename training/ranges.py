"""Which values a setting may have, and the words for them in errors and in ``--list-settings``.

A range stands beside its field: ``steps: Annotated[int, Range(1)]``.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import UserError

# (one, several)
WORDS = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
}
LONGEST = 60  # characters of a value in an error


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have.  NaN is never among them.

    Attributes:
        low: smallest value.
        high: largest value.
        above: lower bound that is excluded itself.
        below: upper bound that is excluded itself.
        infinite: True if infinity is allowed.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False

    def __contains__(self, number: float) -> bool:
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            return False
        return (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self):
        if self.low is not None and self.high is not None:
            return f"from {self.low:g} to {self.high:g}"
        if self.above is not None and self.below is not None:
            return f"between {self.above:g} and {self.below:g}"
        bounds = (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        words = " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)
        return f"of {words}" if words.startswith("at") else words


# ----------------------------------------------------------------------------------------------------------------------
# Type hints


def fields_of(kind: Any) -> dict[str, Any]:
    """The settings of a dataclass and their type hints, with the ranges."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def is_optional(hint: Any) -> bool:
    """True if a setting may be None."""
    return types.NoneType in typing.get_args(hint)


def bare(hint: Any) -> Any:
    """A type hint without None and without ranges."""
    if is_optional(hint):
        (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def is_list(hint: Any) -> bool:
    """True if a setting is a list."""
    return typing.get_origin(bare(hint)) is tuple


def entry_of(hint: Any, number: int) -> Any:
    """The type hint of an entry of a list."""
    arguments = typing.get_args(bare(hint))
    return arguments[0] if arguments[-1] is Ellipsis else arguments[min(number, len(arguments) - 1)]


def expanded(hint: Any, content: Any) -> Any:
    """The content of settings, copied, with each plain value replaced by the table that it stands for."""
    kind = bare(hint)
    if is_list(kind) and isinstance(content, list):
        return [expanded(entry_of(kind, number), item) for number, item in enumerate(content)]
    if dataclasses.is_dataclass(kind):
        plain = getattr(kind, "plain", None)
        if plain is not None and isinstance(content, str):
            return {plain: content}
        if isinstance(content, dict):
            fields = fields_of(kind)
            return {name: expanded(fields[name], one) if name in fields else one for name, one in content.items()}
    return content


# ----------------------------------------------------------------------------------------------------------------------
# Words and checks


def allowed(hint: Any, several: bool = False) -> str:
    """What a type hint allows, in words such as "a whole number of at least 1"."""
    if is_optional(hint):
        (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
    kind = bare(hint)
    if ranges := _ranges(hint):
        return " ".join([allowed(kind, several), *map(str, ranges)])
    if typing.get_origin(kind) is Literal:
        *others, last = map(json.dumps, typing.get_args(kind))
        return f"{', '.join(others)} or {last}"
    if is_list(kind):
        count = "" if typing.get_args(kind)[-1] is Ellipsis else f"{len(typing.get_args(kind))} "
        return f"a list of {count}{allowed(entry_of(kind, 0), several=True)}"
    if dataclasses.is_dataclass(kind):
        table = "tables" if several else "a table"
        plain = getattr(kind, "plain", None)  # a value of this setting alone stands for the table
        return f"{allowed(fields_of(kind)[plain], several)} or {table}" if plain else table
    return WORDS[kind][several]


def shown(value: Any) -> str:
    """A value as TOML has it, cut if it is long."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(shown, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{name} = {shown(one)}' for name, one in value.items())}}}"
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def refusal(name: str, hint: Any, value: Any) -> UserError:
    """The error for a value that a setting may not have."""
    return UserError(f"{name} must be {allowed(hint)}, not {shown(value)}")


def check_values(settings: Any) -> None:
    """Check every number and every choice in a tree of settings, whose types are taken to be right.

    Raises:
        UserError: The first value that its setting may not have, by its full name.
    """
    for name, hint in fields_of(type(settings)).items():
        _check(getattr(settings, name), hint, name)


def _check(value: Any, hint: Any, name: str) -> None:
    if value is None:
        return
    if is_list(hint):
        for number, item in enumerate(value):
            _check(item, entry_of(hint, number), f"{name}.{number}")
    elif dataclasses.is_dataclass(value):
        for child, child_hint in fields_of(type(value)).items():
            _check(getattr(value, child), child_hint, f"{name}.{child}")
    elif any(value not in one for one in _ranges(hint)) or not _is_choice(value, bare(hint)):
        raise refusal(name, hint, value)


def _ranges(hint: Any) -> list[Range]:
    if is_optional(hint):
        (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
    return [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Range)]


def _is_choice(value: Any, kind: Any) -> bool:
    return typing.get_origin(kind) is not Literal or value in typing.get_args(kind)
