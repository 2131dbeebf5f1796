"""What the check and the benchmark share: processes within the run's time, the machine's facts, the native build."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.process import Outcome, environment, run
from benchmarks.gpu.rows import Rows

LIMIT_S = 540.0  # for everything; the command as a whole stays below 9.5 minutes


class Runner:
    """Runs Python processes of ours and writes what they find.

    Args:
        options: of the command line: device and tiny.
        rows: what is found.
    """

    def __init__(self, options: argparse.Namespace, rows: Rows) -> None:
        self.options = options
        self.rows = rows
        self.is_cuda = options.device == "cuda"
        self.device = ["--device", options.device, *(["--tiny"] if options.tiny else [])]

    def run(
        self,
        arguments: Sequence[str],
        limit_s: float,
        *,
        before: Sequence[str] = (),
        variables: dict[str, str] | None = None,
        **more: Any,
    ) -> Outcome:
        """Run Python with these arguments, until the limit or the end of the run.

        Args:
            before: a command that runs Python for us.
            variables: of the environment, beside those that are there.
            more: of `process.run`.
        """
        env = environment(self.options.device, variables)
        command = [*before, sys.executable, "-W", "ignore", *arguments]
        return run(command, limit_s=min(limit_s, self.rows.left_s), env=env, **more)

    def take(self, line: str) -> None:
        """Write a row that another process measured."""
        row = json.loads(line)
        self.rows.write(row.pop("row"), **row)

    def facts(self) -> None:
        outcome = self.run(["-m", "benchmarks.gpu.facts", *self.device], 90, on_line=self.take)
        if not outcome.is_good:
            self.rows.outcome("facts", outcome)

    def build(self) -> None:
        """Our native libraries, where the cache of this user lacks them."""
        built: list[str] = []
        command = ["-m", "lightning_superscale.ops.native.build", "--jobs", str(os.cpu_count() or 2)]
        outcome = self.run(command, 200, on_line=built.append)
        self.rows.outcome("native build", outcome, libraries=len(built))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of both."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path, help="folder for the JSON lines")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    made.add_argument("--tiny", action="store_true", help="a few small cases, for a rehearsal")
    made.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for everything")
    return made


def carry_out(rows: Rows, work: Callable[[], None]) -> int:
    """Do all rows; returns the exit status. Ctrl-C and SIGTERM end the run, its processes and its file."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        work()
    except KeyboardInterrupt:
        rows.write("interrupted", ok=False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return rows.conclude()
