"""The mean-leak test on a MODEL and a sampler."""

import contextlib
import itertools
import math
from importlib.util import find_spec
from typing import NamedTuple

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_base import ModelType
from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker

from ..diagnostics.latent_stats import LatentStatistics
from ..diagnostics.leak import mean_leak
from ..diagnostics.leak_probes import PROBED, Run, ToRGB, probed_sigmas
from ..diagnostics.leak_report import COLOURS
from ..diagnostics.verdict import LeakReport
from ..errors import UserError
from ..extras import needs
from ..samplers import DEFAULT_SOLVER, NoiseSchedule, step_schedule
from ..samplers.devices import to_float64
from ..samplers.sampling import Denoise
from .guidance_shift import guidances_of, name_of_guidance, without_guidance
from .latent_rgb import draw, rgb_of, strip_of
from .messages import refused
from .model_patch import patch_model, trained_schedule
from .model_sampling import ExactSchedule
from .probe import RunProbe, noise_level, noise_scale, unwatched, watch
from .report import describe_first_guidance
from .sampler import sample_ztsnr
from .schema import schema

REFERENCE_STEPS = 50
FINER = 4  # times as many steps, where the reference is the sampler itself


class LatentMeanDiagnostic(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LatentMeanDiagnostic",
            display_name="Latent Mean Diagnostic",
            category="ZTSNR/diagnostics",
            description="Measures whether brightness leaks: whether the model mistakes the mean of the noise for the "
            "picture's, and what the sampler adds to that. It tells whether a checkpoint is zero-SNR trained and "
            "whether it is sampled exactly.",
            search_aliases=["mean leak", "zero terminal SNR test", "ztsnr", "brightness", "checkpoint test", "zsnr"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model as it goes to the sampler. It is not changed."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt. Leave it empty to test the checkpoint: that leaves the brightness open.",
                ),
                io.Conditioning.Input("negative", tooltip="As in your workflow."),
                io.Latent.Input("latent", tooltip="An empty latent of the size to test; only its size is used."),
                io.Sampler.Input("sampler", tooltip="The sampler to test, such as KSamplerSelect or ZTSNR Sampler."),
                io.Sigmas.Input("sigmas", tooltip="The steps to test, such as BasicScheduler or ZTSNR Scheduler."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale of the sampler. The checkpoint is tested without guidance.",
                ),
                io.Int.Input(
                    "seeds",
                    default=8,
                    min=2,
                    max=1000,
                    tooltip="Number of noise seeds. Each is sampled twice with your sampler and twice with the "
                    "reference. The report says if more are needed.",
                ),
                io.Int.Input(
                    "first_seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    tooltip="The first seed; each next one is higher by 1.",
                ),
                io.Combo.Input(
                    "asked_colour",
                    options=["none", *COLOURS],
                    default="none",
                    tooltip="If the prompt asks for a picture of one colour, choose that colour: the report then says "
                    "how far the pictures are from it.",
                ),
                io.Combo.Input(
                    "theme", options=["dark", "light"], default="dark", tooltip="Background of the picture."
                ),
                io.Boolean.Input(
                    "guidance_shift",
                    default=False,
                    optional=True,  # graphs that were saved before it existed do not have it
                    tooltip="Also measure how far guidance moves the brightness of pictures from the same noise. Takes "
                    "about twice as long.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="For true brightness and colours. Without it they are estimated from the latents.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The verdict, and every number behind it."),
                io.Image.Output(display_name="picture", tooltip="The measurements as a picture; needs matplotlib."),
                io.Float.Output(
                    display_name="slope",
                    tooltip="How much the model's first prediction follows the mean of the noise; 0 for a zero-SNR "
                    "model.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent: dict,
        sampler,
        sigmas: torch.Tensor,
        cfg: float,
        seeds: int,
        first_seed: int,
        asked_colour: str,
        theme: str,
        guidance_shift: bool = False,
        vae=None,
    ) -> io.NodeOutput:
        try:
            check_sigmas(sigmas)
            model = unwatched(model)
            empty = empty_pair(model, latent)
            latent_format = model.get_model_object("latent_format")
            to_rgb, through = rgb_of(latent_format, vae)
            if to_rgb is not None:
                to_rgb(empty[:1])  # a VAE for other latents fails here, not after the first run
            target, remarks = colour_of(asked_colour, to_rgb is not None)
            question = question_for(model)
            if question is None:
                remarks.append(
                    "The checkpoint was not tested: that works for Stable Diffusion and flow matching models, not for "
                    f"{type(model.model).__name__} ({model.model.model_type.name})."
                )
            exact, reference = reference_of(model, sampler, sigmas, empty.shape[-2:])
            guidances, more = guidances_of(exact[0], cfg, empty.ndim) if guidance_shift else ({}, [])
            remarks[:0] = more
            probe = RunProbe()
            bar = comfy.utils.ProgressBar(seeds * ((2 if question is None else 3) + len(guidances)))

            def exact_run(model, cfg: float) -> Run:
                return run_of(model, *exact[1:], RunProbe(), positive, negative, cfg, empty, first_seed)

            report = mean_leak(
                None if question is None else answers_of(question, positive, negative, empty),
                run_of(model, sampler, sigmas, probe, positive, negative, cfg, empty, first_seed),
                tuple(empty.shape[1:]),
                schedule=None if question is None else question.schedule,
                sigmas=[] if question is None else question.sigmas,
                reference=exact_run(exact[0], cfg),
                reference_name=reference,
                guidance_name=name_of_guidance(model, cfg),
                **{kind: exact_run(*guidance) for kind, guidance in guidances.items()},
                start_sigma=start_of(model, sigmas),
                seeds=range(first_seed, first_seed + seeds),
                to_rgb=to_rgb,
                brightness_through=through,
                target=target,
                progress=lambda: tick(bar),
            )
        except UserError as reason:
            return refused(UserError(sentence(str(reason))), outputs=3)
        picture = draw(lambda: figure_of(report, probe, to_rgb, theme), theme, sentence(report.verdict))
        if to_rgb is not None and not guidance_shift:
            remarks = describe_first_guidance(probe, to_rgb) + remarks
        text = "\n".join([str(report), *remarks])
        slope = ExecutionBlocker(remarks[-1]) if report.checkpoint is None else report.checkpoint.slope.value
        return io.NodeOutput(text, picture, slope, ui=ui.PreviewImage(picture, cls=cls))


def check_sigmas(sigmas: torch.Tensor) -> None:
    """UserError unless there are at least two sigmas and the last is 0."""
    if len(sigmas) < 2:
        raise UserError(f"The sigmas must contain at least two values, which is one step, not {len(sigmas)}.")
    if sigmas[-1] != 0:
        raise UserError(
            f"The sigmas must end at 0, the finished picture, not at {float(sigmas[-1]):.4g}: connect all of them."
        )


def empty_pair(model, latent: dict) -> torch.Tensor:
    """Two empty latents of the size of a LATENT, with the channels of the model, as ComfyUI's samplers make them."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        raise UserError(
            "The latent has several tensors, such as audio and video: this node takes a latent of one tensor."
        )
    ratios = {name: latent[name] for name in latent if name.startswith("downscale_ratio")}  # newer cores'
    samples = comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(samples[:1]), **ratios)
    return comfy.utils.repeat_to_batch_size(samples, 2)


def colour_of(name: str, has_rgb: bool) -> tuple[tuple[int, int, int] | None, list[str]]:
    """The colour to compare with, and a sentence if that is impossible."""
    if name == "none":
        return None, []
    if not has_rgb:
        return None, [
            "The colour was not compared: connect a VAE, because this model's latents have no linear map to RGB."
        ]
    if find_spec("skimage") is None:
        return None, [f"The colour was not compared: {needs('CIEDE2000', 'skimage')}."]
    return COLOURS[name], []


def tick(bar: comfy.utils.ProgressBar) -> None:
    """Advance the bar by one probe; stop here if the user has interrupted."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    bar.update(1)


def sentence(text: str) -> str:
    """Text with a capital at its beginning and a full stop at its end."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def figure_of(report: LeakReport, probe: RunProbe, to_rgb: ToRGB | None, theme: str):
    """The picture, with a strip of the last seed's run."""
    from ..diagnostics.leak_figure import leak_figure

    sigmas = probe.recorder.read().sigmas
    return leak_figure(report, theme=theme, strip=strip_of(probe.predictions, sigmas, finished(probe)[:1], to_rgb))


# ----------------------------------------------------------------------------------------------------------------------
# The checkpoint: what the network predicts for pure noise


class Question(NamedTuple):
    """The network to probe with pure noise, and at which noise levels.

    Attributes:
        model: a MODEL without guidance functions.
        schedule: None for flow matching, which has no table of noise levels.
        sigmas: increasing, up to that of t = T; standard deviation of the noise over that of the signal.
    """

    model: object
    schedule: NoiseSchedule | None
    sigmas: list[float]


def question_for(model) -> Question | None:
    """How to probe a MODEL; None if it is neither Stable Diffusion nor flow matching.

    A Stable Diffusion model is probed through our own patch, so that t = T is exact whatever nodes come before; one
    whose schedule another node has replaced is probed as it is.
    """
    kind = model.model.model_type
    with contextlib.suppress(UserError):
        model, _ = patch_model(model, canvas_shift=1.0)
    model = without_guidance(model)
    model_sampling = model.get_model_object("model_sampling")
    if isinstance(model_sampling, ExactSchedule):
        return Question(model, model_sampling.schedule, probed_sigmas(model_sampling.schedule))
    if isinstance(model_sampling, comfy.model_sampling.CONST) and kind in (ModelType.FLOW, ModelType.FLUX):
        scale = noise_scale(model_sampling)
        return Question(model, None, [math.inf if time == 1 else scale * time / (1 - time) for time in PROBED])
    if isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete) and kind in (
        ModelType.EPS,
        ModelType.V_PREDICTION,
    ):
        schedule = trained_schedule(model_sampling, bool(model_sampling.zsnr))
        return Question(model, schedule, probed_sigmas(schedule))
    return None


def answers_of(question: Question, positive, negative, empty: torch.Tensor) -> Denoise:
    """``denoise(x_vp, sigma) -> x0`` for one noise at several levels: the first call computes them all in one run."""
    model_sampling = question.model.get_model_object("model_sampling")
    answers: dict[float, torch.Tensor] = {}

    def denoise(x_vp: torch.Tensor, sigma: float) -> torch.Tensor:
        if not answers:
            ask(x_vp)
        return answers.pop(sigma)

    def ask(noise: torch.Tensor) -> None:
        def sampler_function(network, x, sigmas_of_run, extra_args=None, **_):
            for sigma in question.sigmas:
                comfy.model_management.throw_exception_if_processing_interrupted()
                level, scale = state_at(model_sampling, sigma)
                answers[sigma] = network(scale * noise.to(x), x.new_full((len(x),), level), **extra_args).cpu()
            return x

        sampler_function.starts_at_infinity = True
        start = torch.tensor([state_at(model_sampling, question.sigmas[-1])[0], 0.0])
        sampler = comfy.samplers.KSAMPLER(sampler_function)
        comfy.sample.sample_custom(
            question.model, noise, 1.0, sampler, start, positive, negative, empty, disable_pbar=True, seed=0
        )

    return denoise


def state_at(model_sampling, sigma: float) -> tuple[float, float]:
    """The number that ComfyUI calls sigma at a noise level, and the scale of its state there."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        scale = noise_scale(model_sampling)
        time = 1.0 if math.isinf(sigma) else sigma / (scale + sigma)
        return time, math.hypot(1 - time, scale * time)
    sigma = min(sigma, float(model_sampling.sigma_max))  # the last of the table stands for infinity
    return sigma, math.hypot(1, sigma)


# ----------------------------------------------------------------------------------------------------------------------
# The sampler: its pictures beside those of the exact flow


def run_of(
    model, sampler, sigmas: torch.Tensor, probe: RunProbe, positive, negative, cfg: float, empty, seed: int
) -> Run:
    """``run(noise) -> (latents, statistics)`` with ComfyUI's sampling, in the scale of the model."""
    model = watch(model, probe)
    seeds = itertools.count(seed)  # for the noise that samplers add; another for each run, as for a user

    def on_step(*_) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def run(noise: torch.Tensor) -> tuple[torch.Tensor, LatentStatistics]:
        comfy.sample.sample_custom(
            model, noise, cfg, sampler, sigmas, positive, negative, empty, callback=on_step, disable_pbar=True,
            seed=next(seeds),
        )  # fmt: skip
        return finished(probe), probe.recorder.read()

    return run


def finished(probe: RunProbe) -> torch.Tensor:
    """The result of a run, in the scale of the model, on the CPU."""
    return probe.latent_format.process_in(probe.result.float().cpu())


def reference_of(
    model, sampler, sigmas: torch.Tensor, latent_size: tuple[int, int]
) -> tuple[tuple[object, object, torch.Tensor], str]:
    """Model, sampler and sigmas that come close to the exact flow of the same network, and their name in words."""
    try:
        exact, _ = patch_model(model, canvas_shift=canvas_shift_of(model))
    except UserError:
        return (model, sampler, finer(sigmas)), f"the same sampler with {FINER} times as many steps"
    schedule = exact.get_model_object("model_sampling").schedule
    steps = step_schedule(schedule, REFERENCE_STEPS, latent_size=tuple(latent_size)).float()
    options = {"solver": DEFAULT_SOLVER, "eta": 0.0, "s_noise": 1.0}
    start = "infinity" if schedule.zero_terminal_snr else f"sigma {float(steps[0]):.4g}"
    name = f"ZTSNR Sampler, {DEFAULT_SOLVER}, {REFERENCE_STEPS} steps from {start}"
    return (exact, comfy.samplers.KSAMPLER(sample_ztsnr, extra_options=options), steps), name


def canvas_shift_of(model) -> float:
    """The factor by which our nodes have multiplied a MODEL's sigmas."""
    own = model.get_model_object("model_sampling")
    if not getattr(own, "made_by_ztsnr", False):
        return 1.0
    loaded = model.clone()
    loaded.object_patches.pop("model_sampling")
    return round(float(own.sigmas[0] / loaded.get_model_object("model_sampling").sigmas[0]), 4)


def finer(sigmas: torch.Tensor) -> torch.Tensor:
    """FINER times as many steps: more between any two, evenly in the angle atan(sigma)."""
    levels = to_float64(sigmas).cpu()
    angles = levels.atan()
    shares = torch.arange(FINER) / FINER
    between = (angles[:-1, None] + shares * angles.diff()[:, None]).flatten().tan()
    between[::FINER] = levels[:-1]  # as they were, to the last digit
    return torch.cat([between, levels[-1:]]).to(sigmas)


def start_of(model, sigmas: torch.Tensor) -> float:
    """The noise level at which a run starts, inf if it starts with pure noise."""
    return float(noise_level(model.get_model_object("model_sampling"), sigmas[:1])[0])
