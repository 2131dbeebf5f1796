"""ScaleMonitor: a callback that logs tokens per second and prints where a run's bytes and time went."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_superscale.config.values import PositiveInt, check_arguments
from lightning_superscale.plugins.trainer.strategy import SuperScaleStrategyMixin
from lightning_superscale.run.report.figures import figures_of
from lightning_superscale.run.report.plan import format_bytes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback as _Base
else:
    _Base = object


class ScaleMonitorMixin(_Base):
    """Counts tokens and divides the time of every training step; prints both, and the bytes, at the end of `fit()`.

    It reads the host's clock only and synchronises nothing, so on a GPU a phase's seconds are those that it kept the
    host busy. It logs `tokens_per_s`, which the progress bar shows too. Where optimizer states are on the host, it logs
    `stall_share`, the share of the time since the last logging in which the host kept the model waiting,
    `link_bytes_per_step`, both ways, and the figures that the engine knows besides.

    Args:
        every_n_steps: training batches from one logging to the next.

    Raises:
        SettingError: every_n_steps is no whole number of at least 1.
    """

    def __init__(self, every_n_steps: PositiveInt = 10) -> None:
        check_arguments("ScaleMonitor", ScaleMonitorMixin.__init__, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._fit_start = 0.0
        self._batch_start = 0.0
        self._batch_seconds = 0.0
        self._window_start = 0.0
        self._window_tokens = 0
        # At the start of the window between two loggings.
        self._window_before = _Counts()
        self._num_tokens = 0
        self._num_batches = 0
        self._validation_start = 0.0
        # Bytes that had crossed the link before the first batch: (device to host, host to device).
        self._link_start = (0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit_start = self._window_start = perf_counter()
        self._num_tokens = self._num_batches = self._window_tokens = 0
        self._batch_seconds = 0.0
        self._link_start = _link_bytes(trainer)
        self._window_before = _counts(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Tokens/s is that of training, so validation does not count in its window.
        self._window_start += perf_counter() - self._validation_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_start = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = perf_counter()
        self._batch_seconds += now - self._batch_start
        self._num_batches += 1
        tokens = count_tokens(batch)
        self._num_tokens += tokens
        self._window_tokens += tokens
        if self._num_batches % self.every_n_steps == 0:
            seconds = max(now - self._window_start, 1e-9)
            pl_module.log("tokens_per_s", self._window_tokens / seconds, prog_bar=True, rank_zero_only=True)
            counts = _counts(trainer)
            for name, value in _offload_metrics(trainer, self._window_before, counts, seconds).items():
                pl_module.log(name, value, rank_zero_only=True)
            self._window_start, self._window_tokens, self._window_before = now, 0, counts

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    @rank_zero_only
    def _report(self, trainer: Trainer) -> None:
        console = Console(file=sys.stdout)
        console.print()  # a progress bar may still hold the current line
        if isinstance(trainer.strategy, SuperScaleStrategyMixin):
            console.print(bytes_table(trainer.strategy, self._link_start))
        console.print(self.time_table(trainer))
        if isinstance(trainer.strategy, SuperScaleStrategyMixin):
            for line in trainer.strategy.exposure():
                console.print(f"- {line}", soft_wrap=True)

    def time_table(self, trainer: Trainer) -> Table:
        """A table of how the run's wall time divided, per batch and as a share, and tokens/s."""
        wall = perf_counter() - self._fit_start
        batches = max(1, self._num_batches)
        table = Table(title="Where the time went", title_justify="left")
        for column, justify in (("phase", "left"), ("s / batch", "right"), ("share", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        phases = self._phases(trainer)
        phases["data, logging, validation, checkpoints"] = wall - self._batch_seconds
        phases["other work of a step"] = self._batch_seconds - sum(list(phases.values())[:-1])
        for phase, seconds in phases.items():
            table.add_row(phase, f"{seconds / batches:.4f}", f"{seconds / max(wall, 1e-9):.1%}")
        rate = self._num_tokens / max(self._batch_seconds, 1e-9)
        table.caption = (
            f"{self._num_batches} batches in {wall:.1f} s; {self._num_tokens:,} tokens, {rate:,.0f} tokens/s in steps"
        )
        return table

    def _phases(self, trainer: Trainer) -> dict[str, float]:
        strategy = trainer.strategy
        if not isinstance(strategy, SuperScaleStrategyMixin) or strategy.assembly is None:
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


def count_tokens(batch: Any) -> int:
    """Elements of the first tensor of a batch that is integer and has 2 or more dims; without one, the batch size."""
    tensors = [t for t in _flatten(batch) if isinstance(t, torch.Tensor)]
    for tensor in tensors:
        if not tensor.is_floating_point() and tensor.ndim > 1:
            return tensor.numel()
    return tensors[0].shape[0] if tensors and tensors[0].ndim else 0


def _flatten(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return [leaf for value in batch.values() for leaf in _flatten(value)]
    if isinstance(batch, (list, tuple)):
        return [leaf for value in batch for leaf in _flatten(value)]
    return [batch]


def _link_bytes(trainer: Trainer) -> tuple[int, int]:
    """Bytes that crossed the link so far, (device to host, host to device)."""
    strategy = trainer.strategy
    if not isinstance(strategy, SuperScaleStrategyMixin) or strategy.assembly is None or strategy.assembly.link is None:
        return 0, 0
    return strategy.assembly.link.bytes.d2h, strategy.assembly.link.bytes.h2d


class _Counts(NamedTuple):
    """What has added up on this rank so far.

    Attributes:
        num_steps: optimizer steps.
        stalled: seconds in which the host kept the model waiting.
        link_bytes: bytes that crossed the link, both ways.
    """

    num_steps: int = 0
    stalled: float = 0.0
    link_bytes: int = 0


def _counts(trainer: Trainer) -> _Counts:
    strategy = trainer.strategy
    if not isinstance(strategy, SuperScaleStrategyMixin):
        return _Counts()
    phases = strategy.phase_seconds
    return _Counts(phases.num_steps, phases.stalled, sum(_link_bytes(trainer)))


def _offload_metrics(trainer: Trainer, before: _Counts, now: _Counts, seconds: float) -> dict[str, float]:
    """What is logged besides, by name: nothing where no optimizer states are on the host.

    Args:
        before: the counts `seconds` ago.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SuperScaleStrategyMixin) or strategy.assembly is None or strategy.assembly.link is None:
        return {}
    metrics = {"stall_share": min(1.0, (now.stalled - before.stalled) / seconds)}
    if now.num_steps > before.num_steps:
        num_steps = now.num_steps - before.num_steps
        metrics["link_bytes_per_step"] = (now.link_bytes - before.link_bytes) / num_steps
    figures = figures_of(strategy.assembly)
    return metrics | {figure.name: figure.measured for figure in figures if figure.measured is not None}


def bytes_table(strategy: SuperScaleStrategyMixin, link_start: tuple[int, int]) -> Table:
    """A table of each class of bytes and its memory, and of bytes that crossed the link per step since `link_start`."""
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
            f"{plan.engine}: {format_bytes((link.bytes.d2h - link_start[0]) / steps)} of gradients to the host and "
            f"{format_bytes((link.bytes.h2d - link_start[1]) / steps)} of weights back per step"
        )
    return table
