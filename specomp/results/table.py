"""`python -m specomp.results.table ...` is `specomp table ...`."""

import sys

from specomp.tables.table import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
