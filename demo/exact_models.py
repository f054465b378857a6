"""``ztsnr demo``: what the first step of a sampler does to a picture, without any weights.

The model is the exact denoiser of a small set of pictures (``PictureSet``), so that every error seen is the sampler's.
Its samples come from real diffusers scheduler objects, which see only the v network and its timesteps.

How the set makes brightness matter.  A set of a single black picture would give black from any start: its denoiser
predicts black for every input.  Real captions leave brightness open, and the network reads it from x.  So every picture
here is in the set at many exposures: the average of each colour channel over the canvas is spread by a Gaussian of
standard deviation EXPOSURE (0.15 on the scale [-1, 1], 19 of 255 levels, half a stop at mid-grey), one number per
channel.  With H*W values, x shows that average to within sigma/sqrt(H*W).  At sigma = 14.6 and 128 x 128 pixels that is
0.11: the network can tell black (-1) from grey (0), and trusts what it sees.  A sampler that starts at 14.6 with pure
noise shows it a canvas of average 0 and gets a picture between black and grey; at infinity the network knows that it
sees nothing, and a sampler that starts there gets black.  A wider spread or a larger canvas pulls harder: in the limit
of many steps a start at sigma_0 leaves -m * EXPOSURE / sqrt(EXPOSURE^2 + sigma_0^2 / (H*W)) of error in an average m.
Nothing of this is put in by hand: the pictures are what the schedulers return.

The exact answer from the same noise is known: an average ends at m + EXPOSURE * z, with z = sqrt(H*W) * (average of the
noise).  Brightness error and mean leak are intercept and slope of (result - exact answer) over z, so they do not depend
on which seeds were drawn.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..extras import no_matplotlib
from ..figures.png import png
from ..files import prepare_folder, write_atomically
from .exact_prompts import EXPOSURE, library_photographs, load_pictures, make_prompts
from .exact_report import draw_plot, draw_sheet, table
from .exact_runs import make_rows, measure, sample_with_scheduler


def run_demo(
    out: Path,
    images: Path | None = None,
    steps: int = 20,
    size: int = 128,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo: sample every prompt with every scheduler, print the table, save contact sheet, plot and numbers.

    Args:
        out: folder for the files; created if missing.
        images: folder of pictures to use instead of the photographs.
        steps: sampling steps, at least 1.
        size: height and width of the pictures.
        seed: seed of the first sample; sample i uses seed + i, the same noise in every row and prompt.
        say: called with each paragraph of text.

    Returns:
        The contents of results.json.

    Raises:
        UserError: the folder cannot be written, or no picture can be read.
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
