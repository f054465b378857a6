"""The diagnostic inside ComfyUI: more functions for the worker of inside.py, as "diagnostic_inside.name"."""

import contextlib
import sys

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch
from inside import empty_latent, ideal_model, ksampler, patched, prompt, room, stock

import nodes

diagnostic, latent_rgb = room("nodes.diagnostic"), room("nodes.latent_rgb")
samplers, GaussianCanvas = room("samplers"), room("diagnostics").GaussianCanvas


# ----------------------------------------------------------------------------------------------------------------------
# Models


def flow_model(mean=-1.0, brightness_std=0.3, texture_std=0.6, latent_format="SD3"):
    """A flow-matching MODEL that answers exactly: ComfyUI's SD3 sampling around a Gaussian canvas; video likewise."""
    import comfy.latent_formats

    canvas = GaussianCanvas(mean, brightness_std, texture_std)

    class IdealTransformer(torch.nn.Module):
        dtype = torch.float32

        def __init__(self):
            super().__init__()
            self.times = []

        def forward(self, x, timesteps, **_):
            time = timesteps[0].item() / 1000  # the share of noise in x
            self.times.append(time)
            sigma = time / (1 - time) if time < 1 else float("inf")
            state = x.double() / (time**2 + (1 - time) ** 2) ** 0.5
            x0 = canvas(state.flatten(2, -2), sigma).reshape(x.shape)  # of a video: its frames one below the other
            return ((x.double() - x0) / time).to(x.dtype)

    config = comfy.supported_models.SD3({"disable_unet_model_creation": True, "in_channels": 16})
    config.latent_format = getattr(comfy.latent_formats, latent_format)()
    model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.FLOW)
    model.diffusion_model = IdealTransformer()
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def edm_model():
    """An EDM model: its kind is one that the checkpoint's question is not for."""
    model = ideal_model()
    config = comfy.supported_models.SDXL(
        {"disable_unet_model_creation": True, "in_channels": 4, "adm_in_channels": 2816}
    )
    network = model.model.diffusion_model
    model.model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.V_PREDICTION_EDM)
    model.model.diffusion_model = network
    return model


def vae(channels):
    """A VAE with random weights."""
    import comfy.sd
    import comfy.taesd.taesd

    torch.manual_seed(1)
    return comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=channels).state_dict())


MODELS = {
    "exact": patched,
    "unpatched": ideal_model,
    "plain": lambda: ideal_model(marks=("v_pred",), trained_zero_snr=False),
    "plain, marked": lambda: patched(ideal_model(trained_zero_snr=False)),
    "shifted": lambda: patched(canvas_shift=2.0),
    "stock, shifted": lambda: patched(first_step="as ComfyUI does it", canvas_shift=2.0),
    "another schedule": lambda: stock("ModelSamplingDiscrete", model=ideal_model(), sampling="v_prediction", zsnr=True)[
        0
    ],
    "flow": flow_model,
    "video": lambda: flow_model(latent_format="HunyuanVideo"),
    "edm": edm_model,
}


FIGURES = ("diagnostics.leak_figure", "diagnostics.run_figure", "diagnostics.panels", "figures.strip", "figures.rows")


@contextlib.contextmanager
def without(module):
    """As if a module were not installed."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == module}
    drawing = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.endswith(("diagnostics.leak_figure", "diagnostics.run_figure"))
    }
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]
        sys.modules.update(hidden | drawing)


def installed(module):
    import importlib.util

    return importlib.util.find_spec(module) is not None


# ----------------------------------------------------------------------------------------------------------------------
# LatentMeanDiagnostic


def sigmas_for(model, scheduler, steps, latent):
    if isinstance(scheduler, list):
        return torch.tensor([float(sigma) for sigma in scheduler])
    if scheduler == "spectral":
        return stock("ZTSNRScheduler", model=model, steps=steps, spacing=scheduler, denoise=1.0, latent=latent)[0]
    return stock("BasicScheduler", model, scheduler, steps, 1.0)[0]


def diagnose(
    model="exact", sampler="ztsnr", scheduler="spectral", steps=20, shape=(4, 16, 16), hide=None, save=None, **inputs
):
    """Run the node: its outputs, and the LeakReport behind them."""
    model = MODELS[model]() if isinstance(model, str) else model
    latent = {"samples": torch.zeros(1, *shape)}
    if sampler == "ztsnr":
        (sampler,) = stock("ZTSNRSampler", solver="spectral", eta=1.0, s_noise=1.0)
    else:
        (sampler,) = stock("KSamplerSelect", sampler)
    sigmas = sigmas_for(model, scheduler, steps, latent)
    settings = {"positive": prompt(), "negative": prompt(), "cfg": 1.0, "seeds": 3, "first_seed": 5,
                "asked_colour": "none", "theme": "dark", **inputs}  # fmt: skip
    reports, shown = [], []
    mean_leak, show = diagnostic.mean_leak, latent_rgb.show
    latent_rgb.show = shown.append
    diagnostic.mean_leak = lambda *args, **kwargs: reports.append(mean_leak(*args, **kwargs)) or reports[-1]
    try:
        with without(hide) if hide else contextlib.nullcontext():
            output = nodes.NODE_CLASS_MAPPINGS["LatentMeanDiagnostic"].execute(
                model=model, latent=latent, sampler=sampler, sigmas=sigmas, **settings
            )
    finally:
        diagnostic.mean_leak, latent_rgb.show = mean_leak, show
    if output.block_execution:
        return {"refused": output.block_execution, "shown": output.ui.as_dict()["text"][0], "count": len(output.args)}
    text, picture, slope = output.args
    if save:
        from PIL import Image

        Image.fromarray((255 * picture[0]).round().byte().numpy()).save(save)
    return {
        "text": text,
        "slope": slope if isinstance(slope, float) else {"blocked": slope.message},
        "picture": [*picture.shape],
        "paper": (255 * picture[0, 0, 0]).round().tolist(),
        "contrast": picture.std().item(),
        "report": reports[0].to_dict(),
        "sigmas": [str(sigma) for sigma in sigmas.tolist()],
        "shown": shown,
        "ui": {name: len(values) for name, values in output.ui.as_dict().items()},
    }


def diagnose_guided(positive=2.4, negative=2.3, cfg=5.0, node=None, model="exact", **inputs):
    """The diagnostic with two prompts that add to the canvas; and how many levels brighter an addition of 1 is."""
    model = MODELS[model]()
    if node == "ours":
        (model,) = stock("ZTSNRGuidance", model, exposure=1.0, contrast=0.0, interval_start=0.0, interval_end=0.0)
    elif node == "halver":
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda args: (args["denoised"] + args["cond_denoised"]) / 2)
    factors = torch.tensor(model.model.latent_format.latent_rgb_factors)
    luma = (factors.sum(0) @ torch.tensor([0.2126, 0.7152, 0.0722])).item()
    found = diagnose(model, positive=prompt(positive), negative=prompt(negative), cfg=cfg, **inputs)
    return {**found, "levels": 255 * luma / 2}


def nan_model(at_time):
    """A model that answers NaN in its third channel from some timestep down."""
    model = patched()
    network = model.model.diffusion_model
    forward = network.forward

    def broken(x, timesteps, **rest):
        v = forward(x, timesteps, **rest)
        if timesteps[0] <= at_time:
            v[:, 2] = float("nan")
        return v

    network.forward = broken
    return model


def refusals():
    finite = ["10", "1", "0"]
    empty = torch.zeros(0)

    return {
        "one sigma": diagnose(scheduler=["10"]),
        "no sigmas": diagnose(scheduler=empty.tolist()),
        "half way": diagnose(scheduler=["10", "1"]),
        "nan at T": diagnose(nan_model(999)),
        "nan later": diagnose(nan_model(300), sampler="euler", scheduler="simple", steps=5),
        "infinity without our model": diagnose("unpatched", scheduler=["inf", "1", "0"]),
        "one seed": diagnose(seeds=1),
        "wrong vae": diagnose(vae=vae(16), scheduler=finite),
    }


def progress(interrupt_at=None, **inputs):
    """What the progress bar was told; with an interruption during a probe, how it ended and what a second run does."""
    import comfy.utils

    told, asked = [], [0]

    class Bar:
        def __init__(self, total):
            told.append(["total", total])

        def update(self, value):
            told.append(["tick", value])

    model = patched()
    network = model.model.diffusion_model
    forward = network.forward

    def count(x, timesteps, **rest):
        asked[0] += 1
        if asked[0] == interrupt_at:
            comfy.model_management.interrupt_current_processing()
        return forward(x, timesteps, **rest)

    network.forward = count
    original, comfy.utils.ProgressBar = comfy.utils.ProgressBar, Bar
    error = None
    try:
        diagnose(model, steps=4, **inputs)
    except comfy.model_management.InterruptProcessingException as interruption:
        error = type(interruption).__name__
    finally:
        comfy.utils.ProgressBar = original
    calls = asked[0]
    return {"told": told, "error": error, "calls": calls, "again": "report" in diagnose(model, steps=4)}


def model_left_alone():
    """What the input MODEL carries before and after, and whether a probe on it saw the diagnostic's runs."""
    model, probe = nodes.NODE_CLASS_MAPPINGS["LatentMeanProbe"].execute(model=patched()).args
    before = str((sorted(model.object_patches), model.wrappers, model.model_options))
    diagnose(model, steps=3)
    return {
        "same": before == str((sorted(model.object_patches), model.wrappers, model.model_options)),
        "probe": len(probe.predictions),
    }


def guidance_left_out():
    """The checkpoint's slopes of a model with a function in its guidance that spoils every answer, and without."""
    spoiled = patched()
    spoiled.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + 5 * args["input"])
    return [diagnose(model, steps=3)["report"]["checkpoint"]["slope"] for model in (patched(), spoiled)]


def finer(sigmas):
    return [str(sigma) for sigma in diagnostic.finer(torch.tensor([float(sigma) for sigma in sigmas])).tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# LatentMeanProbe and LatentMeanReport


def probe_of(model):
    return nodes.NODE_CLASS_MAPPINGS["LatentMeanProbe"].execute(model=model).args


def listed(statistics):
    """A recorder's statistics as JSON can hold them."""
    return {
        "sigmas": [str(sigma) for sigma in statistics.sigmas.tolist()],
        "state": statistics.state_mean.tolist(),
        "denoised": statistics.denoised_mean.tolist(),
        "noise": None if statistics.noise_mean is None else statistics.noise_mean.tolist(),
    }


def watched_run(sampler, scheduler="simple", steps=6, side=8, cfg=1.0):
    """A probed run beside a spy on the network, and the same run without a probe.

    The spy sees the network's input, which is the variance-preserving state, and its v; x0 = alpha x - s v.
    """
    schedule = samplers.NoiseSchedule.sdxl()
    plain = patched()
    model, probe = probe_of(plain)
    network = plain.model.diffusion_model
    forward = network.forward
    seen = []

    def spy(x, timesteps, **rest):
        v = forward(x, timesteps, **rest)
        sigma = schedule.sigma(timesteps[0].item())
        alpha, s = (1 / (1 + sigma**2)) ** 0.5, (1 / (1 + sigma**-2)) ** 0.5 if sigma > 0 else 0.0
        x0 = alpha * x.double() - s * v.double()
        seen.append([str(sigma), x.double().mean((2, 3)).tolist(), x0.mean((2, 3)).tolist()])
        return v

    settings = {"sampler": sampler, "scheduler": scheduler, "steps": steps, "cfg": cfg}
    bare = ksampler(plain, empty_latent(side, side), **settings)
    network.forward = spy
    picture = ksampler(model, empty_latent(side, side), **settings)
    network.forward = forward
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, side, side), 7)
    return {
        "same": torch.equal(bare, picture),
        "probe": listed(probe.recorder.read()),
        "predictions": len(probe.predictions),
        "spy": seen,
        "noise": noise.double().mean((2, 3)).tolist(),
    }


def probe_before_and_after():
    """The same run with the probe in front of ZTSNR Model and behind it."""
    found = []
    for first in (True, False):
        if first:
            model, probe = probe_of(ideal_model())
            model = patched(model)
        else:
            model, probe = probe_of(patched())
        ksampler(model, empty_latent(8, 8), steps=5)
        found.append(listed(probe.recorder.read()))
    return found


def probe_in_two_stages(split=3, steps=8):
    """KSamplerAdvanced in two stages, in one, and in two again with the same probe."""
    settings = {"steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "positive": prompt(),
                "negative": prompt()}  # fmt: skip
    model, probe = probe_of(patched())

    def stages(seed):
        (first,) = stock("KSamplerAdvanced", model=model, add_noise="enable", latent_image=empty_latent(8, 8),
                         start_at_step=0, end_at_step=split, return_with_leftover_noise="enable", noise_seed=seed,
                         **settings)  # fmt: skip
        between = len(probe.predictions)
        (second,) = stock("KSamplerAdvanced", model=model, add_noise="disable", latent_image=first,
                          start_at_step=split, end_at_step=10000, return_with_leftover_noise="disable",
                          noise_seed=seed, **settings)  # fmt: skip
        return between, listed(probe.recorder.read()), reported(probe, second)["text"]

    two = stages(7)
    ksampler(model, empty_latent(8, 8), steps=steps)
    whole = listed(probe.recorder.read())
    return {"two": two, "whole": whole, "again": stages(7)}


def reported(probe, latent, hide=None, save=None, **inputs):
    with without(hide) if hide else contextlib.nullcontext():
        output = nodes.NODE_CLASS_MAPPINGS["LatentMeanReport"].execute(
            probe=probe, latent=latent, **{"theme": "dark", **inputs}
        )
    if output.block_execution:
        return {"refused": output.block_execution}
    text, picture = output.args
    if save:
        from PIL import Image

        Image.fromarray((255 * picture[0]).round().byte().numpy()).save(save)
    return {
        "text": text,
        "picture": [*picture.shape],
        "paper": (255 * picture[0, 0, 0]).round().tolist(),
        "contrast": picture.std().item(),
    }


def report_of_run(model="exact", shape=(4, 4, 16, 16), steps=12, sampler="euler", hide=None, save=None, **inputs):
    """A user's own graph: probe, KSampler, report.  And what the pictures are, computed here."""
    bare = MODELS[model]()
    watched, probe = probe_of(bare)
    latent = {"samples": torch.zeros(shape)}
    picture = ksampler(watched, latent, steps=steps, sampler=sampler)
    raw = bare.model.process_latent_in(picture).double()
    return {
        "report": reported(probe, {"samples": picture}, hide, save, **inputs),
        "again": reported(probe, {"samples": picture.half()}, hide, **inputs),
        "statistics": listed(probe.recorder.read()),
        "picture": raw.flatten(2).mean(2).tolist(),
        "brightness": brightness(bare, raw) if raw.ndim == 4 else None,
        "noise": comfy.sample.prepare_noise(torch.zeros(shape), 7).double().flatten(2).mean(2).tolist(),
    }


def brightness(model, raw):
    """Mean luma of what ComfyUI's own previewer, without a decoder, makes of each latent."""
    import latent_preview
    import numpy as np

    latent_format = model.model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    )
    pictures = [np.asarray(previewer.decode_latent_to_preview(latent[None].float())) for latent in raw]
    # the previewer cuts off what is after the point: half a level on average
    return [float((picture + 0.5 * ((picture > 0) & (picture < 255))).mean((0, 1)) @ [0.2126, 0.7152, 0.0722])
            for picture in pictures]  # fmt: skip


def watched_inpainting():
    """Inpainting with and without a probe."""
    mask = torch.zeros(1, 16, 16)
    mask[..., 8:] = 1
    latent = {"samples": torch.full((1, 4, 16, 16), 5.0), "noise_mask": mask}
    plain = patched()
    model, probe = probe_of(plain)
    picture = ksampler(model, latent, steps=5)
    return {
        "same": torch.equal(picture, ksampler(plain, latent, steps=5)),
        "evaluations": len(probe.predictions),
        "noise": probe.recorder.read().noise_mean.tolist(),
        "text": reported(probe, {"samples": picture})["text"],
    }


def report_refusals():
    model, probe = probe_of(patched())
    unseen = reported(probe, empty_latent())
    picture = ksampler(model, empty_latent(8, 8, batch=2), steps=3)
    return {
        "unseen": unseen,
        "batch": reported(probe, {"samples": picture[:1]}),
        "other": reported(probe, {"samples": picture + 1}),
        "wrong vae": reported(probe, {"samples": picture}, vae=vae(16)),
        "fitting": reported(probe, {"samples": picture}),
    }


def unusual_runs():
    """Texts about a run of NaN, one whose pictures begin alike, and one whose sampler adds no noise."""
    model, probe = probe_of(nan_model(500))
    broken = ksampler(model, empty_latent(8, 8), steps=4)
    texts = {"nan": reported(probe, {"samples": broken})}

    model, probe = probe_of(patched())
    latent = {**empty_latent(8, 8, batch=3), "batch_index": [0, 0, 0]}
    texts["alike"] = reported(probe, {"samples": ksampler(model, latent, steps=4)})

    constant = torch.full((3, 4, 8, 8), 0.5)
    (sampler,) = stock("KSamplerSelect", "euler")
    sigmas = torch.tensor([float("inf"), 10.0, 1.0, 0.0])
    picture = comfy.sample.sample_custom(model, constant, 1.0, sampler, sigmas, prompt(), prompt(),
                                         torch.zeros_like(constant), seed=7)  # fmt: skip
    texts["constant"] = reported(probe, {"samples": picture})

    generator = torch.Generator().manual_seed(1)
    noisy = {"samples": 3 * torch.randn(1, 4, 8, 8, generator=generator)}
    (picture,) = stock("SamplerCustom", model, False, 7, 1.0, prompt(), prompt(), sampler,
                       torch.tensor([3.0, 1.0, 0.0]), noisy)[:1]  # fmt: skip
    texts["no noise"] = reported(probe, picture)
    return texts
