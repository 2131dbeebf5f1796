"""The tables that ScaleMonitor prints when training ends: where the bytes live, and where the time went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from lightning_superscale.plugins.trainer.scale_monitor.window import Counts, strategy_of
from lightning_superscale.plugins.trainer.strategy import SuperScaleStrategyMixin
from lightning_superscale.run.report.plan import format_bytes

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def bytes_table(strategy: SuperScaleStrategyMixin, start: Counts) -> Table:
    """A table of each class of bytes and its memory, and of bytes that crossed the link per step since `start`."""
    plan = strategy.plan
    table = Table(title="Where the bytes live", title_justify="left")
    table.add_column("class")
    table.add_column("dtype")
    table.add_column(f"device ({plan.device})", justify="right")
    table.add_column("host", justify="right")
    for row in plan.bytes:
        table.add_row(row.name, row.dtype, format_bytes(row.device_bytes), format_bytes(row.host_bytes))
    table.add_section()
    table.add_row("total", "", format_bytes(plan.device_bytes), format_bytes(plan.host_bytes))
    link = None if strategy.assembly is None else strategy.assembly.link
    if strategy.assembly is not None and link is not None:
        strategy.assembly.wait_all_published()  # the last step's weights may not have left yet
        steps = max(1, strategy.phase_seconds.num_steps)
        table.caption = (
            f"{plan.engine}: {format_bytes((link.bytes.d2h - start.d2h) / steps)} of gradients to the host and "
            f"{format_bytes((link.bytes.h2d - start.h2d) / steps)} of weights back per step"
        )
    return table


def time_table(trainer: Trainer, *, wall: float, in_batches: float, num_batches: int, num_tokens: int) -> Table:
    """A table of how the run's wall time divided, per batch and as a share, and this rank's tokens/s.

    Args:
        wall, in_batches: seconds of the fit, and of the training batches in it.
    """
    batches = max(1, num_batches)
    table = Table(title="Where the time went", title_justify="left")
    for column, justify in (("phase", "left"), ("s / batch", "right"), ("share", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    phases = _phases(trainer)
    phases["data, logging, validation, checkpoints"] = wall - in_batches
    phases["other work of a step"] = in_batches - sum(list(phases.values())[:-1])
    for phase, seconds in phases.items():
        table.add_row(phase, f"{seconds / batches:.4f}", f"{seconds / max(wall, 1e-9):.1%}")
    rate = num_tokens / max(in_batches, 1e-9)
    table.caption = f"{num_batches} batches in {wall:.1f} s; {num_tokens:,} tokens, {rate:,.0f} tokens/s in steps"
    return table


def _phases(trainer: Trainer) -> dict[str, float]:
    strategy = strategy_of(trainer)
    if strategy is None or strategy.assembly is None:
        return {}
    engines = [engine.seconds for engine in strategy.assembly.engines.values()]
    return {
        "forward": strategy.phase_seconds.forward,
        "backward": strategy.phase_seconds.backward,
        "optimizer: gradients in": sum(s.collect for s in engines),
        "optimizer: clipping": sum(s.norm for s in engines),
        "optimizer: update": sum(s.update for s in engines),
        "optimizer: weights out": sum(s.publish for s in engines),
    }
