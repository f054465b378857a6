"""Our nodes on a stand-in for a device without float64: more functions for the worker of inside.py."""

import contextlib
import importlib.util
import re
from pathlib import Path
from unittest import mock

import comfy.model_management
import torch
from inside import empty_latent, ideal_model, ksampler, patched, prompt, stock

_file = importlib.util.spec_from_file_location("float32_device", Path(__file__).parent.parent / "float32_device.py")
float32_device = importlib.util.module_from_spec(_file)
_file.loader.exec_module(float32_device)


@contextlib.contextmanager
def on_the_device():
    """ComfyUI as on Apple silicon: one memory, no copies that do not wait; the stand-in is none that it knows."""
    management, device = comfy.model_management, float32_device.make_device()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    free = lambda dev=None, torch_free_too=False: (2**34, 2**34) if torch_free_too else 2**34  # noqa: E731
    try:
        with (
            mock.patch.object(management, "get_free_memory", free),
            mock.patch.object(management, "device_supports_non_blocking", return_value=False),
            mock.patch.object(torch, "Generator", float32_device.Generator),
        ):
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def model_for(device):
    """The ideal model, with everything but the network's own arithmetic on the device."""
    model = ideal_model(channels=(1.0, -1.0, 0.5, 2.0))
    network = model.model.diffusion_model
    del network.shift  # it calculates in float64, on the CPU
    network.shift, answer = torch.zeros(4), network.forward

    def forward(x, timesteps, context=None, **rest):
        assert x.device.type == device.type
        return answer(x.cpu(), timesteps.cpu(), context.cpu(), **rest).to(x.device)

    network.forward = forward
    model.load_device = device
    return model


def difference(run):
    """The largest difference of what runs on the CPU and on the device make."""
    expected = run(model_for(torch.device("cpu")))
    with on_the_device() as device:
        model = model_for(device)
        model.model.model_sampling.to(device)  # Load Checkpoint has put it there
        found = run(model)
    return {"difference": (found.cpu() - expected).abs().max().item(), "size": expected.abs().max().item()}


def ours(solver, cfg_pp=False):
    """ZTSNR Model, Guidance, Guidance Rescale, Scheduler and Sampler."""

    def run(model):
        model = patched(model)
        (model,) = stock("ZTSNRGuidance", model, 0.5, 0.5, 0.0, 0.0)
        (model,) = stock("ZTSNRGuidanceRescale", model, 0.7)
        latent = empty_latent(8, 8, 2)
        (sigmas,) = stock("ZTSNRScheduler", model=model, steps=5, spacing="trailing", denoise=1.0, latent=latent)
        (sampler,) = stock("ZTSNRSampler", solver=solver, eta=1.0, s_noise=1.0, cfg_pp=cfg_pp)
        return stock(
            "SamplerCustom", model, True, 7, 4.0, prompt(0.6), prompt(-0.2), sampler, sigmas, latent
        )[1]["samples"]  # fmt: skip

    return difference(run)


def theirs(sampler, scheduler):
    """ZTSNR Model behind a KSampler."""
    prompts = {"positive": prompt(0.6), "negative": prompt(-0.2)}
    latent = empty_latent(8, 8, 2)

    def run(model):
        return ksampler(patched(model), latent, steps=5, cfg=2.0, sampler=sampler, scheduler=scheduler, **prompts)

    return difference(run)


def unpatched(scheduler):
    """Our schedulers in a KSampler, without ZTSNR Model."""
    return difference(lambda model: ksampler(model, empty_latent(8, 8, 2), steps=5, scheduler=scheduler))


def probed():
    """Latent Mean Probe and Report: the first channel's means."""

    def run(model):
        model, probe = stock("LatentMeanProbe", patched(model))
        samples = ksampler(model, empty_latent(8, 8, 3), steps=5, sampler="dpmpp_2m")
        text, _ = stock("LatentMeanReport", probe=probe, latent={"samples": samples}, theme="dark")
        assert "Channel 4" in text, text
        return torch.from_numpy(probe.recorder.read().denoised_mean)

    return difference(run)


def diagnosed():
    """Latent Mean Diagnostic: the numbers of its report."""

    def run(model):
        model = patched(model)
        (sampler,) = stock("KSamplerSelect", "euler")
        (sigmas,) = stock("BasicScheduler", model, "karras", 4, 1.0)
        text, _, _ = stock(
            "LatentMeanDiagnostic", model=model, positive=prompt(), negative=prompt(), latent=empty_latent(8, 8),
            sampler=sampler, sigmas=sigmas, cfg=2.0, seeds=3, first_seed=5, asked_colour="none", theme="dark",
        )  # fmt: skip
        return torch.tensor([float(number) for number in re.findall(r"-?\d+\.\d+", text)])

    return difference(run)
