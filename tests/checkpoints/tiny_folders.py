"""Tiny diffusers folders of every architecture, and what is done with them in several tests."""

import json
import multiprocessing
import os
import time

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints.single_file import to_single_file

from ..tiny_pipelines import make_tiny_sdxl

PARTS = {
    "SDXL": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "SD 1.x": ("unet", "vae", "text_encoder"),
    "SD 2.x": ("unet", "vae", "text_encoder"),
}
PIPELINES = {
    "SDXL": diffusers.StableDiffusionXLPipeline,
    "SD 1.x": diffusers.StableDiffusionPipeline,
    "SD 2.x": diffusers.StableDiffusionPipeline,
}


def make_tiny_folders(place):
    """One of each architecture, with random numbers: new networks have many zeros and ones, which look alike wherever
    they are put.
    """
    sdxl = make_tiny_sdxl(place / "sdxl")
    made = {"SDXL": sdxl}
    for version in (1, 2):
        made[f"SD {version}.x"] = _make_tiny_sd(place / f"sd{version}", sdxl, version)
    generator = torch.Generator().manual_seed(0)

    def randomize(tensors):
        return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}

    for model, folder in made.items():
        for part in PARTS[model]:
            rewrite(folder, part, randomize)
    return made


def _make_tiny_sd(folder, sdxl, version):
    """A folder of SD 1.x or 2.x, with the tokenizer and one text encoder of a tiny SDXL."""
    donor = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    with torch.random.fork_rng():
        torch.manual_seed(version)
        unet = diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=24,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            use_linear_projection=version == 2,
        )
        config = {**donor.text_encoder_2.config.to_dict(), "hidden_act": "gelu" if version == 2 else "quick_gelu"}
        text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    diffusers.StableDiffusionPipeline(
        unet=unet.eval(),
        vae=donor.vae,
        text_encoder=text_encoder.eval(),
        tokenizer=donor.tokenizer,
        scheduler=diffusers.PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def convert(folder, place, **options):
    place.mkdir(exist_ok=True)
    to_single_file(folder, place / "model.safetensors", **options)
    return place / "model.safetensors"


def weights(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def rewrite(folder, part, change):
    """Change the tensors of one network."""
    (file,) = (folder / part).glob("*.safetensors")
    save_file(change(load_file(file)), file)


def set_scheduler(folder, **changes):
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | changes))


def grow(folder, words):
    """Make the tables of words larger: for the tests here it is enough that there are many bytes."""
    for part, width in (("text_encoder", 16), ("text_encoder_2", 24)):

        def enlarge(tensors, width=width):
            (name,) = (name for name in tensors if name.endswith("token_embedding.weight"))
            return tensors | {name: torch.randn(words, width, generator=torch.Generator().manual_seed(width))}

        rewrite(folder, part, enlarge)
        config = folder / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": words}))
    return folder


def run_alone(function, *arguments, writes_in, killed_after=None, **options):
    """Run a function in another process, to be killed so many seconds after it began to write.

    What comes before the first write, imports above all, takes longer in some runs than in others, and a kill there
    would say nothing.

    Args:
        writes_in: the folder where a new name says that the writing has begun.

    Returns:
        How long it wrote, in seconds.
    """
    process = multiprocessing.get_context("fork").Process(target=_run, args=(function, arguments, options))
    before = set(os.listdir(writes_in))
    process.start()
    start = wait_for_a_new_name(writes_in, before, process.is_alive)
    if killed_after is not None:
        time.sleep(killed_after)
        process.kill()
    process.join()
    assert killed_after is not None or process.exitcode == 0
    return time.perf_counter() - start


def wait_for_a_new_name(folder, before, running):
    """When a folder had another name in it than before, or the one who was to make it had ended."""
    while running() and before >= set(os.listdir(folder)):
        time.sleep(0.0005)
    return time.perf_counter()


def _run(function, arguments, options):
    torch.set_num_threads(1)  # those of the parent are not in a forked process
    function(*arguments, **options)
