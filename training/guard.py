"""Steps whose gradient is no number: not taken, written down, and too many of them end the run."""

import json
from collections import deque
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch.distributed.tensor.experimental import implicit_replication

from ..data.dataset import Batch
from ..errors import UserError
from ..files import atomic_write
from ..world import World


class _Pending(NamedTuple):
    """A step whose outcome is on its way from the device."""

    step: int
    bad: torch.Tensor  # () float32 on the CPU, once it has arrived
    arrived: "torch.cuda.Event | None"
    norm: torch.Tensor
    batch: Batch
    t: torch.Tensor


class StepGuard:
    """Takes the optimizer's steps, but for those whose gradient is not finite.

    The norm of the gradient is that of all processes together, so they all leave out the same steps.  Where the
    optimizer can (torch's fused AdamW), it decides on the device and nothing is waited for; with the others the norm is
    read.

    Args:
        folder: for the batches of such steps.
        limit: the run ends after so many of them in a row.
    """

    def __init__(self, folder: Path, limit: int, world: World):
        self.folder, self.limit, self.world = folder, limit, world
        self._pending: deque[_Pending] = deque()
        self._last_bad, self._in_a_row, self._skipped = -1, 0, 0
        self._norm: torch.Tensor | None = None

    def step(
        self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, batch: Batch, t: torch.Tensor, step: int
    ) -> torch.Tensor:
        """Let the optimizer take its step if the gradient's norm () is finite; () float32, 1 if it was not."""
        self._norm = norm
        bad = (~torch.isfinite(norm)).float()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, bad
            with implicit_replication():  # ``bad`` is the same on all ranks, whatever shares of weights they have
                optimizer.step()
        elif not bad:
            optimizer.step()
        on_host, arrived = bad, None
        if bad.is_cuda:
            on_host = torch.empty((), pin_memory=True).copy_(bad, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(_Pending(step, on_host, arrived, norm, batch, t))
        return bad

    def look(self) -> None:
        """At the steps whose outcome is known by now.

        Raises:
            UserError: too many steps in a row were left out; a report.
        """
        while self._pending and (self._pending[0].arrived is None or self._pending[0].arrived.query()):
            self._look_at(self._pending.popleft())

    def read(self) -> dict[str, float]:
        """What happened, as metrics; waits for the device.  For what is raised see ``look``."""
        if self._pending and self._pending[-1].arrived is not None:
            self._pending[-1].arrived.synchronize()
        self.look()
        return {"gradient norm": float(self._norm), "steps left out": self._skipped} if self._norm is not None else {}

    def state(self) -> dict[str, int]:
        """For the state of the run."""
        return {"last_bad": self._last_bad, "in_a_row": self._in_a_row, "skipped": self._skipped}

    def load(self, state: dict[str, int]) -> None:
        """Go on from ``state``."""
        self._last_bad, self._in_a_row, self._skipped = state["last_bad"], state["in_a_row"], state["skipped"]

    def _look_at(self, pending: _Pending) -> None:
        if not pending.bad:
            return
        self._in_a_row = self._in_a_row + 1 if pending.step == self._last_bad + 1 else 1
        self._last_bad = pending.step
        self._skipped += 1
        found = self._write(pending)
        if self._in_a_row >= self.limit:
            raise UserError(
                f"the gradient was not finite in {self._in_a_row} steps in a row, up to step {pending.step}, and none "
                f"of them was taken; the last batch {found}: lower the learning rate, or look at its pictures"
            )

    def _write(self, pending: _Pending) -> str:
        """Where this process's share of the batch is now, as the end of a sentence."""
        batch = pending.batch
        path = self.folder / f"step-{pending.step:08d}-rank-{self.world.rank}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = {"data": batch.data, "timesteps": pending.t, "weights": batch.weights, "pictures": batch.pictures}
            about = {"captions": json.dumps(batch.captions, ensure_ascii=False), "norm": str(float(pending.norm))}
            with atomic_write(path) as file:
                file.write(save({name: tensor.contiguous().cpu() for name, tensor in rows.items()}, about))
        except (OSError, UserError):  # a full disk; the run matters more
            return "could not be written down"
        return f"is in {path}"
