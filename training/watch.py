"""What is written down during a run: lines of JSON always, TensorBoard's files, and W&B where it is asked for."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
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
    """Refuse, before anything is loaded, what is asked for and not installed.

    Raises:
        UserError: how to install it.
    """
    if settings.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise UserError(f"{needs('watch.tensorboard', 'tensorboard')}, or turn it off") from None
    if settings.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError(f"{needs('watch.wandb', 'wandb')}, or leave it out") from None


class Watch:
    """Where metrics and pictures go; in all processes but the first, nowhere.

    Args:
        folder: of the run.
        step: that the run goes on from: what was written down behind it by a run before is dropped.
        config: all settings of the run, for W&B.

    Raises:
        UserError: a library that is not installed, W&B without a login, files that cannot be written.
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
            import wandb

            try:
                self._run = wandb.init(
                    project=settings.wandb, dir=str(folder), name=folder.resolve().name, config=config
                )
            except wandb.Error as error:
                raise UserError(f"W&B cannot be written for, which watch.wandb asks for: {error}") from None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line of metrics at a step; names with a slash are groups."""
        if not self._writes:
            return
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        rest = memoryview(f"{json.dumps(line)}\n".encode())
        with open(self._path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:  # no half line, to which the next one would be added
                file.truncate(before)
                raise
        with self._tensorboard() as writer:
            for name, value in metrics.items() if writer else ():
                writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """A picture at a step."""
        with self._tensorboard() as writer:
            if writer:
                writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Bring all to the disk."""
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()

    @contextmanager
    def _tensorboard(self) -> Iterator["SummaryWriter | None"]:
        """What writes for it, if it is asked for.  One that failed never writes again, so another takes its place."""
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
            with suppress(ValueError):  # of a line that was being written when the run was killed
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        with atomic_write(self._path) as file:
            file.write("".join(kept).encode())


class BandedLoss:
    """Mean losses by bands of timesteps, gathered on the device and read when asked.

    Args:
        bands: first timesteps of all bands but the lowest.
        last: the last timestep T, which is a band of its own.

    Attributes:
        sums: (3, bands) on the device, of this process: counts, errors, losses; float64 where it has that.
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
        """(B,) timesteps, mean square errors and weighted losses; what is not finite does not count."""
        band = torch.bucketize(t.contiguous(), self._starts, right=True)
        rows = torch.stack([torch.ones_like(errors), errors, losses]).to(self.sums.dtype)
        self.sums.index_add_(1, band, torch.where(errors.isfinite(), rows, 0.0))

    def read(self, world: World) -> dict[str, float]:
        """The mean error of each band that had a picture, "loss" of all and "loss/weighted"; begins anew.

        Waits for the device.
        """
        counts, errors, losses = world.sum(self.sums).tolist()
        self.sums.zero_()
        metrics = {name: error / count for name, error, count in zip(self.names, errors, counts, strict=True) if count}
        total = sum(counts) or math.nan  # where none counts there is no loss
        return {"loss": sum(errors) / total, "loss/weighted": sum(losses) / total} | metrics
