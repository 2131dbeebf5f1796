"""The `superscale` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from lightning_superscale import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit code (0: all is well, 1: something needed is missing)."""
    parser = argparse.ArgumentParser(prog="superscale", description="Tools of lightning-superscale.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="what this environment has, what is missing, and how to get it")
    parser.parse_args(arguments)
    checks = doctor.examine()
    Console(file=sys.stdout).print(doctor.table(checks))
    return 1 if any(check.status == "error" for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
