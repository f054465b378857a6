"""Copying tensors to the device before they are needed, without waiting for it."""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from functools import partial

import torch

from ..samplers.devices import send
from .dataset import Batch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on its way to the device.  It is pinned first: copying unpinned memory, CUDA may wait."""
    tensor = tensor.contiguous()
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def ahead(batches: Iterator[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """The batches on the device; the next one is copied while this one is used."""
    ready: deque[tuple[Batch, torch.Event | None]] = deque()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(stream) if stream else nullcontext():
            moved = _moved(batch, device)
            ready.append((moved, stream.record_event() if stream else None))
        if len(ready) == 2:
            yield _arrived(*ready.popleft())


def _moved(batch: Batch, device: torch.device) -> Batch:
    assert batch.tokens is not None  # training needs a dataset with ``tokenize``
    to = partial(send, device=device)
    tokens = batch.tokens._replace(chunks=tuple(map(to, batch.tokens.chunks)), rows=to(batch.tokens.rows))
    return batch._replace(data=to(batch.data), tokens=tokens, time_ids=to(batch.time_ids), weights=to(batch.weights))


def _arrived(batch: Batch, event: torch.Event | None) -> Batch:
    """The batch, once the computing stream waits for its copy, and not for the copies after it."""
    if event is not None:
        assert batch.tokens is not None
        now = torch.cuda.current_stream(batch.data.device)
        now.wait_event(event)
        for tensor in (batch.data, *batch.tokens.chunks, batch.tokens.rows, batch.time_ids, batch.weights):
            tensor.record_stream(now)  # else the copy stream could reuse its memory before this one is done
    return batch
