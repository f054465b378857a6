"""Tensors on the device before they are needed, and without waiting for it."""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch

from ..samplers.devices import send
from .dataset import Batch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on its way to the device; from memory that is not pinned CUDA may wait for all it does."""
    tensor = tensor.contiguous()
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device; the next one is on its way while this one is used."""
    ready: deque[tuple[Batch, torch.cuda.Event | None]] = deque()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(stream) if stream else nullcontext():
            moved = _moved(batch, device)
            ready.append((moved, stream.record_event() if stream else None))
        if len(ready) == 2:
            yield _arrived(*ready.popleft())


def _moved(batch: Batch, device: torch.device) -> Batch:
    to = partial(send, device=device)
    tokens = batch.tokens._replace(chunks=tuple(map(to, batch.tokens.chunks)), rows=to(batch.tokens.rows))
    return batch._replace(data=to(batch.data), tokens=tokens, time_ids=to(batch.time_ids), weights=to(batch.weights))


def _arrived(batch: Batch, event: "torch.cuda.Event | None") -> Batch:
    """The batch for the stream that computes, which waits for this one and not for those behind it."""
    if event is not None:
        now = torch.cuda.current_stream(batch.data.device)
        now.wait_event(event)
        for tensor in (batch.data, *batch.tokens.chunks, batch.tokens.rows, batch.time_ids, batch.weights):
            tensor.record_stream(now)  # its memory is of the other stream, and must not be given away too early
    return batch
