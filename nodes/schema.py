"""The schema of a node, for every ComfyUI that the pack supports."""

import dataclasses

from comfy_api.latest import io


def schema(*, search_aliases: list[str], **fields) -> io.Schema:
    """``io.Schema``, without search_aliases on a core from before they existed (0.3.64)."""
    if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}:
        fields["search_aliases"] = search_aliases
    return io.Schema(**fields)
