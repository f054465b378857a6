"""How a run ends before its last step: by a signal, or because the device has too little memory."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import UserError, signals_handled

ONE_REQUEST = 5.0  # seconds; signals within them are one request, because torchrun passes a signal on


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM are added: stop when it is not empty.  A second request stops at once.

    Behind the block raise ``Stopped``.
    """
    caught: list[int] = []
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        first = first or time.monotonic()
        caught.append(number)
        if time.monotonic() - first > ONE_REQUEST:
            restore()
            signal.raise_signal(number)

    with signals_handled(note) as restore:
        yield caught


def stopped_sentence(number: int, step: int) -> str:
    """What the user reads when a signal has stopped a run behind a step."""
    return f"stopped by {signal.Signals(number).name} at step {step}; continue with --resume auto"


@contextmanager
def out_of_memory_in_one_sentence(ways: Sequence[str]) -> Iterator[None]:
    """Raise a UserError that names some ways to need less memory if the device has too little for the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device has too little memory: try {', '.join(ways)}") from error
