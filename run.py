"""python run.py [group=choice ...] [key=value ...]: one experiment; with -m, a sweep. The command
`specomp` from a clone; see README.md.
"""

import sys

from specomp.cli import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
