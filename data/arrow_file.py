"""Opening the Arrow files that are written here: the index of the pictures and that of cached latents."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

WINDOWS = os.name == "nt"
pc: Any = pyarrow.compute  # Any: it makes most of its functions when it is imported, so type checkers do not know them


def open_arrow(path: str | Path) -> pa.Table:
    """The table in an Arrow IPC file, mapped into memory, so that all processes of a run share it.

    On Windows it is read instead: a file that is mapped there can be neither replaced nor removed, and the next run
    writes its index anew.

    Raises:
        OSError, pa.ArrowException: the file cannot be read, or is not an Arrow file.
    """
    if WINDOWS:
        return pa.ipc.open_file(pa.py_buffer(Path(path).read_bytes())).read_all()
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
