"""Proof that boxes make up a tensor: all within it, none over another, nothing left out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_superscale.layout.box import Box


def uncovered(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why these boxes are not exactly the tensor, each element once; None when they are.

    Bounds, no overlap and the full volume together prove it.
    """
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


def _overlap(boxes: list[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None. A sweep along dim 0: only boxes in the same rows are compared."""
    active: list[Box] = []
    for box in sorted(boxes):
        low = box.offset[0] if box.offset else 0
        active = [other for other in active if not other.offset or other.stop[0] > low]
        for other in active:
            if other.intersect(box) is not None:
                return other, box
        active.append(box)
    return None
