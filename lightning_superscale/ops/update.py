"""Which kernel applies an AdamW update, by device; the engines call whatever this page chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lightning_superscale.ops import adamw, reference
from lightning_superscale.ops.pool import Pool, default_pool
from lightning_superscale.ops.types import AdamWSegment, GradStats


class UpdateTicket(Protocol):
    def wait(self) -> Sequence[GradStats] | None: ...


class FinishedUpdate:
    """An update that was queued or done when its call returned."""

    def __init__(self, stats: Sequence[GradStats] | None) -> None:
        self._stats = stats

    def wait(self) -> Sequence[GradStats] | None:
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
    submit: Callable[[Sequence[AdamWSegment]], UpdateTicket]
    num_threads: int


def update_path(device: torch.device, num_threads: int | None) -> UpdatePath:
    """The best exact path for states on `device`; `num_threads` None leaves one core to the launching thread."""
    if device.type == "cuda":
        return _cuda_path()
    pool = default_pool() if num_threads is None else Pool(num_threads)
    return UpdatePath(
        adamw.kernel_name(), lambda s: adamw.submit_adamw_commit(s, stats=True, pool=pool), pool.num_threads
    )


def _cuda_path() -> UpdatePath:
    from lightning_superscale.ops import cuda  # noqa: PLC0415 - looks for a library that few machines have

    reason = cuda.unavailable_reason()
    if reason is None:
        return UpdatePath("CUDA AdamW", lambda s: FinishedUpdate(_no_stats(cuda.adamw_commit(s))), 0)
    return UpdatePath(
        f"PyTorch operations on the GPU ({reason})", lambda s: FinishedUpdate(reference.adamw_commit(s)), 0
    )


def _no_stats(_: object) -> None:
    return None
