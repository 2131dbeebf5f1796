"""The proof that boxes make up a tensor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_superscale.checkpoint.format import coverage
from lightning_superscale.checkpoint.format.coverage import uncovered
from lightning_superscale.layout.box import Box


@given(st.lists(st.integers(0, 4), max_size=3).map(tuple), st.data())
def test_it_holds_exactly_where_every_element_is_covered_once(shape, data):
    def boxes(count: int) -> list[Box]:
        found = []
        for _ in range(count):
            offset = tuple(data.draw(st.integers(0, extent)) for extent in shape)
            size = tuple(data.draw(st.integers(0, extent + 1)) for extent in shape)
            found.append(Box(offset, size))
        return found

    some = boxes(data.draw(st.integers(0, 4)))
    if data.draw(st.booleans()) and shape and shape[0] > 1:  # random boxes seldom fit; two halves do
        some = [Box((0,) * len(shape), (1, *shape[1:])), Box((1, *(0 for _ in shape[1:])), (shape[0] - 1, *shape[1:]))]
    counts = torch.zeros(shape, dtype=torch.int64)
    is_inside = all(box.lies_in(shape) for box in some)
    if is_inside:
        for box in some:
            counts[tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))] += 1
    assert (uncovered(shape, some) is None) == (is_inside and bool((counts == 1).all()))


def test_rows_without_gaps_need_no_comparison_of_pairs(monkeypatch):
    monkeypatch.setattr(coverage, "_overlap", lambda boxes: pytest.fail("compared"))
    rows = [Box((start, 0), (2, 3)) for start in (4, 0, 2)]
    assert uncovered((6, 3), rows) is None
    assert "not within" in uncovered((5, 3), rows)


def test_it_says_what_is_wrong():
    assert "not within" in uncovered((4, 3), [Box((0, 0), (4, 3)), Box((5, 0), (0, 3))])
    whole = Box((0, 0), (4, 4))
    assert uncovered((4, 4), [whole]) is None
    assert "not within its shape" in uncovered((4, 3), [whole])
    assert "overlap" in uncovered((4, 4), [whole, Box((3, 3), (1, 1))])
    assert "12 of the 16 elements" in uncovered((4, 4), [Box((0, 0), (3, 4))])
