"""Graphs through other people's node packs, for the worker of tests/comfyui/inside.py; comfyui_packs.py judges them.

Every graph runs on the three models of comfyui_doors.py, whose network answers exactly: what differs from the limit is
the door's doing and not the pack's.
"""

import asyncio
import functools
import logging
import math
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import inside
import torch
from comfyui_doors import DOORS

MEAN, TEXTURE = -2.4, 0.6
STEPS = 28
PATIENCE = 90  # seconds of the processor for a graph on one model


@dataclass(frozen=True)
class Case:
    """A graph.

    Attributes:
        pack: name of its folder.
        node: name of the node, as the user reads it.
        graph: what stands around it.
        run: makes samples (B, 4, H, W), in the scale of a LATENT, of a ``Desk``.
        guided: two prompts at CFG 5 instead of one.
        spread: the steps depend on where the table ends, so the limit has others: the picture is held against the
            closed form.
        side, batch: size of the latent and of the batch.
        note: what there is to say of the pack's own part in the numbers.
    """

    pack: str
    node: str
    graph: str
    run: Callable
    guided: bool = False
    spread: bool = False
    side: int = 128
    batch: int = 1
    note: str = ""


@dataclass
class Desk:
    """What a graph is made of: the MODEL, two CONDITIONINGs, the scale, an empty LATENT and a seed."""

    model: object
    positive: list
    negative: list
    cfg: float
    latent: dict
    seed: int = 7
    steps: int = STEPS

    @property
    def prompts(self) -> dict:
        return {"positive": self.positive, "negative": self.negative}


CASES: list[Case] = []
NO_ZERO_SNR = "sigmas of a model without zero SNR, from 14.6; ours says so"
NEEDS = {"ComfyUI-Inspire-Pack": ("ComfyUI-Impact-Pack",)}  # packs whose nodes a pack's own call


def case(pack: str, node: str, graph: str, **options):
    def add(run):
        CASES.append(Case(pack, node, graph, run, **options))
        return run

    return add


def use(node_id: str, **inputs):
    """The outputs of a node of either API; widgets that are not named keep their defaults."""
    import nodes

    kind = nodes.NODE_CLASS_MAPPINGS[node_id]
    known = kind.INPUT_TYPES()
    for name, (type_, *options) in (known.get("optional", {}) | known.get("required", {})).items():
        options = options[0] if options else {}
        if name in inputs or (name in known.get("optional", {}) and "default" not in options):
            continue
        if "default" in options:
            inputs[name] = options["default"]
        elif isinstance(type_, list | tuple):
            inputs[name] = type_[0]
        elif type_ == "COMBO":
            inputs[name] = options["options"][0]
    outputs = inside.stock(node_id, **inputs)
    return outputs["result"] if isinstance(outputs, dict) else outputs


# ----------------------------------------------------------------------------------------------------------------------
# Models


def network(mean: float, guided: bool):
    """An exact model.

    In the guided one the channels differ, the picture has a wave of the prompt's height, as functions of other packs
    divide by its contrast, and self-attention changes what the network answers.
    """
    if not guided:
        return inside.ideal_model(mean)
    channels = (1.0, -1.0, 0.5, 2.0)
    model = inside.ideal_model(mean, channels=channels)
    unet, schedule = model.model.diffusion_model, inside.room("samplers").NoiseSchedule.sdxl()
    answer = unet.forward

    def forward(x, timesteps, context=None, **options):
        patches = options.get("transformer_options", {}).get("patches_replace", {}).get("attn1", {})
        prompts = context + 0.2 * attended(patches)
        across = torch.cos(torch.arange(x.shape[-1], dtype=torch.float64) * (2 * math.pi / x.shape[-1]))
        wave = (1 + prompts[:, 0, 0].double()).view(-1, 1, 1, 1) * torch.tensor(channels).view(4, 1, 1) * across
        phi = schedule.sigma(timesteps.double()).atan().view(-1, 1, 1, 1)
        # the canvas moved by the wave: v of x is that of x without its share of the wave, and the wave's own
        plain = answer((x - phi.cos() * wave).float(), timesteps, context=prompts, **options)
        return (plain - phi.sin() * wave).to(x.dtype)

    unet.forward = forward
    return model


def attended(patches: dict) -> float:
    """What self-attention over two tokens, of values 1 and -1, makes of the first: 0, and 1 where it is perturbed."""
    values = torch.tensor([[[1.0], [-1.0]]])
    looks = torch.zeros_like(values)
    for patch in patches.values():
        return patch(looks, looks, values, {"n_heads": 1, "original_shape": [1, 4, 8, 8]})[0, 0, 0].item()
    return 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(packs: str, pack: str, seconds: float, only: str = ""):
    """The cases of a pack, in a process of their own, as packs change ComfyUI: a case's names and, by door, numbers."""
    _server()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply_async(_measure, (packs, pack, only)).get(seconds)


@functools.cache
def _server():
    """A PromptServer: packs add their routes to it when they are imported."""
    import execution  # noqa: F401  packs expect it to be imported
    import server

    return server.PromptServer(asyncio.new_event_loop())


def _measure(packs: str, pack: str, only: str):
    import nodes

    loop = _server().loop
    asyncio.set_event_loop(loop)
    log = _Lines()
    logging.getLogger().addHandler(log)
    for name in ("align_your_steps", "gits"):  # the core's, which packs call
        path = Path(nodes.__file__).parent / "comfy_extras" / f"nodes_{name}.py"
        loop.run_until_complete(nodes.load_custom_node(str(path), module_parent="comfy_extras"))
    for name in (*NEEDS.get(pack, ()), pack):
        if not loop.run_until_complete(nodes.load_custom_node(str(Path(packs, name)), module_parent="custom_nodes")):
            reasons = (line.rpartition("module for custom nodes: ")[2] for line in log.lines if "Cannot import" in line)
            return {"failed": next(reasons, "an error").partition(" (")[0]}
    results = []
    for each in CASES:
        if each.pack == pack and only in f"{each.node} {each.graph}":
            outcome = {name: getattr(each, name) for name in ("node", "graph", "guided", "spread", "note")}
            for door in DOORS:
                log.lines.clear()
                began = time.process_time()
                outcome[door] = _numbers(each, door)
                outcome[door]["seconds"] = time.process_time() - began
                outcome[door]["said"] = any("ZTSNR" in line for line in log.lines)
            results.append(outcome)
    return {"cases": results}


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def _too_long(*_):
    raise TimeoutError(f"still running after {PATIENCE} s of the processor")


def _numbers(each: Case, door: str) -> dict:
    """Per channel the mean and the texture, or the error in which the graph ends.

    Without guidance the mean is the response to a change of the model's mean, over that change: the graph's fresh noise
    cancels, and the exact answer is 1.
    """

    def picture(mean):
        desk = Desk(
            model=DOORS[door](network(mean, each.guided)),
            positive=inside.prompt(0.6 if each.guided else 0.0),
            negative=inside.prompt(-0.2 if each.guided else 0.0),
            cfg=5.0 if each.guided else 1.0,
            latent=inside.empty_latent(each.side, each.side, each.batch),
        )
        torch.manual_seed(3)  # some packs draw from the global generator
        return inside.raw(each.run(desk)["samples"]).double()

    try:
        signal.signal(signal.SIGVTALRM, _too_long)
        signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
        first = picture(-1.0 if each.guided else MEAN)
        means = first if each.guided else (first - picture(0.0)) / MEAN
    except Exception as error:  # a pack's own error is a result
        logging.getLogger().exception("%s, %s", each.node, door, exc_info=error)
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if not (first.isfinite().all() and means.isfinite().all()):
        return {"error": "NaN"}
    return {
        "mean": means.mean((0, 2, 3)).tolist(),
        "texture": first.std((-2, -1)).mean(0).tolist(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Graphs


def ksampler(desk: Desk, sampler="dpmpp_2m", scheduler="simple", model=None, **inputs):
    return use(
        "KSampler", model=model or desk.model, seed=desk.seed, steps=desk.steps, cfg=desk.cfg, sampler_name=sampler,
        scheduler=scheduler, latent_image=desk.latent, denoise=1.0, **desk.prompts, **inputs,
    )[0]  # fmt: skip


def custom(desk: Desk, sampler=None, sigmas=None, noise=None, guider=None, latent=None):
    """SamplerCustomAdvanced; parts that are not given are dpmpp_2m, simple, RandomNoise and CFGGuider."""
    (sigmas,) = (sigmas,) if sigmas is not None else use("BasicScheduler", model=desk.model, scheduler="simple",
                                                         steps=desk.steps)  # fmt: skip
    return use(
        "SamplerCustomAdvanced",
        noise=noise or use("RandomNoise", noise_seed=desk.seed)[0],
        guider=guider or use("CFGGuider", model=desk.model, cfg=desk.cfg, **desk.prompts)[0],
        sampler=sampler or chosen("dpmpp_2m"),
        sigmas=sigmas,
        latent_image=latent or desk.latent,
    )[0]


def chosen(sampler: str):
    return use("KSamplerSelect", sampler_name=sampler)[0]


@case("ComfyUI_TiledKSampler", "Tiled KSampler", "random tiles of 512, dpmpp_2m, simple")
def _(desk):
    return use("BNK_TiledKSampler", model=desk.model, seed=desk.seed, steps=desk.steps, cfg=desk.cfg,
               sampler_name="dpmpp_2m", scheduler="simple", latent_image=desk.latent, **desk.prompts)[0]  # fmt: skip


@case("ComfyUI_TiledKSampler", "Tiled KSampler", "padded tiles of 512, euler, simple")
def _(desk):
    return use("BNK_TiledKSampler", model=desk.model, seed=desk.seed, steps=desk.steps, cfg=desk.cfg,
               tiling_strategy="padded", sampler_name="euler", scheduler="simple", latent_image=desk.latent,
               **desk.prompts)[0]  # fmt: skip


@case("ComfyUI_Noise", "Get Sigma, Inject Noise", "then KSampler (Advanced) without noise")
def _(desk):
    (sigma,) = use("BNK_GetSigma", model=desk.model, sampler_name="dpmpp_2m", scheduler="simple", steps=desk.steps)
    side = 8 * desk.latent["samples"].shape[-1]
    (noise,) = use("BNK_NoisyLatentImage", seed=desk.seed, width=side, height=side)
    (noisy,) = use("BNK_InjectNoise", latents=desk.latent, noise=noise, strength=sigma)
    return use("KSamplerAdvanced", model=desk.model, add_noise="disable", noise_seed=desk.seed, steps=desk.steps,
               cfg=desk.cfg, sampler_name="dpmpp_2m", scheduler="simple", latent_image=noisy, start_at_step=0,
               end_at_step=10000, return_with_leftover_noise="disable", **desk.prompts)[0]  # fmt: skip


@case("ComfyUI_Noise", "Unsampler", "a picture to noise and back with euler, normal, 100 steps")
def _(desk):
    settings = {"model": desk.model, "steps": 100, "cfg": desk.cfg, "sampler_name": "euler", "scheduler": "normal"}
    picture = ksampler(desk, "dpmpp_2m")
    (noise,) = use("BNK_Unsampler", latent_image=picture, **settings, **desk.prompts)
    return use("KSamplerAdvanced", add_noise="disable", noise_seed=desk.seed, latent_image=noise, start_at_step=0,
               end_at_step=10000, return_with_leftover_noise="disable", **settings, **desk.prompts)[0]  # fmt: skip


def _clownshark(desk, **inputs):
    return use("ClownsharKSampler_Beta", model=desk.model, latent_image=desk.latent, steps=desk.steps, cfg=desk.cfg,
               seed=desk.seed, options_group=None, **desk.prompts, **inputs)[0]  # fmt: skip


@case("RES4LYF", "ClownsharKSampler", "res_2m, beta57, eta 0")
def _(desk):
    return _clownshark(desk, eta=0.0, bongmath=False)


@case("RES4LYF", "ClownsharKSampler", "its defaults: res_2m, beta57, eta 0.5, bongmath", batch=4)
def _(desk):
    return _clownshark(desk)


@case("RES4LYF", "ClownsharKSampler", "res_2s, simple, eta 0")
def _(desk):
    return _clownshark(desk, sampler_name="exponential/res_2s", scheduler="simple", eta=0.0, bongmath=False)


@case("RES4LYF", "ClownSampler", "in SamplerCustomAdvanced, res_3m, eta 0, sigmas of simple")
def _(desk):
    (sampler,) = use("ClownSampler_Beta", sampler_name="multistep/res_3m", eta=0.0, bongmath=False, options_group=None)
    return custom(desk, sampler)


@case("RES4LYF", "res_2s_ode in KSampler's list", "bong_tangent", spread=True,
      note="a scheduler for flow models: it begins at sigma 1; ours says so")  # fmt: skip
def _(desk):
    return ksampler(desk, "res_2s_ode", "bong_tangent")


@case("RES4LYF", "res_2m in KSampler's list", "beta57", batch=4)
def _(desk):
    return ksampler(desk, "res_2m", "beta57")


@case("RES4LYF", "Sigmas Rescale", "the sigmas of karras to its range", spread=True)
def _(desk):
    (sigmas,) = use("BasicScheduler", model=desk.model, scheduler="karras", steps=desk.steps)
    (sigmas,) = use("Sigmas Rescale", sigmas=sigmas, start=float(sigmas[0]), end=float(sigmas[-1]))
    return custom(desk, sigmas=sigmas)


for name, inputs in (("The Golden Scheduler", {}), ("Gaussian Tail Scheduler", {}), ("Manual scheduler", {}),
                     ("Aligned Scheduler", {"model_type": "SDXL"})):  # fmt: skip

    @case("sigmas_tools_and_the_golden_scheduler", name, "into SamplerCustomAdvanced, dpmpp_2m", spread=True,
          note="" if inputs else "spreads its steps over sigma itself, few are left for texture with both")  # fmt: skip
    def _(desk, name=name, inputs=inputs):
        return custom(desk, sigmas=use(name, model=desk.model, steps=desk.steps, **inputs)[0])


@case("sigmas_tools_and_the_golden_scheduler", "Merge sigmas by average", "simple and karras", spread=True)
def _(desk):
    (simple,), (karras,) = (
        use("BasicScheduler", model=desk.model, scheduler=name, steps=desk.steps) for name in ("simple", "karras")
    )
    return custom(desk, sigmas=use("Merge sigmas by average", sigmas_1=simple, sigmas_2=karras)[0])


@case("ComfyUI-Detail-Daemon", "Detail Daemon Sampler", "its defaults around dpmpp_2m")
def _(desk):
    return custom(desk, use("DetailDaemonSamplerNode", sampler=chosen("dpmpp_2m"))[0])


@case("ComfyUI-Detail-Daemon", "Lying Sigma Sampler", "its defaults around euler")
def _(desk):
    return custom(desk, use("LyingSigmaSampler", sampler=chosen("euler"))[0])


@case("ComfyUI-Detail-Daemon", "Multiply Sigmas", "all by 0.98")
def _(desk):
    (sigmas,) = use("BasicScheduler", model=desk.model, scheduler="simple", steps=desk.steps)
    return custom(desk, sigmas=use("MultiplySigmas", sigmas=sigmas, factor=0.98)[0])


for name, inputs in (("SamplerLCMAlternative", {}), ("SamplerLCMCycle", {}), ("SamplerLCMDualNoise", {}),
                     ("SamplerLCMDuoFusion", {})):  # fmt: skip

    @case("ComfyUI-sampler-lcm-alternative", name, "its defaults, sigmas of simple", batch=4,
          note="its cycle counts the sampler's steps, and ZTSNR Model takes the first of them"
          if name == "SamplerLCMCycle" else "")  # fmt: skip
    def _(desk, name=name, inputs=inputs):
        return custom(desk, use(name, **inputs)[0])


@case("ComfyUI-sampler-lcm-alternative", "LCMScheduler", "8 steps, dpmpp_2m", spread=True)
def _(desk):
    return custom(desk, sigmas=use("LCMScheduler", model=desk.model)[0])


for name in ("supreme", "ttm", "res_momentumized", "clyb_4m_sde_momentumized", "dpmpp_dualsde_momentumized",
             "euler_ancestral_dancing", "dpmpp_3m_sde_dynamic_eta", "lcm_custom_noise"):  # fmt: skip

    @case("ComfyUI-Extra-Samplers", f"{name} in KSampler's list", "simple", batch=4,
          note="its edge enhancement grows with the step in sigma, and destroys stock's picture"
          if name == "supreme" else "")  # fmt: skip
    def _(desk, name=name):
        return ksampler(desk, name)


@case("ComfyUI-Extra-Samplers", "Simple Exponential Scheduler", "dpmpp_2m", spread=True)
def _(desk):
    return custom(desk, sigmas=use("SimpleExponentialScheduler", model=desk.model, steps=desk.steps)[0])


@case("ComfyUI-Extra-Samplers", "Warmup Decay CFG Guider", "CFG 5 to 1", guided=True, side=64,
      note="its scale follows sigma over the table's end, which is another with every door")  # fmt: skip
def _(desk):
    return custom(
        desk, chosen("euler"), guider=use("WarmupDecayCFGGuider", model=desk.model, cfg_max=5.0, **desk.prompts)[0]
    )


@case("ComfyUI_smZNodes", "Settings", "behind the model, then KSampler, dpmpp_2m_alt")
def _(desk):
    return ksampler(desk, "dpmpp_2m_alt", model=use("smZ Settings", **{"*": desk.model})[0])


@case("ComfyUI_smZNodes", "Settings", "behind the model, then KSampler, euler_ancestral", batch=4)
def _(desk):
    return ksampler(desk, "euler_ancestral", model=use("smZ Settings", **{"*": desk.model})[0])


@case("ComfyUI_smZNodes", "Settings", "CFGDenoiser on, CFG 5", guided=True, side=64)
def _(desk):
    return ksampler(desk, "euler", model=use("smZ Settings", **{"*": desk.model, "Use CFGDenoiser": True})[0])


for scheduler in ("simple", "AYS SDXL"):

    @case("ComfyUI-Impact-Pack", "KSampler (pipe)", f"dpmpp_2m, {scheduler}", spread=scheduler != "simple",
          note="" if scheduler == "simple" else NO_ZERO_SNR)  # fmt: skip
    def _(desk, scheduler=scheduler):
        pipe = (desk.model, None, None, desk.positive, desk.negative)
        return use("ImpactKSamplerBasicPipe", basic_pipe=pipe, seed=desk.seed, steps=desk.steps, cfg=desk.cfg,
                   sampler_name="dpmpp_2m", scheduler=scheduler, latent_image=desk.latent)[1]  # fmt: skip

    @case("ComfyUI-Inspire-Pack", "KSampler (inspire)", f"noise of A1111, {scheduler}", spread=scheduler != "simple",
          note="" if scheduler == "simple" else NO_ZERO_SNR)  # fmt: skip
    def _(desk, scheduler=scheduler):
        return use("KSampler //Inspire", model=desk.model, seed=desk.seed, steps=desk.steps, cfg=desk.cfg,
                   sampler_name="dpmpp_2m", scheduler=scheduler, latent_image=desk.latent, variation_strength=0.1,
                   **desk.prompts)[0]  # fmt: skip


@case("ComfyUI-Impact-Pack", "KSampler (Advanced/pipe)", "two stages, dpmpp_2m_sde", batch=4)
def _(desk):
    pipe = (desk.model, None, None, desk.positive, desk.negative)
    settings = {"basic_pipe": pipe, "noise_seed": desk.seed, "steps": desk.steps, "cfg": desk.cfg,
                "sampler_name": "dpmpp_2m_sde", "scheduler": "simple"}  # fmt: skip
    half = use("ImpactKSamplerAdvancedBasicPipe", latent_image=desk.latent, end_at_step=14,
               return_with_leftover_noise=True, **settings)[1]  # fmt: skip
    return use("ImpactKSamplerAdvancedBasicPipe", add_noise=False, latent_image=half, start_at_step=14, **settings)[1]


@case("ComfyUI-Inspire-Pack", "KSamplerAdvanced (inspire)", "two stages of 14 steps")
def _(desk):
    settings = {"model": desk.model, "noise_seed": desk.seed, "steps": desk.steps, "cfg": desk.cfg,
                "sampler_name": "euler", "scheduler": "simple", **desk.prompts}  # fmt: skip
    (half,) = use("KSamplerAdvanced //Inspire", latent_image=desk.latent, end_at_step=14,
                  return_with_leftover_noise=True, **settings)  # fmt: skip
    return use("KSamplerAdvanced //Inspire", add_noise=False, latent_image=half, start_at_step=14, **settings)[0]


@case("ComfyUI-Inspire-Pack", "Scheduled CFGGuider (inspire)", "CFG 6.5 to 1, linear", guided=True, side=64)
def _(desk):
    (sigmas,) = use("BasicScheduler", model=desk.model, scheduler="simple", steps=desk.steps)
    guider, sigmas = use("ScheduledCFGGuider //Inspire", model=desk.model, sigmas=sigmas, **desk.prompts)
    return custom(desk, chosen("euler"), guider=guider, sigmas=sigmas)


@case("ComfyUI_essentials", "KSampler Variations with Noise Injection", "variation 0.17")
def _(desk):
    return use("KSamplerVariationsWithNoise+", model=desk.model, latent_image=desk.latent, main_seed=desk.seed,
               steps=desk.steps, cfg=desk.cfg, sampler_name="dpmpp_2m", scheduler="simple", variation_seed=5,
               **desk.prompts)[0]  # fmt: skip


@case("ComfyUI_essentials", "KSampler Stochastic Variations", "variation 0.2", batch=4)
def _(desk):
    return use("KSamplerVariationsStochastic+", model=desk.model, latent_image=desk.latent, noise_seed=desk.seed,
               steps=desk.steps, cfg=desk.cfg, sampler="dpmpp_2m", scheduler="simple", variation_seed=5,
               **desk.prompts)[0]  # fmt: skip


def _efficient(desk, scheduler="simple", **inputs):
    return use("KSampler (Efficient)", model=desk.model, seed=desk.seed, steps=desk.steps, cfg=desk.cfg,
               sampler_name="dpmpp_2m", scheduler=scheduler, latent_image=desk.latent, preview_method="none",
               vae_decode="false", my_unique_id="1", prompt={}, **desk.prompts, **inputs)[3]  # fmt: skip


@case("efficiency-nodes-comfyui", "KSampler (Efficient)", "dpmpp_2m, simple")
def _(desk):
    return _efficient(desk)


@case("efficiency-nodes-comfyui", "KSampler (Efficient)", "AYS SDXL", spread=True, note=NO_ZERO_SNR)
def _(desk):
    return _efficient(desk, "AYS SDXL")


@case("efficiency-nodes-comfyui", "Noise Control Script", "noise of the GPU's kind, a second seed mixed in")
def _(desk):
    return _efficient(desk, script=use("Noise Control Script", rng_source="nv", add_seed_noise=True, seed=5)[0])


@case("ComfyUI-KJNodes", "Custom Sigmas", "AYS for SDXL, which begins at 14.6", spread=True,
      note=NO_ZERO_SNR)  # fmt: skip
def _(desk):
    (sigmas,) = use("CustomSigmas", interpolate_to_steps=desk.steps)
    return custom(desk, sigmas=sigmas)


@case("ComfyUI-KJNodes", "Scheduled CFG Guidance", "CFG 5 from 0 to 60 %", guided=True, side=64)
def _(desk):
    (guider,) = use("ScheduledCFGGuidance", model=desk.model, cfg=desk.cfg, end_percent=0.6, **desk.prompts)[:1]
    return custom(desk, chosen("euler"), guider=guider)


@case("ComfyUI-KJNodes", "CFG Zero Star/Init", "without its zero init", guided=True, side=64)
def _(desk):
    return ksampler(desk, "euler", model=use("CFGZeroStarAndInit", model=desk.model, use_zero_init=False)[0])


for method in ("MultiDiffusion", "Mixture of Diffusers"):

    @case("ComfyUI-TiledDiffusion", "Tiled Diffusion", f"{method}, tiles of 768, a canvas of 1536", side=192)
    def _(desk, method=method):
        return ksampler(desk, model=use("TiledDiffusion", model=desk.model, method=method)[0])


@case("cg-noisetools", "Shape Noise", "a wave of weight 0.01")
def _(desk):
    (noise,) = use("RandomNoise", noise_seed=desk.seed)
    return custom(desk, noise=use("Shape Noise", noise=noise)[0])


@case("cg-noisetools", "Split Sigmas with Rewind", "to step 14 and on from step 12")
def _(desk):
    (sigmas,) = use("BasicScheduler", model=desk.model, scheduler="simple", steps=desk.steps)
    high, low, *_ = use("Split Sigmas with Rewind", sigmas=sigmas, endstep=14, startstep=12)
    half = custom(desk, sigmas=high)
    return custom(desk, sigmas=low, latent=half, noise=use("RandomNoise", noise_seed=5)[0])


@case("comfyui_overly_complicated_sampling", "OCS Sampler", "its defaults, sigmas of simple", batch=4)
def _(desk):
    (substeps,) = use("OCS Substeps")
    (group,) = use("OCS Group", substeps=substeps)
    return custom(desk, use("OCS Sampler", groups=group)[0])


@case("ComfyUI-Advanced-ControlNet", "Apply Advanced ControlNet", "from 0 to 50 %, strengths falling")
def _(desk):
    import comfy.controlnet

    class Shift(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x, hint, timesteps, context, **_):
            return {"output": [torch.full_like(x, 0.25)], "middle": [torch.zeros_like(x)]}

    net = comfy.controlnet.ControlNet(Shift(), load_device=torch.device("cpu"))
    (frames,) = use("ACN_TimestepKeyframeInterpolation", strength_start=1.0, strength_end=0.2, interpolation="linear",
                    end_percent=0.5)  # fmt: skip
    positive, negative, *_ = use("ACN_AdvancedControlNetApply_v2", control_net=net, image=torch.zeros(1, 64, 64, 3),
                                 end_percent=0.5, timestep_kf=frames, **desk.prompts)  # fmt: skip
    desk.positive, desk.negative = positive, negative
    return ksampler(desk)


def _evolved(desk, **settings):
    (settings,) = use("ADE_AnimateDiffSamplingSettings", noise_type="default", seed_gen="comfy", **settings)
    return use("ADE_UseEvolvedSampling", model=desk.model, beta_schedule="use existing", sample_settings=settings)[0]


@case("ComfyUI-AnimateDiff-Evolved", "Use Evolved Sampling", "without a motion model, existing schedule")
def _(desk):
    return ksampler(desk, model=_evolved(desk))


@case("ComfyUI-AnimateDiff-Evolved", "Use Evolved Sampling", "Custom CFG 5 with rescale 0.7", guided=True, side=64)
def _(desk):
    (extras,) = use("ADE_CFGExtrasRescaleCFGSimple")
    (cfg,) = use("ADE_CustomCFGSimple", cfg=desk.cfg, cfg_extras=extras)
    return ksampler(desk, "euler", model=_evolved(desk, custom_cfg=cfg))


@case("ComfyUI-AnimateDiff-Evolved", "Sigma Schedule", "a schedule of its own, v-prediction",
      note="replaces every door's schedule, by one without zero SNR; ours says so")  # fmt: skip
def _(desk):
    (schedule,) = use("ADE_RawSigmaSchedule", raw_beta_schedule="linear", sampling="v_prediction")
    return ksampler(desk, model=_evolved(desk, sigma_schedule=schedule))


# Functions of guidance: nothing but a node between the model and KSampler.
for pack, node_id, graph, inputs in (
    ("Skimmed_CFG", "Skimmed CFG", "its defaults", {}),
    ("Skimmed_CFG", "Skimmed CFG - linear interpolation", "its defaults", {}),
    ("Skimmed_CFG", "Skimmed CFG - Timed flip", "its defaults", {}),
    ("ComfyUI-AutomaticCFG", "Automatic CFG", "its defaults", {}),
    ("ComfyUI-AutomaticCFG", "Automatic CFG - Warp Drive", "its defaults", {}),
    ("ComfyUI-AutomaticCFG", "Automatic CFG - Post rescale only", "its defaults", {}),
    ("ComfyUI-CADS", "CADS", "on the prompt, a seed", {"seed": 5, "key": "c_crossattn"}),
    ("ComfyUI-Latent-Modifiers", "Latent Diffusion Mega Modifier", "rescale 0.7, sharpness 2, tonemap 1",
     {"rescale_cfg_phi": 0.7, "sharpness_multiplier": 2.0, "tonemap_multiplier": 1.0}),
    ("ComfyUI_experiments", "RescaleClassifierFreeGuidanceTest", "its defaults", {}),
    ("ComfyUI_experiments", "ModelSamplerTonemapNoiseTest", "its defaults", {}),
    ("sd-dynamic-thresholding", "DynamicThresholdingSimple", "mimic 3", {"mimic_scale": 3.0}),
    ("sd-dynamic-thresholding", "DynamicThresholdingFull", "mimic 3, half cosine down",
     {"mimic_scale": 3.0, "mimic_mode": "Half Cosine Down"}),
    ("sd-perturbed-attention", "PerturbedAttention", "its defaults: scale 3", {}),
    ("sd-perturbed-attention", "SlidingWindowGuidanceAdvanced", "tiles of 256, to the end",
     {"tile_width": 256, "tile_height": 256, "tile_overlap": 64, "sigma_end": -1.0}),
    ("sd-perturbed-attention", "FrequencyDecoupledGuidance", "its defaults", {}),
    ("sd-perturbed-attention", "MomentumGuidance", "its defaults", {}),
    ("sd-perturbed-attention", "SlidingModeControlCFG", "its defaults", {}),
):  # fmt: skip

    @case(pack, node_id, f"{graph}, CFG 5", guided=True, side=64)
    def _(desk, node_id=node_id, inputs=inputs):
        return ksampler(desk, "euler", model=use(node_id, model=desk.model, **inputs)[0])
