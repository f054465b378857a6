"""Files from the Hugging Face Hub, or from its local cache where the Hub does not answer."""

import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from huggingface_hub import errors, model_info

from ..errors import UserError, first_line

HUB_TIMEOUT = 10  # seconds
# All the client's own errors, which include those of its HTTP library; ValueError for an answer that is not JSON;
# RuntimeError from the downloader of the Hub's new storage.
HUB_ERRORS = (
    *(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    OSError,
    ValueError,
    RuntimeError,
)

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_name(name: str) -> bool:
    """True for a name of the form owner/model."""
    return _HUB_NAME.fullmatch(name) is not None


def from_hub(fetch: Callable[..., str | PathLike], name: str, way_out: str, **options) -> Path:
    """What ``fetch(name, **options)`` downloads, from the cache alone if the Hub does not answer.

    Args:
        fetch: one of the client's functions, which returns a path and takes ``local_files_only``.
        way_out: end of the error message, which says what the user can do instead.

    Raises:
        UserError: neither the Hub nor the cache has it.
    """
    # One short question first.  Without an answer the client itself would retry for minutes, even for cached files.
    trouble = None
    try:
        model_info(name, timeout=HUB_TIMEOUT)
    except HUB_ERRORS as error:
        trouble = error
    try:
        return Path(fetch(name, local_files_only=trouble is not None, **options))
    except HUB_ERRORS as error:
        reason = first_line(trouble or error.__cause__ or error)
        raise UserError(f"could not download {name} from the Hugging Face Hub ({reason}): {way_out}") from error
