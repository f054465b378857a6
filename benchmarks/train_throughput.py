"""How fast training is, beside the loop of diffusers' example for the same work.

    python benchmarks/train_throughput.py [--batch BATCH] [--steps STEPS] [--device DEVICE] [--no-write]

The U-Net is SDXL's with random weights, the latents are those of pictures of 1024 x 1024 and random, texts and sizes
too.  Prints the table and puts it into benchmarks/RESULTS.md.  Without CUDA it is a small U-Net, which says nothing of
a GPU: the table says so.
"""

import datetime
import gc
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from results import RESULTS, machine, markdown, write_section
from torch.nn.attention import sdpa_kernel

from ztsnr.data.prefetch import sent
from ztsnr.training.checkpointing import apply_checkpointing
from ztsnr.training.flops import mfu, peak_flops, unet_flops
from ztsnr.training.guard import StepGuard
from ztsnr.training.memory_plan import device_memory, plan
from ztsnr.training.networks import predict
from ztsnr.training.objective import Objective, ObjectiveSettings
from ztsnr.training.optimizers import clip_grad_norm, make_optimizer
from ztsnr.training.precision import MixedPrecision
from ztsnr.training.speed import choose_attention
from ztsnr.world import World

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 77
SMALL = {  # as SDXL's is built
    "sample_size": 32,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 64,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 64,
}
WARMUP = 3  # steps that are not timed
GOAL, AIM = 12, 20  # pictures a second of SDXL on one H200
NEAR = 0.05  # so near is the plan to be to the memory that is measured
GIB = 2**30


class Batch(NamedTuple):
    """B pictures, float32 on the device.

    Attributes:
        latents: (B, 4, h, w), as the U-Net takes them.
        hidden, pooled: (B, 77, 2048) and (B, 1280) of SDXL's text encoders.
        time_ids: (B, 6).
    """

    latents: torch.Tensor
    hidden: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor


class Measured(NamedTuple):
    """Pictures a second, and the most bytes of the device's memory at once; 0 where it does not count them.

    Attributes:
        planned: bytes, of the same; 0 without a plan.
    """

    speed: float
    memory: int
    planned: int = 0


def random_batch(unet: UNet2DConditionModel, batch: int, device: torch.device) -> Batch:
    generator, config = torch.Generator(device).manual_seed(0), unet.config
    side = config.sample_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    sizes = torch.tensor([[8.0 * side, 8.0 * side, 0.0, 0.0, 8.0 * side, 8.0 * side]], device=device)
    return Batch(
        normal(batch, config.in_channels, side, side),
        normal(batch, TOKENS, config.cross_attention_dim),
        normal(batch, pooled),
        sizes.repeat(batch, 1),
    )


def measure(step: Callable[[Batch], None], batches: Iterable[Batch], steps: int, device: torch.device) -> Measured:
    """Time steps behind some that are not timed."""
    batches = iter(batches)
    for batch in islice(batches, WARMUP):
        step(batch)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wait()
    pictures, begin = 0, time.perf_counter()
    for batch in islice(batches, steps):
        step(batch)
        pictures += len(batch.latents)
    wait()
    seconds = time.perf_counter() - begin
    return Measured(pictures / seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


# ----------------------------------------------------------------------------------------------------------------------
# The loop of diffusers' example


def diffusers_loop(unet: UNet2DConditionModel, batches: Iterable[Batch], steps: int, device: torch.device) -> Measured:
    """Training as diffusers' example for SDXL does it, with bf16 and gradient checkpointing, without EMA.

    Weights are float32 and the forward pass is under autocast, noise and timesteps are drawn on the device, the loss is
    the mean squared error to v in float32, gradients are clipped to 1, the optimizer is torch's AdamW as it comes, and
    each step reads its loss for the progress bar.
    """
    unet.train().enable_gradient_checkpointing()
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2)
    losses = []

    def step(batch: Batch) -> None:
        noise = torch.randn_like(batch.latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(noise),), device=device)
        noisy = scheduler.add_noise(batch.latents, noise, timesteps)
        target = scheduler.get_velocity(batch.latents, noise, timesteps)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = unet(
                noisy.bfloat16(),
                timesteps,
                batch.hidden.bfloat16(),
                added_cond_kwargs={"text_embeds": batch.pooled.bfloat16(), "time_ids": batch.time_ids},
                return_dict=False,
            )[0]
        loss = torch.nn.functional.mse_loss(predicted.float(), target.float())
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return measure(step, batches, steps, device)


# ----------------------------------------------------------------------------------------------------------------------
# Ours


class Conditioned(torch.nn.Module):
    """The U-Net of texts that are encoded already, as in diffusers' example."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, batch: Batch) -> torch.Tensor:
        hidden, pooled = batch.hidden.to(noisy.dtype), batch.pooled.to(noisy.dtype)
        return predict(self.unet, noisy, t, hidden, pooled, batch.time_ids)


def our_loop(
    unet: UNet2DConditionModel, batches: Iterable[Batch], steps: int, device: torch.device, *, compiled: bool
) -> Measured:
    """The parts of ``ztsnr finetune``, with its default settings: float32 weights, bfloat16 arithmetic, the objective,
    stratified timesteps, keyed noise, clipping, the guard, fused AdamW; on CUDA checkpointed as planned.
    Without averages of the weights, as in diffusers' example.

    Args:
        compiled: on CUDA, as ``ztsnr finetune`` does it; the plan of the memory is one without.
    """
    batches = iter(batches)
    first = next(batches)
    size, latent = len(first.latents), tuple(first.latents.shape[-2:])
    is_cuda = device.type == "cuda"
    planned, attention = 0, nullcontext()
    if is_cuda:
        memory = plan(unet, batch=size, buckets=[(8 * latent[1], 8 * latent[0])], memory=device_memory(device))
        print(memory)
        mode = memory.mode or "full"
        planned = memory.totals[mode]
        apply_checkpointing(unet, mode)
        attention = sdpa_kernel(choose_attention(unet, size, latent[::-1], torch.bfloat16, print), set_priority=True)
        if compiled:
            unet.compile(dynamic=False)
    layout = torch.channels_last if is_cuda else torch.contiguous_format
    unet.train().to(memory_format=layout)
    network = Conditioned(unet)
    model = MixedPrecision(network, torch.bfloat16, [name for name, _ in network.named_parameters()])
    objective = Objective(ObjectiveSettings(), device=device)
    optimizer = make_optimizer("adamw", [{"params": list(model.parameters())}], lr=1e-5)
    guard = StepGuard(Path("bad_batches"), 10, World(0, 1, 1, device))
    counter = count()

    def step(batch: Batch) -> None:
        number = next(counter)
        t = sent(objective.draw_timesteps(0, 0, number, size), device)
        noise = objective.draw_noise(batch.latents.shape[1:], range(size), 0, 0, number)
        noisy = objective.noisy(batch.latents, noise, t).bfloat16().contiguous(memory_format=layout)
        losses, _ = objective.losses(model(noisy, t, batch), batch.latents, noise, t)
        losses.mean().backward()
        norm = clip_grad_norm(model.parameters(), 1.0)
        guard.step(optimizer, norm, batch, t, number)
        guard.look()
        optimizer.zero_grad(set_to_none=True)

    with attention:
        return measure(step, chain([first], batches), steps, device)._replace(planned=planned)


NOT_COMPILED = "ztsnr finetune, not compiled"  # without CUDA nothing is
WAYS = {
    "diffusers' example": diffusers_loop,
    NOT_COMPILED: partial(our_loop, compiled=False),
    "ztsnr finetune": partial(our_loop, compiled=True),
}


# ----------------------------------------------------------------------------------------------------------------------
# The table


def make_unet(config: dict[str, Any], device: torch.device | str) -> UNet2DConditionModel:
    with torch.device(device):
        return UNet2DConditionModel(**config)


def full_size() -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    from tests.full_size import UNETS

    return UNETS["SDXL base"]


@click.command(help=__doc__.split("\n")[0])
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Pictures of a step.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="That are timed.")
@click.option("--device", default="auto", show_default=True, help="auto takes CUDA if there is one.")
@click.option("--write/--no-write", default=True, show_default=True, help="Put the table into RESULTS.md.")
def main(batch: int, steps: int, device: str, write: bool) -> None:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else "no GPU"
    config = full_size() if is_cuda else SMALL
    side = config["sample_size"]
    flops = unet_flops(make_unet(config, "meta"), 1, (side, side), TOKENS)
    rows, found = [["training", "pictures a second", "MFU", "memory at most", "planned"]], []
    for way, run in WAYS.items():
        if way == NOT_COMPILED and not is_cuda:
            continue
        torch.manual_seed(0)
        unet = make_unet(config, device)
        found.append(run(unet, repeat(random_batch(unet, batch, device)), steps, device))
        share = mfu(found[-1].speed, flops, peak_flops(name))
        rows.append(
            [
                way,
                f"{found[-1].speed:.2f}",
                f"{share:.1%}" if share is not None else "not known",
                *(f"{size / GIB:.1f} GiB" if size else "not known" for size in found[-1][1:]),
            ]
        )
        print(*rows[-1], sep=", ")
        del unet
        gc.collect()  # optimizers refer to themselves
        if is_cuda:
            torch.cuda.empty_cache()
    what = "SDXL's U-Net" if is_cuda else "Not measured on a GPU: there is none here. A small U-Net"
    text = (
        f"`python benchmarks/{Path(__file__).name} --batch {batch} --steps {steps}`, "
        f"{datetime.date.today().isoformat()}.\n"
        f"{name}; {machine(None)}.\n\n"
        f"{what} of random weights, {steps} steps of {batch} pictures of {8 * side} x {8 * side} as random latents,\n"
        f"{flops / 1e12:.3g} TFLOP each (what checkpointing computes again is not counted). Ours is "
        f"{found[-1].speed / found[0].speed:.2f} x as fast{goals(*found) if is_cuda else ''}.\n\n"
        f"{markdown(rows)}\n"
    )
    print(text)
    if write:
        write_section(RESULTS, "Training: pictures a second", text)


def goals(theirs: Measured, eager: Measured, ours: Measured) -> str:
    """What was to be reached on one H200; the plan of the memory is for the eager mode."""
    aims = {"2 x": 2 * theirs.speed, f"{GOAL} pictures a second": GOAL, f"{AIM}": AIM}
    reached = {aim: ours.speed >= least for aim, least in aims.items()}
    off = eager.memory / eager.planned - 1
    reached[f"memory within {NEAR:.0%} of the plan (not compiled, {off:+.1%})"] = abs(off) <= NEAR
    return ": " + ", ".join(f"{aim} {'reached' if is_so else 'missed'}" for aim, is_so in reached.items())


if __name__ == "__main__":
    main()
