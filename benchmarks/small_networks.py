"""Solvers and spacings on a trained network, the zero-SNR one that comes with the package, under guidance.

    python benchmarks/small_networks.py [--prompts 32] [--steps 10,20,28] [--cfg 1,5,7.5] [--no-write]

Every sampler gets the same captions and noise.  Its pictures are compared, in levels of 255, with those of Heun's
method in many steps; how far those of another method in many steps are from them says how well the answer is known.
Prints the tables and puts them into benchmarks/RESULTS.md.
"""

import datetime
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import diffusers
import numpy as np
import torch
from results import RESULTS, machine, write_section
from tabulate import tabulate
from tqdm import tqdm

from ztsnr.demo.classifier import adherence, draw_short, train_classifier
from ztsnr.demo.composed import Asked, Composer
from ztsnr.demo.measures import frame
from ztsnr.demo.networks import DemoNetwork
from ztsnr.demo.objectives import OURS, shift_of
from ztsnr.demo.shipped import load_shipped
from ztsnr.diagnostics.estimates import Estimate
from ztsnr.diagnostics.leak_probes import LUMA
from ztsnr.samplers import DEFAULT_SOLVER, DEFAULT_SPACING, step_schedule
from ztsnr.samplers.prediction import from_denoised

HEADING = "Trained network: solvers under guidance"
REFERENCE = 150  # steps of Heun's method: 300 evaluations
STOCK_SIGMA_MAX = 4518.76  # ComfyUI's stand-in for infinity
OFF = 10.0  # levels of rms from which on a picture is another one
SEED = 2000

Levels = np.ndarray
SigmasOf = Callable[[DemoNetwork, int, float], Sequence[float]]  # (network, steps, cfg)


@dataclass(frozen=True)
class Case:
    """What is sampled.

    Attributes:
        asked, captions: One a picture; half of the pairs were never trained with.
        noise: (B, C, h, w).
        cfg: Scale of guidance.
    """

    asked: tuple[Asked, ...]
    noise: torch.Tensor
    cfg: float

    @property
    def captions(self) -> list[str]:
        return [one.caption for one in self.asked]


@dataclass(frozen=True)
class Row:
    """A sampler: ``run(network, case, steps)`` gives pictures in levels, not clipped."""

    program: str
    name: str
    run: Callable[[DemoNetwork, Case, int], Levels]


def make_case(network: DemoNetwork, composer: Composer, count: int, cfg: float) -> Case:
    """Things on all grounds, drawn and not chosen; every second pair is held out."""
    random = np.random.default_rng(SEED)
    asked = []
    while len(asked) < count:
        one = draw_short(composer, random)
        if one.emoji and composer.held_out(one) == bool(len(asked) % 2):
            asked.append(one)
    return Case(tuple(asked), network.noise(range(SEED, SEED + count)), cfg)


# ----------------------------------------------------------------------------------------------------------------------
# Samplers


def with_sigmas(solver: str, sigmas_of: SigmasOf):
    """``sample`` with a solver of this package on noise levels of whatever kind."""

    def run(network: DemoNetwork, case: Case, steps: int) -> Levels:
        sigmas = sigmas_of(network, steps, case.cfg)
        return network.levels(network.sample(case.captions, case.noise, sigmas, solver, case.cfg))

    return run


def ours(spacing: str) -> SigmasOf:
    """A spacing of this package, from infinity, told the scale of guidance."""

    def sigmas(network: DemoNetwork, steps: int, cfg: float) -> Sequence[float]:
        return step_schedule(network.schedule, steps, spacing, latent_size=network.shape[1:], guidance=cfg)

    return sigmas


def stock(spacing: str) -> SigmasOf:
    """The noise levels that stock ComfyUI samples a zero-SNR model at, scaled to the canvas: they begin at 4518.76."""

    def sigmas(network: DemoNetwork, steps: int, cfg: float) -> Sequence[float]:
        schedule, shift = network.schedule, shift_of(network.shape[-1])
        low, high = schedule.sigma_min, STOCK_SIGMA_MAX * shift
        if spacing == "karras":
            ramp = np.linspace(0, 1, steps)
            levels = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        elif spacing == "exponential":
            levels = np.geomspace(high, low, steps)
        else:  # simple
            last = schedule.last_timestep
            levels = [min(schedule.sigma(float(last - int(i * (last + 1) / steps))), high) for i in range(steps)]
        return [*map(float, levels), 0.0]

    return sigmas


def in_diffusers(scheduler_class: type, **options) -> Callable[[DemoNetwork, Case, int], Levels]:
    """The loop of a diffusers pipeline around the network."""

    def run(network: DemoNetwork, case: Case, steps: int) -> Levels:
        config = {**network.pipe.scheduler.config, "_use_default_values": []}
        scheduler = scheduler_class.from_config(config, rescale_betas_zero_snr=True, **options)
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)
        denoise = network.denoise(case.captions, case.cfg)
        x = case.noise * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            state = scheduler.scale_model_input(x, t)
            if scheduler_class is not diffusers.EulerDiscreteScheduler:  # its state is variance-preserving already
                state = x
            sigma = float(scheduler.sigmas[i])
            if scheduler_class is diffusers.EulerDiscreteScheduler:
                state = x / math.hypot(1, sigma)
            output = from_denoised(denoise(state, sigma), state, sigma, "v_prediction")
            x = scheduler.step(output, t, x).prev_sample
        return network.levels(x)

    return run


def rows() -> list[Row]:
    """Ours, our solvers on each other's spacings, stock ComfyUI's noise levels, and diffusers' schedulers."""
    made = [
        Row(
            "ztsnr",
            f"{DEFAULT_SOLVER} / {DEFAULT_SPACING} (default)",
            with_sigmas(DEFAULT_SOLVER, ours(DEFAULT_SPACING)),
        )
    ]
    made += [
        Row("ztsnr", f"{solver} / {spacing}", with_sigmas(solver, ours(spacing)))
        for solver in ("euler", "dpmpp_2m", "unipc", "res_multistep", DEFAULT_SOLVER)
        for spacing in (DEFAULT_SPACING, "karras", "exponential", "trailing")
        if (solver, spacing) != (DEFAULT_SOLVER, DEFAULT_SPACING)
    ]
    made += [
        Row("stock levels", f"{solver} / {spacing}", with_sigmas(solver, stock(spacing)))
        for solver in ("euler", "dpmpp_2m", "unipc", "res_multistep")
        for spacing in ("simple", "karras")
    ]
    trailing = {"timestep_spacing": "trailing"}
    made += [
        Row("diffusers", "Euler / trailing", in_diffusers(diffusers.EulerDiscreteScheduler, **trailing)),
        Row(
            "diffusers",
            "DPM++ 2M / karras",
            in_diffusers(diffusers.DPMSolverMultistepScheduler, use_karras_sigmas=True, **trailing),
        ),
        Row("diffusers", "DPM++ 2M / trailing", in_diffusers(diffusers.DPMSolverMultistepScheduler, **trailing)),
        Row("diffusers", "UniPC / trailing", in_diffusers(diffusers.UniPCMultistepScheduler, **trailing)),
    ]
    return made


# ----------------------------------------------------------------------------------------------------------------------
# The table


def scores(found: Levels, reference: Levels) -> dict[str, np.ndarray]:
    """Of each picture: rms to the reference, and how far the brightness of its ground is off, in levels."""
    found, reference = found.clip(0, 255), reference.clip(0, 255)
    rms = np.sqrt(np.square(found - reference).mean((1, 2, 3)))
    grounds = ((frame(found) - frame(reference)) @ LUMA).mean(1)
    return {"rms": rms, "ground": np.abs(grounds)}


@click.command(help=__doc__.split("\n")[0])
@click.option("--prompts", type=click.IntRange(2), default=32, show_default=True)
@click.option("--steps", default="10,20,28", show_default=True)
@click.option("--cfg", default="1,5,7.5", show_default=True)
@click.option("--write/--no-write", default=True, show_default=True, help="Put the tables into RESULTS.md.")
def main(prompts: int, steps: str, cfg: str, write: bool) -> None:
    network, composer, begin = load_shipped(OURS), Composer(), time.process_time()
    counts, scales = [int(n) for n in steps.split(",")], [float(w) for w in cfg.split(",")]
    classifier = train_classifier(composer)
    samplers, sections = rows(), []
    with tqdm(total=len(scales) * (len(samplers) * len(counts) + 2), unit="run") as bar:
        for scale in scales:
            case = make_case(network, composer, prompts, scale)
            reference = with_sigmas("heun", ours(DEFAULT_SPACING))(network, case, REFERENCE)
            bar.update()
            check = with_sigmas("dpmpp_2m", ours(DEFAULT_SPACING))(network, case, 2 * REFERENCE)
            bar.update()
            known = scores(check, reference)["rms"]
            right = adherence(classifier, composer, reference, case.asked)
            table, first = [], {}
            for row in samplers:
                cells = [row.program, row.name]
                for count in counts:
                    pictures = row.run(network, case, count)
                    bar.update()
                    found = scores(pictures, reference)
                    first.setdefault(count, found["rms"])
                    cells += [
                        f"{found['rms'].mean():.1f} ± {Estimate.over_seeds(found['rms']).error:.1f}",
                        f"{np.median(found['rms']):.1f}",
                        f"{(found['rms'] > OFF).mean():.0%}",
                        f"{np.sqrt(np.square(found['ground']).mean()):.1f}",
                        f"{Estimate.over_seeds(found['rms'] - first[count])}" if row is not samplers[0] else "",
                    ]
                table.append(cells)
            heads = [
                f"{name}\n{n} steps"
                for n in counts
                for name in ("rms", "median", f"off by {OFF:g}", "ground", "minus default")
            ]
            text = tabulate(
                table,
                ["", "solver / spacing", *heads],
                disable_numparse=True,
                colalign=["left"] * 2 + ["right"] * len(heads),
            )
            sections.append(
                f"CFG {scale:g}. Two references are {known.mean():.2f} levels apart (at most {known.max():.2f}). In "
                f"the reference's pictures a classifier sees the thing that was asked for in {right[0].mean():.0%} and "
                f"the ground in {right[1].mean():.0%}.\n\n```\n{text}\n```"
            )
            print(sections[-1], flush=True)
    took = time.process_time() - begin
    text = f"""`python benchmarks/{Path(__file__).name} --prompts {prompts}`, {datetime.date.today().isoformat()}.
{machine(None)}.

The zero-SNR network that comes with the package (32 x 32, SDXL's schedule scaled to the canvas), {prompts} captions of
which half are pairs of thing and ground that it never saw; rms per picture in levels of 255 to Heun's method in
{REFERENCE} steps ({2 * REFERENCE} evaluations), mean ± 99 % interval over pictures, median, share off by more than
{OFF:g} levels, rms error of the ground's brightness, and the paired difference to the default. "Stock levels": the
noise levels of ComfyUI from 4518.76, by this package's solvers, with exact timesteps. {took:.0f} CPU seconds.

{(chr(10) * 2).join(sections)}
"""
    if write:
        write_section(RESULTS, HEADING, text)


if __name__ == "__main__":
    main()
