"""Batches on the device before they are needed."""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from .dataset import Batch


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device; the next one is on its way while this one is used."""
    ready: deque[Batch] = deque()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(stream) if stream else nullcontext():
            ready.append(_moved(batch, device))
        if len(ready) == 2:
            yield _arrived(ready.popleft(), stream)


def _moved(batch: Batch, device: torch.device) -> Batch:
    def to(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    tokens = batch.tokens._replace(chunks=tuple(map(to, batch.tokens.chunks)), rows=to(batch.tokens.rows))
    return batch._replace(data=to(batch.data), tokens=tokens, time_ids=to(batch.time_ids), weights=to(batch.weights))


def _arrived(batch: Batch, stream: "torch.cuda.Stream | None") -> Batch:
    if stream is not None:
        now = torch.cuda.current_stream()
        now.wait_stream(stream)
        for tensor in (batch.data, *batch.tokens.chunks, batch.tokens.rows, batch.time_ids, batch.weights):
            tensor.record_stream(now)
    return batch
