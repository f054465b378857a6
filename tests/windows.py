"""Windows' rules for files, simulated on Linux: a stand-in, because there is no Windows here.

What a process holds open or mapped can be neither removed nor renamed nor replaced, a name that is taken is not taken
over by ``os.rename``, folders cannot be opened, and there are no locks, owners or O_NOFOLLOW.
"""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from ztsnr import files as atomic
from ztsnr.data import arrow_file


def held_files() -> set[str]:
    """What this process and its children hold open or mapped."""
    found = set()
    for process in ["self", *(str(child.pid) for child in multiprocessing.active_children())]:
        place = Path("/proc", process)
        try:
            found |= {os.readlink(entry) for entry in (place / "fd").iterdir() if os.path.isfile(entry)}
            found |= {line.split(maxsplit=5)[5] for line in (place / "maps").read_text().splitlines() if " /" in line}
        except OSError:  # ended meanwhile
            continue
    return found


def refuse_if_held(path: str) -> None:
    path = os.path.realpath(path)
    for held in held_files():
        if held == path or held.startswith(f"{path}{os.sep}"):
            raise PermissionError(errno.EACCES, "[WinError 32] it is being used by another process", path)


class WindowsOs:
    """The module ``os`` as ``atomic`` finds it on Windows."""

    def __getattr__(self, name: str):
        if name in ("chown", "O_NOFOLLOW"):
            raise AttributeError(name)
        return getattr(os, name)

    def open(self, path, *arguments):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return os.open(path, *arguments)


@pytest.fixture(name="windows")
def windows_files(monkeypatch):
    """See above.  Calls of Rust and C++ are not seen; they write new files only."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("the system does not say which files are mapped")

    def guard(name: str, takes_target: bool) -> None:
        function = getattr(os, name)

        def guarded(*paths, dir_fd=None, **options):
            folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            for path in paths:
                refuse_if_held(os.path.join(folder, path))
            if name == "rename" and os.path.lexists(paths[1]):
                raise FileExistsError(errno.EEXIST, "File exists", paths[1])
            return function(*paths, **options, **({} if takes_target else {"dir_fd": dir_fd}))

        monkeypatch.setattr(os, name, guarded)

    for name in ("unlink", "remove", "rmdir"):
        guard(name, takes_target=False)
    for name in ("rename", "replace"):
        guard(name, takes_target=True)
    monkeypatch.setattr(atomic, "fcntl", None)
    monkeypatch.setattr(atomic, "os", WindowsOs())
    monkeypatch.setattr(atomic, "PAUSES", (0, 0))
    monkeypatch.setattr(arrow_file, "WINDOWS", True)
