"""Writing a file so that its name stands for the old content or for the whole new one, whatever happens meanwhile.

A neighbour is written, brought to the disk and renamed.  A killed program leaves its neighbour behind: it is named
``.NAME.RANDOM.unfinished``, and the next write of NAME removes it.  Who is still writing is told from who was killed by
a lock on the neighbour, which the system lifts when the program ends, however it ends.
"""

import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SUFFIX = ".unfinished"
LONGEST_STEM = 50  # characters: with 4 bytes each and what is added, a name that every file system takes
ABANDONED = 3600  # seconds without a change; only where there are no locks


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to, seekable, that takes the name ``path`` when the block ends without an error.

    A file that is replaced passes on its permissions and, as far as we may, its owner and group; a symbolic link stays
    and the file that it points to is replaced; other hard links keep the old content.  A new file gets the permissions
    that the umask leaves.

    Raises:
        ValueError: it cannot be written: no such folder, a read-only file, a full disk, ...  What was there before is
            still there.  An OSError within the block is taken for such a one, so those of reading must be caught there.
    """
    target = Path(os.path.realpath(path))
    try:
        old = _replaceable(target)
        _remove_leftovers(target)
        file, temporary = _create(target, private=old is not None)
        try:
            with file:
                if old is not None:
                    _take_over_permissions(temporary, old)
                yield file
                file.flush()
                os.fsync(file.fileno())
                if fcntl is not None:  # before the lock is lifted
                    os.replace(temporary, target)
            if fcntl is None:  # where open files cannot be renamed
                os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror or error}") from None
    _sync_folder(target.parent)


def _replaceable(target: Path) -> os.stat_result | None:
    """The state of the file to be replaced, None if there is none; refuses what should not be replaced."""
    if not target.parent.is_dir():
        raise ValueError(f"{target} cannot be written: there is no folder {target.parent}")
    try:
        old = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(old.st_mode):
        raise ValueError(f"{target} cannot be written: it is there and is no file")
    # the system asks for permission to write into the folder only, and root for none
    if not old.st_mode & 0o222 or not os.access(target, os.W_OK):
        raise ValueError(f"{target} cannot be written: it is read-only")
    return old


def _stem(target: Path) -> str:
    return f".{target.name[:LONGEST_STEM]}."


def _is_neighbour(name: str, target: Path) -> bool:
    return re.fullmatch(re.escape(_stem(target)) + "[0-9a-f]{8}" + re.escape(SUFFIX), name) is not None


def _create(target: Path, private: bool) -> tuple[BinaryIO, Path]:
    """A new locked neighbour of the target, and its path."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = target.with_name(f"{_stem(target)}{secrets.token_hex(4)}{SUFFIX}")
        file = os.fdopen(os.open(temporary, flags, 0o600 if private else 0o666), "wb")
        if fcntl is not None:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return file, temporary
        file.close()  # another writer took it for a leftover before it was locked


def _remove_leftovers(target: Path) -> None:
    """Remove what killed programs left of the target."""
    with suppress(OSError):
        for neighbour in list(target.parent.iterdir()):
            if _is_neighbour(neighbour.name, target):
                with suppress(OSError):  # locked, so somebody is writing it; or gone by now
                    _remove_if_abandoned(neighbour)


def _remove_if_abandoned(temporary: Path) -> None:
    if fcntl is None:
        if time.time() - temporary.stat().st_mtime > ABANDONED:
            temporary.unlink()
    else:
        with temporary.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()


def _take_over_permissions(temporary: Path, old: os.stat_result) -> None:
    if hasattr(os, "chown"):
        for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):  # one may be allowed without the other
            with suppress(PermissionError):
                os.chown(temporary, owner, group)
    os.chmod(temporary, stat.S_IMODE(old.st_mode))


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk.  The file is in place already, so where this cannot be done nothing is wrong."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
