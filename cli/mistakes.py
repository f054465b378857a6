"""How a command ends on a mistake, and the device option that several commands share."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..errors import Stopped, UserError, signals_handled
from ..extras import IMPORT_ERRORS, explain

if TYPE_CHECKING:
    import torch

PATIENCE = 10  # seconds, in which torchrun ends the other processes once the first has failed


@contextmanager
def _signals_end_it(advice: str) -> Iterator[None]:
    """End the command on SIGINT or SIGTERM with one sentence and status 128 + signal.

    Within training's steps the trainer takes the signals, saves its state and raises ``Stopped`` itself; this holds for
    the time before, behind and without such steps.
    """

    def stop(number: int, frame: Any) -> None:
        restore()  # the next one ends the process at once
        raise Stopped(number, told=False)

    with signals_handled(stop) as restore:
        try:
            yield
        except Stopped as stopped:
            if not stopped.told:
                name = signal.Signals(stopped.signal).name
                click.echo(f"stopped by {name}{advice and '; '}{advice}", err=True)
            raise


@contextmanager
def mistakes_in_one_sentence(after_signal: str = "") -> Iterator[None]:
    """End the command with one sentence and status 2 on a mistake that the user can mend, as click does.

    A missing library of an extra and a torchvision that does not fit torch are such mistakes too.  Every other error is
    a bug and shows its traceback.

    Under torchrun, a mistake that all processes make is reported by the first one, whose end makes torchrun stop the
    others.  A mistake of another process alone, such as too many broken pictures among its own, is reported by that
    process after a wait.

    SIGINT and SIGTERM end the command with one sentence too, and with status 128 + signal.

    Args:
        after_signal: what to do then, as the end of that sentence.
    """
    try:
        with _signals_end_it(after_signal):
            yield
    except (UserError, *IMPORT_ERRORS) as error:
        if isinstance(error, UserError):
            sentence = str(error)
        elif (sentence := explain(click.get_current_context().command_path, error)) is None:
            raise
        if rank := int(os.environ.get("RANK", 0)):
            time.sleep(PATIENCE)
            sentence = f"process {rank}: {sentence}"
        mistake = click.ClickException(sentence)
        mistake.exit_code = 2
        raise mistake from None


def device_of(name: str) -> "torch.device":
    """The device of ``--device``, one for each process of torchrun.  Prints the choice of auto."""
    from ..world import describe_device, find_device

    device = find_device(name, setting="--device", local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    if name == "auto":
        click.echo(f"Device: {describe_device(device)}", err=True)  # standard output may be read by a program
    return device
