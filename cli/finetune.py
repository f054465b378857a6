"""``ztsnr finetune`` and ``ztsnr finetune-vae``."""

from collections.abc import Callable
from pathlib import Path

import click

from ..errors import UserError
from .mistakes import mistakes_in_one_sentence

EXAMPLES = Path(__file__).parent.parent / "training" / "examples"
TEMPLATES = {"lora": "lora_24gb.toml", "full": "full_80gb.toml", "decoder": "decoder.toml"}


RESUME = click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="never",
    show_default=True,
    help="auto resumes from the most recent state in the run's folder, if there is one.",
)


def _settings_command(command: Callable) -> Callable:
    """A command with a settings file as its argument, and every setting as an option."""
    listing = click.option(
        "--list-settings",
        is_flag=True,
        help="Explain every setting and stop.  With SETTINGS.toml, also print its values.",
    )
    arguments = click.argument(
        "arguments", nargs=-1, type=click.UNPROCESSED, metavar="SETTINGS.toml [--SETTING VALUE]..."
    )
    return click.command(context_settings={"ignore_unknown_options": True})(arguments(listing(command)))


@_settings_command
@click.option(
    "--init",
    type=click.Choice(list(TEMPLATES)),
    help="Print commented settings to start from, and stop.  decoder is for finetune-vae.",
)
@RESUME
@click.option("--dry-run", is_flag=True, help="Read data and model, plan the memory, print the tables, and stop.")
def finetune(arguments: tuple[str, ...], init: str | None, resume: str, dry_run: bool, list_settings: bool) -> None:
    """Fine-tune a model to v-prediction with zero terminal SNR, from any prediction type.

    Start with ztsnr finetune --init lora > settings.toml, and fill in the paths of the base model and of the pictures.
    Every setting of the file can also be given here, as in --optimizer.learning-rate 1e-6.  On several GPUs: torchrun
    --nproc-per-node 8 --no-python ztsnr finetune SETTINGS.toml
    """
    with mistakes_in_one_sentence("continue with --resume auto"):
        if init is not None:
            _print_template(init)
            return
        if arguments or not list_settings:
            _check_file(arguments, "ztsnr finetune --init lora")

        from ..training.config import FinetuneSettings

        if list_settings:
            _print_settings(FinetuneSettings, arguments)
            return

        from ..training.settings_file import read_settings

        chosen = read_settings(FinetuneSettings, arguments[0], arguments[1:])

        from ..training.trainer import run_finetune

        run_finetune(chosen, resume=resume == "auto", dry_run=dry_run, say=click.echo)


@_settings_command
@click.option("--init", is_flag=True, help="Print commented settings to start from, and stop.")
@RESUME
def finetune_vae(arguments: tuple[str, ...], init: bool, resume: str, list_settings: bool) -> None:
    """Fine-tune the decoder of a VAE, so that eyes and other small details come out right.

    The encoder stays bit for bit the same, so latents, caches and U-Nets stay valid.  Start with ztsnr finetune-vae
    --init > settings.toml, and fill in the paths of the model and of the pictures.  Every setting of the file can also
    be given here, as in --steps 1000.
    """
    with mistakes_in_one_sentence("continue with --resume auto"):
        if init:
            _print_template("decoder")
            return
        if arguments or not list_settings:
            _check_file(arguments, "ztsnr finetune-vae --init")

        from ..training.decoder.settings import VaeDecoderSettings

        if list_settings:
            _print_settings(VaeDecoderSettings, arguments)
            return

        from ..training.settings_file import read_settings

        chosen = read_settings(VaeDecoderSettings, arguments[0], arguments[1:])

        from ..training.decoder.trainer import run_finetune_vae

        run_finetune_vae(chosen, resume=resume == "auto", say=click.echo)


def _print_template(name: str) -> None:
    click.echo((EXAMPLES / TEMPLATES[name]).read_text(encoding="utf-8"), nl=False)


def _print_settings(kind: type, arguments: tuple[str, ...]) -> None:
    from ..training.settings_file import read_settings
    from ..training.settings_list import list_settings

    settings = read_settings(kind, arguments[0], arguments[1:]) if arguments else None
    click.echo("\n".join(list_settings(kind, settings)))


def _check_file(arguments: tuple[str, ...], init: str) -> None:
    """Refuse anything but a file as the first argument, before the training code is imported."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"the first argument must be a settings file; {init} prints one to start from")
