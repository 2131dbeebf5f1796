"""Which bytes of which files hold the boxes that ranks want, and which rank reads them: pure geometry.

Files are read in whole blocks, since only those can be verified. A block that several ranks want is read by one of
them, which sends each other rank the part that it wants.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lightning_superscale.checkpoint.format.blocks import BLOCK_BYTES
from lightning_superscale.checkpoint.format.chunks import Chunk, ChunkColumns
from lightning_superscale.checkpoint.format.manifest import TensorRecord
from lightning_superscale.checkpoint.save.plan import boxes_between
from lightning_superscale.checkpoint.state import TensorKey
from lightning_superscale.layout.box import Box

# Blocks of a segment at most, and bytes that a rank sends or receives in one round of an exchange. Three rounds are in
# memory: one that is read, one that travels and one that is scattered.
SEGMENT_BLOCKS = 4
ROUND_BYTES = 2**25
# Boxes within a message begin at multiples of this, so that their bytes can be viewed as elements of any dtype.
ALIGN_BYTES = 64

# Fewer chunks of a tensor are tried one by one.
_FEW_CHUNKS = 8

# By file, intervals [first, stop) of blocks, in order.
Blocks = Mapping[str, Sequence[tuple[int, int]]]


class ReadItem(NamedTuple):
    """The box that one request takes from one chunk of a file.

    Attributes:
        request: index of the request in its rank's requests.
        chunk: the chunk that holds the box.
        box: intersection of the request's box and the chunk's, in the unsharded tensor.
        dtype: dtype of the chunk in its file.
    """

    request: int
    chunk: Chunk
    box: Box
    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def start(self) -> int:
        """First byte of the chunk in its file."""
        return self.chunk.start

    @property
    def stop(self) -> int:
        """One past the chunk's last byte in its file."""
        return self.chunk.start + self.chunk.box.numel * self.itemsize


class Segment(NamedTuple):
    """Blocks [first, stop) of a file, read at once.

    Attributes:
        ranks: ranks that want the segment, in order.
        reader: the one of these ranks that reads it.
    """

    file: str
    first: int
    stop: int
    ranks: tuple[int, ...] = ()
    reader: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the segment; an upper bound for the last segment of a file, whose last block may be shorter."""
        return (self.stop - self.first) * BLOCK_BYTES


def read_items_of(wanted: Sequence[tuple[TensorKey, Box]], tensors: Mapping[TensorKey, TensorRecord]) -> list[ReadItem]:
    """The read items that together fill each wanted box.

    Args:
        wanted: the box of each request, and its tensor.
        tensors: the tensors of the manifest.
    """
    return ChunkFinder(tensors).read_items(wanted)


class ChunkFinder:
    """Finds the chunks that hold a box by its rows, so that thousands of chunks of a tensor are not tried one by one.

    Args:
        tensors: the tensors of the manifest.
    """

    def __init__(self, tensors: Mapping[TensorKey, TensorRecord]) -> None:
        self._tensors = tensors
        self._rows: dict[TensorKey, _ChunkRows] = {}

    def read_items(self, wanted: Sequence[tuple[TensorKey, Box]]) -> list[ReadItem]:
        """The read items that together fill each wanted box, in the order of the boxes and of the tensors' chunks."""
        items = []
        for i, (key, box) in enumerate(wanted):
            record = self._tensors[key]
            for chunk in self._near(key, record, box):
                both = chunk.box.intersect(box)
                if both is not None:
                    items.append(ReadItem(i, chunk, both, record.info.dtype))
        return items

    def _near(self, key: TensorKey, record: TensorRecord, box: Box) -> Sequence[Chunk]:
        """The chunks that may share rows with a box."""
        if len(record.chunks) < _FEW_CHUNKS or not box.size:
            return record.chunks
        rows = self._rows.get(key)
        if rows is None:
            rows = self._rows[key] = _rows_of(record.chunks)
        first, last = box.offset[0], box.offset[0] + box.size[0]
        near = range(bisect_right(rows.starts, first - rows.most), bisect_left(rows.starts, last))
        return [record.chunks[i] for i in sorted(rows.order[place] for place in near)]


class _ChunkRows(NamedTuple):
    """A tensor's chunks by their first rows.

    Attributes:
        starts: first rows, in order.
        order: for each of them, the index of its chunk.
        most: rows of the chunk that has the most.
    """

    starts: list[int]
    order: list[int]
    most: int


def _rows_of(chunks: Sequence[Chunk]) -> _ChunkRows:
    if isinstance(chunks, ChunkColumns):
        starts, counts = chunks.rows()
    else:
        starts, counts = [chunk.box.offset[0] for chunk in chunks], [chunk.box.size[0] for chunk in chunks]
    order = sorted(range(len(chunks)), key=starts.__getitem__)
    return _ChunkRows([starts[i] for i in order], order, max(counts))


def byte_runs(item: ReadItem) -> Iterator[tuple[int, int]]:
    """Bytes [start, stop) of the file that hold an item's box; runs less than a block apart come as one."""
    box, chunk = item.box, item.chunk.box
    if box.size and box.size[1:] == chunk.size[1:]:  # whole rows, as most are
        row = math.prod(box.size[1:]) * item.itemsize
        start = item.start + (box.offset[0] - chunk.offset[0]) * row
        yield start, start + box.size[0] * row
        return
    inner = item.box.within(item.chunk.box)
    sizes, itemsize = item.chunk.box.size, item.itemsize
    # Bytes from one index to the next, along each tensor dim.
    strides = [math.prod(sizes[dim + 1 :]) * itemsize for dim in range(len(sizes))]
    last = sum((part.stop - 1) * stride for part, stride in zip(inner, strides, strict=True)) + itemsize
    # Along the first `far` dims a step jumps over blocks that nobody wants: each index of them is a run of its own.
    far = 0
    while far < len(sizes) and strides[far] > BLOCK_BYTES and _is_cut(inner[far + 1 :], sizes[far + 1 :]):
        far += 1
    first = sum(part.start * stride for part, stride in zip(inner, strides, strict=True))
    run = last - first - sum((p.stop - 1 - p.start) * s for p, s in zip(inner[:far], strides[:far], strict=True))
    starts = [first]
    for part, stride in zip(inner[:far], strides[:far], strict=True):
        starts = [start + k * stride for start in starts for k in range(part.stop - part.start)]
    for start in starts:
        yield item.start + start, item.start + start + run


def _is_cut(inner: Sequence[slice], sizes: Sequence[int]) -> bool:
    return any(part.stop - part.start < size for part, size in zip(inner, sizes, strict=True))


def blocks_of(items: Sequence[ReadItem]) -> dict[str, list[tuple[int, int]]]:
    """The blocks that hold the items' boxes: by file, intervals [first, stop) in order, apart from one another."""
    runs: dict[str, list[tuple[int, int]]] = {}
    for item in items:
        own = runs.setdefault(item.chunk.file, [])
        own += [(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)) for start, stop in byte_runs(item)]
    return {file: _merged(own) for file, own in sorted(runs.items())}


def _merged(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def segments_of(wanted: Sequence[Blocks]) -> list[Segment]:
    """The segments to read: one rank reads each block, and all ranks read about as many blocks.

    Args:
        wanted: each rank's blocks, by rank: results of `blocks_of`, whose intervals are apart.
    """
    loads = [0] * len(wanted)
    segments: list[Segment] = []
    # Only the ranks that want something of a file are asked for it: of thousands, few do; and replicas want the same.
    of_files: dict[str, dict[tuple[tuple[int, int], ...], list[int]]] = {}
    for rank, blocks in enumerate(wanted):
        for file, intervals in blocks.items():
            of_files.setdefault(file, {}).setdefault(tuple(intervals), []).append(rank)
    for file, of_ranks in sorted(of_files.items()):
        alike = [tuple(ranks) for ranks in of_ranks.values()]
        begins: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}
        for i, intervals in enumerate(of_ranks):
            for first, stop in intervals:
                begins.setdefault(first, []).append(i)
                ends.setdefault(stop, []).append(i)
        edges = sorted({*begins, *ends})
        want: set[int] = set()  # of `alike`: who wants the blocks from here on
        all_of: dict[frozenset[int], tuple[int, ...]] = {}
        for first, stop in zip(edges, edges[1:], strict=False):
            want.difference_update(ends.get(first, ()))
            want.update(begins.get(first, ()))
            if not want:
                continue
            who = frozenset(want)
            ranks = all_of.get(who)
            if ranks is None:
                ranks = all_of[who] = tuple(sorted(rank for i in want for rank in alike[i]))
            start = first
            while start < stop:
                end = min(stop, start - start % SEGMENT_BLOCKS + SEGMENT_BLOCKS)
                # The first of those that read least; ranks are in order.
                reader = ranks[0] if len(ranks) == 1 else min(ranks, key=loads.__getitem__)
                segments.append(Segment(file, start, end, ranks, reader))
                loads[reader] += end - start
                start = end
    return segments


@dataclass(frozen=True, slots=True)
class Transfer:
    """A segment that several ranks want, on its way from its reader.

    Attributes:
        segment: the segment.
        nbytes: length of the message to each rank; 0 for the reader and for ranks that want nothing of the segment.
        is_whole: whether every message is the entire segment; otherwise each holds the values that its rank wants,
            packed.
    """

    segment: Segment
    nbytes: tuple[int, ...]
    is_whole: bool

    def held(self, rank: int) -> int:
        """Bytes of memory that a rank's messages take; an entire segment is sent from one buffer to all its ranks."""
        if rank != self.segment.reader:
            return self.nbytes[rank]
        return max(self.nbytes) if self.is_whole else sum(self.nbytes)


def transfer_of(segment: Segment, size: int, packed: Sequence[int]) -> Transfer:
    """The transfer of a segment: packed where its reader then holds no more than the segment, else of the entire one.

    Args:
        size: bytes of the segment.
        packed: bytes of the values that each rank wants of the segment, by rank, when packed.
    """
    nbytes = [0 if rank == segment.reader else count for rank, count in enumerate(packed)]
    is_whole = sum(nbytes) > size
    return Transfer(segment, tuple(size if is_whole and count else count for count in nbytes), is_whole)


def mapped_transfer_of(segment: Segment, size: int, num_ranks: int) -> Transfer:
    """The transfer of a segment that the other ranks scatter from its reader's memory, which they map.

    Args:
        size: bytes of the segment.
        num_ranks: ranks of the mesh.
    """
    getters = set(segment.ranks) - {segment.reader}
    return Transfer(segment, tuple(size if rank in getters else 0 for rank in range(num_ranks)), is_whole=True)


def rounds_of(
    transfers: Sequence[Transfer], limit: int | None = None, *, is_mapped: bool = False
) -> list[list[Transfer]]:
    """Transfers divided into rounds, in which no rank holds more than a limit, or one segment.

    Args:
        limit: bytes; None for ROUND_BYTES.
        is_mapped: whether only its reader holds a transfer, as ranks map one another's memory.
    """
    limit = ROUND_BYTES if limit is None else limit
    rounds: list[list[Transfer]] = []
    held: dict[int, int] = {}
    for transfer in transfers:
        holders = (transfer.segment.reader,) if is_mapped else transfer.segment.ranks
        more = {rank: transfer.held(rank) for rank in holders}
        if not rounds or any(held.get(rank, 0) + count > limit for rank, count in more.items()):
            rounds.append([])
            held = {}
        rounds[-1].append(transfer)
        for rank, count in more.items():
            held[rank] = held.get(rank, 0) + count
    return rounds


@dataclass(frozen=True, slots=True)
class ReadItemPart:
    """The part of a read item in a run of consecutive elements of a file.

    Attributes:
        at: the run's first byte in the file.
        box: the run's elements, in the unsharded tensor.
        wanted: the elements of the run that are copied, in the unsharded tensor.
    """

    item: ReadItem
    at: int
    box: Box
    wanted: Box

    def values(self, data: torch.Tensor, start: int) -> torch.Tensor:
        """The wanted values, of shape `wanted.size`, as a view of `data`.

        Args:
            data: the file's bytes from byte `start` on, flat uint8.
        """
        first = self.at - start
        source = data[first : first + self.box.numel * self.item.itemsize]
        return source.view(self.item.dtype).view(self.box.size)[self.wanted.within(self.box)]

    @property
    def packed_bytes(self) -> int:
        """Bytes that the wanted values take in a message, a multiple of ALIGN_BYTES."""
        return -(-self.wanted.numel * self.item.itemsize // ALIGN_BYTES) * ALIGN_BYTES

    def packed_values(self, message: torch.Tensor, start: int) -> torch.Tensor:
        """The place of the wanted values in a message, as a view of shape `wanted.size`; they begin at byte `start`."""
        packed = message[start : start + self.wanted.numel * self.item.itemsize]
        return packed.view(self.item.dtype).view(self.wanted.size)


def parts_of(item: ReadItem, start: int, stop: int) -> Iterator[ReadItemPart]:
    """The parts of a read item within bytes [start, stop) of its file, which begin and end between elements."""
    first = (max(start, item.start) - item.start) // item.itemsize
    last = (min(stop, item.stop) - item.start) // item.itemsize
    at = item.start + first * item.itemsize
    for box in boxes_between(item.chunk.box, first, last):
        wanted = box.intersect(item.box)
        if wanted is not None:
            yield ReadItemPart(item, at, box, wanted)
        at += box.numel * item.itemsize


def pack(packed: Iterable[ReadItemPart], data: torch.Tensor, start: int, message: torch.Tensor) -> None:
    """Copy parts of read items into a message, one after the other.

    Args:
        packed: the parts.
        data: the file's bytes from byte `start` on, flat uint8.
        message: flat uint8, as long as the parts' `packed_bytes` together.
    """
    at = 0
    for part in packed:
        part.packed_values(message, at).copy_(part.values(data, start))
        at += part.packed_bytes
