"""The schema of a node, for every ComfyUI that the pack supports."""

import dataclasses
from collections.abc import Sequence

from comfy_api.latest import io


def schema(*, search_aliases: list[str], **fields) -> io.Schema:
    """``io.Schema``, without what a core from before it existed does not know (0.3.64)."""
    # has_intermediate_output: what a node shows comes back in a page that is opened anew, though its result is cached
    newer = {"search_aliases": search_aliases, "has_intermediate_output": True}
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**fields, **{name: value for name, value in newer.items() if name in known})


def used_for(*, unless: str | None = None, **choices: Sequence[str]) -> dict:
    """``extra_dict`` of an input that does nothing otherwise: the page hides its widget (web/ztsnr.js).

    Args:
        unless: name of an input that, when connected, takes its place.
        choices: name of a list of the node -> what has to be chosen there.
    """
    rule = {"used_for": {name: list(values) for name, values in choices.items()}}
    return rule if unless is None else rule | {"unused_with": unless}
