"""The results of ``ztsnr demo``'s exact models as a table, a contact sheet and a plot."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .exact_prompts import EXPOSURE, PHOTOGRAPH_SEEDS, Prompt
from .exact_runs import LEVEL, Row, Run, canvas_noise, intercept_and_slope

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VISIBLE = 5  # levels: the contact sheet marks larger errors


def table(rows: list[Row], results: list[dict[str, Any]]) -> str:
    """The measured numbers, one row per sampler, and a line on each kind of column."""
    from tabulate import tabulate

    known = list(results[0]["brightness_error"])
    choices = [name for name in results[0]["right_picture"] if name == "photograph"]
    headers = ["sampler", "starts at\nsigma", *(name.replace(" ", "\n", 1) for name in known), "mean\nleak"]
    body = [
        [
            row.name,
            start(row),
            *(signed(result["brightness_error"][name]) for name in known),
            signed(result["mean_leak"]),
            *(f"{result['right_picture'][name]:.0%}" for name in choices),
        ]
        for row, result in zip(rows, results, strict=True)
    ]
    lines = [
        tabulate(
            body,
            headers=headers + ["right\nphotograph"] * len(choices),
            disable_numparse=True,
            colalign=["left"] + ["right"] * (len(body[0]) - 1),
        ),
        "",
        f"{known[0]} ... {known[-1]}: brightness error, in levels of 255, against the exact answer; + is too bright.",
        "mean leak: levels that the brightness moves with the average of the noise, per standard deviation of that",
        f"  average, less the {EXPOSURE / LEVEL:.1f} by which it should.",
    ]
    if choices:
        lines.append(
            f"right photograph: how often a noise ends at the photograph it should end at ({PHOTOGRAPH_SEEDS} seeds)."
        )
    return "\n".join(lines)


def start(row: Row) -> str:
    """The noise level at which a row's scheduler starts, once its timesteps are set."""
    sigma = float(row.scheduler.sigmas[0])
    return "infinity" if math.isinf(sigma) else f"{sigma:.4g}"


def signed(value: float, digits: int = 1) -> str:
    """+1.2, -1.2, and 0.0 without a sign when it rounds to nothing."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"


def draw_sheet(
    rows: list[Row], prompts: list[Prompt], runs: list[list[Run]], exact: list[torch.Tensor], note: str
) -> "Figure":
    """The contact sheet: the exact flow, then every row, over prompts and seeds.

    The caption of a picture gives the error of its worst channel average, or says that it is another picture.
    """
    from ..figures.contact_sheet import contact_sheet

    pictures, captions, alarms = [], [], []
    for samples in [exact, *([run.pictures for run in row_runs] for row_runs in runs)]:
        shown, texts, wrong = [], [], []
        for prompt, truth, x in zip(prompts, exact, samples, strict=True):
            for i in range(prompt.shown):
                shown.append(((x[i].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).round().byte().numpy())
                error = ((x[i] - truth[i]).mean((-2, -1)) / LEVEL).tolist()
                worst = max(error, key=abs)
                other = (
                    not prompt.known
                    and (prompt.model.nearest(x[i, None]) != prompt.model.nearest(truth[i, None])).item()
                )
                texts.append("wrong picture" if other else f"off by {signed(worst, 0)}")
                wrong.append(other or abs(worst) > VISIBLE)
        if samples is exact:
            texts = [f"brightness {picture.mean():.0f}" for picture in shown]
        pictures.append(np.stack(shown))
        captions.append(texts)
        alarms.append(wrong)
    return contact_sheet(
        np.stack(pictures),
        [
            "exact flow\nthe answer, without a sampler",
            *(f"{row.name}\n{row.detail}\nstarts at sigma {start(row)}" for row in rows),
        ],
        [(prompt.name, prompt.shown) for prompt in prompts],
        captions,
        np.array(alarms),
        title="What the first step does to a picture",
        subtitle="Down a column: one prompt, one noise, one model that never errs. "
        "Whatever differs from the top row is the sampler's doing.",
        note=f"{note}  Off by: the worst colour channel's average against the top row's, in levels of 255.\n"
        "The model knows every picture at many exposures and white balances "
        f"(standard deviation {EXPOSURE / LEVEL:.0f} levels), so an exact white is not always 255.",
    )


def draw_plot(
    rows: list[Row], prompts: list[Prompt], runs: list[list[Run]], noise: torch.Tensor, note: str
) -> "Figure":
    """The brightness that the network predicts, from the first step to the picture, for black and for white."""
    from ..figures.curves import Curve, plot_over_sigma

    curves = []
    for row, row_runs in zip(rows, runs, strict=True):
        for prompt, run in zip(prompts, row_runs, strict=True):
            if prompt.name in ("solid black", "solid white"):
                z = canvas_noise(noise[: prompt.seeds])
                means = [*run.denoised_means, run.pictures.mean((-2, -1))]
                levels = [(intercept_and_slope(mean, z)[0] + 1) / LEVEL for mean in means]
                curves.append(Curve(row.name, [*run.sigmas, 0.0], levels))
    return plot_over_sigma(
        curves,
        title="What the model believes the picture's brightness to be, while the noise is removed",
        subtitle=f'Average of the denoised prediction for "solid white" (top) and "solid black" (bottom). {note}',
        ylabel="brightness of the prediction (0 to 255)",
        ylim=(-14, 275),
        truths=((255, "white: the exact answer"), (127.5, "mid-grey"), (0, "black: the exact answer")),
    )
