"""The command `specomp`, and `python -m specomp ...` of this very Python."""

import sys

from specomp.interrupts import until_interrupted


def main() -> int:
    """The exit code."""
    return until_interrupted(_typed)


def _typed() -> int:
    """Imported here: Ctrl-C is heard from now on."""
    from specomp.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
