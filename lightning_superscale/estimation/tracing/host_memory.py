"""Host memory and its link in a traced step: what the run's own offload of activations puts there and brings back.

[Note: Host tensors of a trace] A trace counts tensors of the CPU, which plays the device, so tensors of host memory are
on the meta device. Copies take no operation; the offload counts their bytes itself. A source is kept until its copy is
waited for, as an allocator keeps it for a copy under way: that bounds from above what the device holds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_superscale.sequence.memory.activation_offload import Fence


@dataclass(frozen=True, slots=True)
class TracedBuffer:
    """Host memory without bytes. Satisfies `host_pool.Buffer`."""

    nbytes: int

    def tensor(self, dtype: torch.dtype, numel: int) -> Tensor:
        """See [Note: Host tensors of a trace]."""
        return torch.empty(numel, dtype=dtype, device="meta")


class _Copy:
    """A copy, which keeps its source until somebody waits for it."""

    def __init__(self, source: Tensor) -> None:
        self._source: Tensor | None = source

    def wait(self) -> None:
        self._source = None

    synchronize = wait

    def is_waitable(self) -> bool:
        return True

    is_complete = is_waitable


class TracedLink:
    """The link of a traced step. Satisfies `activation_offload.ActivationLink`."""

    def d2h(self, dst: Tensor, src: Tensor) -> _Copy:
        return _Copy(src)

    def h2d(self, dst: Tensor, src: Tensor, after: Fence | None = None) -> _Copy:
        return _Copy(src)

    def allocating(self) -> AbstractContextManager[object]:
        return nullcontext()

    def needs_pinned_host(self) -> bool:
        return False
