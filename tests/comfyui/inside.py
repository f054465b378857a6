"""What runs inside ComfyUI's own interpreter: a worker that answers calls of the functions below.

    python inside.py COMFYUI    reads {"call": name, "arguments": {...}} lines, writes {"result" or "error": ...} lines

The model is a real ``comfy.model_base.SDXL`` in a real ModelPatcher; only its U-Net is replaced, by one that answers the
exact v of a Gaussian canvas whose mean the prompt sets.  So every picture has a known exact answer.
"""

import asyncio
import json
import logging
import math
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACK = str(ROOT).replace(".", "_x_")  # the name under which ComfyUI imports the pack


def start(comfyui: str) -> None:
    """Import ComfyUI for the CPU, the stock nodes that the checks use, and the pack as ComfyUI itself loads it."""
    sys.path.insert(0, comfyui)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import nodes

    extras = ("custom_sampler", "model_advanced", "apg", "mahiro", "pag", "eps", "differential_diffusion")
    for name in extras:
        path = Path(comfyui, "comfy_extras", f"nodes_{name}.py")
        if path.exists():  # newer cores have more of them
            asyncio.run(nodes.load_custom_node(str(path), module_parent="comfy_extras"))
    assert asyncio.run(nodes.load_custom_node(str(ROOT))), "the pack does not load"


def room(name: str):
    """A module of the pack: room("nodes.model_patch")."""
    import importlib

    return importlib.import_module(f"{PACK}.{name}")


# ----------------------------------------------------------------------------------------------------------------------
# Models


def ideal_model(mean=-2.4, brightness_std=0.3, texture_std=0.6, *, marks=("v_pred", "ztsnr"), trained_zero_snr=True):
    """A MODEL that answers exactly: latents with this mean, whatever the prompt, unless the prompt carries its own."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    diagnostics, samplers = room("diagnostics"), room("samplers")
    schedule = samplers.NoiseSchedule.sdxl(zero_terminal_snr=trained_zero_snr)

    class IdealUNet(torch.nn.Module):
        dtype = torch.float32

        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(4), requires_grad=False)  # something for LoRAs to change
            self.timesteps, self.controls, self.brightest = [], [], 0.0

        def forward(self, x, timesteps, context=None, control=None, **_):
            self.timesteps.append(timesteps.tolist())
            self.controls.append(control is not None)
            self.brightest = max(self.brightest, x.abs().max().item())
            x0s = []
            for row, t, prompt in zip(x.double().split(1), timesteps.tolist(), context, strict=True):
                shift = self.shift.double() + (0 if control is None else control["output"][0][0])
                canvas = diagnostics.GaussianCanvas(mean + prompt[0, 0].double() + shift, brightness_std, texture_std)
                sigma = schedule.sigma(t)
                x0s.append(samplers.from_denoised(canvas(row, sigma), row, sigma))
            return torch.cat(x0s).to(x.dtype)

    config = comfy.supported_models.SDXL(
        {"disable_unet_model_creation": True, "in_channels": 4, "adm_in_channels": 2816}
    )
    kind = config.model_type(dict.fromkeys(marks, torch.zeros(0)))
    model = comfy.model_base.SDXL(config, model_type=kind)
    model.diffusion_model = IdealUNet()
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def prompt(mean=0.0, **options):
    """A CONDITIONING that adds ``mean`` to the canvas."""
    import torch

    return [[torch.full((1, 77, 2048), float(mean)), {"pooled_output": torch.zeros(1, 1280), **options}]]


def patched(model=None, **settings):
    return room("nodes.model_patch").patch_model(ideal_model() if model is None else model, **settings)[0]


def empty_latent(height=32, width=32, batch=1):
    import torch

    return {"samples": torch.zeros(batch, 4, height, width)}


def exact_picture(seed, latent, mean=-2.4, brightness_std=0.3, texture_std=0.6):
    """What the flow makes of the noise that ComfyUI draws for this seed, in the scale of a LATENT."""
    import comfy.latent_formats
    import comfy.sample

    noise = comfy.sample.prepare_noise(latent["samples"], seed).double()
    exact = room("diagnostics").GaussianCanvas(mean, brightness_std, texture_std).exact(noise)
    return comfy.latent_formats.SDXL().process_out(exact)


def stock(node_id, *arguments, **inputs):
    """Run a node of either API by its id; its outputs."""
    import nodes

    node = nodes.NODE_CLASS_MAPPINGS[node_id]
    if hasattr(node, "execute") and hasattr(node, "GET_SCHEMA"):
        return node.execute(*arguments, **inputs).result
    return getattr(node(), node.FUNCTION)(*arguments, **inputs)


def ksampler(model, latent, *, seed=7, steps=20, cfg=1.0, sampler="euler", scheduler="simple", denoise=1.0, **prompts):
    positive, negative = prompts.get("positive") or prompt(), prompts.get("negative") or prompt()
    (result,) = stock(
        "KSampler", model=model, seed=seed, steps=steps, cfg=cfg, sampler_name=sampler, scheduler=scheduler,
        positive=positive, negative=negative, latent_image=latent, denoise=denoise,
    )  # fmt: skip
    return result["samples"]


def raw(samples):
    """A LATENT's samples in the scale of the model."""
    import comfy.latent_formats

    return comfy.latent_formats.SDXL().process_in(samples)


LEVELS = 127.5 / 2.4  # grey levels (of 255) in a latent unit


# ----------------------------------------------------------------------------------------------------------------------
# Checks.  They return numbers; the tests outside judge them.


def about():
    import comfy.samplers
    import comfyui_version
    import nodes

    return {
        "version": comfyui_version.__version__,
        "samplers": comfy.samplers.SAMPLER_NAMES,
        "schedulers": comfy.samplers.SCHEDULER_NAMES,
        "nodes": sorted(name for name, node in nodes.NODE_CLASS_MAPPINGS.items() if "ztsnr" in name.lower()),
    }


def bias(sampler, scheduler, steps=20, seeds=(7,)):
    """How far, in grey levels, the canvas's mean is off: the response to a mean of -2.4, exactly 1 in the exact flow.

    The model is affine in its mean, so the difference between two runs with the same noise, fresh noise included, is
    free of chance.
    """
    outcomes = {"levels": [], "finite": True, "first_t": None}
    for seed in seeds:
        pictures = []
        for mean in (-2.4, 0.0):
            model = patched(ideal_model(mean))
            pictures.append(raw(ksampler(model, empty_latent(), seed=seed, steps=steps, sampler=sampler,
                                         scheduler=scheduler)).double())  # fmt: skip
            outcomes["first_t"] = model.model.diffusion_model.timesteps[0][0]
        outcomes["finite"] &= all(bool(picture.isfinite().all()) for picture in pictures)
        outcomes["levels"].append(((pictures[0] - pictures[1]).mean().item() + 2.4) * LEVELS)
    return outcomes


CALLS = {name: function for name, function in globals().items() if callable(function)}


def serve(answers) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": globals()[request["call"]](**request["arguments"])}
        except Exception:
            reply = {"error": traceback.format_exc()}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    # standard output is the wire: whatever ComfyUI prints goes to standard error
    wire = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    comfyui, sys.argv = sys.argv[1], sys.argv[:1]
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    start(comfyui)
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    serve(wire)
