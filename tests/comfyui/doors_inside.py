"""The three models of benchmarks/comfyui_doors.py, by which other people's packs are judged."""

import sys

import inside
import torch

sys.path.append(str(inside.ROOT / "benchmarks"))

from comfyui_doors import DOORS


def pictures(path, sampler, cfg):
    """By door, pictures of a black and of a grey model, written to a file together with the noise."""
    import comfy.sample
    import numpy as np

    latent = inside.empty_latent(64, 64)
    prompts = {"positive": inside.prompt(0.3), "negative": inside.prompt(-0.1)} if cfg != 1 else {}
    by_door = {
        door: torch.stack([
            inside.raw(inside.ksampler(make(inside.ideal_model(mean)), latent, sampler=sampler, cfg=cfg, **prompts))
            for mean in (-2.4, 0.0)
        ])
        for door, make in DOORS.items()
    }  # fmt: skip
    with open(path, "wb") as file:
        np.savez(file, noise=comfy.sample.prepare_noise(latent["samples"], 7), **by_door)
