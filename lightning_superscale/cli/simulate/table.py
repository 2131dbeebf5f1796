"""A simulation as a table for the terminal."""

from __future__ import annotations

from typing import get_args

from rich.console import Console
from rich.table import Table

from lightning_superscale.simulation.rank import Waiting
from lightning_superscale.simulation.result import SimulatedStep, Simulation

# Numbers are never cut short, in a narrow terminal neither.
_WIDTH = 110
WAITINGS: tuple[Waiting, ...] = get_args(Waiting)


def show(found: Simulation, console: Console) -> None:
    """Print a simulation: a row for each size of the cluster, and what was assumed."""
    console.print(
        f"{found.model}: {found.num_params:,} parameters on nodes of {found.ranks_per_node} x {found.device}; "
        f"{found.num_tokens:,} {found.unit} a batch; Trainer({found.line})",
        soft_wrap=True,
    )
    table = Table(padding=(0, 0))
    has_slow = found.slow_rank != 1
    waitings = [what for what in WAITINGS if any(what in step.waited for step in found.steps)]
    columns = ["nodes", "ranks", "s / step", "model", "update", *(f"+ {what}" for what in waitings)]
    columns += ["of it: slow"] if has_slow else []
    rows = [_row(step, waitings, has_slow=has_slow) for step in found.steps]
    for column, cells in zip([*columns, f"{found.unit}/s", "efficiency"], zip(*rows, strict=True), strict=True):
        table.add_column(column, justify="right", min_width=max(map(len, (*cells, *column.split()))))
    for row in rows:
        table.add_row(*row)
    console.print(table, width=max(console.width, _WIDTH), crop=False)
    console.print(
        "`+` is what a device waited for, copies included: weights of other ranks, reductions, attention, the host.",
        soft_wrap=True,
    )
    console.print(f"Assumed: {'; '.join(found.assumptions)}.", soft_wrap=True)


def _row(step: SimulatedStep, waitings: list[Waiting], *, has_slow: bool) -> list[str]:
    cells = [f"{step.num_nodes:,}", f"{step.num_ranks:,}"]
    cells += [_seconds(value) for value in (step.seconds, step.model, step.update)]
    cells += [_seconds(step.waited.get(what, 0.0)) for what in waitings]
    cells += [_seconds(step.slow)] if has_slow else []
    return [*cells, f"{step.tokens_per_s:,.0f}", f"{step.efficiency:.0%}"]


def _seconds(value: float) -> str:
    return f"{value:.4f}"
