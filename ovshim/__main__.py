"""`python -m ovshim` is `ovshim`."""

import sys

from ovshim.cli import main

if __name__ == "__main__":
    sys.exit(main())
