"""Everything happens to runs, and their ends are those of an undisturbed run: `python -m tests.soak`.

Runs of a small model go from leg to leg: each has another number of ranks and another strategy, and is ended by
something that happens to it at a random moment. The next goes on from the last whole checkpoint, by the same command.
At its end the weights and the samples of every step have to equal those of one process that nothing happened to. What
was done is printed, and JSON at the end; the exit code is 1, and everything is kept, if anything is not as promised.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.disk import limit_core_dumps, small_disk
from tests.soak.one_run import Run
from tests.soak.report import figures, show


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SOAK_SECONDS", "3600")))
    parser.add_argument("--seed", type=int, default=None, help="of everything random but moments; printed")
    parser.add_argument("--steps", type=int, default=240, help="of each run")
    parser.add_argument("--only", default="", help="part of the names of what may happen")
    given = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    limit_core_dumps()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    begun, runs = time.monotonic(), []
    while not runs or (time.monotonic() - begun < given.seconds and not runs[-1].failures):
        kind = ("fp32", "fp32", "fp16")[len(runs) % 3]
        with small_disk(folder / "disk") as is_small:
            runs.append(
                Run(
                    kind, given.steps, folder / f"run-{len(runs)}", folder / "disk" / "checkpoints",
                    seed + len(runs), only=given.only, can_fill=is_small, deadline=begun + given.seconds,
                )
            )  # fmt: skip
            runs[-1].play()
            if runs[-1].failures:
                shutil.copytree(folder / "disk", folder / "disk-at-the-failure", dirs_exist_ok=True, symlinks=True)
        shutil.rmtree(folder / "disk" / "checkpoints", ignore_errors=True)
        _tell(len(runs), runs[-1], time.monotonic() - begun)
    found = figures(runs, time.monotonic() - begun)
    show(found)
    if found["failures"]:
        print(f"everything is kept in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _tell(number: int, run: Run, seconds: float) -> None:
    print(f"[{seconds:5.0f} s] run {number} ({run.kind}): {'FAILED' if run.failures else 'ended with the right bits'}")
    for outcome in run.outcomes:
        leg = outcome.leg
        print(
            f"    leg {leg.number}: {leg.strategy} on {leg.ranks}{' async' if leg.asynchronous else ''}: {outcome.name}"
            f"{f' ({outcome.where})' if outcome.where else ''}, {outcome.lost_steps} steps lost",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
