"""Steps whose gradient is not finite: they are skipped and recorded, and too many in a row end the run."""

import json
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save
from torch.distributed.tensor.experimental import implicit_replication

from ..data.dataset import Batch
from ..errors import UserError
from ..files import atomic_write
from ..world import World


class _Pending(NamedTuple):
    """A step whose outcome is still being copied from the device."""

    step: int
    bad: torch.Tensor  # () float32 on the CPU, once it has arrived
    arrived: "torch.cuda.Event | None"
    norm: torch.Tensor
    batch: Batch
    t: torch.Tensor
    errors: torch.Tensor | None


class StepGuard:
    """Takes the optimizer's steps, except those whose gradient is not finite.

    The norm is that of the gradient over all processes, so they all skip the same steps.  torch's fused AdamW decides
    on the device, and nothing waits; for other optimizers the host reads the norm.

    Args:
        folder: folder for the batches of skipped steps.
        limit: number of skipped steps in a row that ends the run.
        world: the processes of the run.
    """

    def __init__(self, folder: Path, limit: int, world: World):
        self.folder, self.limit, self.world = folder, limit, world
        self._pending: deque[_Pending] = deque()
        self._last_bad, self._in_a_row, self._skipped = -1, 0, 0
        self._norm: torch.Tensor | None = None

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        norm: torch.Tensor,
        batch: Batch,
        t: torch.Tensor,
        step: int,
        errors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Take the optimizer's step if the gradient's norm, (), is finite.  Returns () float32: 1 if it was skipped.

        ``errors``, (B,) of this rank's pictures, tell a network without numbers from a gradient without.
        """
        self._norm = norm
        bad = (~torch.isfinite(norm)).float()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # As for torch's GradScaler: the fused step reads found_inf on the device, and does nothing if it is 1.
            fused = cast(Any, optimizer)
            fused.grad_scale, fused.found_inf = None, bad
            with implicit_replication():  # ``bad`` is equal on all ranks, though their shards differ
                optimizer.step()
        elif not bad:
            optimizer.step()
        # Copy the outcome to the host in the background; ``look`` finds it some steps later.
        on_host, arrived = bad, None
        if bad.is_cuda:
            on_host = torch.empty((), pin_memory=True).copy_(bad, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(_Pending(step, on_host, arrived, norm, batch, t, errors))
        return bad

    def look(self) -> None:
        """Record the skipped steps whose outcome has arrived.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        while self._pending and (self._pending[0].arrived is None or self._pending[0].arrived.query()):
            self._look_at(self._pending.popleft())

    def read(self) -> dict[str, float]:
        """Metrics; waits for the device.  Raises as ``look`` does."""
        if self._pending and self._pending[-1].arrived is not None:
            self._pending[-1].arrived.synchronize()
        self.look()
        return {"gradient norm": float(self._norm), "steps left out": self._skipped} if self._norm is not None else {}

    def state(self) -> dict[str, int]:
        """The numbers for the state of the run."""
        return {"last_bad": self._last_bad, "in_a_row": self._in_a_row, "skipped": self._skipped}

    def load(self, state: dict[str, int]) -> None:
        """Resume from ``state``."""
        self._last_bad, self._in_a_row, self._skipped = state["last_bad"], state["in_a_row"], state["skipped"]

    def _look_at(self, pending: _Pending) -> None:
        if not pending.bad:
            return
        self._in_a_row = self._in_a_row + 1 if pending.step == self._last_bad + 1 else 1
        self._last_bad = pending.step
        self._skipped += 1
        found = self._write(pending)
        if pending.step == 0 and _broke(pending):
            raise UserError(
                "the network gives numbers that are not finite in the first step, though its pictures and weights are "
                f"finite; the batch {found}: if model.dtype is float16, the network overflows in it; set float32"
            )
        if self._in_a_row >= self.limit:
            raise UserError(
                f"the gradient was not finite in {self._in_a_row} steps in a row, up to step {pending.step}, and "
                f"all were skipped; the last batch {found}: lower optimizer.learning_rate, or look at its pictures"
            )

    def _write(self, pending: _Pending) -> str:
        """Write this process's share of the batch; says where it is, as the end of a sentence."""
        batch = pending.batch
        path = self.folder / f"step-{pending.step:08d}-rank-{self.world.rank}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = {"data": batch.data, "timesteps": pending.t, "weights": batch.weights, "pictures": batch.pictures}
            about = {"captions": json.dumps(batch.captions, ensure_ascii=False), "norm": str(float(pending.norm))}
            with atomic_write(path) as file:
                file.write(save({name: tensor.contiguous().cpu() for name, tensor in rows.items()}, about))
        except (OSError, UserError):  # a full disk does not end the run
            return "could not be written"
        return f"is in {path}"


def _broke(pending: _Pending) -> bool:
    """True if the network's output is not finite although its input is."""
    errors, data = pending.errors, pending.batch.data
    return errors is not None and not bool(errors.isfinite().all()) and bool(data.isfinite().all())
