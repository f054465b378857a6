"""The ``ztsnr`` command.  Each subcommand imports what it needs when it runs, so that --help answers at once."""

import sys

import click

from .. import __version__
from .checkpoints import convert, inspect, mark, verify
from .data import buckets, cache
from .demo import demo, example
from .finetune import finetune, finetune_vae
from .leak import leak
from .noise import silence_libraries


class _Commands(click.Group):
    """Commands whose output fits every pipe."""

    def main(self, *args, **options):
        """Escape characters that the output's encoding lacks: Windows pipes use cp1252, file names anything."""
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # as Python does for stderr
        return super().main(*args, **options)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ztsnr")
def main() -> None:
    """Exact zero-terminal-SNR sampling for v-prediction diffusion models."""
    silence_libraries()


for command in (demo, example, leak, inspect, verify, mark, convert, buckets, cache, finetune, finetune_vae):
    main.add_command(command)
