"""The old place of specomp.tables.report: committed commands name it."""

import sys

from specomp.tables.report import main

if __name__ == "__main__":
    sys.exit(main())
