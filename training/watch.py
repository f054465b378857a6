"""What is recorded during a run: always lines of JSON, and TensorBoard's files and W&B if the settings say so."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from ..extras import needs
from ..files import atomic_write
from ..samplers.devices import widest_float
from ..world import World
from .config import WatchSettings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check_installed(settings: WatchSettings) -> None:
    """Refuse, before anything is loaded, a watcher that is set but not installed.

    Raises:
        UserError: how to install it.
    """
    if settings.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise UserError(f"{needs('watch.tensorboard', 'tensorboard')}, or set watch.tensorboard = false") from None
    if settings.wandb:
        try:
            import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(f"{needs('watch.wandb', 'wandb')}, or leave out watch.wandb") from None


@contextmanager
def written_if_possible(what: str, step: int, say: Callable[[str], None]) -> Iterator[None]:
    """Report what the block could not write, and continue: the training is worth more than a line of metrics."""
    try:
        yield
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or error
        say(f"{what} of step {step} could not be written: {reason}; training continues without it")


class Watch:
    """Writes metrics and pictures, in the first process alone.

    Args:
        folder: folder of the run.
        settings: watch settings of the run.
        world: the processes of the run.
        step: the step that the run resumes at; lines of later steps, which an earlier run wrote, are dropped.
        config: all settings of the run, for W&B.

    Raises:
        UserError: a library is not installed, W&B has no login, or a file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: WatchSettings,
        world: World,
        step: int = 0,
        config: Mapping[str, Any] | None = None,
    ):
        self._path = folder / "metrics.jsonl"
        self._new_writer = self._writer = self._run = None
        self._writes = world.first
        if not self._writes:
            return
        self._forget_behind(step)
        check_installed(settings)
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._new_writer = partial(SummaryWriter, str(folder / "tensorboard"))
            try:
                self._writer = self._new_writer(purge_step=step + 1)
            except OSError as error:
                raise UserError(f"{folder / 'tensorboard'} cannot be written: {error.strerror or error}") from None
        if settings.wandb:
            import wandb  # pyright: ignore[reportMissingImports]

            try:
                self._run = wandb.init(
                    project=settings.wandb, dir=str(folder), name=folder.resolve().name, config=config
                )
            except wandb.Error as error:
                raise UserError(f"W&B did not start: {error}; run `wandb login`, or leave out watch.wandb") from None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line of metrics; a slash in a name makes a group. Numbers that are not finite become null."""
        if not self._writes:
            return
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        rest = memoryview(f"{json.dumps(line)}\n".encode())
        with open(self._path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:  # remove the half line, else the next one would be appended to it
                file.truncate(before)
                raise
        with self._tensorboard() as writer:
            if writer:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Give a picture to TensorBoard and W&B."""
        with self._tensorboard() as writer:
            if writer:
                writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self._run is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self._run.log({name: wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Flush everything to the disk."""
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()

    @contextmanager
    def _tensorboard(self) -> Iterator["SummaryWriter | None"]:
        """TensorBoard's writer, or None.  A writer that failed never writes again, so a new one replaces it."""
        if self._writer is None and self._new_writer is not None:
            self._writer = self._new_writer()
        try:
            yield self._writer
        except OSError:
            self._writer = None
            raise

    def _forget_behind(self, step: int) -> None:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return
        kept = []
        for line in lines:
            with suppress(ValueError):  # a line that a killed run was writing
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        with atomic_write(self._path) as file:
            file.write("".join(kept).encode())


class BandedLoss:
    """Mean losses by bands of timesteps, summed on the device and read on demand.

    Args:
        last: the last timestep T, a band of its own.
        bands: first timestep of each band except the lowest.
        device: device of the sums.

    Attributes:
        sums: (3, bands) counts, errors and losses of this process; float64 if the device has it.
    """

    def __init__(self, last: int, bands: Sequence[int], device: torch.device):
        starts = [0, *bands, last]
        self.names = [
            *(f"loss/t{low:03d}-{high - 1:03d}" for low, high in pairwise(starts)),
            f"loss/t{last:03d}",
        ]
        self._starts = torch.tensor(starts[1:], device=device)
        self.sums = torch.zeros(3, len(self.names), dtype=widest_float(device), device=device)

    def add(self, t: torch.Tensor, errors: torch.Tensor, losses: torch.Tensor) -> None:
        """Add (B,) timesteps, mean square errors and weighted losses; errors that are not finite are left out."""
        band = torch.bucketize(t.contiguous(), self._starts, right=True)
        rows = torch.stack([torch.ones_like(errors), errors, losses]).to(self.sums.dtype)
        self.sums.index_add_(1, band, torch.where(errors.isfinite(), rows, 0.0))

    def read(self, world: World) -> dict[str, float]:
        """The mean error of each band that had a picture, "loss" of all, and "loss/weighted"; then start from zero.

        All processes call this; it waits for the device.
        """
        counts, errors, losses = world.sum(self.sums).tolist()
        self.sums.zero_()
        metrics = {name: error / count for name, error, count in zip(self.names, errors, counts, strict=True) if count}
        total = sum(counts) or math.nan  # without a single finite error the loss is nan
        return {"loss": sum(errors) / total, "loss/weighted": sum(losses) / total} | metrics
