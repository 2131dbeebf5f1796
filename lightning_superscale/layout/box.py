"""Boxes: the only description of a part of a tensor that checkpoints know.

Rows of a ZeRO shard, a tensor-parallel column block, a slice of a fused weight and a whole tensor are all boxes; a
range of a flattened tensor is a few of them. So any layout can be read into any other by intersecting boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, sub


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A hyperrectangle within a tensor.

    Attributes:
        offset: first index along each tensor dim; () in a scalar.
        size: extent along each tensor dim; a 0 makes the box empty.

    Raises:
        ValueError: `offset` and `size` have different lengths, or any of them is negative.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.size) or min((*self.offset, *self.size), default=0) < 0:
            raise ValueError(f"a box needs as many offsets as sizes, none below 0; found {self.offset} and {self.size}")

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def stop(self) -> tuple[int, ...]:
        """One past the last index along each tensor dim."""
        return tuple(map(add, self.offset, self.size))

    def lies_in(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape contains the box."""
        return len(shape) == len(self.size) and all(
            stop <= extent for stop, extent in zip(self.stop, shape, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """The box of the elements in both boxes; None where they share none."""
        start = tuple(map(max, self.offset, other.offset))
        size = tuple(map(sub, map(min, self.stop, other.stop), start))
        return Box(start, size) if min(size, default=1) > 0 else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """The index of this box in a tensor that holds `outer`, which contains it."""
        return tuple(
            slice(start - low, start - low + extent)
            for start, low, extent in zip(self.offset, outer.offset, self.size, strict=True)
        )

    def run_within(self, outer: Box) -> int | None:
        """The place of this box's first element in the flattened `outer`, which contains it.

        None if the box's elements are not consecutive there.
        """
        first, is_several = 0, False
        for part, extent in zip(self.within(outer), outer.size, strict=True):
            count = part.stop - part.start
            if is_several and count != extent:
                return None
            first = first * extent + part.start
            is_several = is_several or count > 1
        return first


def whole_box(shape: Sequence[int]) -> Box:
    """The box of a whole tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def row_box(shape: Sequence[int], start: int, stop: int) -> Box:
    """The box of rows [start, stop) along tensor dim 0; of all of a scalar."""
    return Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:])) if shape else whole_box(shape)


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes that elements [start, stop) of the flattened tensor make, in order; at most 2 * ndim - 1 of them."""
    if start >= stop:
        return []
    if not shape:
        return [whole_box(shape)]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if len(shape) == 1 or (start % row == 0 and stop % row == 0):
        return [row_box(shape, first, last + 1)]
    if first == last:
        return _in_row(shape, first, start - first * row, stop - first * row)
    boxes = []
    if start % row:
        boxes += _in_row(shape, first, start - first * row, row)
        first += 1
    if stop % row == 0:
        return [*boxes, row_box(shape, first, last + 1)]
    if first < last:
        boxes.append(row_box(shape, first, last))
    return boxes + _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    return [Box((row, *box.offset), (1, *box.size)) for box in flat_boxes(shape[1:], start, stop)]
