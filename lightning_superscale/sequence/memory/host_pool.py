"""Host memory for activations on their way: buffers that are used again, because pinning memory is slow."""

from __future__ import annotations

import threading
from collections import defaultdict

from lightning_superscale.ops.cpu.memory import HostBuffer


class HostPool:
    """Lends host buffers by size, and lends those again that came back. Any thread may call it.

    Args:
        pin: whether buffers are page-locked.
        device: index of the CUDA device whose copies use them.

    Attributes:
        lent_bytes: bytes of buffers that are lent now.
        held_bytes: bytes of all buffers, lent or not.
    """

    def __init__(self, *, pin: bool, device: int = 0) -> None:
        self.lent_bytes = self.held_bytes = 0
        self._pin = pin
        self._device = device
        self._free: defaultdict[int, list[HostBuffer]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> HostBuffer:
        """A buffer of this size, with any content."""
        with self._lock:
            free = self._free[nbytes]
            self.lent_bytes += nbytes
            if free:
                return free.pop()
            self.held_bytes += nbytes
        return HostBuffer(nbytes, pin=self._pin, device=self._device, in_forks=False)

    def put_back(self, buffer: HostBuffer) -> None:
        """Take a buffer back that nothing reads or writes any more, or that work which comes later is ordered after."""
        with self._lock:
            self.lent_bytes -= buffer.nbytes
            self._free[buffer.nbytes].append(buffer)

    def clear(self) -> None:
        """Give the memory of buffers that are not lent back to the system."""
        with self._lock:
            self._free.clear()
            self.held_bytes = self.lent_bytes
