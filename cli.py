"""The ``ztsnr`` command.  Each subcommand imports what it needs when it runs, so that --help answers at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from . import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ztsnr")
def main() -> None:
    """Exact zero-terminal-SNR sampling for v-prediction diffusion models."""


@main.command()
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
    default=Path("ztsnr_demo"),
    show_default=True,
    help="Folder for the contact sheet, the plot and the numbers.",
)
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True, help="Sampling steps.")
@click.option(
    "--size", type=click.IntRange(16, 256), default=128, show_default=True, help="Height and width in pixels."
)
@click.option("--seed", type=click.IntRange(0, 2**32), default=0, show_default=True, help="Seed of the first picture.")
def demo(images: Path | None, out: Path, steps: int, size: int, seed: int) -> None:
    """See what a sampler's first step does to a picture; needs no model.

    Samples from a model that is exact for a small set of pictures, with diffusers schedulers that start at infinity, at
    finite noise, or late, and shows how far each ends from the exact answer.
    """
    from .diagnostics.demo import run_demo

    with mistakes_in_one_sentence():
        run_demo(out, images, steps, size, seed, say=click.echo)


@contextmanager
def mistakes_in_one_sentence() -> Iterator[None]:
    """What the user can mend ends the command with a sentence and status 2, as every other wrong argument does."""
    from .diagnostics.output import UserError

    try:
        yield
    except (UserError, ValueError) as error:
        mistake = click.ClickException(str(error))
        mistake.exit_code = 2
        raise mistake from None
