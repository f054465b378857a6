"""How a command ends on a mistake, and what several commands share."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ..errors import UserError
from ..extras import IMPORT_ERRORS, explain

if TYPE_CHECKING:
    import torch

PATIENCE = 10  # seconds in which torchrun ends all processes after the first


@contextmanager
def mistakes_in_one_sentence() -> Iterator[None]:
    """What the user can mend ends the command with a sentence and status 2, as every other wrong argument does.

    So does a library of an extra that is not installed, or a torchvision that does not fit torch.

    Of several processes the first one says what all of them meet, and with it torchrun ends the others.  What another
    one meets alone, such as too many broken pictures among its own, that one says, if it is still there after a while.
    """
    try:
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
    """The device of ``--device``, for torchrun's processes one each; says which one auto took."""
    from ..world import describe_device, find_device

    device = find_device(name, setting="--device", local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    if name == "auto":
        click.echo(f"Device: {describe_device(device)}", err=True)  # standard output may be read by a program
    return device
