"""What comfyui_samplers.py runs inside ComfyUI: by how far a sampler's pictures are too bright."""

import comfy.sample
import comfy.samplers
import inside
import torch
from comfyui_doors import DOORS, LIMIT

MEAN = -2.4  # of a black canvas


def bias(sampler: str, schedulers: list, cfg: float, door: str, steps: int = 20, side: int = 128) -> dict:
    """By scheduler, how many grey levels the mean of a black canvas is off, or None for a picture of NaN.

    The negative prompt asks for a quarter of that black and the positive one for as much more as guidance needs.  Both
    canvases have the same spread, so the guided one has it too and the exact answer is black; without guidance the
    prompts are the same.  CFG++ follows no flow of this kind: its exact answer is that of the same steps on the limit.

    Pictures are affine in the prompts' means, so the difference between two runs with the same noise, fresh noise
    included, is free of chance.  The starting noise has a mean of 0, lest samplers that choose their own steps answer
    it twice.
    """
    empty = torch.zeros(1, 4, side, side)
    noise = comfy.sample.prepare_noise(empty, 7)
    noise -= noise.mean((-2, -1), keepdim=True)
    negative, positive = (1.0, 1.0) if cfg == 1 else (0.25, 0.25 + 0.75 / cfg)

    def response(door, sigmas):
        """Mean of the picture of black prompts less that of grey ones."""
        pictures = [
            comfy.sample.sample_custom(
                DOORS[door](inside.ideal_model(0.0)), noise, cfg, comfy.samplers.sampler_object(sampler), sigmas,
                inside.prompt(positive * mean), inside.prompt(negative * mean), empty, seed=7,
            )
            for mean in (MEAN, 0.0)
        ]  # fmt: skip
        return (inside.raw(pictures[0]) - inside.raw(pictures[1])).double().mean().item()

    outcomes = {}
    for scheduler in schedulers:
        model = DOORS[door](inside.ideal_model(0.0))
        sigmas = comfy.samplers.KSampler(model, steps, "cpu", sampler, scheduler, denoise=1.0).sigmas
        exact = MEAN
        if cfg != 1 and "cfg_pp" in sampler:
            exact = response("limit", torch.cat([torch.tensor([LIMIT]), sigmas[1:]]))
        levels = (response(door, sigmas) - exact) * inside.LEVELS
        outcomes[scheduler] = levels if levels == levels else None
    return outcomes
