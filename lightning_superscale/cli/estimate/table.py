"""An estimate as a table for the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_superscale.estimation.result import Estimate, StrategyEstimate
from lightning_superscale.run.report.plan import format_bytes

_COLUMNS = ("GiB: device", "host", "s / step", "forward", "backward", "optimizer", "ranks", "per s", "MFU", "largest")
_OF_MODELS = ("GiB: device", "host", "s / step", "per s", "MFU", "largest", "longest")
_COPIES = "activations"
_WIDEST = 1000
_OF_STEPS = ("s / step", "forward", "backward", "optimizer", "ranks")


def show(found: Estimate, console: Console) -> None:
    """Print an estimate: a row for each strategy, what is recommended, and what was assumed.

    No number is cut off: where the terminal is too narrow for all columns, rows have numbers that a list below names.
    """
    console.print(
        f"{found.model}: {found.num_params:,} parameters, {found.num_trainable:,} trained; {found.num_ranks} x "
        f"{found.device} with {format_bytes(found.device_memory)}, and {format_bytes(found.host_memory)} of host "
        f"memory; {found.num_tokens:,} {found.unit} a step on each",
        soft_wrap=True,
    )
    has_lengths = any(one.longest_sequence is not None for one in found.strategies)
    columns: tuple[str, ...] = (*_COLUMNS, "longest") if has_lengths else _COLUMNS
    of_steps: tuple[str, ...] = _OF_STEPS
    if any(one.time.activations for one in found.strategies):
        place = columns.index("ranks") + 1
        columns = (*columns[:place], _COPIES, *columns[place:])
        of_steps = (*_OF_STEPS, _COPIES)
    wide = _table(found, columns, is_numbered=False)
    # A console measures within its own width, which a table that is cut off fits.
    if console.measure(wide, options=console.options.update_width(_WIDEST)).minimum <= console.width:
        console.print(wide)
        for one in found.strategies:
            if not one.fits and not one.checkpoints_blocks:
                console.print(f"- {one.line} does not fit: {one.why_not}", style="dim", soft_wrap=True)
    else:
        console.print(_table(found, [name for name in _OF_MODELS if name in columns], is_numbered=True))
        console.print(_table(found, of_steps, is_numbered=True))
        for number, one in enumerate(found.strategies, 1):
            why = "" if one.fits else f" does not fit: {one.why_not}"
            console.print(f"{number:2} {one.line}{_mark(one)}{why}", style=_style(one, found), soft_wrap=True)
    _show_recommended(found.recommended, console)
    console.print(
        "`largest` is the deepest such model, in parameters; `longest` a sequence, in tokens.", soft_wrap=True
    )
    console.print(f"Assumed: {'; '.join(found.assumptions)}.", soft_wrap=True)


def _show_recommended(best: StrategyEstimate | None, console: Console) -> None:
    if best is None:
        console.print("Nothing fits: more devices, a smaller batch or shorter sequences would.", style="bold red")
        return
    imported = ", ".join(sorted(set(re.findall(r"\b[A-Z]\w+(?=\()", best.line))))
    if imported:
        console.print(f"from lightning_superscale import {imported}", style="bold green", soft_wrap=True)
    console.print(f"Recommended: Trainer({best.line})", style="bold green", soft_wrap=True)


def _table(found: Estimate, columns: Sequence[str], *, is_numbered: bool) -> Table:
    table = Table()
    if is_numbered:
        table.add_column("", justify="right", no_wrap=True)
    else:
        table.add_column("strategy=", overflow="fold", min_width=40)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    was_plain = True
    for number, one in enumerate(found.strategies, 1):
        if was_plain and one.checkpoints_blocks:
            table.add_section()
            was_plain = False
        cells = _cells(one)
        name = str(number) if is_numbered else one.line.removeprefix("strategy=") + _mark(one)
        table.add_row(name, *(cells[column] for column in columns), style=_style(one, found))
    return table


def _style(one: StrategyEstimate, found: Estimate) -> str:
    return "bold green" if one is found.recommended else "" if one.fits else "dim"


def _mark(one: StrategyEstimate) -> str:
    return "" if one.is_exact else " (not AdamW's result)"


def _cells(one: StrategyEstimate) -> dict[str, str]:
    time = one.time
    return {
        "GiB: device": f"{one.peak.total / 2**30:.1f}{'' if one.fits else ' !'}",
        "host": f"{one.host_bytes / 2**30:.1f}",
        "s / step": _seconds(time.total),
        "forward": _seconds(time.forward),
        "backward": _seconds(time.backward),
        "optimizer": _seconds(time.optimizer),
        "ranks": _seconds(time.ranks),
        _COPIES: _seconds(time.activations),
        "per s": f"{one.tokens_per_s:,.0f}",
        "MFU": f"{one.mfu:.0%}",
        "largest": "-" if one.largest_params is None else _billions(one.largest_params),
        "longest": "-" if one.longest_sequence is None else f"{one.longest_sequence:,}",
    }


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _billions(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"
