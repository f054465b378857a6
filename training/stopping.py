"""How a run ends before its last step: asked to, or for want of memory."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..errors import UserError
from .config import FinetuneSettings

ONE_REQUEST = 5.0  # seconds in which signals are one request: torchrun passes on what others have sent already


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is not empty any more once the process was asked to stop; asked again, it stops at once."""
    caught: list[int] = []
    before = {}
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        first = first or time.monotonic()
        caught.append(number)
        if time.monotonic() - first > ONE_REQUEST:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    with suppress(ValueError):  # in another thread than the main one there are no signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        restore()


@contextmanager
def out_of_memory_in_one_sentence(settings: FinetuneSettings) -> Iterator[None]:
    """What can be done about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = []
        if settings.speed.checkpointing != "full":
            ways.append('speed.checkpointing = "full"')
        ways.append(f"optimizer.accumulation above {settings.optimizer.accumulation}")
        if settings.optimizer.name == "adamw":
            ways.append('optimizer.name = "adamw8bit"')
        if not settings.average.on_cpu and settings.speed.strategy == "ddp":
            ways.append("average.on_cpu = true")
        if settings.model.adapter is None:
            ways.append("model.adapter")
        raise UserError(f"the device has too little memory: try {', '.join(ways)}") from error
