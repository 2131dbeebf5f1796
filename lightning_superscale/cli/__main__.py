"""`python -m lightning_superscale.cli` runs the `superscale` command."""

import sys

from lightning_superscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
