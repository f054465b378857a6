"""Gradient checkpointing: which activations are kept for the backward pass, and which it recomputes.

The checkpointed blocks are those of diffusers, the residual and transformer blocks of a U-Net.  The input of each block
is always kept (Chen et al., arXiv 1604.06174).

    off         Keep everything that the backward pass needs.
    selective   Inside a block, keep the outputs of attention, convolutions and square linear layers (Korthikanti et
                al., arXiv 2205.05198).  Norms and activations cost almost nothing to recompute.  The wide linear layer
                of the feed-forward, whose output is eight times as large as its input, takes the most memory for its
                FLOPs.
    full        Keep nothing inside a block.

For SDXL in bfloat16 and one picture of 1024 x 1024, training/memory_plan.py and training/flops.py give: off keeps
6.41 GiB.  Selective keeps 2.36 GiB and adds 1.9 TFLOP, 9 % of the 20.2 of a training step.  Full keeps 0.55 GiB and
adds 5.2 TFLOP, 26 %.  So selective saves 2.2 GiB per additional TFLOP, and full another 0.5 GiB per TFLOP beyond it.
Keeping the outputs of all matrix products would take 4.14 GiB; keeping only those of attention and convolutions 1.18
GiB and 3.3 TFLOP.

Without compilation, selective inspects every operation in Python, which takes the same time for every batch size.
"""

from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..errors import UserError

MODES = ("off", "selective", "full")  # fastest first

_aten = torch.ops.aten
_KEPT = {
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
_WEIGHT = {_aten.mm.default: 1, _aten.addmm.default: 2}  # position of a linear layer's transposed weight


def apply_checkpointing(unet: UNet2DConditionModel, mode: str) -> None:
    """Set the checkpointing of a U-Net, replacing any earlier mode.  Gradients are the same in every mode.

    Raises:
        UserError: the mode is not in MODES.
    """
    if mode not in MODES:
        raise UserError(f"unknown gradient checkpointing {mode!r}: choose one of {', '.join(MODES)}")
    if mode == "off":
        unet.disable_gradient_checkpointing()
        return
    # not a bound method of the block, so that one compiled function serves all blocks of a kind
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
