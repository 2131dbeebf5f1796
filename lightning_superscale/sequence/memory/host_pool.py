"""Host memory for activations on their way: buffers that are used again, because pinning memory is slow."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Buffer(Protocol):
    """Memory that a pool lends, such as a `HostBuffer`."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    def tensor(self, dtype: torch.dtype, numel: int) -> Tensor:
        """A tensor [numel] in it."""


class HostPool:
    """Lends host buffers by size, and lends those again that came back. Any thread may call it.

    Args:
        make: makes a buffer of so many bytes.

    Attributes:
        lent_bytes: bytes of buffers that are lent now.
        held_bytes: bytes of all buffers, lent or not.
    """

    def __init__(self, make: Callable[[int], Buffer]) -> None:
        self.lent_bytes = self.held_bytes = 0
        self._make = make
        self._free: defaultdict[int, list[Buffer]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Buffer:
        """A buffer of this size, with any content."""
        with self._lock:
            free = self._free[nbytes]
            self.lent_bytes += nbytes
            if free:
                return free.pop()
            self.held_bytes += nbytes
        return self._make(nbytes)

    def put_back(self, buffer: Buffer) -> None:
        """Take a buffer back that nothing reads or writes any more, or that work which comes later is ordered after."""
        with self._lock:
            self.lent_bytes -= buffer.nbytes
            self._free[buffer.nbytes].append(buffer)

    def clear(self) -> None:
        """Give the memory of buffers that are not lent back to the system."""
        with self._lock:
            self._free.clear()
            self.held_bytes = self.lent_bytes
