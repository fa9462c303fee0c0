"""`python -m fxkfac` is the command line."""

import sys

from fxkfac.cli import main

if __name__ == "__main__":
    sys.exit(main())
