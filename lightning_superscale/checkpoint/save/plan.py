"""Which boxes each rank writes: pure arithmetic over the boxes that ranks hold.

Where several ranks hold an equal box, the work is divided so that all write about as many bytes; every rank computes
the same plan from the same boxes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_superscale.checkpoint.format.coverage import uncovered
from lightning_superscale.checkpoint.state import TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box, flat_boxes

# A box that several ranks hold is not divided into parts smaller than this.
_MIN_PART_BYTES = 2**20
# No chunk and no file is larger; chunks are smaller than files, so that files can be filled evenly.
MAX_CHUNK_BYTES = 2**30
MAX_FILE_BYTES = 2**32


@dataclass(frozen=True, slots=True)
class WriteItem:
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


def divide(tensors: Mapping[TensorKey, TensorInfo], held: Held) -> list[list[WriteItem]]:
    """The items that each rank writes.

    Args:
        tensors: all tensors of the state.
        held: each rank's boxes of each tensor, by rank.

    Returns:
        Each rank's items, by rank; together they cover each tensor once.

    Raises:
        CheckpointError: the boxes don't cover a tensor, or overlap without being equal; names it.
    """
    items: list[list[WriteItem]] = [[] for _ in held]
    loads = [0] * len(held)
    shared: dict[tuple[int, ...], list[tuple[TensorKey, Box]]] = {}
    for key in sorted(tensors):
        holders: dict[Box, list[int]] = {}
        for rank, boxes in enumerate(held):
            for box in boxes.get(key, ()):
                if not holders.get(box) or holders[box][-1] != rank:
                    holders.setdefault(box, []).append(rank)
        why = uncovered(tensors[key].shape, [*holders])
        if why is not None:
            raise CheckpointError(
                f"{key} can't be saved: {why}. Together the ranks must hold each element, in boxes that are equal "
                "where they overlap."
            )
        for box, holding in sorted(holders.items()):
            if not box.numel:
                continue
            if len(holding) == 1:
                loads[holding[0]] += box.numel * tensors[key].dtype.itemsize
                items[holding[0]].append(WriteItem(key, box, box))
            else:
                shared.setdefault(tuple(holding), []).append((key, box))
    for ranks in sorted(shared, key=lambda ranks: (len(ranks), ranks)):
        _share(shared[ranks], ranks, tensors, loads, items)
    return [[chunk for item in own for chunk in _limited(item, tensors)] for own in items]


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
        itemsize = tensors[key].dtype.itemsize
        start = 0
        while start < box.numel:
            count = box.numel - start
            if at < len(ranks) - 1:
                count = _taken(box, count, shares[at] // itemsize, itemsize)
            if count == 0:
                at += 1
                continue
            items[ranks[at]] += [WriteItem(key, box, part) for part in boxes_between(box, start, start + count)]
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


def _limited(item: WriteItem, tensors: Mapping[TensorKey, TensorInfo]) -> list[WriteItem]:
    """The item, cut into items of at most MAX_CHUNK_BYTES."""
    limit = MAX_CHUNK_BYTES // tensors[item.key].dtype.itemsize
    numel = item.box.numel
    if numel <= limit:
        return [item]
    row = math.prod(item.box.size[1:])
    step = max(row, limit // row * row) if row <= limit else limit
    return [
        WriteItem(item.key, item.shard, box)
        for start in range(0, numel, step)
        for box in boxes_between(item.box, start, min(start + step, numel))
    ]


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
