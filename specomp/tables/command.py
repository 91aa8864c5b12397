"""What the commands of this folder share."""

import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from specomp.errors import UserError

RECORDS = "folders of records (default: yours and the committed ones)"


def sweep_parser(name: str, about: str | None, also: str = "") -> ArgumentParser:
    """Of a command about one sweep. also: what more than overrides of run.py may be typed."""
    parser = ArgumentParser(prog=f"specomp {name}", description=about)
    parser.add_argument("experiment", help="its name, or the first of what was typed after -m")
    typed = f"what else was typed{also}"
    parser.add_argument("overrides", nargs="*", help=typed)
    parser.add_argument("--records", nargs="*", type=Path, help=RECORDS)
    return parser


def command(
    parser: ArgumentParser, arguments: Sequence[str] | None, answer: Callable[[Namespace], str]
) -> int:
    """Write the answer to what was typed; an error of the user is one line. The exit code."""
    options = parser.parse_intermixed_args(arguments)
    try:
        sys.stdout.write(answer(options))
    except UserError as error:
        logging.getLogger("specomp").error("%s", error)
        return 1
    return 0
