"""A training step without data: real networks and real operations on tensors that have a shape and no memory.

What a step allocates and computes follows from shapes alone, so torch's meta device can determine it before the first
step, in seconds and on any machine.  Attention uses the fused operation, as on a GPU: autograd keeps its queries, keys,
values, output and log-sum-exp, but not the matrix of weights (Dao et al., FlashAttention, arXiv 2205.14135).
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel

from .checkpointing import apply_checkpointing

Network = TypeVar("Network", bound=torch.nn.Module)


class FakeStep:
    """Forward and backward pass of a U-Net in training.

    Args:
        unet: U-Net with weights or on the meta device; not changed.
        batch: number of pictures, B.
        latent: (h, w) of the latents.
        text_length: number of tokens in a prompt.
        dtype: dtype of the computation; the parameters have it too, as in the copy that is trained.
        checkpointing: a mode of training/checkpointing.py.
        trained: names of the trained parameters; by default those that require gradients.

    Attributes:
        parameters: copies of the U-Net's parameters.
        inputs: noisy latents (B, C, h, w), timesteps (B,), text (B, text_length, width), target (B, C, h, w), and the
            U-Net's other conditions.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        *,
        batch: int,
        latent: tuple[int, int],
        text_length: int = 77,
        dtype: torch.dtype = torch.bfloat16,
        checkpointing: str = "off",
        trained: Collection[str] | None = None,
    ):
        self._unet = without_data(unet, dtype, trained).train()
        apply_checkpointing(self._unet, checkpointing)
        self.parameters = list(self._unet.parameters())
        config = unet.config
        with torch.device("meta"):
            noisy = torch.empty(batch, config["in_channels"], *latent, dtype=dtype)
            text = torch.empty(batch, text_length, config["cross_attention_dim"], dtype=dtype)
            target = torch.empty(batch, config["out_channels"], *latent)
            self.inputs = [noisy, torch.empty(batch), text, target]
            self._conditions = None
            if config["addition_embed_type"] == "text_time":
                numbers = 6 * config["addition_time_embed_dim"]
                pooled = torch.empty(batch, config["projection_class_embeddings_input_dim"] - numbers, dtype=dtype)
                self._conditions = {"text_embeds": pooled, "time_ids": torch.empty(batch, 6)}
                self.inputs += self._conditions.values()

    def forward(self) -> torch.Tensor:
        """The mean squared error, in float32."""
        noisy, timesteps, text, target = self.inputs[:4]
        with fused_attention():
            predicted = self._unet(noisy, timesteps, text, added_cond_kwargs=self._conditions).sample
        return torch.nn.functional.mse_loss(predicted.float(), target)

    def backward(self, loss: torch.Tensor) -> None:
        with fused_attention():
            loss.backward()


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within the block attention is the fused operation, also on the meta device."""
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


def without_data(network: Network, dtype: torch.dtype | None = None, trained: Collection[str] | None = None) -> Network:
    """A copy of a network whose tensors are on the meta device, converted to a dtype if one is given."""
    copies = {}
    for name, parameter in network.named_parameters():
        is_trained = parameter.requires_grad if trained is None else name in trained
        empty = torch.empty_like(parameter, dtype=dtype, device="meta")
        copies[id(parameter)] = torch.nn.Parameter(empty, is_trained)
    for buffer in network.buffers():
        kind = dtype if buffer.is_floating_point() else None
        copies[id(buffer)] = torch.empty_like(buffer, dtype=kind, device="meta")
    return copy.deepcopy(network, copies)
