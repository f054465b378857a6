"""How far a run is: a bar in a terminal, and lines elsewhere."""

from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A bar of a run's steps; where there is no terminal, a line at each report instead.

    Args:
        step: steps done before.
        steps: steps of the whole run.
        say: called with each line.
        shown: False in all processes but the first.
    """

    def __init__(self, step: int, steps: int, say: Callable[[str], None], *, shown: bool = True):
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=None if shown else True)
        self._say = say

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Count a step."""
        self._bar.update()

    def show(self, step: int, text: str) -> None:
        """Report the state of the run at a step."""
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            self._say(f"step {step}: {text}")
