"""Speed and memory of a run: checkpointing that fits, compilation, the attention kernel, and measurements."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from typing import Any

import torch
import torch._dynamo
from diffusers import UNet2DConditionModel
from torch._inductor.compile_fx import compile_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..canvas import Size
from ..data.epoch_plan import BucketCount, EpochPlan
from ..data.tokens import TokenBatch
from ..errors import UserError
from ..world import World
from .checkpointing import MODES, apply_checkpointing
from .config import FinetuneSettings
from .flops import mfu, peak_flops, picture_flops
from .memory_plan import MemoryPlan, device_memory, measure_encoding, plan
from .networks import Networks

GIB = 2**30
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class Speed:
    """The parts of a run that concern time and memory.

    Args:
        settings: settings of the run.
        networks: the networks, on the device.
        epoch_plan: plan of the epochs.
        trained: names of the U-Net's trained parameters.
        latents_are_made: True if steps encode pixels, False if a cache gives latents.
        world: the processes of the run.
        say: called with each line for the user.

    Attributes:
        micro_batch: number of pictures that a device computes at a time.
        buckets: (width, height) of the buckets that the epoch plan uses.
        plan: the memory plan.
    """

    def __init__(
        self,
        settings: FinetuneSettings,
        networks: Networks,
        epoch_plan: EpochPlan,
        trained: list[str],
        latents_are_made: bool,
        world: World,
        say: Callable[[str], None],
    ):
        self._settings, self._world, self._say = settings, world, say
        share = settings.data.batch_size // world.size
        self.micro_batch = -(-share // settings.optimizer.accumulation)
        self._rest = share % self.micro_batch  # pictures of the last part, if it is smaller
        used = [count for count in epoch_plan.counts(0) if count.pictures]
        self.buckets = [count.size for count in used]
        compile_it = settings.speed.compile
        self._compiles = world.device.type == "cuda" if compile_it is None else compile_it
        self._graphs = self._warm = 0  # graphs compiled so far, and by the end of the warm-up
        self._attention = ExitStack()  # exited when this object is freed
        # the most chunks that a batch of prompts can have, see ``batch_prompts``
        self._longest = math.lcm(*range(1, settings.data.max_chunks + 1))
        self.plan = self._plan(networks, trained, latents_are_made)
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self._peak = peak_flops(name)
        self._flops = self._flops_of_a_picture(networks, used, trained) if self._peak else math.nan  # only MFU needs it
        self.start_interval()

    def _plan(self, networks: Networks, trained: list[str], latents_are_made: bool) -> MemoryPlan:
        settings, device = self._settings, self._world.device
        chosen = settings.speed.checkpointing
        on_device = device_memory(device) if device.type == "cuda" else _main_memory() // self._world.local_size
        largest = max(self.buckets, key=math.prod)
        average = settings.average
        profiles = 0 if average.on_cpu else len(average.sigma_rel) + (average.decay is not None)
        planned = plan(
            networks.unet,
            batch=self.micro_batch,
            buckets=self.buckets,
            memory=on_device,
            factor=networks.factor,
            text_length=77 * self._longest,
            dtype=getattr(torch, settings.model.dtype),
            optimizer=settings.optimizer.name,
            ema_profiles=profiles,
            trained=trained,
            others=[*networks.text_encoders, networks.vae],
            shards={"ddp": 1, "fsdp": self._world.size, "hsdp": self._world.local_size}[settings.speed.strategy],
            gradients_kept=settings.optimizer.accumulation > 1 or self._world.size > 1,
            compiled=self._compiles,
            encoding=measure_encoding(networks.vae, self.micro_batch, largest) if latents_are_made else 0,
            modes=MODES if chosen == "auto" else (chosen,),
        )
        self._say(str(planned))
        return planned

    def _flops_of_a_picture(self, networks: Networks, used: list[BucketCount], trained: list[str]) -> float:
        """Mean over the pictures of an epoch."""
        latents = [(count.size[1] // networks.factor, count.size[0] // networks.factor) for count in used]
        flops = picture_flops(networks.unet, latents, trained=trained)
        pictures = [count.pictures for count in used]
        return sum(map(math.prod, zip(flops, pictures, strict=True))) / sum(pictures)

    # ------------------------------------------------------------------------------------------------------------------
    # Before the first step

    def prepare(self, unet: UNet2DConditionModel, factor: int) -> None:
        """Set checkpointing, choose the attention kernel, and mark the U-Net for compilation at its first call.

        Args:
            unet: the U-Net, on the device.
            factor: pixels per latent along each side.

        Raises:
            UserError: no checkpointing mode fits into the memory.
        """
        if self.plan.mode is None and self._settings.speed.checkpointing == "auto":
            raise UserError(f"the run does not fit into the device's memory: {self.plan.advice}")
        apply_checkpointing(unet, self.plan.mode or self._settings.speed.checkpointing)
        if self._world.device.type == "cuda":
            width, height = max(self.buckets, key=math.prod)
            latents, dtype = (width // factor, height // factor), getattr(torch, self._settings.model.dtype)
            backends = choose_attention(unet, self.micro_batch, latents, dtype, self._say)
            self._attention.enter_context(sdpa_kernel(backends, set_priority=True))
        if self._compiles:
            # one graph per bucket, size of a part, and stage; above the limit torch would silently stop compiling
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 2**16
            unet.compile(backend=self._counted, dynamic=False)

    def warm_up(self, try_bucket: Callable[[Size, int], None]) -> None:
        """Compile for every bucket before the first step.

        Args:
            try_bucket: runs a forward and a backward pass of a bucket and a number of pictures.
        """
        if not self._compiles:
            return
        start = time.perf_counter()
        for bucket, batch in product(self.buckets, sorted({self.micro_batch, self._rest} - {0})):
            try_bucket(bucket, batch)
        self._warm = self._graphs
        self._say(f"compiled {len(self.buckets)} buckets in {time.perf_counter() - start:.0f} s")
        self.start_interval()

    def of_one_length(self, tokens: TokenBatch) -> TokenBatch:
        """If the U-Net is compiled, the prompts repeated to one length for all batches, so that one graph serves them.

        Attention over keys and values that are all repeated equals attention over them once.
        """
        if not self._compiles:
            return tokens
        return tokens._replace(rows=tokens.rows.repeat(1, self._longest // tokens.rows.shape[1]))

    def _counted(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        """A torch.compile backend that counts the U-Net's graphs; torchao's optimizers compile with another one."""
        self._graphs += 1
        return compile_fx(graph, inputs)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Within the block nothing is compiled, for shapes that occur rarely."""
        with torch.compiler.set_stance("force_eager") if self._compiles else nullcontext():
            yield

    @property
    def recompiled(self) -> int:
        """Number of graphs of the U-Net that were compiled after the warm-up; should be 0."""
        return self._graphs - self._warm

    # ------------------------------------------------------------------------------------------------------------------
    # Measuring

    def start_interval(self) -> None:
        """Start a new interval of measurement."""
        self._pictures, self._start = 0, time.perf_counter()
        if self._world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._world.device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block time does not count, because it does not train."""
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def count(self, pictures: int) -> None:
        """Add pictures, over all processes."""
        self._pictures += pictures

    def read(self) -> dict[str, float]:
        """Pictures per second over all processes in this interval, MFU and memory; waits for the device."""
        device = self._world.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        speed = self._pictures / max(time.perf_counter() - self._start, 1e-9)
        metrics = {"pictures a second": speed}
        share = mfu(speed / self._world.size, self._flops, self._peak)
        if share is not None:
            metrics["MFU"] = share
        if device.type == "cuda":
            metrics["peak memory (GiB)"] = torch.cuda.max_memory_allocated(device) / GIB
        if self._compiles:
            metrics["recompiled"] = self.recompiled
        return metrics


def choose_attention(
    unet: UNet2DConditionModel,
    batch: int,
    latents: Size,
    dtype: torch.dtype,
    say: Callable[[str], None],
    runs: int = 10,
) -> list[SDPBackend]:
    """Time the kernels of scaled_dot_product_attention on the U-Net's device.

    Times forward and backward pass of the self-attention at the U-Net's finest level with attention, with the memory
    layout that its heads have there.

    Args:
        unet: the U-Net, on the device.
        batch: pictures at a time.
        latents: (width, height) of the largest latents.
        dtype: dtype to compute in.
        say: called with the result.
        runs: timed repetitions.

    Returns:
        Backends for ``sdpa_kernel`` with ``set_priority``: the fastest, then those for shapes that it does not support.
        torch by itself tries cuDNN's after all others, or on some devices before them.
    """
    rest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with_attention = (index for index, kind in enumerate(unet.config["down_block_types"]) if "CrossAttn" in kind)
    block = next(with_attention, None)
    if block is None:
        return [*BACKENDS, SDPBackend.MATH]
    heads = unet.config["num_attention_heads"] or unet.config["attention_head_dim"]
    heads = heads[block] if isinstance(heads, list | tuple) else heads
    tokens = (latents[0] >> block) * (latents[1] >> block)
    shape = (batch, tokens, heads, unet.config["block_out_channels"][block] // heads)
    q, k, v, gradient = (
        torch.randn(shape, device=unet.device, dtype=dtype, requires_grad=True).transpose(1, 2) for _ in range(4)
    )
    times = {}
    for backend in BACKENDS:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            with sdpa_kernel([backend]):
                for run in range(runs + 3):
                    if run == 3:
                        begin.record()
                    answer = torch.nn.functional.scaled_dot_product_attention(q, k, v)
                    torch.autograd.grad(answer, (q, k, v), gradient)
                end.record()
        except RuntimeError:  # it does not support this shape, or is not available
            continue
        end.synchronize()
        times[backend] = begin.elapsed_time(end) / runs
    if not times:
        return rest
    fastest = min(times, key=times.__getitem__)
    measured = ", ".join(f"{backend.name.lower()} {ms:.3f} ms" for backend, ms in times.items())
    say(f"attention of {tokens} tokens, forward and backward: {measured}; using {fastest.name.lower()}")
    return list(dict.fromkeys([fastest, *rest]))


def _main_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
