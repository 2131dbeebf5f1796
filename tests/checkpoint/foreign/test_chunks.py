"""A table of pieces is only a source if every element is in exactly one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_superscale.checkpoint.foreign.chunks import (
    ForeignChunk,
    ForeignSource,
    ForeignTensor,
    flat_chunks,
    reader,
)
from lightning_superscale.checkpoint.state import ReadRequest, TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box, row_box, whole_box
from tests.helpers.foreign import read_all, read_in_parts

KEY = TensorKey("model", "weight")


def source(shape, chunks, dtype=torch.float32):
    return ForeignSource(
        "here",
        {KEY: ForeignTensor(TensorInfo(dtype, tuple(shape), "model"), tuple(chunks))},
        aliases={"tied": "weight"},
    )


@given(st.lists(st.integers(0, 4), max_size=4), st.data())
def test_flat_ranges_join_to_the_tensor(shape, data):
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, whole.numel()), max_size=4)))
    ends = [0, *cuts, whole.numel()]
    flat = whole.reshape(-1)
    chunks = [p for a, b in zip(ends, ends[1:], strict=False) for p in flat_chunks(shape, a, flat[a:b], "file")]
    found = source(shape, chunks)
    assert torch.equal(read_all(found)[KEY], whole)
    assert torch.equal(read_in_parts(found, seed=0)[KEY], whole)


def chunk(box):
    return ForeignChunk(box, reader(torch.zeros(box.size)), "file")


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([row_box((4, 3), 0, 2)], "hold 6 of the 12 elements"),
        ([row_box((4, 3), 0, 3), row_box((4, 3), 2, 4)], "overlap"),
        ([row_box((4, 3), 0, 2), row_box((4, 3), 0, 2)], "overlap"),
        ([Box((0, 0), (4, 2)), Box((0, 1), (4, 1))], "overlap"),
        ([row_box((5, 3), 0, 4), row_box((5, 3), 4, 5)], "is not within its shape"),
        ([], "hold 0 of the 12 elements"),
    ],
)
def test_a_gap_an_overlap_and_a_stray_piece_are_refused(boxes, message):
    with pytest.raises(CheckpointError, match=message):
        source((4, 3), map(chunk, boxes))


def test_two_pieces_of_a_scalar_are_refused():
    with pytest.raises(CheckpointError, match="overlap"):
        source((), [chunk(whole_box(())), chunk(whole_box(()))])


def test_requests_that_do_not_fit_are_refused():
    found = source((4, 3), [chunk(whole_box((4, 3)))])
    with pytest.raises(CheckpointError, match="did you mean 'weight'"):
        found.read([ReadRequest(TensorKey("model", "weigth"), whole_box((4, 3)), torch.zeros(4, 3))])
    with pytest.raises(CheckpointError, match="tied to 'weight'"):
        found.read([ReadRequest(TensorKey("model", "tied"), whole_box((4, 3)), torch.zeros(4, 3))])
    for box, out in [
        (whole_box((5, 3)), torch.zeros(5, 3)),
        (whole_box((4, 3)), torch.zeros(12)),
        (Box((), ()), torch.zeros(())),
    ]:
        with pytest.raises(CheckpointError, match=r"has shape \(4, 3\)"):
            found.read([ReadRequest(KEY, box, out)])


def test_values_convert_where_the_caller_asks_and_strides_do_not_matter():
    whole = torch.randn(4, 3)
    found = source((4, 3), flat_chunks((4, 3), 0, whole.reshape(-1), "file"))
    out = torch.zeros(3, 8, dtype=torch.bfloat16)[:, ::2].t()
    found.read([ReadRequest(KEY, whole_box((4, 3)), out)])
    assert torch.equal(out, whole.bfloat16())


def test_a_file_that_gives_fewer_values_than_it_said_is_damaged():
    short = ForeignChunk(whole_box((4, 3)), lambda index: torch.zeros(3, 3)[index], "the file")
    with pytest.raises(CheckpointError, match="the file should have"):
        read_all(source((4, 3), [short]))
