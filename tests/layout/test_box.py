"""Boxes of tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_superscale.layout.box import Box, flat_boxes, row_box, whole_box

SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_flat_ranges_are_few_boxes_in_order(shape, data):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    boxes = flat_boxes(shape, start, stop)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    found = [value for box in boxes for value in whole[box.within(whole_box(shape))].reshape(-1).tolist()]
    assert found == list(range(start, stop))


@given(SHAPES, st.data())
def test_a_run_is_where_all_elements_follow_one_another(shape, data):
    ends = [sorted((data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1)))) for n in shape]
    box = Box(tuple(a for a, _ in ends), tuple(b + 1 - a for a, b in ends))
    at = torch.arange(torch.Size(shape).numel()).view(shape)[box.within(whole_box(shape))].reshape(-1)
    is_run = at[-1] - at[0] == len(at) - 1
    assert box.run_within(whole_box(shape)) == (int(at[0]) if is_run else None)


@given(SHAPES, st.data())
def test_intersection_is_what_both_cover(shape, data):
    def some_box() -> Box:
        ends = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
        return Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))

    def covered(box: Box | None) -> torch.Tensor:
        mask = torch.zeros(shape, dtype=torch.bool)
        if box is not None:
            mask[box.within(whole_box(shape))] = True
        return mask

    one, other = some_box(), some_box()
    both = one.intersect(other)
    assert torch.equal(covered(both), covered(one) & covered(other))
    assert both is None or (both.lies_in(shape) and both.numel > 0)


def test_rows_of_a_scalar_are_the_scalar():
    assert row_box((), 0, 1) == whole_box(())
    assert row_box((5, 2), 1, 3) == Box((1, 0), (2, 2))
    assert not Box((4,), (2,)).lies_in((5,))
    with pytest.raises(ValueError, match="as many offsets as sizes"):
        Box((0, 0), (1,))
