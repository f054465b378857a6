"""A sheet that shows zero terminal SNR at a glance: a column per caption, a row per network and start.

All pictures of a column have the same caption and noise.  The networks come with the package, or from a folder of
trainings.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..diagnostics.leak_probes import LUMA
from ..diagnostics.leak_run import steps_from
from ..extras import no_matplotlib
from ..figures.png import png
from ..files import write_atomically
from ..samplers import exposure_true_guidance
from .composed import BRIGHTNESS, COLOURS, Asked, Composer
from .evaluation import START, STEPS, canvas_sigma, mean_colour
from .measures import frame
from .networks import DemoNetwork, quiet_libraries
from .objectives import BASE, OURS, PLAIN
from .shipped import load_shipped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GUIDANCE = 4.0
DEFAULT_STEPS = 20
ALARM = 25  # largest error of the ground's brightness that is not shown in red, in levels
LINE = 13  # letters per line of a caption
SEED = 4

ASKED = (
    Asked("black"),
    Asked("black", "frog"),
    Asked("black", "avocado"),
    Asked("dark", "tulip"),
    Asked("white"),
    Asked("white", "watermelon"),
    Asked("light", "strawberry"),
    Asked("stars", "guitar"),
)

Network = DemoNetwork
Sample = Callable[[Network, Sequence[str], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SheetRow:
    """A network and the way to sample it.

    Attributes:
        network: Name of the training.
        title, detail: Texts of the label.
        sample: (network, captions, noise) -> latents.
    """

    network: str
    title: str
    detail: str
    sample: Sample


def _as_published(network: Network, captions: Sequence[str], noise: torch.Tensor) -> torch.Tensor:
    return network.sample_as_published(captions, noise, STEPS, GUIDANCE)


def _from_finite(network: Network, captions: Sequence[str], noise: torch.Tensor) -> torch.Tensor:
    start = min(canvas_sigma(START, noise.shape[-1]), network.schedule.sigma_max)
    return network.sample(captions, noise, steps_from(network.schedule, start, STEPS), "euler", GUIDANCE)


def _by_default(network: Network, captions: Sequence[str], noise: torch.Tensor) -> torch.Tensor:
    sigmas = network.default_sigmas(DEFAULT_STEPS, GUIDANCE)
    return network.sample(captions, noise, sigmas, guidance=GUIDANCE)


def _exposure_true(network: Network, captions: Sequence[str], noise: torch.Tensor) -> torch.Tensor:
    sigmas = network.default_sigmas(DEFAULT_STEPS, GUIDANCE)
    return network.sample(captions, noise, sigmas, guidance=GUIDANCE, join=exposure_true_guidance)


ROWS = (
    SheetRow(BASE, "epsilon", f"as SDXL is published\nEuler, leading, {STEPS} steps", _as_published),
    SheetRow(BASE, "epsilon", f"from sigma {START:g}\nEuler, trailing, {STEPS} steps", _from_finite),
    SheetRow(PLAIN, "v, plain schedule", f"from its own {START:g}\nEuler, trailing, {STEPS} steps", _from_finite),
    SheetRow(OURS, "v, zero SNR", f"from sigma {START:g}\nEuler, trailing, {STEPS} steps", _from_finite),
    SheetRow(OURS, "v, zero SNR", f"from infinity\nthis package's defaults, {DEFAULT_STEPS} steps", _by_default),
    SheetRow(OURS, "v, zero SNR", f"exposure-true guidance\nfrom infinity, {DEFAULT_STEPS} steps", _exposure_true),
)


@dataclass(frozen=True)
class NetworksSheet:
    """The pictures of the rows and columns.

    Attributes:
        asked: The C columns.
        pictures: (R + 1, C, H, W, 3) uint8; the first row holds training pictures.
        grounds: (R + 1, C) mean luma of the frame, in levels.
    """

    asked: tuple[Asked, ...]
    pictures: np.ndarray
    grounds: np.ndarray

    def table(self) -> str:
        """The brightness of the grounds, as text."""
        from tabulate import tabulate

        columns = [i for i, one in enumerate(self.asked) if one.ground in WANTED]
        headers = ["brightness of the ground", *(_wrapped(self.asked[i]) for i in columns)]
        names = ["pictures of training", *(f"{row.title}, {row.detail.splitlines()[0]}" for row in ROWS)]
        rows = [
            [name, *(f"{grounds[i]:.0f}" for i in columns)] for name, grounds in zip(names, self.grounds, strict=True)
        ]
        return tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * len(columns))


WANTED = {ground: float(mean_colour(ground) @ LUMA) for ground in (*COLOURS, *BRIGHTNESS)}


def sample_sheet(
    networks: Mapping[str, Network], composer: Composer, asked: Sequence[Asked] = ASKED, seed: int = SEED
) -> NetworksSheet:
    """Sample all rows.

    Args:
        networks: BASE, PLAIN and OURS.
        composer: Composer of the training pictures.
        asked: The columns.
        seed: Seed of the noise, which all columns share.
    """
    captions = [one.caption for one in asked]
    random = np.random.default_rng(seed)
    pictures = [np.stack([composer.picture(one, random) for one in asked])]
    for row in ROWS:
        network = networks[row.network]
        noise = network.noise([seed]).repeat(len(asked), 1, 1, 1)
        pictures.append(network.pictures(row.sample(network, captions, noise)))
    grounds = [(frame(row.astype(float)) @ LUMA).mean(1) for row in pictures]
    return NetworksSheet(tuple(asked), np.stack(pictures), np.stack(grounds))


def draw_sheet(sheet: NetworksSheet) -> "Figure":
    """Draw the contact sheet, with the brightness of each ground below its picture."""
    from ..figures.contact_sheet import contact_sheet

    texts = [[_brightness(*pair) for pair in zip(sheet.asked, row, strict=True)] for row in sheet.grounds]
    alarms = [[_is_off(*pair) for pair in zip(sheet.asked, row, strict=True)] for row in sheet.grounds]
    alarms[0] = [False] * len(sheet.asked)
    labels = ["pictures of training\nwhat the captions mean", *(f"{row.title}\n{row.detail}" for row in ROWS)]
    return contact_sheet(
        sheet.pictures,
        labels,
        [(_wrapped(one), 1) for one in sheet.asked],
        texts,
        np.array(alarms),
        title="Same base, same noise: the effect of training and of the first step",
        subtitle=f"Networks trained on real pictures, CFG {GUIDANCE:g}. Each column has one caption and one noise.",
        note=f"Ground: mean brightness of the frame, 0 to 255; red if more than {ALARM} off, or, for dark and light, "
        "outside of 0 to 110 and 145 to 255.",
        smooth=True,
    )


def _brightness(asked: Asked, ground: float) -> str:
    return f"ground {ground:.0f}" if asked.ground in WANTED else ""


def _is_off(asked: Asked, ground: float) -> bool:
    """True if a ground's brightness is visibly wrong for its caption."""
    if asked.ground in BRIGHTNESS:
        low, high = BRIGHTNESS[asked.ground]
        return not low <= ground <= high
    return asked.ground in WANTED and abs(ground - WANTED[asked.ground]) > ALARM


def _wrapped(asked: Asked) -> str:
    return textwrap.fill(asked.caption, LINE)


def show_networks(out: Path, say: Callable[[str], None] = print) -> NetworksSheet:
    """Sample the networks of the package, print the table, and write networks.png into a folder."""
    quiet_libraries()
    sheet = sample_sheet({name: load_shipped(name) for name in (BASE, PLAIN, OURS)}, Composer())
    say(f"Networks of this package, trained on real pictures, CFG {GUIDANCE:g}:\n\n{sheet.table()}")
    missing = no_matplotlib()
    if missing is None:
        write_atomically(out / "networks.png", png(draw_sheet(sheet)))
    say(f"\n{missing or 'Pictures:  ' + str(out / 'networks.png')}\n")
    say("To train them:  ztsnr demo --train cpu (an hour on two cores), or ztsnr demo --train cpu --quick (minutes)")
    return sheet
