"""How segments that several ranks want travel: geometry and bounds, without ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_superscale.checkpoint.format.blocks import BLOCK_BYTES
from lightning_superscale.checkpoint.format.chunks import Chunk, ChunkColumns
from lightning_superscale.checkpoint.format.manifest import TensorRecord
from lightning_superscale.checkpoint.load import segments
from lightning_superscale.checkpoint.load.scatter import Filling, Others
from lightning_superscale.checkpoint.load.segments import (
    ReadItem,
    Segment,
    byte_runs,
    pack,
    read_items_of,
    rounds_of,
    segments_of,
    transfer_of,
)
from lightning_superscale.checkpoint.state import ReadRequest, TensorInfo, TensorKey
from lightning_superscale.layout.box import Box, whole_box

MIB = 2**20


@st.composite
def chunks_and_boxes(draw):
    """Chunks of one tensor [rows, columns], in any order, with or without overlap, and boxes that are wanted of it."""

    def box():
        start, column = draw(st.integers(0, 30)), draw(st.integers(0, 3))
        return Box((start, column), (draw(st.integers(0, 9)), draw(st.integers(1, 4 - column))))

    chunks: Sequence[Chunk] = tuple(Chunk("f", f"x#{i}", 0, box()) for i in range(draw(st.integers(1, 20))))
    if draw(st.booleans()):
        rows = [(0, i, 0, *chunk.box.offset, *chunk.box.size) for i, chunk in enumerate(chunks)]
        chunks = ChunkColumns(("f",), "x#", torch.tensor(rows))
    record = TensorRecord(TensorInfo(torch.float32, (40, 4), "model"), chunks)
    return record, [box() for _ in range(draw(st.integers(1, 5)))]


@given(chunks_and_boxes())
def test_chunks_found_by_rows_are_those_found_one_by_one(case):
    record, boxes = case
    key = TensorKey("model", "w")
    expected = [
        (i, chunk, both)
        for i, box in enumerate(boxes)
        for chunk in record.chunks
        if (both := chunk.box.intersect(box)) is not None
    ]
    found = read_items_of([(key, box) for box in boxes], {key: record})
    assert [(item.request, item.chunk, item.box) for item in found] == expected


@given(st.integers(1, 5), st.integers(0, 8), st.integers(1, 8), st.integers(0, 3), st.integers(1, 4))
def test_runs_hold_every_byte_of_a_box(width, start, rows, column, columns):
    chunk = Box((2, 0), (20, width))
    box = Box((2 + start, min(column, width - 1)), (rows, min(columns, width - min(column, width - 1))))
    item = ReadItem(0, Chunk("f", "e", 100, chunk), box, torch.float32)
    places = torch.arange(chunk.numel).view(chunk.size)[box.within(chunk)].flatten().tolist()
    assert list(byte_runs(item)) == [(100 + 4 * places[0], 100 + 4 * (places[-1] + 1))]


wanted_blocks = st.lists(st.integers(0, 40), max_size=10, unique=True).map(
    lambda edges: list(zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False))
)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), wanted_blocks), min_size=1, max_size=6))
def test_each_wanted_block_is_read_by_one_of_the_ranks_that_want_it(wanted):
    expected = {}
    for rank, blocks in enumerate(wanted):
        for file, intervals in blocks.items():
            for first, stop in intervals:
                for block in range(first, stop):
                    expected.setdefault((file, block), []).append(rank)
    found = {}
    for segment in segments_of(wanted):
        assert segment.reader in segment.ranks
        assert 0 < segment.stop - segment.first <= segments.SEGMENT_BLOCKS
        for block in range(segment.first, segment.stop):
            assert (segment.file, block) not in found
            found[segment.file, block] = list(segment.ranks)
    assert found == expected


@given(
    size=st.integers(1, 4 * MIB),
    packed=st.lists(st.integers(0, 4 * MIB), min_size=2, max_size=9),
    reader=st.integers(0, 8),
)
def test_a_parcel_never_makes_its_reader_hold_more_than_the_segment(size, packed, reader):
    reader %= len(packed)
    transfer = transfer_of(Segment("f", 0, 4, tuple(range(len(packed))), reader), size, packed)
    assert transfer.held(reader) <= size
    assert transfer.nbytes[reader] == 0
    for rank, wanted in enumerate(packed):
        if rank != reader:
            assert transfer.nbytes[rank] == (0 if not wanted else size if transfer.is_whole else wanted)
    wanted = sum(count for rank, count in enumerate(packed) if rank != reader)
    assert transfer.is_whole == (wanted > size)


def test_rounds_keep_order_and_no_rank_holds_more_than_a_round(monkeypatch):
    monkeypatch.setattr(segments, "ROUND_BYTES", 10 * MIB)
    transfers = [
        transfer_of(
            Segment("f", 4 * i, 4 * i + 4, (0, 1, 2), i % 3), 4 * MIB, [MIB * (1 + (i + r) % 2) for r in range(3)]
        )
        for i in range(30)
    ]
    rounds = rounds_of(transfers)
    assert [transfer for those in rounds for transfer in those] == transfers
    for rank in range(3):
        held = [sum(transfer.held(rank) for transfer in those) for those in rounds]
        assert max(held) <= 10 * MIB
    for those, after in zip(rounds, rounds[1:], strict=False):  # none is needlessly short
        assert any(sum(p.held(rank) for p in (*those, after[0])) > 10 * MIB for rank in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_what_one_rank_packs_for_another_is_what_that_scatters(dtype):
    """A file of two tensors, the second at an odd place, of which another rank wants overlapping boxes."""
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, 120, (3 * BLOCK_BYTES,), generator=generator, dtype=torch.uint8)
    shape = (97, 53, 29)
    count = 97 * 53 * 29 * dtype.itemsize
    keys = [TensorKey("model", "a"), TensorKey("model", "b")]
    starts = [192, 192 + -(-count // 64) * 64]
    tensors = {
        key: TensorRecord(TensorInfo(dtype, shape, "model"), (Chunk("f", key.name, start, whole_box(shape)),))
        for key, start in zip(keys, starts, strict=True)
    }
    boxes = [Box((3, 5, 7), (30, 40, 9)), Box((0, 0, 0), shape), Box((30, 0, 28), (67, 53, 1))]
    wanted = [(keys[i % 2], box) for i, box in enumerate([*boxes, *reversed(boxes)])]
    outs = [torch.zeros(box.size, dtype=dtype) for _, box in wanted]
    filling = Filling([ReadRequest(key, box, out) for (key, box), out in zip(wanted, outs, strict=True)])
    filling.take(read_items_of(wanted, tensors))
    others = Others([(), [(keys.index(key), box.offset, box.size) for key, box in wanted]], tensors, frozenset({"f"}))
    for first in range(3):
        segment = Segment("f", first, first + 1, (0, 1), 0)
        start = first * BLOCK_BYTES
        message = torch.full((sum(w.packed_bytes for w in filling.parts_of(segment)),), 255, dtype=torch.uint8)
        assert list(others.parts_of(1, segment)) == list(filling.parts_of(segment))
        pack(others.parts_of(1, segment), data[start : start + BLOCK_BYTES], start, message)
        filling.scatter_packed(segment, message)
    for (key, box), out in zip(wanted, outs, strict=True):
        start = starts[keys.index(key)]
        whole = data[start : start + count].view(dtype).view(shape)
        expected = whole[box.within(whole_box(shape))]
        assert torch.equal(out.view(torch.uint8), expected.contiguous().view(torch.uint8))
