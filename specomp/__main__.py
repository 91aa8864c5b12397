"""`python -m specomp ...`: the command `specomp` of this very Python."""

import sys

from specomp.cli import main

if __name__ == "__main__":
    sys.exit(main())
