"""``python -m ztsnr``: the ``ztsnr`` command, where the folder of scripts is not on the path."""

from .cli import main

main(prog_name="ztsnr")
