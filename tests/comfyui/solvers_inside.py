"""Our solvers and ComfyUI's own inside ComfyUI, on one model, one noise and the same sigmas."""

import inspect
import math

import comfy.k_diffusion.sampling as core
import comfy.sample
import torch
from inside import ideal_model, patched, prompt, raw, stock

SEED, SHAPE = 7, (2, 4, 8, 8)


def model():
    """Its channels differ, so that guidance has something to do."""
    return patched(ideal_model(-1.0, channels=(1.0, -1.0, 0.5, 2.0)))


def picture(sampler, sigmas, cfg=1.0, negative=True):
    """SamplerCustomAdvanced's way, raw; without a negative prompt that of BasicGuider."""
    latent = torch.zeros(SHAPE)
    noise = comfy.sample.prepare_noise(latent, SEED)
    if negative:
        (guider,) = stock("CFGGuider", model(), prompt(0.6), prompt(-0.2), cfg)
    else:
        (guider,) = stock("BasicGuider", model(), prompt(0.6))
    return raw(guider.sample(noise, latent, sampler, torch.tensor(sigmas), seed=SEED))


def ours(solver, eta, cfg_pp=False):
    return stock("ZTSNRSampler", solver=solver, eta=eta, s_noise=1.0, cfg_pp=cfg_pp)[0]


def with_our_noise(sampler):
    """A sampler of ComfyUI's that draws the fresh noise that ours draws."""
    generator = torch.Generator().manual_seed(SEED + 1)
    # a new dictionary: the one that is there is the default of all samplers
    fresh = {"noise_sampler": lambda sigma, sigma_next: torch.randn(SHAPE, generator=generator)}
    sampler.extra_options = sampler.extra_options | fresh
    return sampler


def difference(a, b):
    """The largest, next to which pictures differ by about one."""
    return (a - b).abs().max().item()


def er_sde(sigmas, eta, points):
    """Ours against Sampler ER SDE of ComfyUI, whose integrals are sums of 200 terms, and of any number of them."""
    (sampler,) = stock("SamplerER_SDE", solver_type="ER-SDE", max_stage=3, eta=eta, s_noise=1.0)
    source = inspect.getsource(core.sample_er_sde)
    assert source.count("200.0") == 1
    finer = dict(vars(core))
    exec(source.replace("200.0", f"{points}.0"), finer)
    sampler.sampler_function = finer["sample_er_sde"]
    return difference(picture(ours("er_sde", eta), sigmas), picture(with_our_noise(sampler), sigmas))


def sa_solver(sigmas, eta):
    """Ours against Sampler SASolver of ComfyUI with its defaults."""
    (sampler,) = stock(
        "SamplerSASolver", model=model(), eta=eta, sde_start_percent=0.2, sde_end_percent=0.8, s_noise=1.0,
        predictor_order=3, corrector_order=4, use_pece=False, simple_order_2=False,
    )  # fmt: skip
    return difference(picture(ours("sa_solver", eta), sigmas), picture(with_our_noise(sampler), sigmas))


def cfg_pp(solver, theirs, sigmas, cfg):
    """Ours with CFG++ against ComfyUI's sampler of CFG++, and ours without."""
    (sampler,) = stock("KSamplerSelect", theirs)
    if "ancestral" in theirs:
        with_our_noise(sampler)
    sigmas = [math.inf if sigma is None else sigma for sigma in sigmas]
    found = picture(ours(solver, 1.0, cfg_pp=True), sigmas, cfg)
    return {
        "theirs": difference(found, picture(sampler, sigmas, cfg)),
        "without": difference(found, picture(ours(solver, 1.0), sigmas, cfg)),
    }


def cfg_pp_without_negative(sigmas):
    """BasicGuider has no unconditional prediction: CFG++ on and off."""
    return difference(*(picture(ours("euler", 1.0, cfg_pp=on), sigmas, negative=False) for on in (True, False)))
