"""Write a file or a folder so that its name always stands for the whole old content or the whole new one.

The content goes into a temporary neighbour, ``.NAME.RANDOM.unfinished``, which is flushed to the disk and then renamed.
A killed program leaves its neighbour behind, and the next write of NAME removes it.  A lock on the neighbour tells a
program that is still writing from one that was killed: the system releases it when the program ends, however it ends.
"""

import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

SUFFIX = ".unfinished"
RANDOM = "[0-9a-f]{8}" + re.escape(SUFFIX)  # the end of a neighbour's name
LONGEST_STEM = 50  # characters: with 4 bytes each and what is added, a name that every file system takes
LOCK = ".lock"  # in a folder that is in use: process and host of its user
LOCKED_BYTE = 1 << 30  # Windows' locks forbid reading, so lock a byte after the text
PAUSES = (0.05, 0.1, 0.2, 0.4)  # seconds; only where there are no locks
ABANDONED = 3600  # seconds without a change; only where there are no locks


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a seekable binary file that takes the name ``path`` when the block ends without an error.

    A replaced file passes on its permissions and, where the system allows it, its owner and group.  A symbolic link
    stays, and the file that it points to is replaced.  Other hard links keep the old content.  A new file gets the
    permissions that the umask leaves.

    Raises:
        UserError: it cannot be written: no such folder, a read-only file, a full disk, ...; the old content is kept.
            An OSError inside the block counts as a failed write, so the block must catch those of its own reading.
    """
    target = Path(os.path.realpath(path))
    try:
        old = _replaceable(target)
        _remove_leftovers(target)
        file, temporary = _new_file(target, private=old is not None)
        try:
            with file:
                # Before any content, so that nobody reads in the neighbour what they may not read in the target.
                if old is not None:
                    _take_over_permissions(temporary, old)
                yield file
                # The content must be on the disk before it has the name: file systems may write a rename first, and
                # after a power failure the name would stand for an empty file.
                file.flush()
                os.fsync(file.fileno())
                # Closing the file releases its lock.  Renamed only then, it could be removed as a leftover in between.
                if fcntl is not None:
                    os.replace(temporary, target)
            if fcntl is None:  # where open files cannot be renamed
                _patiently(os.replace, temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    _sync_folder(target.parent)  # until the folder is on the disk too, a power failure may bring back the old file


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a whole file or none; see ``atomic_write``.

    Raises:
        UserError: it cannot be written; the old content is kept.
    """
    with atomic_write(path) as file:
        file.write(content)


def prepare_folder(folder: Path) -> None:
    """Create an output folder and check that files can be written there, before any work is done.

    Raises:
        UserError: it cannot be created, or files cannot be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}): choose another folder") from None


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Create a folder to write into that takes the name ``path`` when the block ends without an error.

    Raises:
        UserError: see ``check_new``, before the block and after it; or it cannot be written.  An OSError inside the
            block counts as a failed write, so the block must catch those of its own reading.
    """
    target = Path(path)
    check_new(target)
    try:
        _remove_leftovers(target)
        with _new_folder(target) as temporary:
            try:
                yield temporary
                _sync_tree(temporary)
                check_new(target)  # the system would replace an empty folder
                _patiently(os.rename, temporary, target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    _sync_folder(target.parent)


def check_new(path: Path) -> None:
    """Refuse a path that already exists, or whose folder does not.

    Raises:
        UserError: either is so; the message says which.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} already exists: choose another name, or remove it first")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}; create it first")


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Reserve a folder for this process within the block.

    The system lifts the lock when the process ends, however it ends; child processes do not hold it.  Where the file
    system has no locks there is none.

    Raises:
        UserError: another process holds the lock, or nothing can be written into the folder.
    """
    path = Path(folder) / LOCK
    try:
        descriptor = _open_locked(path)
    except BlockingIOError:
        raise UserError(
            f"{folder} is in use by {_holder(path)}: wait until it ends, or choose another folder"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror or error}): choose another folder") from None
    _locked.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _locked:  # else this is a child that was forked within the block
            _locked.discard(descriptor)
            with suppress(OSError):  # before the lock is lifted; Windows does not remove an open file, which then stays
                path.unlink()
            os.close(descriptor)


_locked: set[int] = set()  # descriptors of the locks of this process


def _close_inherited_locks() -> None:
    for descriptor in _locked:
        os.close(descriptor)
    _locked.clear()


if hasattr(os, "register_at_fork"):  # a copy in a child would hold the lock after its parent was killed
    os.register_at_fork(after_in_child=_close_inherited_locks)


def _open_locked(path: Path) -> int:
    """A descriptor of the lock file at ``path``, locked.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            _try_lock(descriptor)
            # The holder before may have removed the file between our opening and our locking it: then lock the new one.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    with suppress(OSError):  # a full disk: the lock holds, and only its holder stays unnamed
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]  of Windows
            os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        # Windows says EACCES or EDEADLOCK; whatever else flock says, the file system has no locks.
        if isinstance(error, BlockingIOError) or fcntl is None:
            raise BlockingIOError from None


def _holder(path: Path) -> str:
    """Who holds a lock, as it wrote."""
    with suppress(OSError, UnicodeDecodeError):
        if text := path.read_text(encoding="utf-8"):
            return text
    return "another process"


def _replaceable(target: Path) -> os.stat_result | None:
    """The status of the file to replace, None if there is none; refuses what must not be replaced."""
    if not target.parent.is_dir():
        raise UserError(f"{target} cannot be written: there is no folder {target.parent}; create it first")
    try:
        old = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(old.st_mode):
        raise UserError(f"{target} cannot be written: it exists and is not a file")
    # renaming only needs permission to write into the folder, and root needs none
    if not old.st_mode & 0o222 or not os.access(target, os.W_OK):
        raise UserError(f"{target} cannot be written: it is read-only")
    return old


def _stem(target: Path) -> str:
    return f".{target.name[:LONGEST_STEM]}."


def _is_neighbour(name: str, target: Path) -> bool:
    return re.fullmatch(re.escape(_stem(target)) + RANDOM, name) is not None


def _new_neighbour(target: Path) -> Path:
    return target.with_name(f"{_stem(target)}{secrets.token_hex(4)}{SUFFIX}")


def _new_file(target: Path, private: bool) -> tuple[BinaryIO, Path]:
    """A new locked neighbour of the target, and its path."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = _new_neighbour(target)
        file = os.fdopen(os.open(temporary, flags, 0o600 if private else 0o666), "wb")
        if _lock(file.fileno(), temporary):
            return file, temporary
        file.close()


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A new neighbour of the target that is a folder, locked within the block."""
    with ExitStack() as opened:
        while True:
            temporary = _new_neighbour(target)
            temporary.mkdir()
            if fcntl is None:  # where folders cannot be opened
                break
            with suppress(FileNotFoundError):  # gone already
                descriptor = os.open(temporary, os.O_RDONLY)
                opened.callback(os.close, descriptor)
                if _lock(descriptor, temporary):
                    break
        yield temporary


def _lock(descriptor: int, temporary: Path) -> bool:
    """Lock a new neighbour.  False if another writer removed it as a leftover before it was locked."""
    if fcntl is not None:
        with suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    # Between creating the neighbour and locking it, it looks abandoned.  Once locked nobody removes it any more, so one
    # look now is enough.
    return temporary.exists()


def remove_leftovers(folder: Path) -> None:
    """Remove the leftovers of killed programs in a folder, even of files that are never written again."""
    _remove_abandoned(path for path in folder.iterdir() if re.fullmatch(rf"\..+\.{RANDOM}", path.name))


def _remove_leftovers(target: Path) -> None:
    """Remove the leftovers of killed programs for one target."""
    with suppress(OSError):
        _remove_abandoned(path for path in target.parent.iterdir() if _is_neighbour(path.name, target))


def _remove_abandoned(neighbours: Iterable[Path]) -> None:
    for neighbour in list(neighbours):
        with suppress(OSError):  # locked by its writer; already gone; or a link, which is not ours
            _remove_if_abandoned(neighbour)


def _remove_if_abandoned(neighbour: Path) -> None:
    is_folder = stat.S_ISDIR(neighbour.lstat().st_mode)
    remove = shutil.rmtree if is_folder else os.unlink
    if fcntl is None:
        last_change = max(path.lstat().st_mtime for path in (neighbour, *neighbour.rglob("*")))
        if time.time() - last_change > ABANDONED:
            remove(neighbour)
        return
    # The writer holds the lock for as long as it lives, so getting the lock proves that the writer is gone.  Removing
    # under the lock keeps two cleaners apart.  Links are not followed: one may lead to a precious file.
    descriptor = os.open(neighbour, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(neighbour)
    finally:
        os.close(descriptor)


def _patiently(rename: Callable[[Path, Path], None], temporary: Path, target: Path) -> None:
    """Rename, with retries on Windows, where scanners and indexers hold a new file open for a moment."""
    for seconds in PAUSES if fcntl is None else ():
        try:
            return rename(temporary, target)
        except PermissionError:
            time.sleep(seconds)
    return rename(temporary, target)


def _take_over_permissions(temporary: Path, old: os.stat_result) -> None:
    if hasattr(os, "chown"):
        for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):  # the group may be allowed without the owner
            with suppress(PermissionError):
                os.chown(temporary, owner, group)
    os.chmod(temporary, stat.S_IMODE(old.st_mode))


def _sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(place, name), "r+b") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system offers that; elsewhere it happens a little later."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def special_kind(path: str | os.PathLike) -> str | None:
    """ "FIFO", "socket" or "device" for a path that is one; None for files and folders.

    Opening such a path can wait forever, so whatever opens files of the user's folders asks this first.

    Raises:
        OSError: nothing is there, or it cannot be looked at.
    """
    mode = os.stat(path).st_mode
    kinds = {"FIFO": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    name = next((name for name, is_it in kinds.items() if is_it(mode)), None)
    return name or ("device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else None)
