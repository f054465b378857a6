"""A diffusers pipeline that starts from pure noise, with guidance that leaves brightness to the prompt.

python examples/scheduler_swap.py MODEL "completely black" black.png
"""

import sys

import torch
from diffusers import DiffusionPipeline

from ztsnr.samplers import ZTSNRScheduler, attach


def main(model: str, prompt: str, out: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(model)
    side = pipe.unet.config.sample_size  # of the latents: 128 for SDXL
    pipe.scheduler = ZTSNRScheduler.from_config(pipe.scheduler.config, latent_size=(side, side))
    attach(pipe)
    generator = torch.Generator().manual_seed(0)
    pipe(prompt, num_inference_steps=20, guidance_scale=5, generator=generator).images[0].save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
