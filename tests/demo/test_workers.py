"""Processes beside one another: never too many, one that fails is told, and a signal stops them all."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from ztsnr.demo import workers
from ztsnr.demo.workers import LOG, run_trainings
from ztsnr.errors import Stopped

JOBS = [("a", 0), ("b", 0), ("c", 0), ("d", 1), ("e", 1)]


class FakeTrainings:
    """What of ``Trainings`` is used."""

    def __init__(self, out: Path, steps: int = 10):
        self.out, self.steps = out, steps

    def folder(self, name, seed):
        return self.out / f"seed-{seed}" / name

    def exported(self, name, seed):
        return self.folder(name, seed) / "exported"

    def settings(self, name, seed):
        return SimpleNamespace(steps=self.steps)


@pytest.fixture
def trainings(tmp_path):
    return FakeTrainings(tmp_path)


@pytest.fixture
def started(monkeypatch):
    """Each training is a process that ends when its standard input is closed; job -> process, in their order."""
    processes = {}

    def start(out, folder, job, threads):
        folder.mkdir(parents=True, exist_ok=True)
        program = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
        processes[job] = subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True)
        processes[job].threads = threads
        return processes[job]

    monkeypatch.setattr(workers, "_start", start)
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()
        process.stdin.close()


def alive(processes):
    return [job for job, process in processes.items() if process.poll() is None]


def end(process):
    process.stdin.close()
    process.wait()


def instead_of_sleeping(monkeypatch, act):
    """``act()`` wherever the trainings are waited for."""
    monkeypatch.setattr(workers, "time", SimpleNamespace(sleep=lambda seconds: act()))


@pytest.mark.parametrize("at_a_time", [1, 2, 4])
def test_so_many_run_at_a_time_and_all_in_the_end(trainings, started, monkeypatch, at_a_time):
    seen = []

    def one_ends():
        running = alive(started)
        seen.append(len(running))
        end(started[running[-1]])  # the one that began last: the order of ending must not matter

    instead_of_sleeping(monkeypatch, one_ends)
    run_trainings(trainings, JOBS, at_a_time, cores=4)
    assert list(started) == JOBS
    assert alive(started) == []
    # as many as may be, until too few are left
    assert seen == [min(at_a_time, left) for left in range(len(JOBS), 0, -1)]
    assert {process.threads for process in started.values()} == {max(1, 4 // at_a_time)}


def test_there_is_at_least_one_thread(trainings, started, monkeypatch):
    instead_of_sleeping(monkeypatch, lambda: [end(started[job]) for job in alive(started)])
    run_trainings(trainings, JOBS, 4, cores=2)
    assert {process.threads for process in started.values()} == {1}


def test_what_is_finished_is_not_done_again(trainings, started, monkeypatch):
    instead_of_sleeping(monkeypatch, lambda: [end(started[job]) for job in alive(started)])
    for job in JOBS[1:4]:
        trainings.exported(*job).mkdir(parents=True)
    run_trainings(trainings, JOBS, 2, 2)
    assert list(started) == [JOBS[0], JOBS[4]]
    for job in JOBS:
        trainings.exported(*job).mkdir(parents=True, exist_ok=True)
    started.clear()
    run_trainings(trainings, JOBS, 2, 2)
    assert not started


def test_a_failing_one_is_told_with_its_log_and_ends_the_others(trainings, started, monkeypatch):
    def second_fails():
        log = trainings.folder("b", 0) / LOG
        log.write_text("Traceback\n  of a long way\nValueError: the disk is full\n")
        started["b", 0].kill()
        started["b", 0].wait()

    instead_of_sleeping(monkeypatch, second_fails)
    with pytest.raises(ValueError, match="failed") as caught:
        run_trainings(trainings, JOBS, 3, 4)
    log = trainings.folder("b", 0) / LOG
    assert str(caught.value) == (
        f"training b, seed 0, failed; its log is {log}. It ends: Traceback of a long way ValueError: the disk is full"
    )
    assert list(started) == JOBS[:3]
    assert alive(started) == []


def test_one_that_fails_without_a_word_is_told_too(trainings, started, monkeypatch):
    instead_of_sleeping(monkeypatch, lambda: (started["a", 0].kill(), started["a", 0].wait()))
    with pytest.raises(ValueError, match=r"training a, seed 0, failed; its log is .*training\.log\. It ends: $"):
        run_trainings(trainings, JOBS[:1], 1, 1)


def test_signals_are_as_before_in_the_end(trainings, started, monkeypatch):
    instead_of_sleeping(monkeypatch, lambda: [end(started[job]) for job in alive(started)])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run_trainings(trainings, JOBS[:1], 1, 1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_step_is_the_last_that_was_told(tmp_path):
    assert workers._step(tmp_path / "nothing") == 0
    metrics = tmp_path / "metrics.jsonl"
    for content, step in [("", 0), ('{"step": 3}\n{"step": 7}\n', 7), ('{"step": 3}\n{"st', 0), ("\n", 0)]:
        metrics.write_text(content)
        assert workers._step(tmp_path) == step


def test_the_bar_ends_at_all_steps(trainings, started, monkeypatch):
    positions = []

    class Bar(workers.tqdm):
        def update(self, n=1):
            super().update(n)
            positions.append(self.n)

    monkeypatch.setattr(workers, "tqdm", Bar)

    def half_and_end():
        job = alive(started)[0]
        metrics = trainings.folder(*job) / "metrics.jsonl"
        if metrics.exists():
            end(started[job])
        else:
            metrics.write_text(json.dumps({"step": 5}) + "\n")

    instead_of_sleeping(monkeypatch, half_and_end)
    run_trainings(trainings, JOBS[:2], 1, 1)
    assert positions == [5, 10, 15, 20]


# ----------------------------------------------------------------------------------------------------------------------
# The process itself


def test_how_a_training_is_started(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@"\necho "$OMP_NUM_THREADS $TQDM_DISABLE"\nps -o sid= -p $$\necho bad >&2\n')
    program.chmod(0o755)
    monkeypatch.setattr(workers, "sys", SimpleNamespace(executable=str(program)))
    folder = tmp_path / "seed-3" / "v-plain"
    for _ in range(2):  # a training that resumes adds to its log
        process = workers._start(tmp_path, folder, ("v, plain", 3), 2)
        assert process.wait() == 0
        lines = (folder / LOG).read_text().splitlines()
    assert len(lines) == 8
    assert lines[0] == f"-m ztsnr.demo.one_training {tmp_path} v, plain 3 2"
    assert lines[1] == "2 1"
    assert int(lines[2]) not in (0, os.getsid(0))  # a Ctrl-C reaches the parent alone
    assert lines[3] == "bad"


def test_one_training_tells_by_its_status_whether_it_ended(monkeypatch, tmp_path):
    from ztsnr.demo import one_training

    asked, threads = [], []

    def train(name, seed):
        asked.append((name, seed))
        if len(asked) == 2:
            raise Stopped(signal.SIGTERM)

    trainings = SimpleNamespace(open=lambda out: SimpleNamespace(train=train))
    monkeypatch.setattr(one_training, "Trainings", trainings)
    monkeypatch.setattr(one_training.torch, "set_num_threads", threads.append)
    one_training.main(str(tmp_path), "v, plain", "3", "2")
    with pytest.raises(SystemExit) as stopped:
        one_training.main(str(tmp_path), "v, plain", "3", "2")
    assert stopped.value.code == 143
    assert asked == [("v, plain", 3)] * 2
    assert threads == [2, 2]


PARENT = """
import signal, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
from ztsnr.demo import workers

out = Path(sys.argv[1])
CHILD = '''
import signal, sys, time
from pathlib import Path
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
Path(sys.argv[1] + ".ready").touch()
while not asked:
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))  # it saves its state
Path(sys.argv[1] + ".saved").write_text(str(len(asked)))
sys.exit(1)
'''

def start(out, folder, job, threads):
    command = [sys.executable, "-S", "-c", CHILD, str(out / job[0]), sys.argv[2]]
    return subprocess.Popen(command, start_new_session=True)

workers._start = start
workers.INTERVAL = 0.05
trainings = SimpleNamespace(
    out=out,
    folder=lambda name, seed: out / name / "folder",
    exported=lambda name, seed: out / name / "exported",
    settings=lambda name, seed: SimpleNamespace(steps=5),
)
try:
    workers.run_trainings(trainings, [(name, 0) for name in "abc"], 2, 2)
except SystemExit as stopped:
    print(stopped.code)
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


def stop_by_signal(place, number, saving=0.0):
    """Standard output of a process that trains a and b, with c waiting, and is sent a signal."""
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(place), str(saving)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )
    ready = threading.Event()
    try:
        while parent.poll() is None and not all((place / f"{name}.ready").exists() for name in "ab"):
            ready.wait(0.02)
        parent.send_signal(number)
        output, errors = parent.communicate()
    finally:
        parent.kill()
    assert parent.returncode == 0, errors
    return output.split()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_stops_all_and_they_save_their_state(tmp_path, number):
    assert stop_by_signal(tmp_path, number) == [str(128 + number), "True"]
    assert (tmp_path / "a.saved").exists()
    assert (tmp_path / "b.saved").exists()
    assert not (tmp_path / "c.ready").exists()  # nothing new is begun


def test_a_training_is_asked_to_stop_once(tmp_path):
    """A second signal, some seconds after the first, means "at once" (training/stopping.py): a state that takes longer
    to be saved would be lost."""
    stop_by_signal(tmp_path, signal.SIGTERM, saving=0.5)
    assert (tmp_path / "a.saved").read_text() == "1"
