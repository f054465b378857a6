"""Your network and guidance, our steps and solver: `python examples/own_loop.py "completely black" out.png`.

The network is the small one that comes with the package, of 32 x 32 pixels.
"""

import sys
from pathlib import Path

import torch

from ztsnr.checkpoints import load_pipeline
from ztsnr.samplers import NoiseSchedule, exposure_true_guidance, sample, step_schedule, to_denoised

WEIGHTS = Path(__file__).resolve().parent.parent / "demo" / "weights"
SIDE, SCALE = 32, 4.0


@torch.no_grad()
def main(prompt: str, out: str) -> None:
    pipe = load_pipeline(WEIGHTS / "v_zero_snr.safetensors", config=WEIGHTS / "config").pipeline
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    text, no_text, pooled, no_pooled = pipe.encode_prompt(prompt, do_classifier_free_guidance=True, negative_prompt="")
    time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32)

    def ask(x, sigma, text, pooled):
        t, condition = schedule.timestep(sigma), {"text_embeds": pooled, "time_ids": time_ids}  # 999 at infinity
        v = pipe.unet(x, t, encoder_hidden_states=text, added_cond_kwargs=condition).sample
        return to_denoised(v, x, sigma, "v_prediction")

    def denoise(x, sigma):
        return exposure_true_guidance(ask(x, sigma, text, pooled), ask(x, sigma, no_text, no_pooled), SCALE)

    sigmas = step_schedule(schedule, 20, latent_size=(SIDE, SIDE), guidance=SCALE)  # inf, ..., 0
    latents = sample(denoise, torch.randn(1, 4, SIDE, SIDE), sigmas)
    picture = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    pipe.image_processor.postprocess(picture)[0].save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
