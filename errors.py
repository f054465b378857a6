"""What the user can mend, told apart from bugs; and what a signal stops."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave, said in one sentence: what is wrong, then what to do.

    The command line and the nodes show the sentence alone.  Every other exception is a bug of this package or of a
    library, and keeps its traceback.
    """


class Stopped(SystemExit):
    """A signal stopped a run, which can be continued.  Unless it is caught, the process ends with 128 + the signal.

    A shell says the same of a process that a signal ended, so that no job queue takes a stopped run for a finished one.

    Attributes:
        signal: number of the signal.
        told: whether the user has read why the run ends.
    """

    def __init__(self, number: int, *, told: bool = True):
        super().__init__(128 + number)
        self.signal, self.told = number, told


@contextmanager
def signals_handled(handler: Callable[[int, Any], None]) -> Iterator[Callable[[], None]]:
    """Call ``handler(number, frame)`` for SIGINT and SIGTERM within the block; gives what restores the old handlers."""
    before = {}

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    with suppress(ValueError):  # only the main thread gets signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    try:
        yield restore
    finally:
        restore()


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its class's name if it says nothing, to quote in a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
