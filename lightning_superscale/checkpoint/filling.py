"""Scatters verified bytes of files to where they were asked for."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.checkpoint.blocks import BLOCK_BYTES
from lightning_superscale.checkpoint.reshard import SEGMENT_BLOCKS, Copy, Segment, blocks_of, windows
from lightning_superscale.checkpoint.state import ReadRequest

# Threads that read, each with a buffer of one segment, which so stays in a core's cache between its checksum and its
# copy.
READ_THREADS = min(4, os.cpu_count() or 1)


class Filling:
    """One rank's requests while they are filled.

    Attributes:
        is_pinned: whether buffers are page-locked, for copies to CUDA devices.
    """

    def __init__(self, requests: Sequence[ReadRequest]) -> None:
        self._requests = requests
        self._by_file: dict[str, tuple[list[int], list[Copy]]] = {}
        self._longest: dict[str, int] = {}
        devices = {request.out.device for request in requests if request.out.is_cuda}
        self.is_pinned = bool(devices)
        # Reader threads have streams of their own; values must be there for what the caller runs next.
        self._streams = {device: torch.cuda.current_stream(device) for device in devices}

    def take(self, copies: Sequence[Copy]) -> dict[str, list[tuple[int, int]]]:
        """Take what fills the requests, and say which blocks hold it, as `blocks_of` does."""
        for copy in sorted(copies, key=lambda copy: copy.start):
            starts, those = self._by_file.setdefault(copy.piece.file, ([], []))
            starts.append(copy.start)
            those.append(copy)
            self._longest[copy.piece.file] = max(self._longest.get(copy.piece.file, 0), copy.stop - copy.start)
        return blocks_of(copies)

    def scatter(self, segment: Segment, data: Tensor) -> None:
        """Copy what lies in a segment to where it was asked for."""
        start = segment.first * BLOCK_BYTES
        stop = start + data.numel()
        starts, copies = self._by_file.get(segment.file, ([], []))
        for i in range(bisect_left(starts, start - self._longest.get(segment.file, 0)), bisect_left(starts, stop)):
            copy = copies[i]
            if copy.stop <= start:
                continue
            request = self._requests[copy.request]
            for at, part, both in windows(copy, start, stop):
                source = data[at - start : at - start + part.numel * copy.dtype.itemsize]
                values = source.view(copy.dtype).view(part.size)
                with self._on(request.out.device):
                    request.out[both.within(request.box)].copy_(values[both.within(part)])

    def _on(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[device]) if device in self._streams else nullcontext()


class Buffers:
    """A fixed number of buffers of one segment each, taken by turns."""

    def __init__(self, is_pinned: bool) -> None:
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(READ_THREADS):
            self._free.put(torch.empty(SEGMENT_BLOCKS * BLOCK_BYTES, dtype=torch.uint8, pin_memory=is_pinned))

    def take(self) -> _Taken:
        return _Taken(self._free)


class _Taken:
    def __init__(self, free: SimpleQueue[Tensor]) -> None:
        self._free = free

    def __enter__(self) -> Tensor:
        self._buffer = self._free.get()
        return self._buffer

    def __exit__(self, *_: object) -> None:
        self._free.put(self._buffer)
