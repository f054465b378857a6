"""Several trainings at a time, each in its own process, with one progress bar for all.

A process (``one_training``) prints nothing: its output goes to its log, its progress is read from its metrics.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from ..errors import Stopped, UserError, signals_handled

LOG = "training.log"
INTERVAL = 0.5  # seconds between checks of the processes

Job = tuple[str, int]  # training, seed


class Trainings(Protocol):
    """Folders and lengths of the trainings, see ``trainings.Trainings``."""

    out: Path

    def folder(self, name: str, seed: int) -> Path: ...
    def exported(self, name: str, seed: int) -> Path: ...
    def settings(self, name: str, seed: int) -> "Settings": ...


class Settings(Protocol):
    """The settings of a training that are needed here."""

    steps: int


def run_trainings(trainings: Trainings, jobs: Sequence[Job], at_a_time: int, cores: int) -> None:
    """Run all unfinished trainings.

    Args:
        trainings: The folder of trainings.
        jobs: Trainings to run.
        at_a_time: Number of trainings to run in parallel.
        cores: Processor cores to share among them.

    Raises:
        UserError: A training failed.
        Stopped: A signal stopped them; each has saved its state.
    """
    waiting = [job for job in jobs if not trainings.exported(*job).exists()]
    if not waiting:
        return
    steps = {job: trainings.settings(*job).steps for job in waiting}
    running: dict[Job, subprocess.Popen] = {}
    names = ", ".join(name for name, _ in waiting)
    done = 0
    with _signals() as caught, tqdm(total=sum(steps.values()), desc=names[:40], unit="step", smoothing=0.05) as bar:
        try:
            while waiting or running:
                if caught:
                    raise Stopped(caught[0])
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
                process.terminate()  # saves its state; a second signal would end it without
            for process in running.values():
                process.wait()


def _start(out: Path, folder: Path, job: Job, threads: int) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"{__package__}.one_training", str(out), job[0], str(job[1]), str(threads)]
    with (folder / LOG).open("ab") as log:
        # in its own session: Ctrl-C reaches only this process, which passes it on
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=_environment(threads)
        )


def _environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}


def _step(folder: Path) -> int:
    """The last step in a training's metrics."""
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
    """Within the block, SIGINT and SIGTERM are collected in a list."""
    caught: list[int] = []
    with signals_handled(lambda number, _: caught.append(number)):
        yield caught
