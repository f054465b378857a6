"""What runs inside ComfyUI's own interpreter: a worker that answers calls of the functions below and beside it.

    python inside.py COMFYUI    reads {"call": name, "arguments": {...}} lines, writes {"result" or "error": ...} lines

The model is a real ``comfy.model_base.SDXL`` in a real ModelPatcher; only its U-Net is replaced, by one that answers
the exact v of a Gaussian canvas whose mean the prompt sets.  So every picture has a known exact answer.
"""

import asyncio
import json
import logging
import os
import sys
import time
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

    extras = ("custom_sampler", "model_advanced", "apg", "mahiro", "pag", "eps", "differential_diffusion", "cfg",
              "tcfg", "perpneg")  # fmt: skip
    for name in extras:
        path = Path(comfyui, "comfy_extras", f"nodes_{name}.py")
        if path.exists():  # newer cores have more of them
            asyncio.run(nodes.load_custom_node(str(path), module_parent="comfy_extras"))
    global load_seconds
    start = time.process_time()
    assert asyncio.run(nodes.load_custom_node(str(ROOT))), "the pack does not load"
    load_seconds = time.process_time() - start


def room(name: str):
    """A module of the pack: room("nodes.model_patch")."""
    import importlib

    return importlib.import_module(f"{PACK}.{name}")


# ----------------------------------------------------------------------------------------------------------------------
# Models


def ideal_model(
    mean=-2.4,
    brightness_std=0.3,
    texture_std=0.6,
    *,
    channels=(1.0, 1.0, 1.0, 1.0),
    marks=("v_pred", "ztsnr"),
    trained_zero_snr=True,
):
    """A MODEL that answers exactly: latents whose mean is ``mean`` plus the prompt's number, times the channel's."""
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
                shift = self.shift.double() + (0 if control is None else control["output"][0].mean())
                number = (mean + prompt[0, 0].double()) * torch.tensor(channels, dtype=torch.float64)
                canvas = diagnostics.GaussianCanvas(number + shift, brightness_std, texture_std)
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


def wait(seconds):
    """Nothing, for so long."""
    import time

    time.sleep(seconds)


def has_node(node_id, inputs=()):
    """Whether this core has a node, with these inputs."""
    import nodes

    node = nodes.NODE_CLASS_MAPPINGS.get(node_id)
    if node is None:
        return False
    known = node.INPUT_TYPES()
    return set(inputs) <= {*known.get("required", {}), *known.get("optional", {})}


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
PAPER = "Lin et al. 2023"  # the method of ZTSNR Guidance Rescale that is core RescaleCFG's


# ----------------------------------------------------------------------------------------------------------------------
# Checks.  They return numbers; the tests outside judge them.


def about():
    import comfy.samplers
    import comfyui_version

    import nodes

    return {
        "version": comfyui_version.__version__,
        "load_seconds": load_seconds,
        "samplers": comfy.samplers.SAMPLER_NAMES,
        "schedulers": comfy.samplers.SCHEDULER_NAMES,
        "nodes": sorted(name for name in nodes.NODE_CLASS_MAPPINGS if "ZTSNR" in name or "LatentMean" in name),
    }


def bias(sampler, schedulers, steps=20, side=32, **settings):
    """How far, in grey levels, the canvas's mean is off: the response to a mean of -2.4, exactly 1 in the exact flow.

    The model is affine in its mean, so the difference between two runs with the same noise, fresh noise included, is
    free of chance.  The starting noise has a mean of 0, lest samplers that choose their own steps answer it twice.
    """
    import comfy.sample
    import torch

    empty = torch.zeros(1, 4, side, side)
    noise = comfy.sample.prepare_noise(empty, 7)
    noise -= noise.mean((-2, -1), keepdim=True)
    outcomes = {}
    for scheduler in schedulers:
        pictures, timesteps = [], []
        for mean in (-2.4, 0.0):
            model = patched(ideal_model(mean), **settings)
            picture = comfy.sample.sample(
                model, noise, steps, 1.0, sampler, scheduler, prompt(), prompt(), empty, seed=7
            )
            pictures.append(raw(picture))
            timesteps.append(model.model.diffusion_model.timesteps)
        levels = ((pictures[0] - pictures[1]).double().mean().item() + 2.4) * LEVELS
        outcomes[scheduler] = {
            "levels": levels if pictures[0].isfinite().all() and pictures[1].isfinite().all() else None,
            "first_t": timesteps[0][0][0],
        }
    return outcomes


def overhead(sampler, pairs, steps, shape):
    """Processor seconds a step of KSampler's work without and with our patch, in pairs of runs, on a free model.

    The model returns its input, so a step is nothing but ComfyUI's and our own bookkeeping.  Who begins alternates, and
    so does what the machine's other programs do to both.
    """
    import time

    import comfy.sample
    import torch

    class Free(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x, timesteps, **_):
            return x

    def free_model():
        model = ideal_model()
        model.model.diffusion_model = Free()
        return model

    plain, ours = free_model(), patched(free_model())
    empty = torch.zeros(shape)
    noise = comfy.sample.prepare_noise(empty, 7)

    def seconds(model):
        start = time.thread_time()
        comfy.sample.sample(model, noise, steps, 1.0, sampler, "simple", prompt(), prompt(), empty, seed=7,
                            disable_pbar=True)  # fmt: skip
        return (time.thread_time() - start) / steps

    times = []
    for i in range(-1, pairs):
        order = (plain, ours) if i % 2 else (ours, plain)
        took = {model: seconds(model) for model in order}
        times.append([took[plain], took[ours]])
    return times[1:]  # the first pair warms up


def few_steps(sampler, schedulers):
    """Which (scheduler, steps) end in anything but finite numbers."""
    bad = []
    for scheduler in schedulers:
        for steps in (1, 2, 3):
            picture = ksampler(patched(), empty_latent(8, 8), steps=steps, sampler=sampler, scheduler=scheduler)
            if not picture.isfinite().all():
                bad.append([scheduler, steps])
    return bad


def stock_sigmas(scheduler, steps, **settings):
    """Of a scheduler in KSampler's list, behind ZTSNR Model with these settings."""
    choices = {"prediction": "auto", "schedule": "auto", "first_step": "exact infinity", "canvas_shift": 1.0}
    (model,) = stock("ZTSNRModelSampling", model=ideal_model(), **choices | settings)
    (sigmas,) = stock("BasicScheduler", model, scheduler, steps, 1.0)
    return [str(sigma) for sigma in sigmas.tolist()]


def our_sigmas(steps, spacing, size=(128, 128), **settings):
    """ZTSNR Scheduler's sigmas, with these of its newer settings."""
    model, latent = patched(), empty_latent(*size)
    (sigmas,) = stock("ZTSNRScheduler", model=model, steps=steps, spacing=spacing, denoise=1.0, latent=latent,
                      **settings)  # fmt: skip
    return [str(sigma) for sigma in sigmas.tolist()]


def ours(path, solver, spacing, steps, eta, s_noise, size, seed):
    """ZTSNR Sampler under SamplerCustom on ZTSNR Scheduler's sigmas: every state, written to a file."""
    import comfy.sample
    import numpy as np
    import torch

    model, latent = patched(), empty_latent(*size)
    (sigmas,) = stock("ZTSNRScheduler", model=model, steps=steps, spacing=spacing, denoise=1.0, latent=latent)
    (sampler,) = stock("ZTSNRSampler", solver=solver, eta=eta, s_noise=s_noise)
    noise = comfy.sample.prepare_noise(latent["samples"], seed)
    states, denoised = [], []

    def record(step, x0, x, total):
        states.append(x.clone())
        denoised.append(x0.clone())

    picture = comfy.sample.sample_custom(
        model, noise, 1.0, sampler, sigmas, prompt(), prompt(), latent["samples"], callback=record, seed=seed
    )
    with open(path, "wb") as file:
        np.savez(file, noise=noise, sigmas=sigmas, states=torch.stack(states), denoised=torch.stack(denoised),
                 picture=raw(picture))  # fmt: skip
    return len(states)


def two_stages(sampler, scheduler, split, steps=12):
    """KSamplerAdvanced in two stages against KSampler: the largest difference, and the state between the stages."""
    settings = {"noise_seed": 7, "steps": steps, "cfg": 1.0, "sampler_name": sampler, "scheduler": scheduler,
                "positive": prompt(), "negative": prompt()}  # fmt: skip
    model = patched()
    (first,) = stock("KSamplerAdvanced", model=model, add_noise="enable", latent_image=empty_latent(), start_at_step=0,
                     end_at_step=split, return_with_leftover_noise="enable", **settings)  # fmt: skip
    (second,) = stock("KSamplerAdvanced", model=model, add_noise="disable", latent_image=first, start_at_step=split,
                      end_at_step=10000, return_with_leftover_noise="disable", **settings)  # fmt: skip
    whole = ksampler(model, empty_latent(), steps=steps, sampler=sampler, scheduler=scheduler)
    return {
        "difference": (second["samples"] - whole).abs().max().item(),
        "between": raw(first["samples"]).std().item(),
        "size": whole.abs().max().item(),
    }


def custom_advanced(sampler, scheduler):
    """SamplerCustomAdvanced against KSampler, and whether the caller's sigmas are as they were."""
    model, latent = patched(), empty_latent()
    (sigmas,) = stock("BasicScheduler", model, scheduler, 12, 1.0)
    before = sigmas.clone()
    (guider,) = stock("CFGGuider", model, prompt(), prompt(), 1.0)
    (noise,) = stock("RandomNoise", 7)
    (chosen,) = stock("KSamplerSelect", sampler)
    result = stock("SamplerCustomAdvanced", noise, guider, chosen, sigmas, latent)[0]["samples"]
    whole = ksampler(model, latent, steps=12, sampler=sampler, scheduler=scheduler)
    return {"difference": (result - whole).abs().max().item(), "sigmas_kept": bool((sigmas == before).all())}


def noise_added_before():
    """AddNoise, then a sampler that adds none, against the sampler that adds it itself."""
    model, latent = patched(), empty_latent()
    (sigmas,) = stock("BasicScheduler", model, "simple", 12, 1.0)
    (noise,) = stock("RandomNoise", 7)
    (chosen,) = stock("KSamplerSelect", "euler")
    (noisy,) = stock("AddNoise", model, noise, sigmas, latent)
    result = stock("SamplerCustom", model, False, 7, 1.0, prompt(), prompt(), chosen, sigmas, noisy)[0]["samples"]
    return (result - ksampler(model, latent, steps=12)).abs().max().item()


def inpainting(sampler, scheduler, soft=False, differential=False):
    """The right half is painted anew over a canvas of 5: what became of the left half, and ComfyUI's own start beside
    ours."""
    import torch

    models = [patched(), patched(first_step="as ComfyUI does it")]
    if differential:
        models = [stock("DifferentialDiffusion", model=model)[0] for model in models]
    mask = torch.zeros(1, 32, 32)
    mask[..., 16:] = 1
    if soft:
        mask[..., 12:20] = torch.linspace(0, 1, 8)
    latent = {"samples": torch.full((1, 4, 32, 32), 5.0), "noise_mask": mask}
    picture, theirs = (ksampler(model, latent, sampler=sampler, scheduler=scheduler) for model in models)
    return {
        "kept": (picture[..., :12] - 5).abs().max().item(),
        "painted": picture[..., 20:].std().item(),
        "difference": (picture - theirs).abs().max().item(),
    }


def image_to_image():
    """denoise 0.5 from a picture: our model and ComfyUI's own, and where ours began."""
    import torch

    latent = {"samples": torch.full((1, 4, 32, 32), 5.0)}
    exact = patched()
    ours = ksampler(exact, latent, denoise=0.5)
    theirs = ksampler(patched(first_step="as ComfyUI does it"), latent, denoise=0.5)
    first = exact.model.diffusion_model.timesteps[0][0]
    return {"difference": (ours - theirs).abs().max().item(), "first_t": first, "std": theirs.std().item()}


def condition_windows(start, end):
    """At which calls a condition that is on from ``start`` to ``end`` was used, next to one that always is."""
    model = patched()
    seen = []
    network = model.model.diffusion_model
    forward = network.forward

    def spy(x, timesteps, context=None, **rest):
        seen.append([timesteps[0].item(), 1.0 in context[:, 0, 0].tolist()])
        return forward(x, timesteps, context=context, **rest)

    network.forward = spy
    always, sometimes = prompt(0.0), prompt(1.0, start_percent=start, end_percent=end)
    ksampler(model, empty_latent(8, 8), steps=10, positive=always + sometimes)
    return seen


def control_net(start, end):
    """A real ControlNet around a network of one line: at which calls it was on."""
    import comfy.controlnet
    import torch

    class Shift(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x, hint, timesteps, context, **_):
            return {"output": [torch.full_like(x, 0.25)]}

    net = comfy.controlnet.ControlNet(Shift(), load_device=torch.device("cpu"))
    positive, negative = stock("ControlNetApplyAdvanced", positive=prompt(), negative=prompt(), control_net=net,
                               image=torch.zeros(1, 64, 64, 3), strength=1.0, start_percent=start,
                               end_percent=end)  # fmt: skip
    model = patched()
    ksampler(model, empty_latent(8, 8), steps=10, positive=positive, negative=negative)
    network = model.model.diffusion_model
    return [[t[0], on] for t, on in zip(network.timesteps, network.controls, strict=True)]


def lora_hooks():
    """A weight hook that is on for the first half of the steps: the weight at every call, with its timestep."""
    import comfy.hooks
    import torch

    model = patched()
    hooks = comfy.hooks.create_hook_model_as_lora({"diffusion_model.shift": torch.ones(4)}, None, 1.0, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.5))
    hooks.set_keyframes_on_hooks(keyframes)
    seen = []
    network = model.model.diffusion_model
    forward = network.forward

    def spy(x, timesteps, **rest):
        seen.append([timesteps[0].item(), network.shift[0].item()])
        return forward(x, timesteps, **rest)

    network.forward = spy
    both = [comfy.hooks.set_hooks_for_conditioning(prompt(), hooks=hooks) for _ in range(2)]
    ksampler(model, empty_latent(8, 8), steps=10, positive=both[0], negative=both[1])
    return seen


def batch(sampler):
    """The largest difference between a batch of three and three single runs with the same noise."""
    import comfy.sample
    import torch

    model = patched()
    noise = comfy.sample.prepare_noise(torch.zeros(3, 4, 16, 16), 7)

    def run(noise):
        return comfy.sample.sample(model, noise, 12, 1.0, sampler, "simple", prompt(), prompt(),
                                   torch.zeros_like(noise), seed=7)  # fmt: skip

    together = run(noise)
    alone = torch.cat([run(row) for row in noise.split(1)])
    return (together - alone).abs().max().item()


def regional_prompts():
    """A brighter left half and a darker right half: their means, raw."""
    (left,) = stock("ConditioningSetArea", prompt(2.0), width=128, height=256, x=0, y=0, strength=1.0)
    (right,) = stock("ConditioningSetArea", prompt(-2.0), width=128, height=256, x=128, y=0, strength=1.0)
    model = patched(ideal_model(0.0, brightness_std=0.0))
    picture = raw(ksampler(model, empty_latent(), positive=left + right, negative=prompt(), cfg=1.0))
    return [picture[..., :16].mean().item(), picture[..., 16:].mean().item()]


def previews(sampler, steps=6):
    """What the callback of a run was told."""
    import comfy.sample
    import torch

    told = []

    def callback(step, x0, x, total_steps):
        told.append([step, total_steps, bool(x0.isfinite().all() and x.isfinite().all())])

    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 7)
    comfy.sample.sample(patched(), noise, steps, 1.0, sampler, "simple", prompt(), prompt(), torch.zeros(1, 4, 8, 8),
                        seed=7, callback=callback)  # fmt: skip
    return told


def interruption(step):
    """Interrupted at a step, then run again: the error's name, calls made before it, and the second run's health."""
    import comfy.model_management
    import comfy.sample
    import torch

    model = patched()
    network = model.model.diffusion_model
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 7)
    arguments = (noise, 6, 1.0, "euler", "simple", prompt(), prompt(), torch.zeros(1, 4, 8, 8))

    def callback(at, x0, x, total_steps):
        if at == step:
            comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    try:
        comfy.sample.sample(model, *arguments, seed=7, callback=callback)
        name = None
    except BaseException as error:
        name = type(error).__name__
    calls = len(network.timesteps)
    again = comfy.sample.sample(model, *arguments, seed=7)
    return {"error": name, "calls": calls, "again": bool(again.isfinite().all())}


def guidance_functions(scale=5.0):
    """Under strong guidance and nodes that change it: the first denoised prediction and the picture, raw, from infinity
    and from ComfyUI's finite start."""
    import comfy.sample
    import torch

    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 16, 16), 7)

    def run(model):
        first = []

        def callback(step, x0, x, total_steps):
            if step == 0:
                first.append(x0.clone())

        picture = comfy.sample.sample(model, noise, 12, scale, "euler", "simple", prompt(0.6), prompt(-0.2),
                                      torch.zeros_like(noise), seed=7, callback=callback)  # fmt: skip
        return first[0], raw(picture)

    outcomes = {}
    for start, settings in (("exact", {}), ("stock", {"first_step": "as ComfyUI does it"})):
        # the channels differ, so that predictions have contrast and there is something to rescale
        base = patched(ideal_model(-1.0, channels=(1.0, -1.0, 0.5, 2.0)), **settings)
        (core_rescale,) = stock("RescaleCFG", model=base, multiplier=0.7)
        patches = {
            "nothing": base,
            "RescaleCFG": core_rescale,
            "Epsilon Scaling": stock("Epsilon Scaling", model=base, scaling_factor=1.005)[0],
            "PAG": stock("PerturbedAttentionGuidance", model=base, scale=3.0)[0],
            "APG": stock("APG", model=base, eta=1.0, norm_threshold=15.0, momentum=0.0)[0],
            "Mahiro": stock("Mahiro", model=base)[0],
            "ZTSNRGuidanceRescale": stock("ZTSNRGuidanceRescale", model=base, phi=0.7)[0],
            "ours, by the paper": stock("ZTSNRGuidanceRescale", model=base, phi=0.7, method=PAPER)[0],
            "both rescales": stock("ZTSNRGuidanceRescale", model=core_rescale, phi=0.7, method=PAPER)[0],
        }
        newer = {"CFGZeroStar": {}, "TCFG": {}, "CFGNorm": {"strength": 1.0, "pre_cfg": True}}
        for name, inputs in newer.items():
            if has_node(name, inputs):
                patches[name] = stock(name, model=base, **inputs)[0]
        patches["APG, projection"] = stock("APG", model=base, eta=0.0, norm_threshold=0.0, momentum=0.0)[0]
        for name, model in patches.items():
            first, picture = run(model)
            outcomes.setdefault(name, {})[start] = {
                "first": first.mean((0, 2, 3)).tolist(),
                "noise in first": (first - first.mean((-2, -1), keepdim=True)).std().item(),
                "picture": picture.mean((0, 2, 3)).tolist(),
            }
    return outcomes


def rescale_against_core(sigma):
    """Our rescale and core RescaleCFG on the same random predictions: the largest difference."""
    import comfy.samplers
    import torch

    generator = torch.Generator().manual_seed(3)
    x, cond, uncond = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(3))
    x, sigmas = x * sigma, torch.full((2,), float(sigma))
    base = patched()
    core = stock("RescaleCFG", model=base, multiplier=0.7)[0]
    our = stock("ZTSNRGuidanceRescale", model=base, phi=0.7, method=PAPER)[0]
    results = [
        comfy.samplers.cfg_function(model.model, cond, uncond, 5.0, x, sigmas, model_options=model.model_options)
        for model in (core, our)
    ]
    return (results[0] - results[1]).abs().max().item()


def input_model_unchanged():
    """What a MODEL carries before and after our nodes made others from it, and what it makes of a seed."""
    model = ideal_model()

    def carried():
        return str(
            (sorted(model.object_patches), model.wrappers, model.model_options, type(model.model.model_sampling))
        )

    before, picture = carried(), ksampler(model, empty_latent(8, 8))
    for node, settings in (
        ("ZTSNRModelSampling", {"prediction": "auto", "schedule": "auto", "first_step": "exact infinity",
                                "canvas_shift": 1.5}),
        ("ZTSNRGuidanceRescale", {"phi": 0.7}),
        ("ZTSNRGuidance", {"exposure": 0.9, "contrast": 0.8, "interval_start": 0.0, "interval_end": 0.0}),
    ):  # fmt: skip
        (made,) = stock(node, model=model, **settings)
        ksampler(made, empty_latent(8, 8))
    again = ksampler(model, empty_latent(8, 8))
    return {"same": carried() == before, "difference": (picture - again).abs().max().item()}


def patched_twice():
    """The node after itself: the second one's settings hold, and the first step is taken once."""
    model = patched(patched(patched(), first_step="as ComfyUI does it"), canvas_shift=2.0)
    ksampler(model, empty_latent(8, 8), steps=5)
    network = model.model.diffusion_model
    sigmas = model.get_model_object("model_sampling").sigmas
    return {"calls": len(network.timesteps), "middle": sigmas[500].item()}


def auto_after_told():
    """A model that the file calls epsilon, patched as v-prediction, then patched again with everything on auto."""
    told = patched(ideal_model(marks=()), prediction="v_prediction", schedule="zero terminal SNR")
    return room("nodes.model_patch").patch_model(told, canvas_shift=1.5)[1]


def saved_marks(folder, **settings):
    """Marker keys of what Save Checkpoint writes of a patched model."""
    import comfy_extras.nodes_model_merging as merging
    import safetensors

    merging.save_checkpoint(patched(**settings), filename_prefix="saved", output_dir=folder)
    (path,) = Path(folder).glob("*.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        return sorted(key for key in file.keys() if key in ("v_pred", "ztsnr"))  # noqa: SIM118


def refusals():
    """Models and settings that do not fit: what the node says instead of an output."""
    import comfy.model_base
    import comfy.supported_models
    import torch

    defaults = {"prediction": "auto", "schedule": "auto", "first_step": "exact infinity", "canvas_shift": 1.0}

    def said(node_id, **inputs):
        import nodes

        output = nodes.NODE_CLASS_MAPPINGS[node_id].execute(**inputs)
        return [output.block_execution, output.ui.as_dict()["text"][0], len(output.args)]

    def other(kind, config_class=comfy.supported_models.SDXL, model_class=comfy.model_base.BaseModel):
        model = ideal_model()
        config = config_class({"disable_unet_model_creation": True, "in_channels": 4, "adm_in_channels": 2816})
        unet = model.model.diffusion_model
        model.model = model_class(config, model_type=kind)
        model.model.diffusion_model = unet
        return model

    kinds = comfy.model_base.ModelType
    plain = ideal_model(marks=())
    (discrete,) = stock("ModelSamplingDiscrete", model=ideal_model(), sampling="lcm", zsnr=False)
    video = {"samples": torch.zeros(1, 4, 5, 8, 8)}
    return {
        "flow": said("ZTSNRModelSampling", model=other(kinds.FLOW), **defaults),
        "edm": said("ZTSNRModelSampling", model=other(kinds.EDM), **defaults),
        "refiner": said(
            "ZTSNRModelSampling",
            model=other(kinds.EPS, comfy.supported_models.SDXLRefiner, comfy.model_base.SDXLRefiner),
            **defaults,
        ),
        "epsilon": said("ZTSNRModelSampling", model=plain, **defaults | {"schedule": "zero terminal SNR"}),
        "patched": said("ZTSNRModelSampling", model=discrete, **defaults),
        "video": said("ZTSNRScheduler", model=patched(), steps=5, spacing="trailing", denoise=1.0, latent=video),
        "flow schedule": said("ZTSNRScheduler", model=other(kinds.FLOW), steps=5, spacing="trailing", denoise=1.0),
        "flow guidance": said("ZTSNRGuidanceRescale", model=other(kinds.FLOW), phi=0.7),
        "steps": said("ZTSNRScheduler", model=patched(), steps=0, spacing="trailing", denoise=1.0),
        "start": said("ZTSNRScheduler", model=patched(), steps=5, spacing="karras", denoise=1.0, sigma_start=0.01),
    }


def errors():
    """Runs that cannot work: the sentence each ends in."""
    import torch

    def sentence(function):
        try:
            function()
        except ValueError as error:
            return str(error)
        return None

    def run(model, sigmas, solver=None):
        (euler,) = stock("KSamplerSelect", "euler")
        (our,) = stock("ZTSNRSampler", solver="euler", eta=1.0, s_noise=1.0)
        return stock("SamplerCustom", model, True, 7, 1.0, prompt(), prompt(), our if solver else euler,
                     torch.tensor(sigmas), empty_latent(8, 8))  # fmt: skip

    inf, nan = float("inf"), float("nan")
    return {
        "nan": sentence(lambda: run(patched(), [nan, nan, 0.0])),
        "flipped": sentence(lambda: run(patched(), [0.03, 1.0, inf])),
        "unpatched": sentence(lambda: run(ideal_model(), [inf, 5.0, 0.0], solver=True)),
    }


def warnings():
    """What was logged as a warning in runs that do not do what their user wants, and in good ones."""
    import torch

    lines = []

    class Lines(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING and "ZTSNR" in record.getMessage():
                lines.append(record.getMessage())

    handler = Lines()
    logging.getLogger().addHandler(handler)

    def logged(function):
        lines.clear()
        function()
        return list(lines)

    picture = {"samples": torch.full((1, 4, 8, 8), 5.0)}
    unmarked = ideal_model(marks=("v_pred",), trained_zero_snr=False)
    schedule = {"steps": 5, "denoise": 1.0}
    outcomes = {
        "ddim_uniform": logged(lambda: ksampler(patched(), empty_latent(8, 8), scheduler="ddim_uniform")),
        "half": logged(lambda: ksampler(patched(), empty_latent(8, 8), denoise=0.5)),
        "leading": logged(lambda: stock("ZTSNRScheduler", model=patched(), spacing="leading", **schedule)),
        "unpatched": logged(lambda: stock("ZTSNRScheduler", model=ideal_model(), spacing="trailing", **schedule)),
        "unpatched list": logged(lambda: ksampler(ideal_model(), empty_latent(8, 8), scheduler="ztsnr_trailing")),
        "stock by choice": logged(
            lambda: ksampler(patched(first_step="as ComfyUI does it"), empty_latent(8, 8), scheduler="ztsnr_trailing")
        ),
        "good": logged(lambda: ksampler(patched(), empty_latent(8, 8))),
        "image to image": logged(lambda: ksampler(patched(), picture, denoise=0.5)),
        "not zero SNR": logged(lambda: ksampler(patched(unmarked), empty_latent(8, 8))),
    }
    logging.getLogger().removeHandler(handler)
    return outcomes


def reports():
    """What ZTSNR Model says of different checkpoints and settings."""
    patch = room("nodes.model_patch").patch_model
    v, plain = ideal_model(marks=("v_pred",)), ideal_model(marks=())
    return {
        "marked": patch(ideal_model())[1],
        "stock": patch(ideal_model(), first_step="as ComfyUI does it")[1],
        "as trained": patch(ideal_model(), schedule="as trained")[1],
        "v only": patch(v)[1],
        "v told": patch(v, schedule="zero terminal SNR")[1],
        "epsilon": patch(plain)[1],
        "forced": patch(plain, prediction="v_prediction", schedule="zero terminal SNR", canvas_shift=1.5)[1],
    }


def tables():
    """The tables of patched models, for a comparison with ``NoiseSchedule`` outside."""

    def describe(**settings):
        model_sampling = patched(**settings).get_model_object("model_sampling")
        import torch

        sigmas = torch.tensor([0.0291672, 1.0, 57.87, 136.17, 2254.2, 4518.76, 8192.0, float("inf")])
        return {
            "sigmas": [str(sigma) for sigma in model_sampling.sigmas[[0, 500, 900, 998, 999]].tolist()],
            "timesteps": model_sampling.timestep(sigmas).tolist(),
            "one": model_sampling.timestep(sigmas[2]).tolist(),
            "back": [str(s) for s in model_sampling.sigma(torch.tensor([0.0, 500.5, 998.5, 999.0])).tolist()],
            "percents": [str(model_sampling.percent_to_sigma(p)) for p in (-1, 0, 0.25, 1, 2)],
        }

    return {"exact": describe(), "as trained": describe(schedule="as trained"), "shifted": describe(canvas_shift=2.0)}


def find(name: str):
    """A function of this file, or "module.function" of another one beside it."""
    import importlib

    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module or __name__), function)


def serve(answers) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": find(request["call"])(**request["arguments"])}
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
