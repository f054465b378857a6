"""What LatentMeanRecorder costs a step of an SDXL U-Net.

    python benchmarks/recorder_overhead.py [--side N] [--steps N]

Runs an SDXL U-Net of random weights, on the GPU if there is one, and times what the recorder adds after each of its
evaluations.  Prints the table and puts it into benchmarks/RESULTS.md.
"""

import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from results import RESULTS, machine, markdown, write_section
from tqdm import trange

from ztsnr.diagnostics.latent_stats import LatentMeanRecorder

LIMIT = 0.01
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PARAMETERS = 2_567_463_684  # of stabilityai/stable-diffusion-xl-base-1.0


def sdxl_unet(device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """An SDXL U-Net of random weights, never held twice in memory."""
    with torch.device("meta"):
        network = UNet2DConditionModel(**SDXL).to(dtype)
    network.to_empty(device=device)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    if network.num_parameters() != PARAMETERS:
        raise RuntimeError(f"this is not SDXL's U-Net: it has {network.num_parameters()} parameters, not {PARAMETERS}")
    return network.eval()


def seconds(work: Callable[[], object], device: str, may_wait: bool = False) -> float:
    """How long it takes until the device has done it; waiting for the GPU within it raises, unless it may."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("default" if may_wait else "error")
    try:
        start.record()
        work()
        end.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


@torch.inference_mode()
def measure(device: str, dtype: torch.dtype, side: int, steps: int) -> dict[str, float]:
    """Median seconds of an evaluation of the network, and of what the recorder adds to it by either door.

    The recorder comes right after the network each time, so it finds the caches as a run leaves them.  The first
    evaluation warms up and does not count.
    """
    network = sdxl_unet(device, dtype)
    like = {"device": device, "dtype": dtype}
    x, text = torch.randn(1, 4, side, side, **like), torch.randn(1, 77, 2048, **like)
    added = {"text_embeds": torch.randn(1, 1280, **like), "time_ids": torch.ones(1, 6, **like)}
    plain, watched = (EulerDiscreteScheduler(prediction_type="v_prediction") for _ in range(2))
    for scheduler in (plain, watched):
        scheduler.set_timesteps(steps + 1, device=device)
        scheduler.set_begin_index(0)
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(**parts, unet=network, scheduler=watched)
    pipe._num_timesteps = steps + 1  # as its call would
    callback, recorder = LatentMeanRecorder().on(pipe), LatentMeanRecorder()

    times = []
    for i in trange(steps + 1):
        t, answer = plain.timesteps[i], {}
        for scheduler in (plain, watched):
            scheduler.scale_model_input(x, t)

        def evaluate(t=t, answer=answer):
            answer["v"] = network(x, t, text, added_cond_kwargs=added).sample

        def record(answer=answer):
            recorder.record(14.6, x, answer["v"])

        def step(t=t, answer=answer):
            plain.step(answer["v"], t, x, return_dict=False)

        def watched_step(i=i, t=t, answer=answer):
            watched.step(answer["v"], t, x, return_dict=False)
            callback(pipe, i, t, {"latents": x})

        network_time = seconds(evaluate, device, may_wait=True)
        record_time = seconds(record, device)
        times.append((network_time, record_time, seconds(watched_step, device) - seconds(step, device)))
    return dict(
        zip(("network", "record", "callback"), map(statistics.median, zip(*times[1:], strict=True)), strict=True)
    )


@click.command(help=__doc__.split("\n")[0])
@click.option("--side", type=click.IntRange(min=8), help="Latent side; by default 128 on a GPU, 16 on a processor.")
@click.option("--steps", type=click.IntRange(min=1), default=7, show_default=True, help="Evaluations that count.")
@click.option("--write/--no-write", default=True, show_default=True, help="Put the table into RESULTS.md.")
def main(side: int | None, steps: int, write: bool) -> None:
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    side = side or (128 if on_gpu else 16)
    times = measure(device, dtype, side, steps)
    rows = [
        [name, f"{1e6 * times[key]:.0f}", f"{times[key] / times['network']:.4%}"]
        for name, key in (("`record`, as in `sample`", "record"), ("`on`, in a pipeline with Euler", "callback"))
    ]
    reached = max(times["record"], times["callback"]) <= LIMIT * times["network"]
    waits = "Nothing waited for the GPU." if on_gpu else "There was no GPU: what it costs on one was not measured."
    text = (
        f"`python benchmarks/{Path(__file__).name} --side {side} --steps {steps}`, "
        f"{datetime.date.today().isoformat()}.\n"
        f"{machine(None)}{'; ' + torch.cuda.get_device_name() if on_gpu else ''}.\n\n"
        f"SDXL's U-Net ({PARAMETERS / 1e9:.2f} billion random weights, {str(dtype).removeprefix('torch.')}), latent "
        f"{(1, 4, side, side)}, no guidance: {times['network']:.3g} s an evaluation,\n"
        f"median of {steps}. Target at most {LIMIT:.0%}: {'reached' if reached else 'missed'}. {waits}\n\n"
        f"{markdown([['door', 'µs an evaluation', 'share'], *rows])}\n"
    )
    print(text)
    if write:
        write_section(RESULTS, "Recorder: overhead", text)


if __name__ == "__main__":
    main()
