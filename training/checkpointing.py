"""Gradient checkpointing: what the backward pass finds in memory, and what it computes again.

Its pieces are those that diffusers checkpoints, the residual blocks and the transformer blocks of a U-Net, so the input
of each piece is kept in any case (Chen et al., arXiv 1604.06174).

    off         everything that the backward pass needs is kept.
    selective   of the inside of a piece, the outputs of attention, convolutions and square linear layers are kept
                (Korthikanti et al., arXiv 2205.05198): norms and activations cost next to nothing to compute again, and
                the wide layer of the feed-forward, whose output is eight times as large as its input, has the most
                memory for its FLOPs.
    full        nothing of the inside of a piece is kept.

For one picture of 1024 x 1024 and SDXL in bfloat16, by training/memory_plan.py and training/flops.py: off keeps
6.41 GiB; selective 2.36 GiB for 1.9 TFLOP more, which are 9 % of a training step's 20.2; full 0.55 GiB for 5.2 TFLOP
more, 26 %.  So selective saves 2.2 GiB a TFLOP, and going on to full 0.5.  To keep the outputs of all matrix products
takes 4.14 GiB, and only those of attention and convolutions 1.18 GiB for 3.3 TFLOP.

In the eager mode, selective has Python look at every operation, which takes as long with small batches as with large.
"""

from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..errors import UserError

MODES = ("off", "selective", "full")  # the fastest first

_aten = torch.ops.aten
_KEPT = {
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
_WEIGHT = {_aten.mm.default: 1, _aten.addmm.default: 2}  # where a linear layer has its transposed weight


def apply_checkpointing(unet: UNet2DConditionModel, mode: str) -> None:
    """Set how a U-Net is checkpointed, whatever it was before.  Gradients are the same in every mode.

    Raises:
        UserError: a mode that is not in MODES.
    """
    if mode not in MODES:
        raise UserError(f"gradient checkpointing {mode!r} is none of {', '.join(MODES)}")
    if mode == "off":
        unet.disable_gradient_checkpointing()
        return
    # the piece itself and no bound method of it, so that one compiled function serves those of one kind
    run = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        run = partial(run, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    unet.enable_gradient_checkpointing(run)


def _policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if function in _WEIGHT:
        rows, columns = args[_WEIGHT[function]].shape
        keep = rows == columns
    else:
        keep = function in _KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
