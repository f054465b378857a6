"""Ranks as torchrun starts them, but as copies of a process that has imported torch: real ones, and at once.

They are not copies of the test's own process: once that has run a backward pass, no copy of it can.
"""

import json
import os
import sys
from collections.abc import Callable
from multiprocessing import connection, get_context
from pathlib import Path

import torch
import torch.distributed as dist

from .tiny_run import main

TESTS = Path(__file__).resolve().parents[1]


def run_ranks(function: Callable, *arguments, log: Path, processes: int = 2) -> None:
    """Run ``function(*arguments)`` as each of some ranks; an exception in one of them fails the test.

    Args:
        log: file for what they say.
    """
    # as torchrun does, this process keeps the store that they meet in
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    context = get_context("forkserver")
    context.set_forkserver_preload(["ztsnr.training.trainer"])
    if str(TESTS.parent) not in sys.path:
        sys.path.append(str(TESTS.parent))  # where a rank finds the modules of the tests
    ranks = [
        context.Process(target=_be, args=({**world, "RANK": rank, "LOCAL_RANK": rank}, log, function, arguments))
        for rank in map(str, range(processes))
    ]
    try:
        for rank in ranks:
            rank.start()
        waiting = {rank.sentinel: rank for rank in ranks}
        while waiting:
            for sentinel in connection.wait(waiting):
                rank = waiting.pop(sentinel)
                rank.join()
                assert rank.exitcode == 0, log.read_text(encoding="utf-8", errors="replace")[-6000:]
    finally:  # if one has failed, or the time is over, none goes on
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
                rank.join()


def _be(environment: dict[str, str], log: Path, function: Callable, arguments: tuple) -> None:
    """What a rank does; its exception is printed where the rest of what it says goes."""
    os.environ.update(environment)
    said = log.open("a", buffering=1, encoding="utf-8")  # until the process ends, after its last exception is printed
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    sys.stdout = sys.stderr = said
    torch.set_num_threads(1)
    function(*arguments)


def in_processes(jobs: list[dict], processes: int, place: Path) -> str:
    """``under_torchrun`` without torchrun."""
    path = place / f"jobs-{processes}.json"
    path.write_text(json.dumps(jobs))
    log = path.with_suffix(".log")
    run_ranks(main, str(path), log=log, processes=processes)
    return log.read_text(encoding="utf-8", errors="replace")
