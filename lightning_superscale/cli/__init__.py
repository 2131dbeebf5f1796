"""The `superscale` command line. The scripts that pip installs, also those of earlier versions, call `main` here."""

from lightning_superscale.cli.command import main

__all__ = ["main"]
