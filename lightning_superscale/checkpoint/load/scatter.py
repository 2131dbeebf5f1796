"""Copies of verified bytes from segments of files to the tensors of read requests, on this rank and on others."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_superscale.checkpoint.format.blocks import BLOCK_BYTES
from lightning_superscale.checkpoint.format.chunks import Chunk, chunks_in
from lightning_superscale.checkpoint.format.manifest import TensorRecord
from lightning_superscale.checkpoint.load.segments import (
    SEGMENT_BLOCKS,
    ReadItem,
    ReadItemPart,
    Segment,
    blocks_of,
    parts_of,
)
from lightning_superscale.checkpoint.state import ReadRequest, TensorKey
from lightning_superscale.layout.box import Box

# Threads that read. Each has a buffer of one segment, so that a segment stays in a core's cache between its checksum
# and its copy.
READ_THREADS = min(4, os.cpu_count() or 1)


# Boxes that a rank wants, as it tells the others: index of the tensor in the manifest, offset and size.
Wanted = Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]

# Runs of at least this many bytes are read straight into the request's tensor; shorter ones are cheaper to copy.
_LEAST_RUN_BYTES = 2**16

_Item = TypeVar("_Item")


class _Spans(Generic[_Item]):
    """Items that each cover a span of a file's bytes, found by the bytes that they cover."""

    def __init__(self, items: Iterable[tuple[str, int, int, _Item]]) -> None:
        self._by_file: dict[str, tuple[list[int], list[tuple[int, _Item]]]] = {}
        self._longest: dict[str, int] = {}
        for file, start, stop, item in sorted(items, key=lambda each: each[1]):
            starts, those = self._by_file.setdefault(file, ([], []))
            starts.append(start)
            those.append((stop, item))
            self._longest[file] = max(self._longest.get(file, 0), stop - start)

    def over(self, file: str, start: int, stop: int) -> Iterator[_Item]:
        """The items that cover any of bytes [start, stop) of a file, by their first byte, then in the order given."""
        starts, those = self._by_file.get(file, ([], []))
        for i in range(bisect_left(starts, start - self._longest.get(file, 0)), bisect_left(starts, stop)):
            if those[i][0] > start:
                yield those[i][1]


def _bytes_of(segment: Segment) -> tuple[int, int]:
    return segment.first * BLOCK_BYTES, segment.stop * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes [start, stop) of a read item's file that go, unchanged, to as many consecutive bytes of host memory."""

    item: ReadItem
    start: int
    stop: int
    memory: memoryview


@dataclass(frozen=True, slots=True)
class Destinations:
    """The memory that a segment's bytes are read into.

    Attributes:
        memory: buffers that take all the segment's bytes, one buffer after the other.
        left: read items whose values must be copied to their requests after the read.
    """

    memory: Sequence[memoryview]
    left: Sequence[ReadItem]


class Filling:
    """One rank's requests while they are filled.

    Args:
        requests: the requests of this rank.

    Attributes:
        is_pinned: whether buffers are page-locked, for copies to CUDA devices.
    """

    def __init__(self, requests: Sequence[ReadRequest]) -> None:
        self._requests = requests
        self._items: _Spans[ReadItem] = _Spans(())
        self._runs: _Spans[_Run] = _Spans(())
        devices = {request.out.device for request in requests if request.out.is_cuda}
        self.is_pinned = bool(devices)
        # Reader threads have streams of their own; copies go to the caller's, so that its next work sees the values.
        self._streams = {device: torch.cuda.current_stream(device) for device in devices}

    def take(self, items: Sequence[ReadItem]) -> dict[str, list[tuple[int, int]]]:
        """Take the read items of the requests. Returns the blocks that hold their bytes, as `blocks_of` does."""
        self._items = _Spans((item.chunk.file, item.start, item.stop, item) for item in items)
        runs = [(item, self._run_of(item)) for item in items]
        # A chunk that is wanted twice, once straight and once not, would have no bytes in the buffer to copy from.
        copied = {(item.chunk.file, item.start) for item, run in runs if run is None}
        self._runs = _Spans(
            (item.chunk.file, run.start, run.stop, run)
            for item, run in runs
            if run is not None and (item.chunk.file, item.start) not in copied
        )
        return blocks_of(items)

    def _run_of(self, item: ReadItem) -> _Run | None:
        request = self._requests[item.request]
        nbytes = item.box.numel * item.itemsize
        if nbytes < _LEAST_RUN_BYTES:
            return None
        first, to = item.box.run_within(item.chunk.box), item.box.run_within(request.box)
        if first is None or to is None:
            return None
        out = request.out.detach()
        if not (out.is_cpu and out.dtype == item.dtype and out.is_contiguous()) or out.is_conj() or out.is_neg():
            return None
        memory: memoryview = out.view(-1)[to : to + item.box.numel].view(torch.uint8).numpy().data
        start = item.start + first * item.itemsize
        return _Run(item, start, start + nbytes, memory)

    def destinations(self, segment: Segment, spare: Tensor) -> Destinations:
        """Memory that a segment's bytes can be read into: requests' own tensors where bytes go there unchanged.

        Bumps the version counters of these tensors, so that autograd knows that they change.

        Args:
            spare: flat uint8, as long as the segment; takes the bytes that can't go straight to a request's tensor.
        """
        start, stop = _bytes_of(segment)
        between: memoryview = spare.numpy().data
        memory: list[memoryview] = []
        at = start
        runs = sorted(self._runs.over(segment.file, start, stop), key=lambda run: run.start)
        for run in runs:
            if run.start < at and at > start:  # two requests want the same bytes
                return Destinations([between], list(self._items.over(segment.file, start, stop)))
            first, last = max(run.start, start), min(run.stop, stop)
            memory += [between[at - start : first - start], run.memory[first - run.start : last - run.start]]
            at = last
        increment_version([self._requests[run.item.request].out for run in runs])
        straight = {id(run.item) for run in runs}
        left = [item for item in self._items.over(segment.file, start, stop) if id(item) not in straight]
        return Destinations([*memory, between[at - start :]], left)

    def scatter_left(self, segment: Segment, destinations: Destinations, spare: Tensor) -> None:
        """Copy the items that were not read straight into their requests' tensors, once `spare` holds their bytes."""
        for item in destinations.left:
            for part in parts_of(item, *_bytes_of(segment)):
                self._fill(part, part.values(spare, segment.first * BLOCK_BYTES))

    def parts_of(self, segment: Segment) -> Iterator[ReadItemPart]:
        """The parts of this rank's read items in a segment, in the order of its reader's `Others.parts_of`."""
        start, stop = _bytes_of(segment)
        for item in self._items.over(segment.file, start, stop):
            yield from parts_of(item, start, stop)

    def scatter(self, segment: Segment, data: Tensor) -> None:
        """Copy the wanted values of a segment to the requests' tensors.

        Args:
            data: the segment's bytes, flat uint8.
        """
        for part in self.parts_of(segment):
            self._fill(part, part.values(data, segment.first * BLOCK_BYTES))

    def scatter_packed(self, segment: Segment, message: Tensor) -> None:
        """Copy the wanted values of a segment from a message that `pack` wrote to the requests' tensors.

        Args:
            message: the values that this rank wants of the segment, flat uint8.
        """
        at = 0
        for part in self.parts_of(segment):
            self._fill(part, part.packed_values(message, at))
            at += part.packed_bytes

    def _fill(self, part: ReadItemPart, values: Tensor) -> None:
        request = self._requests[part.item.request]
        with self._on(request.out.device):
            request.out[part.wanted.within(request.box)].copy_(values)

    def _on(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[device]) if device in self._streams else nullcontext()


class Others:
    """The read items of other ranks, in the segments that this rank reads.

    Args:
        wanted: each rank's boxes, by rank, in the order of its requests.
        tensors: all tensors of the manifest, in the order that `wanted` counts them in.
        files: the files of the segments that this rank reads.
    """

    def __init__(
        self, wanted: Sequence[Wanted], tensors: Mapping[TensorKey, TensorRecord], files: frozenset[str]
    ) -> None:
        self._chunks: _Spans[tuple[TensorKey, Chunk]] = _Spans(
            (chunk.file, chunk.start, chunk.start + chunk.box.numel * record.info.dtype.itemsize, (key, chunk))
            for key, record in tensors.items()
            for chunk in chunks_in(record.chunks, files)
        )
        self._dtypes = {key: record.info.dtype for key, record in tensors.items()}
        self._boxes: list[dict[TensorKey, list[tuple[int, Box]]]] = []
        keys = list(tensors)
        for boxes in wanted:
            own: dict[TensorKey, list[tuple[int, Box]]] = {}
            for i, (at, offset, size) in enumerate(boxes):
                own.setdefault(keys[at], []).append((i, Box(offset, size)))
            self._boxes.append(own)

    def parts_of(self, rank: int, segment: Segment) -> Iterator[ReadItemPart]:
        """The parts of a rank's read items in a segment, in the order of that rank's `Filling.parts_of`."""
        start, stop = _bytes_of(segment)
        for key, chunk in self._chunks.over(segment.file, start, stop):
            for i, box in self._boxes[rank].get(key, ()):
                both = chunk.box.intersect(box)
                if both is not None:
                    yield from parts_of(ReadItem(i, chunk, both, self._dtypes[key]), start, stop)


class Buffers:
    """A pool of one host buffer for each reader thread; a buffer holds one segment, flat uint8.

    Args:
        is_pinned: whether the buffers are page-locked.
    """

    def __init__(self, is_pinned: bool) -> None:
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(READ_THREADS):
            self._free.put(torch.empty(SEGMENT_BLOCKS * BLOCK_BYTES, dtype=torch.uint8, pin_memory=is_pinned))

    def take(self) -> _Taken:
        """A context that lends a buffer, once one is free."""
        return _Taken(self._free)


class _Taken:
    def __init__(self, free: SimpleQueue[Tensor]) -> None:
        self._free = free

    def __enter__(self) -> Tensor:
        self._buffer = self._free.get()
        return self._buffer

    def __exit__(self, *_: object) -> None:
        self._free.put(self._buffer)
