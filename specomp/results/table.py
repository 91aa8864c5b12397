"""The old place of specomp.tables.table: committed commands name it."""

import sys

from specomp.tables.table import main

if __name__ == "__main__":
    sys.exit(main())
