"""The folder of a run, which one run uses at a time."""

import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import lock_folder
from ..world import World
from .run_state import RunStates
from .settings_file import changed_settings, settings_content


@contextmanager
def open_run_folder(out: Path, states: RunStates, resume: bool, world: World) -> Iterator[None]:
    """Create the folder of a run if needed, and lock it within the block.  All processes call this; the first locks.

    Raises:
        UserError: the folder cannot be created, is in use, or holds a run that is not to be resumed; in all processes.
    """
    with ExitStack() as held:

        def take_folder() -> None:
            _create(out)
            held.enter_context(lock_folder(out))
            if states.paths() and not resume:
                raise UserError(
                    f"{out} holds a run at step {max(states.paths())}: continue it with --resume auto, or choose "
                    "another folder"
                )

        world.by_first(take_folder)
        yield


def say_changes(path: Path, settings: Any, say: Callable[[str], None]) -> None:
    """List the settings that a resumed run changes, compared with the file at ``path`` that it has written before."""
    with suppress(OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):  # the user may have edited or removed it
        before = tomllib.loads(path.read_text(encoding="utf-8"))
        now = settings_content(settings)
        for content in (before, now):
            content.pop("resume", None)  # says how the run starts, and nothing of the training
        for line in changed_settings(before, now):
            say(line)


def _create(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror or error
        raise UserError(f"{out} cannot be the folder of a run: {reason}; choose another out") from None
