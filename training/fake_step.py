"""A training step without data: real networks and real operations on tensors that have a shape and no memory.

What a step allocates and computes follows from shapes alone, so it can be found out before the first one, on any
machine and in seconds, on torch's meta device.  Attention is given the operation that it is on a GPU: one of which
autograd keeps the queries, keys, values, the output and its log-sum-exp (Dao et al., FlashAttention, arXiv 2205.14135),
and not the matrix of the weights.
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
    """Forward and backward pass of a U-Net as it is trained.

    Args:
        unet: with weights or on the meta device; not changed.
        batch: pictures B.
        latent: (h, w) of the latents.
        text_length: tokens of a prompt.
        dtype: that the network computes in; its parameters are in it already.
        checkpointing: of training/checkpointing.py.
        trained: names of the trained parameters; by default those that require gradients.

    Attributes:
        parameters: the copies of the U-Net's.
        inputs: noisy latents (B, C, h, w), timesteps (B,), text (B, text_length, width), target (B, C, h, w) and what
            else the U-Net is told.
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
    """Gives the meta device the fused operation, in place of the products and the softmax that it has otherwise."""
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
    """A copy of a network in which only the tensors are others: on the meta device, and in a dtype if one is given."""
    copies = {}
    for name, parameter in network.named_parameters():
        is_trained = parameter.requires_grad if trained is None else name in trained
        empty = torch.empty_like(parameter, dtype=dtype, device="meta")
        copies[id(parameter)] = torch.nn.Parameter(empty, is_trained)
    for buffer in network.buffers():
        kind = dtype if buffer.is_floating_point() else None
        copies[id(buffer)] = torch.empty_like(buffer, dtype=kind, device="meta")
    return copy.deepcopy(network, copies)
