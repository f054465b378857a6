"""The ``ztsnr`` command, also as ``python -m ztsnr`` where the folder of scripts is not on the path."""

import sys

from .extras import MissingLibraryError, extras_named


def main() -> None:
    """Run the command, or say how to install what it is made with."""
    try:
        with extras_named("ztsnr"):
            from .cli import main as command
    except MissingLibraryError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    command(prog_name="ztsnr")


if __name__ == "__main__":
    main()
