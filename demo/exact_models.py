"""``ztsnr demo``: what the first step of a sampler does to a picture, without any weights.

The model is the exact denoiser of a small set of pictures (``PictureSet``), so that every error seen is the sampler's.
Its samples come out of real diffusers scheduler objects, which are shown nothing but the v network and its timesteps.

How the set makes brightness matter.  A set that holds one black picture and nothing else would give black from any
start: its denoiser answers black whatever it is asked.  Real captions leave brightness open, and the network reads it
from x.  So every picture here is in the set at many exposures: the average of each colour channel over the canvas is
spread by a Gaussian of standard deviation EXPOSURE (0.15 on the scale [-1, 1], 19 of 255 levels, half a stop at
mid-grey), one number a channel.  Of H*W values x tells that average to within sigma/sqrt(H*W).  At sigma = 14.6 and
128 x 128 pixels that is 0.11: the network can tell black (-1) from grey (0) and believes what it sees.  A sampler that
starts at 14.6 with pure noise shows it a canvas of average 0 and gets a picture between black and grey; one that starts
at infinity asks a network that knows that it sees nothing, and gets black.  A wider spread or a larger canvas pulls
harder: in the limit of many steps a start at sigma_0 leaves -m * EXPOSURE / sqrt(EXPOSURE^2 + sigma_0^2 / (H*W)) of
error in an average m.  Nothing of this is put in by hand: the pictures are what the schedulers return.

The exact answer from the same noise is known: an average ends at m + EXPOSURE * z, with z = sqrt(H*W) * (average of the
noise).  Brightness error and mean leak are intercept and slope of (result - exact answer) over z, so they do not depend
on which seeds were drawn.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from .. import __version__
from ..data.pictures import DAMAGED
from ..diagnostics.ideal_models import PictureSet, v_network
from ..errors import UserError
from ..extras import no_matplotlib
from ..figures.png import png
from ..files import prepare_folder, write_atomically
from ..samplers import NoiseSchedule
from ..samplers.devices import to_float64

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPOSURE = 0.15
LEVEL = 2 / 255  # one step of an 8-bit channel on the scale [-1, 1]
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "hubble_deep_field.jpg")
MOST_PICTURES = 64
COLORS = ((1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, -1), (-1, 1, 1), (1, -1, 1))
KNOWN_SEEDS, PHOTOGRAPH_SEEDS = 8, 64
VISIBLE = 5  # levels from which on the contact sheet marks an error


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and prompts


@dataclass(frozen=True)
class Prompt:
    """A subset of the pictures and how much of it is sampled and shown.

    Attributes:
        model: the exact denoiser of the subset.
        seeds: samples to draw.
        shown: how many of them the contact sheet shows.
    """

    name: str
    model: PictureSet
    seeds: int
    shown: int

    @property
    def known(self) -> bool:
        """Whether the brightness of the answer is known: the subset is one picture."""
        return len(self.model) == 1


def solid(color: Sequence[float], size: int) -> torch.Tensor:
    """(3, size, size) of one colour in [-1, 1]."""
    return torch.tensor(color, dtype=torch.float32).view(3, 1, 1).repeat(1, size, size)


def logo(size: int, ink: int, paper: int) -> torch.Tensor:
    """(3, size, size) line art: an aperture of six blades in a ring, drawn large and scaled down for smooth edges."""
    large, middle = 512, 256
    image = Image.new("L", (large, large), paper)
    draw = ImageDraw.Draw(image)
    draw.ellipse((56, 56, 456, 456), outline=ink, width=26)
    for blade in range(6):
        angle = blade * math.pi / 3
        start = (middle + 92 * math.cos(angle), middle + 92 * math.sin(angle))
        end = (middle + 190 * math.cos(angle + 1.15), middle + 190 * math.sin(angle + 1.15))
        draw.line((*start, *end), fill=ink, width=22)
    return to_tensor(image.convert("RGB"), size)


def to_tensor(image: Image.Image, size: int) -> torch.Tensor:
    """The middle square of an RGB picture as (3, size, size) float32 in [-1, 1]."""
    pixels = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def open_picture(path: Path, size: int) -> torch.Tensor:
    """A picture file, turned as its EXIF says, transparent parts on white, as (3, size, size) in [-1, 1]."""
    return to_tensor(to_rgb(decode(path, size)), size)


def decode(path: Path, size: int) -> Image.Image:
    """A picture file, turned as its EXIF says, with at least 2 * size pixels a side if it has them.

    Raises:
        One of ``DAMAGED``: it cannot be read.
    """
    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode no more than is needed
        return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, transparent parts on white."""
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_pictures(folder: Path, size: int, say: Callable[[str], None]) -> torch.Tensor:
    """(K, 3, size, size): the pictures that lie in a folder, by name, at most ``MOST_PICTURES`` of them.

    Files without a picture's suffix are passed over silently, those that cannot be read with a sentence.

    Raises:
        UserError: none is left.
    """
    suffixes = Image.registered_extensions()
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes and file.is_file())
    if len(files) > MOST_PICTURES:
        say(f"{folder} holds {len(files)} pictures; the first {MOST_PICTURES} by name are used.")
    pictures = []
    for file in files[:MOST_PICTURES]:
        try:
            image = decode(file, size)
        except DAMAGED as error:
            say(f"Skipped {file.name}: {' '.join(str(error).split()) or type(error).__name__}.")
        else:  # outside, so that a bug of ours is not taken for damage
            pictures.append(to_tensor(to_rgb(image), size))
    if not pictures:
        raise UserError(f"{folder} holds no picture that can be read; put JPEG, PNG or WebP files directly into it.")
    return torch.stack(pictures)


def library_photographs(size: int) -> torch.Tensor:
    """(K, 3, size, size): photographs that come inside scikit-image, all free of copyright restrictions."""
    library = find_spec("skimage")
    folder = Path(library.submodule_search_locations[0]) / "data" if library else None
    files = [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()] if folder else []
    if not files:
        raise UserError(
            "scikit-image, whose photographs the demo uses, is not installed; give your own with --images DIR."
        )
    return torch.stack([open_picture(file, size) for file in files])


def make_prompts(photographs: torch.Tensor, size: int) -> list[Prompt]:
    """The prompts: solid canvases, line art, colours, photographs."""

    def prompt(name: str, pictures: torch.Tensor, seeds: int, shown: int) -> Prompt:
        return Prompt(name, PictureSet(pictures, brightness_std=EXPOSURE), seeds, shown)

    return [
        prompt("solid black", solid((-1, -1, -1), size)[None], KNOWN_SEEDS, 1),
        prompt("solid white", solid((1, 1, 1), size)[None], KNOWN_SEEDS, 1),
        prompt("logo on black", logo(size, ink=255, paper=0)[None], KNOWN_SEEDS, 1),
        prompt("logo on white", logo(size, ink=0, paper=255)[None], KNOWN_SEEDS, 1),
        prompt("solid colour", torch.stack([solid(color, size) for color in COLORS]), KNOWN_SEEDS, 2),
        prompt("photograph", photographs, PHOTOGRAPH_SEEDS, 3),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Samplers


@dataclass(frozen=True)
class Row:
    """One way to sample: a diffusers scheduler and the noise schedule that its network was trained with."""

    name: str
    detail: str
    scheduler: Any
    schedule: NoiseSchedule


def make_rows() -> list[Row]:
    """Exact infinity, and the finite starts that people use."""
    from ..samplers import ZTSNRScheduler
    from ..samplers.diffusers_config import stock_euler

    zero, plain = NoiseSchedule.sdxl(), NoiseSchedule.sdxl(zero_terminal_snr=False)
    ours = ZTSNRScheduler()
    ours_euler = ZTSNRScheduler(solver="euler", spacing="trailing")
    trailing = stock_euler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    leading = stock_euler(rescale_betas_zero_snr=True, timestep_spacing="leading", steps_offset=1)
    no_zero_snr = stock_euler(timestep_spacing="trailing")
    return [
        Row("exact infinity", "ZTSNRScheduler, its defaults", ours, zero),
        Row("exact infinity, Euler", "ZTSNRScheduler, euler, trailing", ours_euler, zero),
        Row("finite start 4096", "EulerDiscrete, trailing, zero SNR", trailing, zero),
        Row("SDXL's leading steps", "EulerDiscrete, leading, zero SNR", leading, zero),
        Row("finite start 14.6", "EulerDiscrete, trailing, no zero SNR", no_zero_snr, plain),
    ]


@dataclass(frozen=True)
class Run:
    """What one row made of one prompt.

    Attributes:
        pictures: (B, 3, H, W) the results.
        sigmas: noise level of each network evaluation, as the network was told it.
        denoised_means: (evaluations, B, 3) channel averages of what the network believed.
    """

    pictures: torch.Tensor
    sigmas: list[float]
    denoised_means: torch.Tensor


def sample_with_scheduler(row: Row, model: PictureSet, noise: torch.Tensor, steps: int) -> Run:
    """The loop of a diffusers pipeline around an ideal network."""
    from ..samplers import ZTSNRScheduler

    sigmas, means = [], []

    def recorded(x: torch.Tensor, sigma: float) -> torch.Tensor:
        x0 = model(x, sigma)
        sigmas.append(sigma)
        means.append(x0.mean((-2, -1)))
        return x0

    network = v_network(recorded, row.schedule)
    scheduler = row.scheduler
    size = {"latent_size": tuple(noise.shape[-2:])} if isinstance(scheduler, ZTSNRScheduler) else {}
    scheduler.set_timesteps(steps, **size)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        v = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(v, t, x).prev_sample
    return Run(x, sigmas, torch.stack(means))


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def intercept_and_slope(values: torch.Tensor, z: torch.Tensor) -> tuple[float, float]:
    """Least squares of values on z, both of any one shape, in float64."""
    values, z = to_float64(values).flatten(), to_float64(z).flatten()
    deviation = z - z.mean()
    slope = (deviation * values).sum() / (deviation**2).sum()
    return (values.mean() - slope * z.mean()).item(), slope.item()


def canvas_noise(noise: torch.Tensor) -> torch.Tensor:
    """(B, 3): average of each channel of the noise, in units of its own standard deviation."""
    return noise.mean((-2, -1)) * math.sqrt(noise.shape[-2] * noise.shape[-1])


def measure(prompts: list[Prompt], runs: list[Run], noise: torch.Tensor, exact: list[torch.Tensor]) -> dict[str, Any]:
    """One row's numbers.

    Returns:
        brightness_error: levels by prompt, for prompts of one picture, from a noise of average 0.
        mean_leak: levels per standard deviation of the noise's average, over the same prompts.
        right_picture: share of seeds that end at the same picture as the exact flow, for the other prompts.
    """
    errors, leaks, right = {}, [], {}
    for prompt, run, truth in zip(prompts, runs, exact, strict=True):
        if prompt.known:
            difference = (run.pictures - truth).mean((-2, -1)) / LEVEL
            errors[prompt.name], leak = intercept_and_slope(difference, canvas_noise(noise[: prompt.seeds]))
            leaks.append(leak)
        else:
            same = prompt.model.nearest(run.pictures) == prompt.model.nearest(truth)
            right[prompt.name] = to_float64(same).mean().item()
    return {"brightness_error": errors, "mean_leak": sum(leaks) / len(leaks), "right_picture": right}


# ----------------------------------------------------------------------------------------------------------------------
# The report


def table(rows: list[Row], results: list[dict[str, Any]]) -> str:
    """The measured numbers, one row a sampler, and a line on each kind of column."""
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
    """The noise level that a row's scheduler, whose timesteps are set, starts at."""
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

    Below a picture stands the channel average that is furthest off, or that it is another picture altogether.
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
    """What the network believes the brightness to be, from the first step to the picture, for black and for white."""
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


def run_demo(
    out: Path,
    images: Path | None = None,
    steps: int = 20,
    size: int = 128,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Sample every prompt with every row; print the table, save contact sheet, plot and numbers.

    Args:
        out: folder for the files; made if missing.
        images: folder of the user's pictures, to take the place of the photographs.
        steps: sampling steps, at least 1.
        size: height and width of the pictures.
        seed: of the first sample; sample i uses seed + i, the same noise in every row and prompt.
        say: where text goes, one call a paragraph.

    Returns:
        What results.json holds.

    Raises:
        UserError: the folder cannot be written or no picture can be read.
    """
    from tqdm import tqdm

    prepare_folder(out)
    photographs = load_pictures(images, size, say) if images else library_photographs(size)
    prompts, rows = make_prompts(photographs, size), make_rows()
    generators = [torch.Generator().manual_seed(seed + i) for i in range(max(prompt.seeds for prompt in prompts))]
    noise = torch.cat([torch.randn(1, 3, size, size, generator=generator) for generator in generators])

    exact, runs = [], [[] for _ in rows]
    with tqdm(total=len(prompts) * (len(rows) + 1), unit="run", desc="Sampling", leave=False) as bar:
        for prompt in prompts:
            exact.append(prompt.model.exact(noise[: prompt.seeds]))
            bar.update()
            for row, row_runs in zip(rows, runs, strict=True):
                row_runs.append(sample_with_scheduler(row, prompt.model, noise[: prompt.seeds], steps))
                bar.update()
    results = [
        {
            "name": row.name,
            "scheduler": row.detail,
            "start_sigma": float(row.scheduler.sigmas[0]),
            **measure(prompts, row_runs, noise, exact),
        }
        for row, row_runs in zip(rows, runs, strict=True)
    ]
    say(table(rows, results))

    note = f"{steps} step{'s' * (steps > 1)}, {size} x {size} pixels, seed {seed}."
    report = {
        "ztsnr": __version__,
        "steps": steps,
        "size": size,
        "seed": seed,
        "pictures": str(images) if images else "scikit-image",
        "photographs": len(photographs),
        "exposure_std": EXPOSURE,
        "rows": [
            {**r, "start_sigma": "infinity" if math.isinf(r["start_sigma"]) else r["start_sigma"]} for r in results
        ],
    }
    files = {"results.json": (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()}
    missing = no_matplotlib()
    if missing is None:
        files["contact_sheet.png"] = png(draw_sheet(rows, prompts, runs, exact, note))
        files["denoised_mean.png"] = png(draw_plot(rows, prompts, runs, noise, note))
    for name, content in files.items():
        write_atomically(out / name, content)
    pictures = f"Pictures:  {out / 'contact_sheet.png'}\nPlot:      {out / 'denoised_mean.png'}"
    say(f"\n{missing or pictures}\nNumbers:   {out / 'results.json'}\n")
    if not images:
        say("With your own pictures:  ztsnr demo --images DIR")
    say(
        "In a diffusers pipeline: from ztsnr.samplers import ZTSNRScheduler\n"
        "                         pipe.scheduler = ZTSNRScheduler.from_config(pipe.scheduler.config)"
    )
    return report
