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
    help="Folder of your own pictures, used as the photographs.  [default: some that come with scikit-image]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default=DEMO,
    show_default=True,
    help="Folder for the contact sheet, the plot and the numbers; with --train ztsnr_reproduction by default.",
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
    help="Seed of the first picture, or of the trainings.",
)
@click.option(
    "--train",
    type=click.Choice(["cpu", "gpu"]),
    help="Train an epsilon network and four fine-tunes of it, and measure the claims about zero terminal SNR on them: "
    "in about an hour on two processor cores, or larger ones on a GPU.  A run that was stopped resumes.",
)
@click.option(
    "--quick", is_flag=True, help="With --train cpu: only fine-tune the base that comes with the package, in minutes."
)
def demo(images: Path | None, out: Path, steps: int, size: int, seed: int, train: str | None, quick: bool) -> None:
    """See what a sampler's first step does to a picture; needs no model.

    Samples from a model that is exact for a small set of pictures, with diffusers schedulers that start at infinity, at
    finite noise, or late, and shows how far each ends from the exact answer.  Then samples networks that come with the
    package: epsilon as SDXL is, v-prediction, and zero terminal SNR.
    """
    with mistakes_in_one_sentence():
        if quick and train != "cpu":
            raise UserError("--quick goes with --train cpu")
        if train is not None:
            from ..demo.reproduction import reproduce

            out = Path("ztsnr_reproduction") if out == DEMO else out
            if not reproduce(out, train, quick, [seed], say=click.echo):
                raise SystemExit(1)
            return

        from ..demo.exact_models import run_demo

        run_demo(out, images, steps, size, seed, say=click.echo)

        from ..demo.networks_sheet import show_networks

        show_networks(out, say=click.echo)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
def example(folder: Path) -> None:
    """Write a small data set, a small base and settings to fine-tune with at once.

    DIR gets captioned pictures, an epsilon network of SDXL's classes that trains on a processor in minutes, and a
    settings.toml with a word on every choice.
    """
    with mistakes_in_one_sentence():
        from ..demo.example import write_example

        write_example(folder, say=click.echo)
