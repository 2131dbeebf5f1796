"""The `superscale` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_superscale import doctor, trace
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.plugins.step_recorder import DEFAULT_STEP


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="superscale", description="Tools of lightning-superscale.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="what this environment has, what is missing, and how to get it")
    tracing = commands.add_parser(
        "trace",
        help="run a training command and draw one of its steps, lane by lane",
        usage="superscale trace [--out FOLDER] [--step N] -- COMMAND [ARGUMENT ...]\n"
        "       superscale trace --draw TRACE.json",
    )
    tracing.add_argument("--out", type=Path, default=Path("runs/trace"), help="where trace and picture go")
    tracing.add_argument("--step", type=int, default=DEFAULT_STEP, help="optimizer steps before the recorded one")
    tracing.add_argument("--draw", type=Path, metavar="TRACE", help="draw an earlier trace again")
    tracing.add_argument("training", nargs=argparse.REMAINDER, metavar="COMMAND")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit code (0: all is well, 1: something needed is missing)."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command == "doctor":
        checks = doctor.examine()
        Console(file=sys.stdout).print(doctor.table(checks))
        return 1 if any(check.status == "error" for check in checks) else 0
    command = chosen.training[1:] if chosen.training[:1] == ["--"] else chosen.training
    if bool(command) == (chosen.draw is not None):
        parser.error("trace takes a training command after --, or --draw with an earlier trace")
    if chosen.step < 1:
        parser.error("--step must be at least 1: the first step builds what later ones reuse")
    try:
        if chosen.draw is not None:
            trace.show(chosen.draw)
            return 0
        return trace.run(command, chosen.out, chosen.step)
    except SuperScaleError as error:
        print(f"superscale trace: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
