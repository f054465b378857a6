"""Read settings that come with a model from strangers, and bound their length and the sizes that they ask for.

A config.json with ``layers_per_block: 200000`` has a few bytes, and building a class from it takes minutes, after which
its weights are found missing.  So the numbers are checked first.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError

LONGEST_SETTINGS = 1_000_000  # bytes
MOST_LAYERS = 256  # SDXL's U-Net has 60 by this count, its second text encoder 32
LARGEST_SIZE = 1 << 13  # SDXL's largest is 5120
LARGEST_VOCABULARY = 1 << 20  # CLIP's is 49408, and that of many languages 250002

_IN_WORDS = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}
# layers in a network are the product of these: the number itself, or how long its list is
_DEPTHS = (
    ("num_hidden_layers",),
    ("layers_per_block",),
    ("transformer_layers_per_block", "reverse_transformer_layers_per_block"),
)
_BLOCKS = ("down_block_types", "up_block_types", "block_out_channels")


def read_settings(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file of settings; empty if there is no such file.

    Args:
        what: whose settings these are, for the error: "a scheduler's", ...

    Raises:
        UserError: the file is not such an object, or is too long.
    """
    try:
        if not path.is_file():
            return {}
        with path.open("rb") as file:
            text = file.read(LONGEST_SETTINGS + 1)
        config = json.loads(text.decode("utf-8")) if len(text) <= LONGEST_SETTINGS else None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not {what} settings")
    return config


def check_sizes(path: Path, config: dict[str, Any], names: Collection[str] | None = None) -> None:
    """Refuse settings that ask for more than any model of these kinds has.

    Args:
        path: of the settings, for the error.
        names: of the settings that the class reads; others may say anything, as a trainer's step count may.  None for
            all of them.

    Raises:
        UserError: a setting is too large; the message names it and the limit.
    """
    read = config if names is None else {name: value for name, value in config.items() if name in names}
    for name, value in read.items():
        limit = LARGEST_VOCABULARY if name in _IN_WORDS else LARGEST_SIZE
        if (largest := max(map(abs, _whole_numbers(value)), default=0)) > limit:
            raise UserError(f"{path} asks for {name} = {_brief(largest)}, but at most {limit} is allowed")
    layers = max(len(read[name]) if isinstance(read.get(name), list) else 1 for name in _BLOCKS)
    for depth in _DEPTHS:
        layers *= max((number for name in depth for number in _whole_numbers(read.get(name))), default=1)
    if layers > MOST_LAYERS:
        raise UserError(f"{path} asks for {layers} layers, but at most {MOST_LAYERS} are allowed")


def _whole_numbers(value: Any) -> Iterator[int]:
    """The integers in a setting, which may be nested lists of any depth."""
    open_values = [value]
    while open_values:
        value = open_values.pop()
        if isinstance(value, list):
            open_values += value
        elif type(value) is int:
            yield value


def _brief(number: int) -> str:
    return str(number) if number < 10**12 else "a number of more than 12 digits"
