"""A tiny SDXL, a few pictures, and runs of ``ztsnr finetune`` with them: here, or under torchrun in real processes.

Under torchrun this file is each of the processes: it takes the runs one after the other from a JSON file.
"""

import gc
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ztsnr.data.dataset import Batch
from ztsnr.errors import Stopped, UserError
from ztsnr.training.config import FinetuneSettings
from ztsnr.training.settings_file import parse_settings
from ztsnr.training.step import TrainingStep
from ztsnr.training.trainer import run_finetune

SIZES = [(48, 32), (32, 48), (40, 40)]
TIMES = ("pictures a second",)  # in metrics: what a clock says


def write_pictures(folder: Path, count: int = 40) -> Path:
    """Squares on a ground, of three shapes, with captions."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        picture = np.full((height, width, 3), random.integers(0, 255, 3), np.uint8)
        picture[5:15, 5:15] = random.integers(0, 255, 3)
        Image.fromarray(picture).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"solid, square, tag{i % 5}")
    return folder


def make_content(place: Path, out: Path, **changes) -> dict:
    """Settings as nested tables; ``changes`` by names such as optimizer__clip."""
    content = {
        "out": str(out),
        "steps": 12,
        "save_every": 5,
        "model": {"base": str(place / "tiny"), "dtype": "float32"},
        "data": {
            "batch_size": 4,
            "sources": [{"path": str(place / "pictures")}],
            "buckets": ["32x32,48x32,32x48"],
            "step": 16,
            "validation_share": 0.0,
            "workers": 0,
        },
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "speed": {"checkpointing": "off", "device": "cpu"},
        "watch": {"log_every": 1, "validate_every": 0, "preview_every": 0, "preview_steps": 2, "tensorboard": False},
        "export": {"single_file": False, "raw": False},
    }
    for name, value in changes.items():
        *groups, last = name.split("__")
        table = content
        for group in groups:
            table = table.setdefault(group, {})
        table[last] = value
    return content


def train(content: dict, *, resume: bool = False, say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """A run in this process; [] if a signal stopped it."""
    try:
        return run_finetune(parse_settings(FinetuneSettings, content), resume=resume, say=say)
    except Stopped:
        return []


def poison(batch: Batch) -> Batch:
    """With a pixel that is no number."""
    data = batch.data.clone()
    data[-1, 0, 3, 3] = math.nan
    return batch._replace(data=data)


def sends(number: int) -> Callable[[Batch], Batch]:
    """Sends this process a signal."""

    def send(batch: Batch) -> Batch:
        os.kill(os.getpid(), number)
        return batch

    return send


@contextmanager
def at(steps: dict[int, Callable[[Batch], Batch]]) -> Iterator[list[int]]:
    """Within the block something is done with the batches of some steps, counted from 0; the list of steps taken."""
    call, taken = TrainingStep.__call__, []

    def patched(step, batch):
        taken.append(step.run.place.step)
        return call(step, steps.get(step.run.place.step, lambda batch: batch)(batch))

    TrainingStep.__call__ = patched
    try:
        yield taken
    finally:
        TrainingStep.__call__ = call


def metrics(out: Path) -> list[dict]:
    """The lines of metrics but for what a clock says."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def losses(out: Path) -> np.ndarray:
    """(steps,) of a run that wrote a line every step."""
    return np.array([line["loss"] for line in metrics(out) if "loss" in line])


def difference(out: Path, other: Path) -> float:
    """The largest relative difference of two curves of the loss."""
    ours, theirs = losses(out), losses(other)
    assert len(ours) == len(theirs) > 0
    return float(np.max(np.abs(ours / theirs - 1)))


def state(out: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors of the state that one process wrote at a step."""
    folder = out / "states" / f"step-{step:08d}"
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def states(out: Path) -> list[int]:
    """The steps of the states there are."""
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "states").glob("step-*"))


def assert_same(out: Path, other: Path, step: int = 12) -> None:
    """Two runs of one process came to the very same end, by the very same way."""
    ours, theirs = state(out, step), state(other, step)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert metrics(out) == metrics(other)


def small_files(batch: Batch) -> Batch:
    """From here on this process cannot write files of 100 kB: no snapshot and no state, but what it says."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return batch


def breaks(batch: Batch) -> Batch:
    """Ends this process's run by itself."""
    raise UserError("what one process alone knows")


def under_torchrun(jobs: list[dict], processes: int, place: Path, *, machines: int = 1, seconds: float = 1200) -> str:
    """Runs in real processes, one after the other; what they said.

    Args:
        jobs: "content" of each; also "resume", "raises": a sentence, "small_files": a step from which on there is no
            room, and what happens in the last process alone: "poisoned": steps, "stopped": a step, "broken": a step.
        seconds: they are killed after so many.
    """
    path = place / f"jobs-{processes}-{machines}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes // machines)]
    if machines == 1:
        commands = [[*command, "--standalone"]]
    else:  # as many groups on this machine
        meet = ["--nnodes", str(machines), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
        commands = [[*command, *meet, "--rdzv-conf", f"is_host={int(number == 0)}"] for number in range(machines)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started, logs = [], [path.with_suffix(f".{number}.log") for number in range(machines)]
    end = time.monotonic() + seconds
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("wb") as file:
                started.append(
                    subprocess.Popen(
                        [*command, __file__, str(path)],
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        ended = [process.wait(max(0, end - time.monotonic())) for process in started]
    finally:  # also where the time is over: none goes on without the test
        for process in started:
            _kill(process)
    said = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
    assert not any(ended), said[-6000:]
    return said


def _kill(process: subprocess.Popen) -> None:
    """A torchrun and its processes, which are groups of their own."""
    if process.poll() is not None:
        return
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = [process.pid, *(map(int, children.read_text().split()) if children.exists() else ())]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def main(path: str) -> None:
    torch.set_num_threads(1)
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    for job in json.loads(Path(path).read_text()):
        steps = dict.fromkeys(job.get("poisoned", []), poison) if last else {}
        for name, action in (("stopped", sends(signal.SIGTERM)), ("broken", breaks)):
            if name in job and last:
                steps[job[name]] = action
        if "small_files" in job:
            steps[job["small_files"]] = small_files
        expected = pytest.raises(ValueError, match=job["raises"]) if "raises" in job else nullcontext()
        with at(steps), expected:
            train(job["content"], resume=job.get("resume", False), say=print)
        del expected
        gc.collect()  # the exception's frames hold connections on which others wait


if __name__ == "__main__":
    main(sys.argv[1])
