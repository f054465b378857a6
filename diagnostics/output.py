"""Writing results into a folder of the user's: all of a file or nothing, and one sentence where it cannot be."""

import io
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..extras import how_to_install

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class UserError(ValueError):
    """Something the user can mend, in one sentence."""


def prepare_folder(folder: Path) -> None:
    """Make the output folder and see that files can be written there, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from None


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file or none: a neighbour is written first and then takes the name.

    Raises:
        UserError: it cannot be written; what was there before is still there.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise _cannot_write(path.parent, error) from None


def png(figure: "Figure") -> bytes:
    """A matplotlib figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def no_matplotlib() -> str | None:
    """What to tell where there is no matplotlib, or None where there is."""
    if find_spec("matplotlib") is None:
        return f"No pictures without matplotlib: {how_to_install('matplotlib')}."
    return None


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(f"Cannot write into {folder} ({error.strerror}); choose another folder with --out.")
