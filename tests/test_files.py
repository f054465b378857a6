"""A name stands for the old content or for the whole new one."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from ztsnr import files as atomic
from ztsnr.files import atomic_folder, atomic_write, remove_leftovers

pytestmark = pytest.mark.skipif(os.name == "nt", reason="permissions, links and signals of POSIX")

OLD, NEW = b"old" * 1000, b"new" * 2000
LEFTOVER = ".a.bin.0123abcd.unfinished"  # as a killed program names it


def write(path, content=NEW):
    with atomic_write(path) as file:
        file.write(content)


def write_folder(path, content=NEW):
    with atomic_folder(path) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a.bin").write_bytes(content)


def listing(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path) -> Path:
    path = tmp_path / "a.bin"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def small_disk(mount_disk):
    """A file system of its own, of 64 kB."""
    return mount_disk("64k")


# ----------------------------------------------------------------------------------------------------------------------
# What is written


def test_a_file_is_made_or_replaced(tmp_path):
    for content in (OLD, NEW, b""):
        write(tmp_path / "a.bin", content)
        assert (tmp_path / "a.bin").read_bytes() == content
        assert listing(tmp_path) == ["a.bin"]


def test_the_old_content_stays_until_the_end(old):
    with atomic_write(str(old)) as file:
        file.write(NEW)
        file.flush()
        assert old.read_bytes() == OLD
        file.seek(0)
        file.write(b"N")
    assert old.read_bytes() == b"N" + NEW[1:]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_files_get_what_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "a.bin")
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o7777 == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o777, 0o200])
def test_permissions_are_kept(old, mode):
    old.chmod(mode)
    with atomic_write(old) as file:
        (neighbour,) = old.parent.glob(".*.unfinished")
        assert neighbour.stat().st_mode & 0o7777 == mode  # nobody may read it meanwhile who could not before
        file.write(NEW)
    assert old.stat().st_mode & 0o7777 == mode


def test_a_secret_is_one_from_the_beginning(old, monkeypatch):
    old.chmod(0o600)
    chmod, modes = os.chmod, []

    def watched_chmod(path, mode):
        modes.append(path.stat().st_mode & 0o777)  # who opens it before may read it ever after
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", watched_chmod)
    write(old)
    assert modes == [0o600]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")
def test_owner_and_group_are_kept(old):
    os.chown(old, 1234, 2345)
    old.chmod(0o640)
    write(old)
    assert (old.stat().st_uid, old.stat().st_gid, old.stat().st_mode & 0o777) == (1234, 2345, 0o640)
    assert old.read_bytes() == NEW


def test_the_group_is_kept_where_the_owner_cannot_be(old, monkeypatch):
    calls = []

    def chown(path, owner, group):
        calls.append((owner, group))
        if owner != -1:
            raise PermissionError

    monkeypatch.setattr(os, "chown", chown)
    write(old)
    assert calls == [(-1, old.stat().st_gid), (old.stat().st_uid, -1)]
    assert old.read_bytes() == NEW


def test_links(tmp_path, old):
    (tmp_path / "models").mkdir()
    link = tmp_path / "models" / "link.bin"
    link.symlink_to("../a.bin")
    hard = tmp_path / "hard.bin"
    hard.hardlink_to(old)
    write(link)
    assert link.is_symlink()
    assert old.read_bytes() == NEW
    assert hard.read_bytes() == OLD
    dangling = tmp_path / "models" / "dangling.bin"
    dangling.symlink_to("../b.bin")
    write(dangling)
    assert dangling.is_symlink()
    assert (tmp_path / "b.bin").read_bytes() == NEW
    assert listing(tmp_path / "models") == ["dangling.bin", "link.bin"]


@pytest.mark.parametrize("name", ["模型" * 40 + ".bin", "x" * 250, "[a]*?.bin", "-", "a\nb"])
def test_names_of_all_sorts(tmp_path, name):
    (tmp_path / f".{name[:50]}.0123abcd.unfinished").write_bytes(OLD)
    write(tmp_path / name)
    assert listing(tmp_path) == [name]


def test_content_is_on_the_disk_before_it_has_the_name(old, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor):
        inode = os.fstat(descriptor).st_ino
        events.append("folder" if inode == old.parent.stat().st_ino else f"{os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def watched_replace(*paths):
        events.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write(old)
    assert events == [f"{len(NEW)} bytes", "replace", "folder"]


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(1), MemoryError()])
def test_nothing_happens_if_the_block_fails(tmp_path, old, error):
    def fail(path):
        with atomic_write(path) as file:
            file.write(NEW)
            raise error

    for path in (old, tmp_path / "new.bin"):
        with pytest.raises(type(error)) as caught:
            fail(path)
        assert caught.value is error
        assert listing(tmp_path) == ["a.bin"]
        assert old.read_bytes() == OLD


def test_full_disk(small_disk):
    path = small_disk / "a.bin"
    path.write_bytes(OLD)
    with pytest.raises(ValueError, match=r"a\.bin cannot be written: No space left on device$"):
        write(path, b"x" * 100_000)
    assert path.read_bytes() == OLD
    assert listing(small_disk) == ["a.bin"]
    write(path, b"x" * 30_000)
    assert path.stat().st_size == 30_000


def test_too_large_a_file(old):
    program = f"""
import resource
from ztsnr.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    with atomic_write({str(old)!r}) as file:
        file.write(b"x" * 100_000)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"{old} cannot be written: File too large\n"
    assert old.read_bytes() == OLD
    assert listing(old.parent) == ["a.bin"]


def test_what_cannot_be_replaced(tmp_path, old):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = listing(tmp_path)
    for path, sentence in {
        tmp_path / "folder": "it exists and is not a file",
        tmp_path / "pipe": "it exists and is not a file",
        tmp_path / "loop": "Too many levels of symbolic links",
        tmp_path / "missing" / "a.bin": f"there is no folder {tmp_path / 'missing'}; create it first",
        old / "a.bin": f"there is no folder {old}; create it first",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        with pytest.raises(ValueError, match="cannot be written: ") as caught:
            write(path)
        assert str(caught.value).endswith(sentence)
        assert listing(tmp_path) == before


def test_read_only_files_stay(old):
    old.chmod(0o444)
    with pytest.raises(ValueError, match=r"a\.bin cannot be written: it is read-only$"):
        write(old)
    assert old.read_bytes() == OLD


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may become somebody else")
def test_somebody_without_permission():
    program = """
import os, sys
from ztsnr.files import atomic_write
os.setuid(65534)
for name in ("a.bin", "new.bin"):
    try:
        with atomic_write(f"{sys.argv[1]}/{name}"): pass
    except ValueError as error:
        print(error)
"""
    with tempfile.TemporaryDirectory() as name:  # pytest's own lie in a folder that only we may enter
        folder = Path(name).resolve()
        folder.chmod(0o755)
        (folder / "a.bin").touch()
        command = [sys.executable, "-c", program, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [
            f"{folder / 'a.bin'} cannot be written: it is read-only",
            f"{folder / 'new.bin'} cannot be written: Permission denied",
        ]
        assert listing(folder) == ["a.bin"]


# ----------------------------------------------------------------------------------------------------------------------
# Killed programs, and several at once


def kill_while_writing(path) -> None:
    program = f"""
import time
from ztsnr.files import atomic_write
with atomic_write({str(path)!r}) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)


def test_what_a_killed_program_leaves_is_removed(tmp_path, old):
    kill_while_writing(old)
    assert old.read_bytes() == OLD
    leftover, name = listing(tmp_path)
    assert name == "a.bin"
    assert leftover.startswith(".a.bin.")
    assert leftover.endswith(atomic.SUFFIX)
    write(tmp_path / "b.bin")
    assert leftover in listing(tmp_path)  # it is not of this file
    write(old)
    assert listing(tmp_path) == ["a.bin", "b.bin"]


def test_files_of_others_stay(tmp_path, old):
    others = [".a.bin.unfinished", ".a.bin.notes.unfinished", "a.bin.0123abcd.unfinished", ".a.bin.0123abcd"]
    for name in others:
        (tmp_path / name).touch()
    write(old)
    assert listing(tmp_path) == sorted(["a.bin", *others])


def test_links_are_never_followed(tmp_path, old):
    precious = tmp_path / "precious"
    write_folder(precious)
    leftover = tmp_path / LEFTOVER
    for target in (precious, precious / "part" / "a.bin", "nothing"):
        leftover.symlink_to(target)
        write(old)
        assert leftover.is_symlink()
        leftover.unlink()
    leftover.mkdir()
    (leftover / "folder").symlink_to(precious)
    (leftover / "file").symlink_to(precious / "part" / "a.bin")
    write(old)
    assert listing(tmp_path) == ["a.bin", "precious"]
    assert (precious / "part" / "a.bin").read_bytes() == NEW


def test_who_still_writes_is_not_disturbed(tmp_path, old):
    with atomic_write(old) as slow:
        slow.write(b"slow")
        write(old)
        assert old.read_bytes() == NEW
        assert len(listing(tmp_path)) == 2
    assert old.read_bytes() == b"slow"
    assert listing(tmp_path) == ["a.bin"]


def test_leftovers_of_all_names_are_removed_and_nothing_that_is_being_written(tmp_path, old):
    kill_while_writing(old)
    (leftover,) = tmp_path.glob(".a.bin.*")
    with atomic_write(tmp_path / "b.bin") as file, atomic_folder(tmp_path / "c") as folder:
        remove_leftovers(tmp_path)
        assert not leftover.exists()
        assert len(list(tmp_path.glob(".*.unfinished"))) == 2
        file.write(NEW)
        (folder / "a.bin").write_bytes(NEW)
    assert listing(tmp_path) == ["a.bin", "b.bin", "c"]


def test_a_file_that_was_taken_for_a_leftover_is_made_again(old, monkeypatch):
    flock, removed = atomic.fcntl.flock, []

    def late_flock(file, operation):
        if not removed:  # another writer comes between making the file and locking it
            removed.extend(old.parent.glob(".*.unfinished"))
            removed[0].unlink()
        flock(file, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", late_flock)
    write(old)
    assert len(removed) == 1
    assert old.read_bytes() == NEW
    assert listing(old.parent) == ["a.bin"]


def test_many_writers_and_a_reader(old):
    until = time.monotonic() + 1
    contents = [bytes([65 + i]) * 50_000 for i in range(4)]
    failed, written = [], []

    def write_on(content):
        try:
            while time.monotonic() < until:
                write(old, content)
                written.append(content)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write_on, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    seen = set()
    while time.monotonic() < until:
        seen.add(old.read_bytes())
    for thread in threads:
        thread.join()
    assert not failed
    assert len(set(written)) == 4
    assert seen <= {OLD, *contents}
    assert listing(old.parent) == ["a.bin"]


def test_without_locks(tmp_path, old, monkeypatch):
    """As on Windows, where open files cannot be removed or renamed."""
    monkeypatch.setattr(atomic, "fcntl", None)
    young, stale = tmp_path / LEFTOVER, tmp_path / LEFTOVER.replace("0", "1")
    for path in (young, stale):
        path.touch()
    hours_ago = time.time() - 2 * atomic.ABANDONED
    os.utime(stale, (hours_ago, hours_ago))
    opened, replace = [], os.replace
    fdopen = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda *args: opened.append(fdopen(*args)) or opened[-1])

    def watched_replace(*paths):
        assert opened[0].closed
        replace(*paths)

    monkeypatch.setattr(os, "replace", watched_replace)
    write(old)
    assert old.read_bytes() == NEW
    assert listing(tmp_path) == [LEFTOVER, "a.bin"]
    assert len(opened) == 1


def test_a_file_system_without_locks(old, monkeypatch):
    def no_flock(file, operation):
        raise OSError("No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", no_flock)
    (old.parent / LEFTOVER).touch()
    write(old)
    assert old.read_bytes() == NEW
    assert listing(old.parent) == [LEFTOVER, "a.bin"]  # it might be somebody's


# ----------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_folder_is_made(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_folder(str(tmp_path / "a")) as folder:
            (folder / "part").mkdir()
            (folder / "part" / "a.bin").write_bytes(NEW)
            assert listing(tmp_path) == [folder.name]
    finally:
        os.umask(before)
    assert listing(tmp_path) == ["a"]
    assert (tmp_path / "a" / "part" / "a.bin").read_bytes() == NEW
    assert (tmp_path / "a").stat().st_mode & 0o7777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(1), MemoryError()])
def test_no_folder_is_made_if_the_block_fails(tmp_path, error):
    def fail():
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "part").mkdir()
            (folder / "part" / "a.bin").write_bytes(NEW)
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert listing(tmp_path) == []


def test_a_folder_must_be_new(tmp_path, old):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    before = listing(tmp_path)
    for name in before:
        with pytest.raises(ValueError, match=f"{name} already exists"):
            write_folder(tmp_path / name)
    with pytest.raises(ValueError, match="there is no folder"):
        write_folder(tmp_path / "missing" / "a")
    with pytest.raises(ValueError, match="cannot be written: File name too long"):
        write_folder(tmp_path / ("x" * 300))
    assert listing(tmp_path) == before
    assert old.read_bytes() == OLD


@pytest.mark.parametrize("meanwhile", [Path.mkdir, Path.touch])
def test_a_folder_that_another_makes_meanwhile_is_not_replaced(tmp_path, meanwhile):
    with pytest.raises(ValueError, match="a already exists"), atomic_folder(tmp_path / "a") as folder:
        meanwhile(tmp_path / "a")
    assert not folder.exists()
    assert listing(tmp_path) == ["a"]


def test_a_folder_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    events, names = [], {}
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor):
        names.update({path.stat().st_ino: path.name for path in tmp_path.rglob("*")})
        events.append(names.get(os.fstat(descriptor).st_ino, "around"))
        fsync(descriptor)

    def watched_rename(*paths):
        events.append("rename")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    write_folder(tmp_path / "a")
    assert events[0].startswith(".a.")
    assert events[1:] == ["a.bin", "part", "rename", "around"]


def test_a_folder_on_a_full_disk(small_disk):
    with pytest.raises(ValueError, match=r"a cannot be written: No space left on device$"):
        write_folder(small_disk / "a", b"x" * 100_000)
    assert listing(small_disk) == []
    write_folder(small_disk / "a", b"x" * 10_000)
    assert listing(small_disk) == ["a"]


def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match="a cannot be written: Input/output error"):
        write_folder(tmp_path / "a")
    assert listing(tmp_path) == []


def test_what_killed_writers_of_folders_leave_is_removed(tmp_path):
    program = """
import sys, time
from ztsnr.files import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "part").mkdir()
    (folder / "part" / "a.bin").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""
    for path, write_again in ((tmp_path / "a", write_folder), (tmp_path / "b", write)):  # whichever comes next
        with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"writing\n"
            assert len(list(tmp_path.glob(f".{path.name}.*"))) == 1
            process.send_signal(signal.SIGKILL)
        assert len(list(tmp_path.glob(f".{path.name}.*{atomic.SUFFIX}"))) == 1
        assert not path.exists()
        write_again(path)
        assert not list(tmp_path.glob(".*"))
    (tmp_path / ".c.0123abcd.unfinished").touch()
    write_folder(tmp_path / "c")
    assert listing(tmp_path) == ["a", "b", "c"]


def test_who_still_writes_a_folder_is_not_disturbed(tmp_path):
    with atomic_folder(tmp_path / "a") as slow:
        (slow / "a.bin").write_bytes(b"slow")
        write_folder(tmp_path / "a")
        assert len(listing(tmp_path)) == 2
        (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "a" / "a.bin").read_bytes() == b"slow"
    assert listing(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_folder_that_was_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch, moment):
    removed = []

    def remove(path):
        if not removed:
            removed.append(path)
            path.rmdir()

    if moment == "before it is opened":
        mkdir = Path.mkdir
        monkeypatch.setattr(Path, "mkdir", lambda path, *rest: (mkdir(path, *rest), remove(path)))
    else:
        flock = atomic.fcntl.flock
        monkeypatch.setattr(
            atomic.fcntl, "flock", lambda *arguments: (remove(next(tmp_path.glob(".*"))), flock(*arguments))
        )
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "a.bin").write_bytes(NEW)
    assert len(removed) == 1
    assert listing(tmp_path) == ["a"]
    assert listing(tmp_path / "a") == ["a.bin"]


def test_folders_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    young, busy, stale = (tmp_path / f".a.0000000{i}.unfinished" for i in range(3))
    hours_ago = time.time() - 2 * atomic.ABANDONED
    for folder in (young, busy, stale):
        (folder / "part").mkdir(parents=True)
        (folder / "part" / "a.bin").touch()
        if folder is not young:
            for path in (folder / "part" / "a.bin", folder / "part", folder):
                os.utime(path, (hours_ago, hours_ago))
    (busy / "part" / "a.bin").write_bytes(NEW)  # which changes no folder
    write_folder(tmp_path / "a")
    assert listing(tmp_path) == [young.name, busy.name, "a"]


def test_folders_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_flock(file, operation):
        raise OSError("No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", no_flock)
    (tmp_path / LEFTOVER.replace("a.bin", "a")).mkdir()
    write_folder(tmp_path / "a")
    assert len(listing(tmp_path)) == 2  # it might be somebody's
