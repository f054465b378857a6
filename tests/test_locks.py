"""A folder in use is refused, by whom is said, and it is free once its user has ended, however it ended."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress

import pytest

from ztsnr.errors import UserError
from ztsnr.files import LOCK, lock_folder

HOLD = """
import os, sys, time
from ztsnr.files import lock_folder
with lock_folder(sys.argv[1]):
    if sys.argv[2] == "alone" or not os.fork():
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the folder; all of them end with the test."""
    started = []

    def start(how="alone"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), how],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):  # one that the test has killed
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_folder_in_use_is_refused(tmp_path, hold):
    holder = hold()
    with pytest.raises(UserError) as refused, lock_folder(tmp_path):
        pass
    sentence = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}: wait until it ends, or choose"
    assert str(refused.value) == f"{sentence} another folder"
    assert (tmp_path / LOCK).exists()  # the refused one leaves it to its holder


@pytest.mark.parametrize("how", ["alone", "with a child"])
def test_it_is_free_once_the_holder_is_killed(tmp_path, hold, how):
    """At once, though a child that the holder forked lives on."""
    holder = hold(how)
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_nothing_is_left_behind_the_block(tmp_path):
    for _ in range(2):
        with lock_folder(tmp_path):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"), lock_folder(tmp_path):
                pass
            assert os.listdir(tmp_path) == [LOCK]
        assert os.listdir(tmp_path) == []


def test_a_child_that_leaves_the_block_frees_nothing(tmp_path):
    with ExitStack() as held:
        held.enter_context(lock_folder(tmp_path))
        child = os.fork()
        if not child:
            held.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(UserError, match="in use"), lock_folder(tmp_path):
            pass


def test_one_of_many_holds_it(tmp_path):
    """Who opens the file of a holder that removes it meanwhile does not take the removed one for the lock."""
    program = """
import os, sys, time
from ztsnr.errors import UserError
from ztsnr.files import lock_folder
end = time.monotonic() + 1.5
times = 0
while time.monotonic() < end:
    try:
        with lock_folder(sys.argv[1]):
            open(sys.argv[1] + "/inside", "x").close()
            os.unlink(sys.argv[1] + "/inside")
            times += 1
    except UserError:
        pass
print(times)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert all(int(times) > 0 for times in said)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write into .*Permission denied"), lock_folder(tmp_path):
        pass


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"cannot write into .*No such file or directory"), lock_folder(tmp_path / "no"):
        pass


def test_without_locks(tmp_path, monkeypatch):
    """Where the file system has none, or the system, nothing is refused."""
    monkeypatch.setattr("ztsnr.files.fcntl", None)
    with lock_folder(tmp_path), lock_folder(tmp_path):
        pass
