"""The `superscale` command line. Scripts that pip installed, also earlier ones, call `main` here."""

from lightning_superscale.cli.command import main

__all__ = ["main"]
