"""Slabs cover a tensor once, in order, and none is too large."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.checkpoint.format.coverage import uncovered
from lightning_superscale.checkpoint.state import TensorInfo, TensorKey
from lightning_superscale.checkpoint.tools.chunks import batches, slabs
from lightning_superscale.layout.box import whole_box

SHAPES = [(), (1,), (17,), (5, 3), (2, 9, 4), (3, 1, 2, 5), (0, 4), (4, 0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limit", [1, 4, 12, 20, 36, 10_000])
def test_slabs_cover_a_tensor_once_and_in_order(shape, limit):
    boxes = list(slabs(shape, 4, limit))
    assert uncovered(shape, boxes) is None
    assert all(box.numel * 4 <= max(4, limit) for box in boxes)
    numbers = torch.arange(whole_box(shape).numel).view(shape)
    order = [int(n) for box in boxes for n in numbers[box.within(whole_box(shape))].reshape(-1)]
    assert order == list(range(len(order)))


@pytest.mark.parametrize("limit", [8, 30, 64, 10_000])
def test_batches_hold_everything_once_within_the_limit(limit):
    tensors = {
        TensorKey("model", str(i)): TensorInfo(dtype, shape, "model")
        for i, shape in enumerate(SHAPES)
        for dtype in [torch.float64 if i % 2 else torch.int8]
    }
    groups = list(batches(tensors, tensors, limit))
    for key, info in tensors.items():
        assert uncovered(info.shape, [box for group in groups for of, box in group if of == key]) is None
    sizes = [sum(box.numel * tensors[key].dtype.itemsize for key, box in group) for group in groups]
    assert all(0 < size <= limit for size in sizes)
    assert (len(groups) == 1) == (limit == 10_000)
