"""An estimate as a table for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lightning_superscale.estimation.result import Estimate, StrategyEstimate
from lightning_superscale.run.report.plan import format_bytes

_COLUMNS = ("GiB: device", "host", "s / step", "forward", "backward", "optimizer", "ranks", "per s", "MFU")


def show(found: Estimate, console: Console) -> None:
    """Print an estimate: a row for each strategy, what is recommended, and what was assumed."""
    console.print(
        f"{found.model}: {found.num_params:,} parameters, {found.num_trainable:,} trained; {found.num_ranks} x "
        f"{found.device} with {format_bytes(found.device_memory)}, and {format_bytes(found.host_memory)} of host "
        f"memory; {found.num_tokens:,} {found.unit} a step on each",
        soft_wrap=True,
    )
    table = Table(title_justify="left")
    table.add_column("strategy=", overflow="fold", min_width=24)
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    has_lengths = any(one.longest_sequence is not None for one in found.strategies)
    table.add_column("largest", justify="right")
    if has_lengths:
        table.add_column("longest", justify="right")
    best, was_plain = found.recommended, True
    for one in found.strategies:
        if was_plain and one.checkpoints_blocks:
            table.add_section()
            was_plain = False
        style = "bold green" if one is best else "" if one.fits else "dim"
        table.add_row(*_row(one, has_lengths=has_lengths), style=style)
    console.print(table)
    for one in found.strategies:
        if not one.fits and not one.checkpoints_blocks:
            console.print(f"- {one.line} does not fit: {one.why_not}", style="dim", soft_wrap=True)
    if best is None:
        console.print("Nothing fits: more devices, a smaller batch or shorter sequences would.", style="bold red")
    else:
        console.print(f"Recommended: Trainer({best.line})", style="bold green", soft_wrap=True)
    console.print(
        "`largest` is the deepest such model, in parameters; `longest` a sequence, in tokens.", soft_wrap=True
    )
    console.print(f"Assumed: {'; '.join(found.assumptions)}.", soft_wrap=True)


def _row(one: StrategyEstimate, *, has_lengths: bool) -> list[str]:
    time = one.time
    mark = "" if one.is_exact else " (not AdamW's result)"
    cells = [
        one.line.removeprefix("strategy=") + mark,
        f"{one.peak.total / 2**30:.1f}{'' if one.fits else ' !'}",
        f"{one.host_bytes / 2**30:.1f}",
        _seconds(time.total),
        _seconds(time.forward),
        _seconds(time.backward),
        _seconds(time.optimizer),
        _seconds(time.ranks),
        f"{one.tokens_per_s:,.0f}",
        f"{one.mfu:.0%}",
        "-" if one.largest_params is None else _billions(one.largest_params),
    ]
    if has_lengths:
        cells.append("-" if one.longest_sequence is None else f"{one.longest_sequence:,}")
    return cells


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _billions(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"
