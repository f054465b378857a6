"""The learning rate over the steps of a training."""

import math

from torch import Tensor
from torch.optim import Optimizer

from ..errors import UserError

SCHEDULES = ("constant", "cosine", "rsqrt")


def lr_factor(
    step: int,
    *,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int | None = None,
    final_share: float = 0.0,
    reference_steps: int | None = None,
) -> float:
    """The factor on the learning rate of a step.  It depends on the step alone, so a resume needs no state.

    - constant: 1.
    - cosine: from 1 after the warm-up, along half a cosine, to ``final_share`` at ``total_steps`` (arXiv 1608.03983).
    - rsqrt: 1 / sqrt(max(step / reference_steps, 1)), the decay of EDM2 (arXiv 2312.02696).

    Args:
        step: number of the step that is about to be taken, from 0.
        schedule: one of SCHEDULES.
        warmup_steps: steps over which the factor also rises linearly, from 1 / warmup_steps in step 0 to 1.
        total_steps: steps of the training; for cosine only.
        final_share: factor at the end; for cosine only.
        reference_steps: step at which the decay begins; for rsqrt only.

    Raises:
        UserError: there is no such schedule, or a number that it needs is missing or out of range.
    """
    warmup = min((step + 1) / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    if schedule == "constant":
        return warmup
    if schedule == "cosine":
        if total_steps is None or total_steps <= warmup_steps:
            raise UserError(f"cosine needs total_steps above the {warmup_steps} of the warm-up, not {total_steps}")
        progress = min(max(step - warmup_steps, 0) / (total_steps - warmup_steps), 1.0)
        return warmup * (final_share + (1 - final_share) * (1 + math.cos(math.pi * progress)) / 2)
    if schedule == "rsqrt":
        if reference_steps is None or reference_steps < 1:
            raise UserError(f"rsqrt needs reference_steps of at least 1, not {reference_steps}")
        return warmup / math.sqrt(max(step / reference_steps, 1.0))
    raise UserError(f"there is no learning-rate schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Give every group its learning rate times ``lr_factor`` of the step."""
    for group in optimizer.param_groups:
        lr = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):  # torchao keeps it on the CPU, to compile its step once for all values
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
