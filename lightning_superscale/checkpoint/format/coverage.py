"""Proof that boxes cover each element of a tensor exactly once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_superscale.layout.box import Box


def uncovered(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """The reason why boxes do not cover each element of a tensor exactly once, for messages; None when they do.

    Boxes within the tensor's bounds, without overlap and of the tensor's volume cover it.
    """
    if _are_rows(shape, boxes):
        return None
    outside = next((box for box in boxes if not box.lies_in(shape)), None)
    if outside is not None:
        return f"the part at {outside.offset} of size {outside.size} is not within its shape {tuple(shape)}"
    twice = _overlap([box for box in boxes if box.numel])
    if twice is not None:
        one, other = twice
        return (
            f"the part at {one.offset} of size {one.size} and the part at {other.offset} of size {other.size} overlap"
        )
    volume, numel = sum(box.numel for box in boxes), math.prod(shape)
    if volume != numel:
        return f"its parts hold {volume} of the {numel} elements of its shape {tuple(shape)}"
    return None


def _are_rows(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether boxes are whole rows that follow one another, as those of a sharded tensor do; quick for thousands."""
    width = tuple(shape[1:])
    if not shape or any(box.size[1:] != width or any(box.offset[1:]) for box in boxes):
        return False
    at = 0
    for start, count in sorted((box.offset[0], box.size[0]) for box in boxes):
        if start != at:
            return False
        at += count
    return at == shape[0]


def _overlap(boxes: list[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None. Sweeps along tensor dim 0, and compares only boxes with common rows."""
    active: list[Box] = []
    for box in sorted(boxes):
        low = box.offset[0] if box.offset else 0
        active = [other for other in active if not other.offset or other.stop[0] > low]
        for other in active:
            if other.intersect(box) is not None:
                return other, box
        active.append(box)
    return None
