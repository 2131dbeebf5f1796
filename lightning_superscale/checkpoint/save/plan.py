"""Which boxes each rank writes: pure arithmetic over the boxes that ranks hold.

Where several ranks hold an equal box, the work is divided so that all write about as many bytes; every rank computes
the same plan from the same boxes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from lightning_superscale.checkpoint.format.chunks import Chunk
from lightning_superscale.checkpoint.format.coverage import uncovered
from lightning_superscale.checkpoint.format.payload import FileEntry, layout, sort_entries
from lightning_superscale.checkpoint.state import TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box, flat_boxes

# A box that several ranks hold is not divided into parts smaller than this.
_MIN_PART_BYTES = 2**20
# No chunk and no file is larger; chunks are smaller than files, so that files can be filled evenly.
MAX_CHUNK_BYTES = 2**30
MAX_FILE_BYTES = 2**32


class WriteItem(NamedTuple):
    """A box that one rank writes as one chunk of a file.

    Attributes:
        shard: the box of the rank's shard that the item is a part of.
        box: the box that is written, in the unsharded tensor.
    """

    key: TensorKey
    shard: Box
    box: Box


# By rank, its boxes of each tensor.
Held = Sequence[Mapping[TensorKey, Sequence[Box]]]


class Division(Sequence[list[WriteItem]]):
    """The items that each rank writes, by rank; they are made as they are asked for, since a rank needs its own only.

    Args:
        tensors: all tensors of the state.
        alone: tensors and, by rank, the boxes of them that it alone holds.
        shared: by rank, its part of what several hold.
    """

    def __init__(
        self,
        tensors: Mapping[TensorKey, TensorInfo],
        alone: Sequence[tuple[TensorKey, Sequence[Sequence[Box]]]],
        shared: Sequence[Sequence[WriteItem]],
    ) -> None:
        self._tensors, self._alone, self._shared = tensors, alone, shared

    def __len__(self) -> int:
        return len(self._shared)

    @overload
    def __getitem__(self, rank: int) -> list[WriteItem]: ...

    @overload
    def __getitem__(self, rank: slice) -> list[list[WriteItem]]: ...

    def __getitem__(self, rank: int | slice) -> list[WriteItem] | list[list[WriteItem]]:
        if isinstance(rank, slice):
            return [self[i] for i in range(*rank.indices(len(self)))]
        items = [WriteItem(key, box, box) for key, of_ranks in self._alone for box in of_ranks[rank]]
        items += self._shared[rank]
        return [part for item in items for part in _limited(item, self._limit(item.key))]

    def _limit(self, key: TensorKey) -> int:
        return MAX_CHUNK_BYTES // self._tensors[key].dtype.itemsize


def divide(tensors: Mapping[TensorKey, TensorInfo], held: Held) -> Division:
    """The items that each rank writes; together they cover each tensor once.

    Args:
        tensors: all tensors of the state.
        held: each rank's boxes of each tensor, by rank; quick where tensors that are cut alike share one tuple of them.

    Raises:
        CheckpointError: the boxes don't cover a tensor, or overlap without being equal; names it.
    """
    # Layers of a model are cut alike: with thousands of ranks, what many tensors share is looked at once.
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], _Cut] = {}
    kept = []  # so that no other tuple gets the id of one of these
    alone = []
    shared: dict[tuple[int, ...], list[tuple[TensorKey, Box]]] = {}
    for key in sorted(tensors):
        shape, itemsize = tensors[key].shape, tensors[key].dtype.itemsize
        of_ranks = [boxes.get(key, ()) for boxes in held]
        which = (shape, tuple(map(id, of_ranks)))
        if which not in known:
            known[which] = _cut_of(key, shape, of_ranks)
            kept.append(of_ranks)
        cut = known[which]
        cut.itemsizes += itemsize
        alone.append((key, cut.alone))
        for box, ranks in cut.shared:
            shared.setdefault(ranks, []).append((key, box))
    loads = [0] * len(held)
    for cut in known.values():
        for rank, boxes in enumerate(cut.alone):
            loads[rank] += sum(box.numel for box in boxes) * cut.itemsizes
    items: list[list[WriteItem]] = [[] for _ in held]
    for ranks in sorted(shared, key=lambda ranks: (len(ranks), ranks)):
        _share(shared[ranks], ranks, tensors, loads, items)
    return Division(tensors, alone, items)


@dataclass(slots=True)
class _Cut:
    """How ranks hold a tensor, and all that are held alike. Boxes are in order, and none is empty.

    Attributes:
        alone: by rank, the boxes that it alone holds.
        shared: boxes that several ranks hold, and these.
        itemsizes: bytes of an element, of all tensors together.
    """

    alone: list[list[Box]]
    shared: list[tuple[Box, tuple[int, ...]]]
    itemsizes: int = 0


def _cut_of(key: TensorKey, shape: Sequence[int], of_ranks: Sequence[Sequence[Box]]) -> _Cut:
    """How ranks hold a tensor.

    Raises:
        CheckpointError: they don't cover it, or overlap without being equal; names the key.
    """
    holders: dict[Box, list[int]] = {}
    for rank, boxes in enumerate(of_ranks):
        for box in boxes:
            holding = holders.setdefault(box, [])
            if not holding or holding[-1] != rank:
                holding.append(rank)
    why = uncovered(shape, [*holders])
    if why is not None:
        raise CheckpointError(
            f"{key} can't be saved: {why}. Together the ranks must hold each element, in boxes that are equal "
            "where they overlap."
        )
    cut = _Cut([[] for _ in of_ranks], [])
    for box, holding in sorted(holders.items()):
        if box.numel and len(holding) == 1:
            cut.alone[holding[0]].append(box)
        elif box.numel:
            cut.shared.append((box, tuple(holding)))
    return cut


def _share(
    boxes: list[tuple[TensorKey, Box]],
    ranks: tuple[int, ...],
    tensors: Mapping[TensorKey, TensorInfo],
    loads: list[int],
    items: list[list[WriteItem]],
) -> None:
    """Divide boxes that all of `ranks` hold: a rank that has less to write so far takes more. Adds to `items`."""
    left = sum(box.numel * tensors[key].dtype.itemsize for key, box in boxes)
    shares = _levelled([loads[rank] for rank in ranks], left)
    at = 0
    for key, box in boxes:
        itemsize, numel = tensors[key].dtype.itemsize, box.numel
        start = 0
        while start < numel:
            count = numel - start
            if at < len(ranks) - 1:
                count = _taken(box, count, shares[at] // itemsize, itemsize)
            if count == 0:
                at += 1
                continue
            parts = [box] if count == numel else boxes_between(box, start, start + count)
            items[ranks[at]] += [WriteItem(key, box, part) for part in parts]
            shares[at] = max(0, shares[at] - count * itemsize)
            loads[ranks[at]] += count * itemsize
            start += count


def _levelled(loads: list[int], nbytes: int) -> list[int]:
    """The share of `nbytes` that each load takes, so that loads end up as level as they can."""
    shares = [0] * len(loads)
    order = sorted(range(len(loads)), key=lambda i: (loads[i], i))
    for count in range(len(order), 0, -1):
        level = (sum(loads[i] for i in order[:count]) + nbytes) / count
        if level >= loads[order[count - 1]]:
            for i in order[:count]:
                shares[i] = math.ceil(level - loads[i])
            break
    return shares


def _taken(box: Box, left: int, share: int, itemsize: int) -> int:
    """The number of a box's last `left` elements that a rank takes for a share of `share`: full rows, no tiny parts."""
    least = _MIN_PART_BYTES // itemsize
    if left < 2 * least:
        return left if 2 * share >= left else 0
    row = math.prod(box.size[1:])
    if row <= least:
        share = share // row * row
    if left - share < least:
        return left
    return share if share >= least else 0


def boxes_between(box: Box, start: int, stop: int) -> list[Box]:
    """Boxes of the tensor that together are elements [start, stop) of a flattened box of it."""
    return [
        Box(tuple(a + b for a, b in zip(box.offset, part.offset, strict=True)), part.size)
        for part in flat_boxes(box.size, start, stop)
    ]


def _limited(item: WriteItem, limit: int) -> Sequence[WriteItem]:
    """The item, cut into items of at most `limit` elements."""
    numel = item.box.numel
    if numel <= limit:
        return (item,)
    row = math.prod(item.box.size[1:])
    step = max(row, limit // row * row) if row <= limit else limit
    return [
        WriteItem(item.key, item.shard, box)
        for start in range(0, numel, step)
        for box in boxes_between(item.box, start, min(start + step, numel))
    ]


# Threads of one rank that write, each a file of its own; fewer where a file would have less than _MIN_FILE_BYTES.
WRITE_THREADS = 2
_MIN_FILE_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class FilePlan:
    """The content of one file, before its values.

    Attributes:
        header: the file's first bytes.
        order: indices of the items in the order in which their values follow.
        chunks: in this order, each item's tensor and its chunk.
        size: bytes of the whole file.
    """

    header: bytes
    order: tuple[int, ...]
    chunks: tuple[tuple[TensorKey, Chunk], ...]
    size: int


def entry_prefix(key: TensorKey) -> str:
    """The name of a tensor's entries in a safetensors header, before the number that each has in its file."""
    return f"{key.section}/{key.name}" + (f"[{key.state}]" if key.state else "") + "#"


def plan_files(rank: int, items: Sequence[WriteItem], tensors: Mapping[TensorKey, TensorInfo]) -> dict[str, list[int]]:
    """The files that a rank writes: by name, the indices of their items."""
    sizes = [item.box.numel * tensors[item.key].dtype.itemsize for item in items]
    num_files = min(WRITE_THREADS, max(1, sum(sizes) // _MIN_FILE_BYTES))
    return {f"data/w{rank:05d}-{k}.safetensors": indices for k, indices in enumerate(fill_files(sizes, num_files))}


def plan_file(name: str, items: Sequence[WriteItem], tensors: Mapping[TensorKey, TensorInfo], uuid: str) -> FilePlan:
    """The content of a file with these items.

    Args:
        uuid: id of the checkpoint.
    """
    counts: dict[TensorKey, int] = {}
    entries = []
    for item in items:
        key = item.key
        number = counts[key] = counts.get(key, -1) + 1
        entries.append(FileEntry(f"{entry_prefix(key)}{number}", tensors[key].dtype, item.box.size))
    order = sort_entries(entries)
    place = layout([entries[i] for i in order], uuid)
    chunks = tuple(
        (items[i].key, Chunk(name, entries[i].name, start, items[i].box))
        for i, start in zip(order, place.starts, strict=True)
    )
    return FilePlan(place.header, tuple(order), chunks, len(place.header) + sum(entry.nbytes for entry in entries))


def fill_files(nbytes: Sequence[int], num_files: int) -> list[list[int]]:
    """Indices of chunks, divided into consecutive files of about equal size, none above MAX_FILE_BYTES.

    Args:
        nbytes: bytes of each chunk.
        num_files: least number of files, where there are as many chunks.
    """
    total = sum(nbytes)
    num_files = max(num_files, -(-total // (MAX_FILE_BYTES - MAX_CHUNK_BYTES)), 1)
    files: list[list[int]] = [[]]
    size = done = 0
    for i, count in enumerate(nbytes):
        is_due = done >= total * len(files) / num_files
        if files[-1] and (is_due or size + count > MAX_FILE_BYTES):
            files.append([])
            size = 0
        files[-1].append(i)
        size += count
        done += count
    return [file for file in files if file]
