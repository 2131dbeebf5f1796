"""Tensors cut into boxes of bounded size, for programs that read all of a checkpoint in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from lightning_superscale.checkpoint.state import TensorInfo, TensorKey
from lightning_superscale.layout.box import Box, whole_box

SLAB_BYTES = 2**26


def slabs(shape: tuple[int, ...], itemsize: int, limit_bytes: int = SLAB_BYTES) -> Iterator[Box]:
    """Boxes in C order that cover a tensor once, each of at most `limit_bytes`, or of one element.

    A tensor without elements has no boxes.
    """
    yield from _cut(whole_box(shape), 0, max(1, limit_bytes // itemsize))


def _cut(box: Box, dim: int, limit_numel: int) -> Iterator[Box]:
    if box.numel == 0:
        return
    if box.numel <= limit_numel:
        yield box
        return
    # Cut along `dim`; boxes of one index that are still too large are cut along the next.
    row = math.prod(box.size[dim + 1 :])
    step = max(1, limit_numel // row)
    for start in range(0, box.size[dim], step):
        count = min(step, box.size[dim] - start)
        offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
        yield from _cut(Box(offset, (*box.size[:dim], count, *box.size[dim + 1 :])), dim + 1, limit_numel)


def batches(
    tensors: Mapping[TensorKey, TensorInfo], keys: Iterable[TensorKey], limit_bytes: int = SLAB_BYTES
) -> Iterator[list[tuple[TensorKey, Box]]]:
    """Groups of boxes that cover tensors once, each group of at most `limit_bytes`, or of one element.

    Small tensors share a group, so that a file's block that holds several of them is read once.

    Args:
        tensors: descriptions of all tensors.
        keys: the tensors to cover, in this order.
    """
    group: list[tuple[TensorKey, Box]] = []
    size = 0
    for key in keys:
        info = tensors[key]
        for box in slabs(info.shape, info.dtype.itemsize, limit_bytes):
            nbytes = box.numel * info.dtype.itemsize
            if group and size + nbytes > limit_bytes:
                yield group
                group, size = [], 0
            group.append((key, box))
            size += nbytes
    if group:
        yield group


def num_bytes(info: TensorInfo) -> int:
    """Bytes of an unsharded tensor."""
    return math.prod(info.shape) * info.dtype.itemsize
