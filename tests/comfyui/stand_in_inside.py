"""Runs inside ComfyUI whose sigmas other nodes have calculated with: the number that stands for infinity is among them.

See ``inside`` for how these functions are called, and for the model, whose pictures have a known exact answer.
"""

import comfy.sample
import comfy.samplers
import inside
import torch

MEAN, STEPS = -2.4, 12


def _run(model, sigmas, noise, latent, sampler="euler", adds_noise=True):
    """A raw picture."""
    none = torch.zeros_like(noise)
    return comfy.sample.sample_custom(
        model, noise if adds_noise else none, 1.0, comfy.samplers.sampler_object(sampler), torch.as_tensor(sigmas),
        inside.prompt(), inside.prompt(), latent, seed=7,
    )  # fmt: skip


def _off(picture, exact):
    """Mean and texture (std over the canvas) against the exact picture's: shares of the exact ones."""
    picture, exact = inside.raw(picture).double(), inside.raw(exact)
    texture = picture.std((-2, -1)).mean() / exact.std((-2, -1)).mean()
    return [(picture.mean() / exact.mean()).item(), texture.item(), bool(picture.isfinite().all())]


def _setting(scheduler="simple", steps=STEPS, side=16):
    model, empty = inside.patched(), torch.zeros(1, 4, side, side)
    (sigmas,) = inside.stock("BasicScheduler", model, scheduler, steps, 1.0)
    return model, sigmas, comfy.sample.prepare_noise(empty, 7), empty


def arithmetic():
    """What nodes do with sigmas[0] and the table: pictures against those of the untouched graph."""
    model, sigmas, noise, empty = _setting()
    whole = _run(model, sigmas, noise, empty)
    latent_noise = model.model.process_latent_out(noise)

    def extended():
        return inside.stock("ExtendIntermediateSigmas", sigmas, 2, -1.0, 12.0, "linear")[0]

    def brownian():
        sampler = comfy.samplers.ksampler("dpmpp_sde", {"r": 0.5})
        return comfy.sample.sample_custom(
            model, noise, 1.0, sampler, sigmas, inside.prompt(), inside.prompt(), empty, seed=7
        )

    return {
        "sigma_max": float(model.get_model_object("model_sampling").sigma_max),
        "first": float(sigmas[0]),
        "noise added by a node": _off(_run(model, sigmas, noise, sigmas[0] * latent_noise, adds_noise=False), whole),
        "unit noise added by a node": _off(_run(model, sigmas, noise, latent_noise, adds_noise=False), whole),
        "inf": _off(_run(model, [float("inf"), *sigmas[1:].tolist()], noise, empty), whole),
        "4518.76": _off(_run(model, [4518.7637, *sigmas[1:].tolist()], noise, empty), whole),
        "ExtendIntermediateSigmas": _off(_run(model, extended(), noise, empty), whole),
        "extended": extended().tolist(),
        "Brownian": _off(brownian(), whole),
    }


def unsampling():
    """FlipSigmas: a picture is brought to noise and back again; the largest difference, over the picture's size."""
    model, sigmas, noise, empty = _setting("karras", steps=200)
    picture = _run(model, sigmas, noise, empty)
    (flipped,) = inside.stock("FlipSigmas", sigmas)
    flipped[0] = max(float(flipped[0]), 0.01)
    unsampled = _run(model, flipped, noise, picture, adds_noise=False)
    again = _run(model, sigmas, noise, unsampled, adds_noise=False)
    return {
        "noise": (inside.raw(unsampled) / sigmas[0]).std().item(),
        "difference": ((again - picture).abs().max() / picture.abs().max()).item(),
    }


def broken_latent(value):
    """A latent that holds NaN or infinity: the sentence."""
    model, sigmas, noise, empty = _setting()
    try:
        _run(model, sigmas, noise, torch.full_like(empty, float(value)), adds_noise=False)
    except ValueError as error:
        return str(error)
    return None


def brownian_stages(sampler, split):
    """Texture of KSamplerAdvanced in two stages with one seed over that of one run; means over eight seeds."""
    ratios = []
    for seed in range(8):
        settings = {"noise_seed": seed, "steps": STEPS, "cfg": 1.0, "sampler_name": sampler, "scheduler": "karras",
                    "positive": inside.prompt(), "negative": inside.prompt()}  # fmt: skip
        model = inside.patched()
        (first,) = inside.stock("KSamplerAdvanced", model=model, add_noise="enable", start_at_step=0,
                                latent_image=inside.empty_latent(), end_at_step=split,
                                return_with_leftover_noise="enable", **settings)  # fmt: skip
        (second,) = inside.stock("KSamplerAdvanced", model=model, add_noise="disable", latent_image=first,
                                 start_at_step=split, end_at_step=10000, return_with_leftover_noise="disable",
                                 **settings)  # fmt: skip
        whole = inside.ksampler(model, inside.empty_latent(), seed=seed, steps=STEPS, sampler=sampler,
                                scheduler="karras")  # fmt: skip
        ratios.append((second["samples"].std((-2, -1)).mean() / whole.std((-2, -1)).mean()).item())
    return sum(ratios) / len(ratios)


def cfg_pp(sampler, cfg):
    """Brightness in levels from infinity, and from ComfyUI's 4518.76."""
    brightness = []
    for first_step in ("exact infinity", "as ComfyUI does it"):
        model = inside.patched(first_step=first_step)
        picture = inside.ksampler(model, inside.empty_latent(), steps=16, cfg=cfg, sampler=sampler,
                                  positive=inside.prompt(1.0), negative=inside.prompt(0.0))  # fmt: skip
        brightness.append(inside.raw(picture).double().mean().item() * inside.LEVELS)
    return brightness


def model_sampling_discrete():
    """Core's node in front of ZTSNR Model, and behind it: pictures against those without it, and what is said."""
    import logging

    said = []

    class Lines(logging.Handler):
        def emit(self, record):
            if "ZTSNR" in record.getMessage():
                said.append([record.levelname, record.getMessage()])

    plain = inside.ideal_model()
    (discrete,) = inside.stock("ModelSamplingDiscrete", model=plain, sampling="v_prediction", zsnr=True)
    exact = inside.ksampler(inside.patched(), inside.empty_latent())
    in_front = inside.ksampler(inside.patched(discrete), inside.empty_latent())
    (behind,) = inside.stock("ModelSamplingDiscrete", model=inside.patched(), sampling="v_prediction", zsnr=True)
    handler = Lines()
    logging.getLogger().addHandler(handler)
    inside.ksampler(behind, inside.empty_latent())
    logging.getLogger().removeHandler(handler)
    return {"in front": (in_front - exact).abs().max().item(), "said behind": said}
