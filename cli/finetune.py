"""``ztsnr finetune`` and ``ztsnr finetune-vae``."""

from collections.abc import Callable
from pathlib import Path

import click

from .mistakes import mistakes_in_one_sentence


def _settings_command(command: Callable) -> Callable:
    """A command that reads a TOML file and takes every setting in it as an option too."""
    return click.command(context_settings={"ignore_unknown_options": True})(
        click.argument("settings", type=click.Path(path_type=Path), metavar="SETTINGS.toml")(
            click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--SETTING VALUE]...")(command)
        )
    )


@_settings_command
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="never",
    show_default=True,
    help="auto goes on from the last state in the run's folder, if there is one.",
)
@click.option(
    "--dry-run", is_flag=True, help="Read the data and the model, plan the memory, print the tables; no more."
)
@click.option("--list-settings", is_flag=True, help="Print every setting, what it means and what it is, and stop.")
def finetune(settings: Path, overrides: tuple[str, ...], resume: str, dry_run: bool, list_settings: bool) -> None:
    """Fine-tune a model: zero terminal SNR and v-prediction, from whatever it was.

    Every setting of the file can be given here as well, as in --optimizer.learning-rate 1e-6.  On several GPUs:
    torchrun --nproc-per-node 8 --no-python ztsnr finetune SETTINGS.toml
    """
    with mistakes_in_one_sentence():
        from ..training.config import FinetuneSettings
        from ..training.settings_file import read_settings

        program = "ztsnr finetune SETTINGS.toml"
        chosen = read_settings(FinetuneSettings, settings, [*overrides, *["--help"] * list_settings], program)

        from ..training.trainer import run_finetune

        run_finetune(chosen, resume=resume == "auto", dry_run=dry_run, say=click.echo)


@_settings_command
@click.option("--list-settings", is_flag=True, help="Print every setting, what it means and what it is, and stop.")
def finetune_vae(settings: Path, overrides: tuple[str, ...], list_settings: bool) -> None:
    """Fine-tune the decoder of a VAE, so that eyes and other small things come out right.

    The encoder stays, bit for bit, and so do latents, caches and U-Nets.  Every setting of the file can be given here
    as well, as in --steps 1000.
    """
    with mistakes_in_one_sentence():
        from ..training.decoder.settings import VaeDecoderSettings
        from ..training.settings_file import read_settings

        program = "ztsnr finetune-vae SETTINGS.toml"
        chosen = read_settings(VaeDecoderSettings, settings, [*overrides, *["--help"] * list_settings], program)

        from ..training.decoder.trainer import run_finetune_vae

        run_finetune_vae(chosen, say=click.echo)
