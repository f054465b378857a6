"""Guidance: how well pictures follow their captions, against how far guidance moves their brightness.

    python benchmarks/exposure.py [--prompts 56] [--cfg 2,3,5,7.5] [--no-write]

Kinds of classifier-free guidance on the zero-SNR network that comes with the package, all from the same captions and
noise.  A classifier says whether a picture shows the thing and the ground that it was asked for; each picture's
brightness is compared with what the same noise gives without guidance.  Prints the table, puts it into
benchmarks/RESULTS.md and draws docs/exposure.jpg.
"""

import datetime
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from results import RESULTS, machine, write_section
from scipy.stats import binomtest
from small_networks import Levels, make_case
from tabulate import tabulate
from tqdm import tqdm

from ztsnr.demo.classifier import Classifier, adherence, train_classifier
from ztsnr.demo.composed import COLOURS, Asked, Composer
from ztsnr.demo.evaluation import mean_colour
from ztsnr.demo.measures import brightness, frame
from ztsnr.demo.networks import NO_CAPTION, DemoNetwork
from ztsnr.demo.objectives import OURS
from ztsnr.demo.shipped import load_shipped
from ztsnr.diagnostics.estimates import CONFIDENCE, Estimate
from ztsnr.diagnostics.leak_probes import LUMA
from ztsnr.figures.palette import COLORS, FAINT, INK, MARKERS
from ztsnr.samplers import (
    DEFAULT_SOLVER,
    exposure_true_guidance,
    guide,
    rescale_contrast,
    rescale_guidance,
    sample,
    step_schedule,
    to_denoised,
)
from ztsnr.samplers.prediction import from_denoised
from ztsnr.samplers.sampling import Denoise

HEADING = "Guidance: exposure and adherence"
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "exposure.jpg"
STEPS = 28
PHI = 0.7
SEED = 7

Tensor = torch.Tensor
Numbers = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kind:
    """A kind of guidance.

    Attributes:
        join: (cond, uncond, scale, x, sigma) -> guided; predictions of x0 (B, C, h, w) and the variance-preserving
            state they are of.
        interval: (low, high] noise levels at which there is guidance, in units of the canvas length.
    """

    name: str
    join: Callable[[Tensor, Tensor, float, Tensor, float], Tensor]
    interval: tuple[float, float] = (0.0, math.inf)


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of guidance


def cfg(cond: Tensor, uncond: Tensor, scale: float, x: Tensor, sigma: float) -> Tensor:
    """Ho and Salimans, arXiv 2207.12598."""
    return guide(cond, uncond, scale)


def rescaled(
    cond: Tensor, uncond: Tensor, scale: float, x: Tensor, sigma: float, *, by=rescale_guidance, phi: float = PHI
) -> Tensor:
    """Lin et al., arXiv 2305.08891, Algorithm 2, on v; ``by`` is that or the form that keeps the prompt's mean."""
    guided, alone = (from_denoised(x0, x, sigma, "v_prediction") for x0 in (guide(cond, uncond, scale), cond))
    return to_denoised(by(guided, alone, phi), x, sigma, "v_prediction")


def exposure_true(cond: Tensor, uncond: Tensor, scale: float, x: Tensor, sigma: float, **shares: float) -> Tensor:
    """This package's, with its own exposure and contrast unless told others."""
    return exposure_true_guidance(cond, uncond, scale, **shares)


def projected(cond: Tensor, uncond: Tensor, scale: float, x: Tensor, sigma: float, *, eta: float = 0.0) -> Tensor:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416) without its norm threshold and momentum.

    The share 1 - eta of the difference that is parallel to the conditional x0 is left out.
    """
    difference = cond - uncond
    along = (difference * cond).sum((1, 2, 3), keepdim=True) / cond.square().sum((1, 2, 3), keepdim=True)
    return cond + (scale - 1) * (difference - (1 - eta) * along * cond)


def frequency_decoupled(
    cond: Tensor, uncond: Tensor, scale: float, x: Tensor, sigma: float, *, low: float = 0.5
) -> Tensor:
    """Frequency-decoupled guidance (Sadat et al., arXiv 2506.19713) on a Laplacian pyramid of two levels.

    ``scale`` is that of the high frequencies; the low ones are guided by the share ``low`` of it, so that with 0.5 a
    scale of 10 is one of 5.5 there (the paper's scales for SDXL are 10 and 5).
    """
    difference = cond - uncond
    coarse = _expand(_reduce(difference), difference.shape[-2:])
    return cond + (scale - 1) * (low * coarse + (difference - coarse))


def _reduce(x: Tensor) -> Tensor:
    """The next coarser level of a pyramid."""
    return _blur(x)[..., ::2, ::2]


def _expand(x: Tensor, size: Sequence[int]) -> Tensor:
    """A level of a pyramid on the grid of the next finer one."""
    return _blur(F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False))


def _blur(x: Tensor) -> Tensor:
    """Burt and Adelson's kernel (1, 4, 6, 4, 1) / 16 along both sides."""
    kernel = x.new_tensor([1, 4, 6, 4, 1]) / 16
    kernel = kernel.outer(kernel).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


KINDS = (
    Kind("CFG", cfg),
    Kind("rescale 0.7", rescaled),
    Kind("rescale 0.7, prompt's mean", partial(rescaled, by=rescale_contrast)),
    Kind("exposure-true (0.9, 0.8)", exposure_true),
    Kind("mean alone (1, 0)", partial(exposure_true, exposure=1.0, contrast=0.0)),
    Kind("APG, projection", projected),
    Kind("interval", cfg, (0.01, 0.25)),
    Kind("FDG", frequency_decoupled),
)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and what is measured of them


def guided_denoise(network: DemoNetwork, captions: Sequence[str], kind: Kind, scale: float) -> Denoise:
    """``denoise(x_vp, sigma) -> x0`` under a kind of guidance."""
    with_caption, without = network.denoise(captions), network.denoise([NO_CAPTION] * len(captions))
    low, high = (edge * math.sqrt(math.prod(network.shape[1:])) for edge in kind.interval)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        cond = with_caption(x, sigma)
        if scale == 1 or not low < sigma <= high:
            return cond
        return kind.join(cond, without(x, sigma), scale, x, sigma)

    return denoise


def make_pictures(network: DemoNetwork, captions: Sequence[str], noise: Tensor, kind: Kind, scale: float) -> Levels:
    """(B, H, W, 3) levels, not clipped, by the default solver from infinity."""
    sigmas = step_schedule(network.schedule, STEPS, latent_size=network.shape[1:], guidance=scale)
    return network.levels(sample(guided_denoise(network, captions, kind, scale), noise, sigmas, DEFAULT_SOLVER))


@cache
def asked_luma(ground: str) -> float:
    """Mean luma of the shades of a colour; NaN for other grounds."""
    return float(mean_colour(ground) @ LUMA) if ground in COLOURS else math.nan


def measure(pictures: Levels, asked: Sequence[Asked], classifier: Classifier, composer: Composer) -> Numbers:
    """Of each picture: brightness as shown, error of the ground's, share of clipped values, what the classifier sees.

    The error is NaN where the caption asks for no colour; otherwise it is taken from the mean of that colour's shades.
    """
    shown = pictures.clip(0, 255)
    thing, ground = adherence(classifier, composer, pictures, asked)
    return {
        "brightness": brightness(shown),
        "off": (frame(shown) @ LUMA).mean(1) - [asked_luma(one.ground) for one in asked],
        "clipped": ((pictures <= 0) | (pictures >= 255)).mean((1, 2, 3)),
        "thing": thing,
        "ground": ground,
        "both": thing & ground,
    }


# ----------------------------------------------------------------------------------------------------------------------
# The table and the plot


def moved(found: Numbers, alone: Numbers) -> Estimate:
    """rms over pictures of their brightness less that of their twins without guidance."""
    return Estimate.rms_over_seeds(np.square(found["brightness"] - alone["brightness"]))


def share(right: np.ndarray) -> str:
    """A share in percent and its interval by Wilson, who has one at 0 and 1 too."""
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(CONFIDENCE, "wilson")
    return f"{100 * right.mean():.0f} ({100 * interval.low:.0f} to {100 * interval.high:.0f})"


def table(found: dict[tuple[str, float], Numbers], alone: Numbers, real: Numbers) -> str:
    """One row for each kind and scale, below the prompt alone and pictures of the data set."""
    rows = []
    for (name, scale), numbers in {("data set", 0.0): real, ("no guidance", 1.0): alone, **found}.items():
        off = numbers["off"][~np.isnan(numbers["off"])]
        rows.append(
            [
                name,
                f"{scale:g}" if scale else "",
                str(moved(numbers, alone)) if scale > 1 else "",
                str(Estimate.rms_over_seeds(np.square(off))),
                str(Estimate.over_seeds(100 * numbers["clipped"])),
                *(share(numbers[answer]) for answer in ("thing", "ground", "both")),
            ]
        )
    heads = ["guidance", "scale", "brightness\nmoved", "ground off", "clipped, %", "thing, %", "ground, %", "both, %"]
    return tabulate(rows, heads, disable_numparse=True, colalign=["left", *["right"] * 7])


def draw(found: dict[tuple[str, float], Numbers], alone: Numbers) -> bytes:
    """The JPEG: a line for each kind of guidance, which begins in the picture without any."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    start = 100 * alone["both"].mean()
    names = list(dict.fromkeys(name for name, _ in found))
    for name, colour, marker in zip(names, (*COLORS, INK, FAINT), (*MARKERS, "X", "*"), strict=False):
        points = {scale: numbers for (one, scale), numbers in found.items() if one == name}
        across = [moved(numbers, alone).value for numbers in points.values()]
        up = [100 * numbers["both"].mean() for numbers in points.values()]
        axes.plot([0, *across], [start, *up], color=colour, marker=marker, lw=1.6, ms=6, label=name)
        for scale, x, y in zip(points, across, up, strict=True):
            axes.annotate(f"{scale:g}", (x, y), (5, 4), textcoords="offset points", fontsize=8, color=colour)
    axes.annotate("no guidance", (0, start), (8, -4), textcoords="offset points", fontsize=9, color=INK)
    axes.set_xlabel("brightness moved from that of the same noise without guidance, levels of 255 (rms)")
    axes.set_ylabel("pictures that show the thing and the ground asked for, %")
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", fontsize=9)
    target = io.BytesIO()
    figure.savefig(target, format="jpeg", pil_kwargs={"quality": 88, "optimize": True})
    return target.getvalue()


@click.command(help=__doc__.split("\n")[0])
@click.option("--prompts", type=click.IntRange(2), default=56, show_default=True)
@click.option("--cfg", "scales", default="2,3,5,7.5", show_default=True, help="Scales beside 1.")
@click.option("--write/--no-write", default=True, show_default=True, help="Write RESULTS.md and docs/exposure.jpg.")
def main(prompts: int, scales: str, write: bool) -> None:
    begin = time.process_time()
    network, composer = load_shipped(OURS), Composer()
    classifier = train_classifier(composer)
    case = make_case(network, composer, prompts, cfg=1.0)
    random = np.random.default_rng(SEED)
    real = np.stack([composer.picture(one, random) for one in case.asked]).astype(np.float32)
    judge = partial(measure, asked=case.asked, classifier=classifier, composer=composer)
    alone = judge(make_pictures(network, case.captions, case.noise, KINDS[0], 1.0))
    wanted = [(kind, float(scale)) for kind in KINDS for scale in scales.split(",")]
    found = {
        (kind.name, scale): judge(make_pictures(network, case.captions, case.noise, kind, scale))
        for kind, scale in tqdm(wanted, unit="run")
    }
    text = table(found, alone, judge(real))
    print(text)
    solid = int((~np.isnan(alone["off"])).sum())
    took = time.process_time() - begin
    section = f"""`python benchmarks/{Path(__file__).name} --prompts {prompts} --cfg {scales}`, \
{datetime.date.today().isoformat()}, {took:.0f} CPU seconds.
{machine(None)}.

The zero-SNR network that comes with the package (32 x 32), {prompts} captions of a thing on a ground, half of them
pairs that it never saw, the same noise for all, {STEPS} steps of the default solver on steps made for the scale.
*Brightness moved*: rms over pictures, in levels of 255, from the picture that the same noise gives without guidance.
*Ground off*: rms error of the ground's brightness against the mean of the asked colour's shades, over the {solid}
captions that ask for a colour; shades spread, as the row of the data set says. *Clipped*: share of values at or beyond
0 or 255. *Thing*, *ground*, *both*: share of pictures in which a classifier sees what was asked for. All with 99 %
intervals over pictures; as captions and noise are the same in all rows, a difference of two rows is better known than
either. *Interval*: CFG between 0.25 and 0.01 canvas lengths alone. *APG*: eta 0, without norm threshold and momentum.
*FDG*: a pyramid of two levels, the lower one guided half as much. docs/exposure.jpg shows *both* over *brightness
moved*.

```
{text}
```
"""
    if write:
        write_section(RESULTS, HEADING, section)
        PICTURE.write_bytes(draw(found, alone))


if __name__ == "__main__":
    main()
