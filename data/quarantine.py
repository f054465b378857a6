"""Pictures that cannot be used: the list of them, and when they are too many."""

import json
import os
import secrets
from pathlib import Path

import numpy as np

from ..errors import UserError
from .epoch_plan import EpochPlan

FEW = 1000  # pictures; a share of fewer says little
ALLOWED = 5  # pictures that any share above 0 allows: a few bad ones do not end a run of a small set


class Quarantine:
    """The pictures that cannot be used, each with its reason, in a folder of JSONL files.

    Each process appends to a file of its own, so that workers and ranks do not write into each other's lines; readers
    merge the files.  To try a picture again, remove its line or the folder.

    Args:
        folder: created if needed; the same for all ranks and for a resumed run.

    Raises:
        UserError: the folder cannot be created.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._run = secrets.token_hex(4)  # because machines and later runs have the same process ids
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror or error}") from None

    def add(self, key: str, reason: str) -> None:
        """List a picture.

        Args:
            key: key of the picture in its index.
            reason: why it cannot be used.
        """
        line = json.dumps({"picture": key, "reason": reason}, ensure_ascii=False) + "\n"
        path = self.folder / f"{self._run}-{os.getpid()}.jsonl"
        try:
            with open(path, "ab") as file:
                file.write(line.encode(errors="backslashreplace"))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None

    def listed(self) -> dict[str, str]:
        """The reasons that all processes have found so far, by the picture's key.

        Raises:
            UserError: a file cannot be read, or is not such a list.
        """
        reasons = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            try:
                lines = path.read_bytes().split(b"\n")
                for line in lines[:-1]:  # after the last newline is nothing, or a line that is being written
                    record = json.loads(line)
                    reasons.setdefault(record["picture"], record["reason"])
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is not a list of unusable pictures: remove it") from None
        return reasons

    def report(self, shown: int = 3) -> str:
        """The number of pictures, the first of them, and where the others are listed."""
        reasons = self.listed()
        first = "; ".join(f"{key}: {reason}" for key, reason in list(reasons.items())[:shown])
        return (
            f"{len(reasons)} pictures are listed in {self.folder} (remove it to try them again); the first are {first}"
        )


class UnusableShare:
    """Stops the run when too many of the pictures of this rank's steps cannot be used.

    The share is relative to the pictures seen so far, each counted once over all epochs.  Until FEW pictures are seen,
    or all if they are fewer, it is relative to that number, so that one early picture does not end the run.  ALLOWED
    pictures may be unusable whatever the share, unless it is 0.

    Args:
        plan: plan of the steps.
        quarantine: source of the report.
        limit: the largest share allowed.

    Raises:
        UserError: the limit is not from 0 to 1.
    """

    def __init__(self, plan: EpochPlan, quarantine: Quarantine, limit: float = 0.01):
        if not 0 <= limit <= 1:
            raise UserError(f"data.max_unusable must be from 0 to 1, not {limit!r}")
        self.quarantine, self.limit = quarantine, limit
        self._least = min(FEW, int((plan.assignment >= 0).sum()))
        self._is_seen = np.zeros(len(plan.assignment), bool)
        self._seen, self._unusable = 0, set()

    def check(self, planned: np.ndarray, shown: np.ndarray) -> None:
        """Count the pictures of a step.

        Args:
            planned: (B,) pictures of the plan.
            shown: (B,) pictures in the batch; where they differ, the planned picture cannot be used.

        Raises:
            UserError: too many pictures cannot be used; the message contains the report.
        """
        new = np.unique(planned[~self._is_seen[planned]])
        self._is_seen[new] = True
        self._seen += len(new)
        self._unusable.update(planned[planned != shown].tolist())
        if len(self._unusable) > allowed_unusable(self.limit, max(self._seen, self._least)):
            raise UserError(
                f"{len(self._unusable)} of the {self._seen} pictures seen so far "
                f"({len(self._unusable) / self._seen:.2%}) cannot be used, more than data.max_unusable = "
                f"{self.limit:g} allows: mend or remove them, or raise data.max_unusable; {self.quarantine.report()}"
            )


def allowed_unusable(limit: float, pictures: int) -> float:
    """Number of pictures, of this many, that may be unusable."""
    return max(limit * pictures, ALLOWED) if limit > 0 else 0
