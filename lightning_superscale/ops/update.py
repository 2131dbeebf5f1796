"""Which kernel applies an AdamW update, by device; the engines call whatever this page chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lightning_superscale.ops import adamw, reference
from lightning_superscale.ops.pool import Pool, Ticket, default_pool
from lightning_superscale.ops.types import AdamWSegment, GradStats

# Statistics of an update's gradients, fetched when they are asked for: on a GPU that waits for the device.
StatsSource = Callable[[], Sequence[GradStats]]


class Update(Protocol):
    """An update that was submitted."""

    def wait(self) -> StatsSource:
        """Return once masters and states are new for whatever runs next on their device."""


class HostUpdate:
    """An update that the pool's threads run."""

    def __init__(self, ticket: Ticket[list[GradStats] | None]) -> None:
        self._ticket = ticket

    def wait(self) -> StatsSource:
        stats = self._ticket.wait() or []
        return lambda: stats


class QueuedUpdate:
    """An update that was put on the current stream: nothing to wait for."""

    def __init__(self, stats: StatsSource) -> None:
        self._stats = stats

    def wait(self) -> StatsSource:
        return self._stats


@dataclass(frozen=True, slots=True)
class UpdatePath:
    """How updates run.

    Attributes:
        name: the kernel, in words, for `explain()`.
        submit: starts an update of segments that are all on one device.
        num_threads: host worker threads; 0 where the update runs on a GPU.
    """

    name: str
    submit: Callable[[Sequence[AdamWSegment]], Update]
    num_threads: int


def update_path(device: torch.device, pool: Pool | None = None) -> UpdatePath:
    """The best exact path for states on `device`; on the host it runs in `pool`, None for the process's."""
    if device.type == "cuda":
        return _cuda_path()
    pool = pool or default_pool()

    def host_update(segments: Sequence[AdamWSegment]) -> HostUpdate:
        return HostUpdate(adamw.submit_adamw_commit(segments, stats=True, pool=pool))

    return UpdatePath(adamw.kernel_name(), host_update, pool.num_threads)


def _cuda_path() -> UpdatePath:
    from lightning_superscale.ops import cuda  # looks for a library that few machines have

    def cuda_update(segments: Sequence[AdamWSegment]) -> QueuedUpdate:
        stats = cuda.adamw_commit(segments, stats=True)
        return QueuedUpdate(lambda: [] if stats is None else stats.to_host())

    def torch_update(segments: Sequence[AdamWSegment]) -> QueuedUpdate:
        # The oracle's own statistics would be thousands of small kernels.
        norms = [torch.linalg.vector_norm(seg.grad, dtype=torch.float32) * seg.hyper.grad_scale for seg in segments]
        reference.adamw_commit(segments)
        return QueuedUpdate(lambda: [GradStats(float(n) ** 2, int(not n.isfinite())) for n in norms])

    reason = cuda.unavailable_reason()
    if reason is None:
        return UpdatePath("CUDA AdamW", cuda_update, 0)
    return UpdatePath(f"PyTorch operations on the GPU, not fused ({reason})", torch_update, 0)
