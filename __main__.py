"""The ``ztsnr`` command, which also runs as ``python -m ztsnr``."""

import sys

from .extras import MissingLibraryError, extras_named


def main() -> None:
    """Run the command, or print how to install click."""
    try:
        with extras_named("ztsnr"):
            from .cli import main as command
    except MissingLibraryError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    command(prog_name="ztsnr")


if __name__ == "__main__":
    main()
