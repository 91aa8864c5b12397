"""python run.py [group=choice ...] [key=value ...]: one experiment; with -m, a sweep. The command
`specomp` from a clone; see README.md.
"""

import sys

from specomp.interrupts import until_interrupted


def typed() -> int:
    """Imported here: Ctrl-C is heard from now on."""
    from specomp.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(until_interrupted(typed))
