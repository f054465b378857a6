"""Several trainings at a time, each in a process of its own, with one progress bar for all of them.

A process (``one_training``) says nothing; what it would say is in its log, and how far it is in its metrics.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from ..errors import UserError

LOG = "training.log"
INTERVAL = 0.5  # seconds from one look at the trainings to the next

Job = tuple[str, int]  # training, seed


class Trainings(Protocol):
    """Where each training is and how long it is; see ``trainings.Trainings``."""

    out: Path

    def folder(self, name: str, seed: int) -> Path: ...
    def exported(self, name: str, seed: int) -> Path: ...
    def settings(self, name: str, seed: int) -> "Settings": ...


class Settings(Protocol):
    """The part of a training's settings that counts here."""

    steps: int


def run_trainings(trainings: Trainings, jobs: Sequence[Job], at_a_time: int, cores: int) -> bool:
    """Train all that is not finished; False if a signal stopped it.

    Args:
        at_a_time: So many run beside one another.
        cores: Processor cores, which they share.

    Raises:
        UserError: A training failed.
    """
    waiting = [job for job in jobs if not trainings.exported(*job).exists()]
    if not waiting:
        return True
    steps = {job: trainings.settings(*job).steps for job in waiting}
    running: dict[Job, subprocess.Popen] = {}
    names = ", ".join(name for name, _ in waiting)
    done = 0
    with _signals() as caught, tqdm(total=sum(steps.values()), desc=names[:40], unit="step", smoothing=0.05) as bar:
        try:
            while waiting or running:
                if caught:
                    return False
                while waiting and len(running) < at_a_time:
                    job = waiting.pop(0)
                    running[job] = _start(trainings.out, trainings.folder(*job), job, max(1, cores // at_a_time))
                time.sleep(INTERVAL)
                for job, process in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        if process.returncode and not caught:
                            raise UserError(_trouble(trainings.folder(*job), job))
                        done += steps[job]
                bar.update(done + sum(_step(trainings.folder(*job)) for job in running) - bar.n)
        finally:
            for process in running.values():
                process.terminate()  # which saves its state; asked once, because twice means at once
            for process in running.values():
                process.wait()
    return True


def _start(out: Path, folder: Path, job: Job, threads: int) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"{__package__}.one_training", str(out), job[0], str(job[1]), str(threads)]
    with (folder / LOG).open("ab") as log:
        # in a session of its own: a Ctrl-C reaches this process alone, which passes it on
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=_environment(threads)
        )


def _environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}


def _step(folder: Path) -> int:
    """The last step that a training has told of."""
    try:
        line = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return json.loads(line)["step"]
    except (OSError, IndexError, ValueError):
        return 0


def _trouble(folder: Path, job: Job) -> str:
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        lines = []
    return f"training {job[0]}, seed {job[1]}, failed; its log is {folder / LOG}. It ends: {' '.join(lines[-40:])}"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM are gathered in a list."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
