"""ScaleMonitor: a callback that logs how fast a run goes and what it waits for, and sums it up at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_superscale.config.values import PositiveFloat, PositiveInt, check_arguments
from lightning_superscale.estimation.tracing.inputs import count_tokens
from lightning_superscale.plugins.lightning_private import logged_step
from lightning_superscale.plugins.trainer.scale_monitor.model_work import ModelWork
from lightning_superscale.plugins.trainer.scale_monitor.tables import bytes_table, time_table
from lightning_superscale.plugins.trainer.scale_monitor.window import (
    Counts,
    ExposedTime,
    counts_of,
    memory_metrics,
    offload_metrics,
    sharing_ranks,
    strategy_of,
)
from lightning_superscale.run.report.plan import format_bytes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback as _Base
else:
    _Base = object


class ScaleMonitorMixin(_Base):
    """Logs tokens per second, MFU, memory and waits while training goes on, and prints where bytes and time went.

    It synchronises no device: it reads the host's clock, and on a GPU events that the device has passed already. Rank 0
    logs its own numbers, with the tokens of all ranks: `tokens_per_s`, which the progress bar shows too; `mfu` and
    `model_flops_per_s` where they are known; `process_bytes`, and on a GPU `device_peak_bytes`. Under a strategy of
    this package it logs `exposed_s_per_step`, the seconds of a step beyond forward and backward, too; and where
    optimizer states are on the host, `stall_share`, the share of the time since the last logging in which the host
    kept the model waiting, `link_bytes_per_step`, both ways, and the figures that the engine knows besides.

    Args:
        every_n_steps: training batches from one logging to the next.
        flops_per_token: floating-point operations of the model's forward and backward for a token (or a sample, where
            batches have no tokens), nothing that is computed again. "auto" counts those of the first batch, unless
            anything was compiled.
        peak_flops: floating-point operations per second that one device can do. "auto" takes the data sheet's of the
            devices that `superscale estimate` knows.

    Raises:
        SettingError: an argument of another type or range; says what it takes.
    """

    def __init__(
        self,
        every_n_steps: PositiveInt = 10,
        flops_per_token: PositiveFloat | Literal["auto"] = "auto",
        peak_flops: PositiveFloat | Literal["auto"] = "auto",
    ) -> None:
        check_arguments(
            "ScaleMonitor",
            ScaleMonitorMixin.__init__,
            every_n_steps=every_n_steps,
            flops_per_token=flops_per_token,
            peak_flops=peak_flops,
        )
        self.every_n_steps = every_n_steps
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self._work: ModelWork | None = None
        self._exposed: ExposedTime | None = None
        self._fit_start = self._window_start = self._batch_start = self._validation_start = 0.0
        self._in_batches = self._own_seconds = 0.0
        self._num_batches = self._num_tokens = self._window_tokens = 0
        self._most_bytes: dict[str, float] = {}
        # At the start of training, and of the window between two loggings.
        self._start = self._window_before = Counts()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit_start = self._window_start = perf_counter()
        self._num_batches = self._num_tokens = self._window_tokens = 0
        self._in_batches = self._own_seconds = 0.0
        self._most_bytes = {}
        self._start = self._window_before = counts_of(trainer)
        self._exposed = ExposedTime(trainer)
        is_low = "16" in str(trainer.precision)
        given = self.flops_per_token
        shared = given if given == "auto" else given / sharing_ranks(trainer)
        dtype = torch.bfloat16 if is_low else torch.float32
        self._work = ModelWork(shared, self.peak_flops, trainer.strategy.root_device, dtype)
        self._work.count_next_step(pl_module)

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
        self._in_batches += now - self._batch_start
        with self._timing_itself(now):
            self._num_batches += 1
            tokens, _ = count_tokens(batch)
            self._num_tokens += tokens
            self._window_tokens += tokens
            if self._work is not None:
                self._work.end_step(tokens)
            if self._num_batches % self.every_n_steps == 0:
                self._log(trainer, pl_module, now)

    @contextmanager
    def _timing_itself(self, start: float) -> Iterator[None]:
        """Count the context's time as the monitor's own."""
        try:
            yield
        finally:
            self._own_seconds += perf_counter() - start

    def _log(self, trainer: Trainer, pl_module: LightningModule, now: float) -> None:
        """Log the window that ends now, and begin the next one."""
        seconds, counts = max(now - self._window_start, 1e-9), counts_of(trainer)
        metrics = self._metrics(trainer, counts, seconds)
        for name in ("tokens_per_s", "mfu"):
            if name in metrics:
                pl_module.log(name, metrics[name], prog_bar=True, logger=False, rank_zero_only=True)
        # Not by `self.log`, which takes tenths of a millisecond for each and waits for the Trainer's own period.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=logged_step(trainer))
        self._window_start, self._window_tokens, self._window_before = now, 0, counts
        if self._exposed is not None:
            self._exposed.ask()

    def _metrics(self, trainer: Trainer, counts: Counts, seconds: float) -> dict[str, float]:
        """What is logged, by name."""
        groups = trainer.world_size / sharing_ranks(trainer)
        found: dict[str, float | None] = {"tokens_per_s": groups * self._window_tokens / seconds}
        if self._work is not None:
            flops = self._work.flops(self._window_tokens)
            found["model_flops_per_s"] = None if flops is None else flops / seconds
            found["mfu"] = self._work.mfu(self._window_tokens, seconds)
        if self._exposed is not None:
            found["exposed_s_per_step"] = self._exposed.per_step(self._window_before, counts)
        memory = memory_metrics(trainer.strategy.root_device)
        self._most_bytes = {name: max(value, self._most_bytes.get(name, 0.0)) for name, value in memory.items()}
        found |= memory
        found |= offload_metrics(trainer, self._window_before, counts, seconds)
        return {name: value for name, value in found.items() if value is not None}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_next_step()
        self._report(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget_next_step()

    def _forget_next_step(self) -> None:
        if self._work is not None:
            self._work.forget_next_step()

    @rank_zero_only
    def _report(self, trainer: Trainer) -> None:
        console, strategy = Console(file=sys.stdout), strategy_of(trainer)
        console.print()  # a progress bar may still hold the current line
        if strategy is not None:
            console.print(bytes_table(strategy, self._start))
        console.print(self.time_table(trainer))
        for line in self.sentences(trainer):
            console.print(f"- {line}", soft_wrap=True)

    def time_table(self, trainer: Trainer) -> Table:
        """A table of how the run's wall time divided, per batch and as a share, and tokens/s."""
        return time_table(
            trainer,
            wall=perf_counter() - self._fit_start,
            in_batches=self._in_batches,
            num_batches=self._num_batches,
            num_tokens=self._num_tokens,
        )

    def sentences(self, trainer: Trainer) -> list[str]:
        """What the run did of what its devices can, its memory, its exposed time, and what this monitor took."""
        strategy, said = strategy_of(trainer), [self._model_sentence()]
        most = {name: format_bytes(value) for name, value in self._most_bytes.items()}
        if "device_peak_bytes" in most:
            said.append(f"the device held {most['device_peak_bytes']} of tensors at the most")
        if "process_bytes" in most:
            said.append(f"the process held {most['process_bytes']} of host memory at the most, when it was logged")
        if self._exposed is not None and (exposed := self._exposed.mean()) is not None:
            said.append(f"exposed beyond forward and backward: {exposed * 1e3:.2f} ms a step, measured on the device")
        if strategy is not None:
            said += strategy.exposure()
        share = self._own_seconds / max(perf_counter() - self._fit_start, 1e-9)
        return [*said, f"this monitor took {share:.2%} of the time"]

    def _model_sentence(self) -> str:
        work, seconds = self._work, max(self._in_batches, 1e-9)
        flops = None if work is None else work.flops(self._num_tokens)
        if work is None or flops is None:
            return f"MFU is not known: {'no step was taken' if work is None else work.why_no_flops}"
        rate = f"the model's floating-point operations: {flops / max(1, self._num_batches):.3g} a batch"
        mfu = work.mfu(self._num_tokens, seconds)
        reached = f"MFU is not known: {work.why_no_peak}" if mfu is None else f"MFU {mfu:.1%}"
        return f"{rate}, {flops / seconds:.3g} a second in steps; {reached}"
