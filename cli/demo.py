"""``ztsnr demo`` and ``ztsnr example``."""

from pathlib import Path

import click

from ..errors import UserError
from .mistakes import mistakes_in_one_sentence

DEMO = Path("ztsnr_demo")


@click.command()
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of pictures to use as the photographs.  [default: photographs of scikit-image]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default=DEMO,
    show_default=True,
    help="Folder for the contact sheet, the plot and the numbers.  With --train, the default is ztsnr_reproduction.",
)
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True, help="Sampling steps.")
@click.option(
    "--size", type=click.IntRange(16, 256), default=128, show_default=True, help="Height and width in pixels."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32),
    default=0,
    show_default=True,
    help="Seed of the first picture, or of the training runs.",
)
@click.option(
    "--train",
    type=click.Choice(["cpu", "gpu"]),
    help="Train an epsilon network and four fine-tunes of it, and test the claims about zero terminal SNR on them.  "
    "cpu takes about an hour on two cores; gpu trains larger networks.  A stopped run resumes.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="With --train cpu: fine-tune the packaged base network, in minutes.",
)
def demo(images: Path | None, out: Path, steps: int, size: int, seed: int, train: str | None, quick: bool) -> None:
    """Show what a sampler's first step does to a picture.  Needs no model.

    Samples an ideal model of a small set of pictures with diffusers schedulers that start at infinity, at finite noise,
    or late, and shows how far each ends from the exact result.  Then samples networks that come with the package: one
    with epsilon prediction, as SDXL, one with v-prediction, and one with zero terminal SNR.
    """
    with mistakes_in_one_sentence("the same command resumes" if train else ""):
        if quick and train != "cpu":
            raise UserError("--quick needs --train cpu: add it, or leave --quick out")
        if train is not None:
            from ..demo.reproduction import reproduce

            out = Path("ztsnr_reproduction") if out == DEMO else out
            reproduce(out, train, quick, [seed], say=click.echo)
            return

        from ..demo.exact_models import run_demo

        run_demo(out, images, steps, size, seed, say=click.echo)

        from ..demo.networks_sheet import show_networks

        show_networks(out, say=click.echo)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
def example(folder: Path) -> None:
    """Write a small data set, a small base model and settings to fine-tune it with.

    DIR gets captioned pictures, an epsilon network of SDXL's architecture that a CPU fine-tunes in minutes, and a
    commented settings.toml.
    """
    with mistakes_in_one_sentence():
        from ..demo.example import write_example

        write_example(folder, say=click.echo)
