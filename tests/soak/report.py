"""What was done to the runs and what survived, as a table and as JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.soak.one_run import Outcome, Run


def figures(runs: list[Run], seconds: float) -> dict[str, Any]:
    """How often everything was done, how often runs went on, and what it cost."""
    by_name: dict[str, list[Outcome]] = defaultdict(list)
    for run in runs:
        for outcome in run.outcomes:
            by_name[outcome.name].append(outcome)
    return {
        "seconds": round(seconds),
        "runs": len(runs),
        "steps": sum(run.steps for run in runs if not run.failures),
        "legs": sum(len(run.legs) for run in runs),
        "ranks_started": sum(leg.ranks for run in runs for leg in run.legs),
        "strategies": sorted({leg.strategy for run in runs for leg in run.legs}),
        "changes": sum(
            (one.ranks, one.strategy) != (other.ranks, other.strategy)
            for run in runs
            for one, other in zip(run.legs, run.legs[1:], strict=False)
        ),
        "happenings": {name: _row(outcomes) for name, outcomes in sorted(by_name.items())},
        "failures": [failure for run in runs for failure in run.failures],
    }


def _row(outcomes: list[Outcome]) -> dict[str, Any]:
    lost = [outcome.lost_steps for outcome in outcomes]
    return {
        "times": len(outcomes),
        "recovered": sum(not outcome.failures for outcome in outcomes),
        "named": sum(outcome.is_named for outcome in outcomes),
        "lost_steps_mean": round(sum(lost) / len(lost), 1),
        "lost_steps_max": max(lost),
        "all_ended_s_max": round(max(outcome.ended_s for outcome in outcomes), 1),
        "restarted_s_max": round(max(outcome.restarted_s for outcome in outcomes), 1),
    }


def show(found: dict[str, Any]) -> None:
    """Print the table, and the JSON as the last line."""
    table = Table(title=f"{found['runs']} runs in {found['legs']} legs, {found['seconds']} s", title_justify="left")
    for column in (
        "what happened",
        "times",
        "recovered",
        "steps lost: mean",
        "most",
        "all ended after, s",
        "restart, s",
    ):
        table.add_column(column, justify="left" if column == "what happened" else "right")
    for name, row in found["happenings"].items():
        table.add_row(
            name, *(str(row[key]) for key in ("times", "recovered", "lost_steps_mean", "lost_steps_max")),
            str(row["all_ended_s_max"]), str(row["restarted_s_max"]),
        )  # fmt: skip
    console = Console(width=140)
    console.print(table)
    console.print(
        f"{found['changes']} changes of ranks or strategy, {found['ranks_started']} ranks started; "
        + (f"{len(found['failures'])} FAILURES" if found["failures"] else "every run ended with the undisturbed bits")
    )
    for failure in found["failures"]:
        console.print(f"  {failure}", markup=False)
    print(json.dumps(found), flush=True)
