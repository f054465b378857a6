"""ZTSNR Guidance inside ComfyUI, for the worker of inside.py.

The model is the one of inside.py but for its network, which answers exactly for Gaussian latents whose mean picture the
prompt paints.  So guidance between two prompts has a brightness, a contrast and a content of its own.
"""

import math

import torch


def painting(numbers, height: int, width: int) -> torch.Tensor:
    """(4, H, W) float64 of a prompt of three numbers: how bright, how much of a pattern, how much of another."""
    across = torch.cos(2 * math.pi * (torch.arange(width, dtype=torch.float64) + 0.5) / width)
    down = torch.cos(2 * math.pi * (torch.arange(height, dtype=torch.float64) + 0.5) / height)[:, None]
    channels = torch.tensor([[1, -1, 0.5, 2], [1, 0.5, -1, 0.3], [-0.2, 1, 0.4, 1]], dtype=torch.float64)
    patterns = (torch.ones(height, width, dtype=torch.float64), across.expand(height, width), down * across)
    return sum(
        number * channel.view(4, 1, 1) * pattern
        for number, channel, pattern in zip(numbers, channels, patterns, strict=True)
    )


class Painter(torch.nn.Module):
    """The exact v of latents N(painting, spread^2); a ControlNet's output is added to the painting.

    Attributes:
        calls: timestep, number of rows, and whether a ControlNet was on, of every call.
    """

    dtype = torch.float32

    def __init__(self, spread: float):
        super().__init__()
        self.spread, self.calls = spread, []

    def forward(self, x, timesteps, context=None, control=None, **_):
        from inside import room

        modes, samplers = room("diagnostics").GaussianModes, room("samplers")
        schedule = samplers.NoiseSchedule.sdxl()
        self.calls.append([timesteps[0].item(), len(x), control is not None])
        answers = []
        for row, t, prompt in zip(x.double().split(1), timesteps.tolist(), context, strict=True):
            mean = painting(prompt[0, :3].double(), *x.shape[-2:])
            mean = mean if control is None else mean + control["output"][0].double().mean()
            sigma = schedule.sigma(t)
            answers.append(samplers.from_denoised(modes(mean, self.spread)(row, sigma), row, sigma))
        return torch.cat(answers).to(x.dtype)


def painter(spread: float):
    """The MODEL behind ZTSNR Model."""
    from inside import ideal_model, patched

    model = ideal_model()
    model.model.diffusion_model = Painter(spread)
    return patched(model)


def conditioning(numbers, **options):
    """A CONDITIONING of a prompt."""
    from inside import prompt

    (entry,) = prompt(**options)
    entry[0][:, 0, :3] = torch.tensor(numbers)
    return [entry]


def in_areas(prompts, height: int, width: int):
    """Prompts side by side, each in its share of the canvas, by ConditioningSetArea."""
    from inside import stock

    share = 8 * width // len(prompts)
    area = {"width": share, "height": 8 * height, "y": 0, "strength": 1.0}
    return [
        entry
        for i, numbers in enumerate(prompts)
        for entry in stock("ConditioningSetArea", conditioning(numbers), x=i * share, **area)[0]
    ]


def controlled(positive, negative, shift: float):
    """Both conditionings behind a real ControlNet whose network adds ``shift`` to the canvas."""
    import comfy.controlnet
    from inside import stock

    class Shift(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x, hint, timesteps, context, **_):
            return {"output": [torch.full_like(x, shift)]}

    net = comfy.controlnet.ControlNet(Shift(), load_device=torch.device("cpu"))
    return stock("ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=net,
                 image=torch.zeros(1, 64, 64, 3), strength=1.0, start_percent=0.0, end_percent=1.0)  # fmt: skip


def spied(model, states: list):
    """A clone that keeps what the functions before this place made of every prediction."""

    def keep(args):
        states.append((args["cond_denoised"].clone(), args["denoised"].clone()))
        return args["denoised"]

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(keep)
    return clone


def picture(
    path, chain, guider, inputs, sampler="euler", size=(16, 24), batch=1, steps=9, spread=0.5, control=None, seed=7
):
    """A run of SamplerCustomAdvanced, written to a file.

    Args:
        chain: nodes between ZTSNR Model and the guider, as [id, inputs]; what comes into and out of ZTSNRGuidance is
            written down.
        guider: id of its node.
        inputs: of that node; a list of numbers is a prompt, a list of such lists are prompts side by side.
        control: what a ControlNet adds to "positive" and "negative".

    Returns:
        the network's calls.
    """
    import comfy.sample
    import numpy as np
    from inside import empty_latent, raw, stock

    model = start = painter(spread)
    before, after = [], []
    for node, settings in chain:
        model = spied(model, before) if node == "ZTSNRGuidance" else model
        (model,) = stock(node, model=model, **settings)
        model = spied(model, after) if node == "ZTSNRGuidance" else model

    inputs = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, list):
            inputs[name] = in_areas(value, *size) if isinstance(value[0], list) else conditioning(value)
    if control is not None:
        inputs["positive"], inputs["negative"] = controlled(inputs["positive"], inputs["negative"], control)
    (guided,) = stock(guider, model=model, **inputs)

    latent = empty_latent(*size, batch=batch)
    (sigmas,) = stock("BasicScheduler", model, "ztsnr_trailing", steps, 1.0)
    (noise,) = stock("RandomNoise", seed)
    (chosen,) = stock("KSamplerSelect", sampler)
    result = stock("SamplerCustomAdvanced", noise, guided, chosen, sigmas, latent)[0]["samples"]
    with open(path, "wb") as file:
        np.savez(
            file,
            noise=comfy.sample.prepare_noise(latent["samples"], seed),
            sigmas=sigmas,
            picture=raw(result),
            cond=torch.stack([cond for cond, _ in before]) if before else [],
            before=torch.stack([denoised for _, denoised in before]) if before else [],
            after=torch.stack([denoised for _, denoised in after]) if after else [],
        )
    return start.model.diffusion_model.calls


def has(node, inputs) -> bool:
    """Whether this core has a node, with these inputs."""
    import nodes

    known = nodes.NODE_CLASS_MAPPINGS.get(node)
    groups = known.INPUT_TYPES().values() if known else ()
    return known is not None and set(inputs) <= {name for group in groups for name in group}


def refusals():
    """Settings and models that do not fit: what the node says instead of an output, or the run instead of a picture."""
    import comfy.model_base
    import comfy.samplers
    import comfy.supported_models

    import nodes

    defaults = {"exposure": 0.9, "contrast": 0.8, "interval_start": 0.0, "interval_end": 0.0}

    def said(model, **settings):
        output = nodes.NODE_CLASS_MAPPINGS["ZTSNRGuidance"].execute(model=model, **defaults | settings)
        return [output.block_execution, output.ui.as_dict()["text"][0], len(output.args)]

    def other(kind):
        model = painter(0.5).clone()
        model.object_patches.clear()
        config = comfy.supported_models.SDXL({"disable_unet_model_creation": True, "in_channels": 4})
        model.model = comfy.model_base.BaseModel(config, model_type=kind)
        return model

    def run(shape, **settings):
        from inside import stock

        (model,) = stock("ZTSNRGuidance", model=painter(0.5), **defaults | settings)
        x, cond, uncond = (torch.zeros(shape) for _ in range(3))
        try:
            comfy.samplers.cfg_function(model.model, cond, uncond, 5.0, x, torch.ones(1), model.model_options)
        except ValueError as error:
            return [str(error)] * 2 + [1]
        return None

    kinds = comfy.model_base.ModelType
    return {
        "flow": said(other(kinds.FLOW)),
        "edm": said(other(kinds.EDM)),
        "interval": said(painter(0.5), interval_start=0.1, interval_end=0.3),
        "video": run((1, 4, 5, 8, 8)),
        "share": run((1, 4, 8, 8), exposure=1.5),
    }
