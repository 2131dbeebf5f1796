"""Chooses the kernel that applies an AdamW update, by device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lightning_superscale.ops import reference
from lightning_superscale.ops.cpu import adamw
from lightning_superscale.ops.cpu.pool import Pool, Ticket, default_pool
from lightning_superscale.ops.events import Waitable
from lightning_superscale.ops.types import AdamWSegment, GradStats
from lightning_superscale.torch_private import norms_of_all

# Fetches the statistics of an update's gradients when it is called; on a GPU the call waits for the device.
StatsSource = Callable[[], Sequence[GradStats]]


# An update that was submitted. After its `wait`, later work on the device of the masters and states sees the new ones.
Update = Waitable[StatsSource]


class HostUpdate:
    """An update that the pool's threads run: waitable when it is done."""

    def __init__(self, ticket: Ticket[list[GradStats] | None]) -> None:
        self._ticket = ticket

    def is_waitable(self) -> bool:
        return self._ticket.is_waitable()

    def wait(self) -> StatsSource:
        stats = self._ticket.wait() or []
        return lambda: stats


class QueuedUpdate:
    """An update that was queued on the current stream: waitable at once, complete when the stream is."""

    def __init__(self, stats: StatsSource) -> None:
        self._stats = stats

    def is_waitable(self) -> bool:
        return True

    def wait(self) -> StatsSource:
        return self._stats


@dataclass(frozen=True, slots=True)
class UpdatePath:
    """The kernel that runs the updates of a device's states.

    Attributes:
        name: the kernel, in words, for `explain()`.
        submit: starts an update of segments that are all on one device.
        num_threads: host worker threads; 0 where the update runs on a GPU.
        scales_on_device: whether a segment may have a `device_scale`, which the host never reads.
    """

    name: str
    submit: Callable[[Sequence[AdamWSegment]], Update]
    num_threads: int
    scales_on_device: bool = False


def update_path(device: torch.device, pool: Pool | None = None, *, is_low_precision: bool = False) -> UpdatePath:
    """The best exact path for states on `device`.

    Args:
        pool: the threads that run updates on the host; None takes the process's `default_pool()`.
        is_low_precision: whether masters or moments are bf16, which another kernel steps on a GPU.
    """
    if device.type == "cuda":
        return _cuda_path(is_low_precision=is_low_precision)
    pool = pool or default_pool()

    def host_update(segments: Sequence[AdamWSegment]) -> HostUpdate:
        return HostUpdate(adamw.submit_adamw_commit(segments, stats=True, pool=pool))

    return UpdatePath(adamw.kernel_name(), host_update, pool.num_threads)


def _cuda_path(*, is_low_precision: bool) -> UpdatePath:
    from lightning_superscale.ops.cuda import kernels  # imported late: it looks for libraries that few machines have
    from lightning_superscale.ops.triton import adamw_low, launch

    reason, why_no_triton = kernels.unavailable_reason(), launch.unavailable_reason()

    def by_triton(segments: Sequence[AdamWSegment]) -> None:
        for seg in segments:
            adamw_low.adamw_low(seg)

    def cuda_update(segments: Sequence[AdamWSegment]) -> QueuedUpdate:
        if any(seg.rounding is not None for seg in segments):  # then all have a rounding, since all are of one unit
            return _beside_norms(by_triton if why_no_triton is None else reference.adamw_commit, segments)
        if reason is not None:
            return _beside_norms(reference.adamw_commit, segments)
        stats = kernels.adamw_commit(segments, stats=True)
        return QueuedUpdate(lambda: [] if stats is None else stats.to_host())

    kernel, why_none = ("Triton AdamW", why_no_triton) if is_low_precision else ("CUDA AdamW", reason)
    name = kernel if why_none is None else f"PyTorch operations on the GPU, not fused ({why_none})"
    return UpdatePath(name, cuda_update, 0, scales_on_device=True)


def _beside_norms(step: Callable[[Sequence[AdamWSegment]], object], segments: Sequence[AdamWSegment]) -> QueuedUpdate:
    """Queue an update, and torch's own norms as its statistics: the oracle's would be thousands of small kernels."""
    if not segments:
        return QueuedUpdate(list)
    norms = norms_of_all([seg.grad for seg in segments], torch.float32)
    scaled = torch.stack([norm * seg.grad_scale for norm, seg in zip(norms, segments, strict=True)])
    step(segments)
    return QueuedUpdate(lambda: [GradStats(n**2, int(not math.isfinite(n))) for n in scaled.tolist()])
