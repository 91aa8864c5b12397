"""The old place of specomp.tables.dashboard: committed commands name it."""

import sys

from specomp.tables.dashboard import main

if __name__ == "__main__":
    sys.exit(main())
