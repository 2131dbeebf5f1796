"""What a run did between two moments, as the numbers that ScaleMonitor logs."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from lightning_superscale.plugins.trainer.strategy import SuperScaleStrategyMixin
from lightning_superscale.run.report.figures import figures_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@dataclass(frozen=True, slots=True)
class Counts:
    """What has added up on this rank so far.

    Attributes:
        num_steps: optimizer steps.
        stalled: seconds in which the host kept the model waiting.
        exposed: seconds of the host's clock beyond forward and backward.
        d2h, h2d: bytes that crossed the link, to the host and to the device.
    """

    num_steps: int = 0
    stalled: float = 0.0
    exposed: float = 0.0
    d2h: int = 0
    h2d: int = 0

    @property
    def link_bytes(self) -> int:
        return self.d2h + self.h2d


def strategy_of(trainer: Trainer) -> SuperScaleStrategyMixin | None:
    """The trainer's strategy, if it is one of this package."""
    return trainer.strategy if isinstance(trainer.strategy, SuperScaleStrategyMixin) else None


def counts_of(trainer: Trainer) -> Counts:
    """What has added up under a strategy of this package; nothing under others."""
    strategy = strategy_of(trainer)
    if strategy is None or strategy.assembly is None:
        return Counts()
    phases, link = strategy.phase_seconds, strategy.assembly.link
    d2h, h2d = (0, 0) if link is None else (link.bytes.d2h, link.bytes.h2d)
    return Counts(phases.num_steps, phases.stalled, phases.exposed, d2h, h2d)


def sharing_ranks(trainer: Trainer) -> int:
    """Ranks that work on one batch of the loader together."""
    strategy = strategy_of(trainer)
    if strategy is None or strategy.assembly is None:
        return 1
    mesh = strategy.assembly.mesh
    return mesh.sequence.size * mesh.tensor.size


class ExposedTime:
    """Seconds of each step beyond the model's own work, without waiting for a device.

    On a CPU they are the host clock's, of every step. On a GPU they are measured by events in one step of each window,
    from the end of its backward to the next forward, with the waits for weights in that.
    """

    def __init__(self, trainer: Trainer) -> None:
        strategy = strategy_of(trainer)
        timeline = None if strategy is None or strategy.assembly is None else strategy.assembly.settings.timeline
        self._timeline = timeline
        self._seen: list[float] = []
        self.ask()

    def ask(self) -> None:
        """Begin a window."""
        if self._timeline is not None:
            self._timeline.waits.ask()

    def per_step(self, before: Counts, now: Counts) -> float | None:
        """Seconds per step of a window that is over; None where no step was measured in it."""
        if self._timeline is None or now.num_steps == before.num_steps:
            return None
        if not self._timeline.is_cuda:
            return (now.exposed - before.exposed) / (now.num_steps - before.num_steps)
        seconds = self._timeline.waits.take()
        if seconds is not None:
            self._seen.append(seconds)
        return seconds

    def mean(self) -> float | None:
        """The mean of the steps that were measured on a GPU; None without any."""
        return sum(self._seen) / len(self._seen) if self._seen else None


def offload_metrics(trainer: Trainer, before: Counts, now: Counts, seconds: float) -> dict[str, float]:
    """What is logged where optimizer states are on the host, by name.

    Args:
        before: the counts `seconds` ago.
    """
    strategy = strategy_of(trainer)
    if strategy is None or strategy.assembly is None or strategy.assembly.link is None:
        return {}
    metrics = {"stall_share": min(1.0, (now.stalled - before.stalled) / seconds)}
    if now.num_steps > before.num_steps:
        num_steps = now.num_steps - before.num_steps
        metrics["link_bytes_per_step"] = (now.link_bytes - before.link_bytes) / num_steps
    figures = figures_of(strategy.assembly)
    return metrics | {figure.name: figure.measured for figure in figures if figure.measured is not None}


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Bytes of this process on the host now, and of its tensors on a GPU at the most so far."""
    metrics = {"process_bytes": float(_process(os.getpid()).memory_info().rss)}
    if device.type == "cuda":
        metrics["device_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return metrics


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> psutil.Process:
    """The process of a number; to look it up takes longer than to ask it."""
    return psutil.Process(pid)
