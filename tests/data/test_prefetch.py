"""Batches come in their order, each on the device when it is used; with CUDA, a stand-in of its streams."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ztsnr.data.dataset import Batch
from ztsnr.data.prefetch import ahead, sent
from ztsnr.data.tokens import TokenBatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def make_batches(count, read):
    for step in range(count):
        read.append(step)
        tokens = TokenBatch((torch.full((2, 77), step), torch.full((2, 77), step)), torch.arange(2)[:, None])
        rows = torch.zeros(2, 3, 8, 8), ["a", "b"], tokens, torch.zeros(2, 6), torch.ones(2)
        yield Batch(*rows, torch.arange(2), torch.arange(2), bucket=0, epoch=0, step=step)


def test_batches_come_in_order_and_the_next_one_is_read_already():
    read = []
    batches = ahead(make_batches(4, read), CPU)
    for step in range(3):
        batch = next(batches)
        assert batch.step == batch.tokens.chunks[1][0, 0] == step
        assert read == list(range(step + 2))


class Cuda:
    """What is asked of CUDA's streams, in order."""

    def __init__(self, monkeypatch):
        self.said, self.stream_now, self.count = [], "main", 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(FakeTensor, "record_stream", lambda tensor, stream: self.note("kept"), raising=False)

    def note(self, what):
        self.said.append((self.stream_now, what))

    @contextmanager
    def stream(self, stream):
        self.stream_now = "side"
        yield
        self.stream_now = "main"

    def record_event(self):
        self.count += 1
        self.note(f"sent {self.count}")
        return self.count

    def wait_event(self, event):
        self.note(f"waits for {event}")


def test_the_stream_that_computes_waits_for_its_batch_alone(monkeypatch):
    cuda = Cuda(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batches = ahead(make_batches(3, []), CUDA)
        batch = next(batches)
        tensors = batch.data, *batch.tokens.chunks, batch.tokens.rows, batch.time_ids, batch.weights
        assert {tensor.device for tensor in tensors} == {CUDA}
        assert cuda.said == [("side", "sent 1"), ("side", "sent 2"), ("main", "waits for 1"), *[("main", "kept")] * 6]
        next(batches)
    assert cuda.said[9:11] == [("side", "sent 3"), ("main", "waits for 2")]


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_is_sent_is_dense_and_from_pinned_memory(monkeypatch, device):
    """A strided tensor would have torch.compile make another graph, and one that is not pinned would be waited for."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = sent(torch.arange(6)[1::2], device)
    assert (there.device, there.stride(), len(pinned)) == (device, (1,), int(device == CUDA))
    if device == CPU:
        assert sent(torch.arange(6)[1::2], device).tolist() == [1, 3, 5]
