"""Chunks as columns: the same chunks as one by one, in every question that is asked of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_superscale.checkpoint.format.chunks import Chunk, ChunkColumns, chunks_in
from lightning_superscale.checkpoint.format.coverage import uncovered
from lightning_superscale.layout.box import Box, row_box

NAMES = ("a", "b", "c")
SIZES = torch.tensor([1000, 64, 0])


def columns(*chunks: Chunk, prefix: str = "x#", names: tuple[str, ...] = NAMES) -> ChunkColumns:
    rows = [
        (names.index(c.file), int(c.entry.removeprefix(prefix)), c.start, *c.box.offset, *c.box.size) for c in chunks
    ]
    return ChunkColumns(names, prefix, torch.tensor(rows))


ONE, TWO, THREE = (
    Chunk("a", "x#0", 64, row_box((6, 4), 0, 1)),
    Chunk("b", "x#7", 0, row_box((6, 4), 1, 3)),
    Chunk("a", "x#1", 128, row_box((6, 4), 3, 6)),
)
SAMPLE = columns(ONE, TWO, THREE)


def test_it_is_a_sequence_of_chunks():
    assert len(SAMPLE) == 3
    assert [*SAMPLE] == [SAMPLE[0], SAMPLE[1], SAMPLE[-1]] == [ONE, TWO, THREE]
    assert [*SAMPLE[1:]] == [TWO, THREE]
    assert TWO in SAMPLE
    assert [*chunks_in(SAMPLE, frozenset("a"))] == [*chunks_in((ONE, TWO, THREE), frozenset("a"))] == [ONE, THREE]
    assert [*chunks_in(SAMPLE, frozenset({"c", "d"}))] == []
    assert SAMPLE.rows() == ([0, 1, 3], [1, 2, 3])


def test_columns_are_equal_where_their_chunks_are():
    other = columns(ONE, TWO, THREE, names=("b", "a"))
    assert other == SAMPLE
    assert columns(ONE, TWO) != SAMPLE
    assert (ONE, TWO, THREE) != SAMPLE
    assert columns(ONE, THREE, TWO) != SAMPLE


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), "int64 columns"),
        (torch.zeros(2, 2, dtype=torch.int64), "int64 columns"),
        (torch.zeros(7, dtype=torch.int64), "int64 columns"),
        (torch.zeros(2, 5), "int64 columns"),
        (torch.tensor([[0, 0, 0, 0, -1]]), "below 0"),
        (torch.tensor([[3, 0, 0, 0, 1]]), "not listed"),
        (torch.tensor([[-1, 0, 0, 0, 1]]), "not listed"),
    ],
)
def test_a_table_that_can_be_no_chunks_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        ChunkColumns(NAMES, "x#", table)


def test_rows_in_any_order_are_proven():
    assert SAMPLE.are_proven((6, 4), 1, SIZES)
    assert columns(THREE, ONE, TWO).are_proven((6, 4), 4, SIZES)
    assert not SAMPLE.are_proven((6, 4), 16, SIZES), "the second ends behind its file"
    assert not SAMPLE.are_proven((6, 4, 1), 1, SIZES)
    assert not SAMPLE[:0].are_proven((6, 4), 1, SIZES)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(-2, 70), st.integers(0, 5), st.integers(0, 1), st.integers(0, 4),
                  st.integers(0, 2)), min_size=1, max_size=4,
    ),
    st.integers(1, 5), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_only_what_is_complete_is_proven(rows, num_rows, itemsize):
    """Whatever is proven is so by the proof that tries every box, and lies aligned within its file."""
    chunks = [
        Chunk(NAMES[file], f"x#{i}", start, Box((first, column), (count, width)))
        for i, (file, start, first, column, count, width) in enumerate(rows)
    ]
    if columns(*chunks).are_proven((num_rows, 2), itemsize, SIZES):
        assert uncovered((num_rows, 2), [chunk.box for chunk in chunks]) is None
        for chunk in chunks:
            assert chunk.start >= 0
            assert chunk.start % itemsize == 0
            assert chunk.start + chunk.box.numel * itemsize <= SIZES[NAMES.index(chunk.file)]


@given(st.permutations(range(4)), st.integers(1, 3))
def test_the_json_form_comes_back(order, width):
    chunks = [Chunk(NAMES[i % 2], f"x#{i}", 8 * i, row_box((8, width), 2 * i, 2 * i + 2)) for i in order]
    found = columns(*chunks)
    names = ("0", *NAMES)
    fields = found.to_json(names)
    assert fields["size"] == [2, width], "a column of equal numbers is one"
    assert ChunkColumns.from_json(fields, names) == found
    assert [*ChunkColumns.from_json(fields, names)] == chunks
