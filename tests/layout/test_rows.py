"""Shard arithmetic against DTensor's own Shard(0) cuts and against itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_superscale.layout.rows import SLICE_ALIGN_NUMEL, ParamSpec, shard_rows, split_into_units, unit_layout

SHAPES = st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_shard_rows_cuts_as_torch_chunk_does(num_rows, world):
    chunks = list(torch.arange(num_rows).chunk(world)) if num_rows else []
    chunks += [torch.empty(0)] * (world - len(chunks))
    for rank, chunk in enumerate(chunks):
        start, stop = shard_rows(num_rows, rank, world)
        assert stop - start == len(chunk)
        assert not len(chunk) or start == chunk[0]


def test_shard_rows_of_a_rank_outside_the_axis_is_refused():
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), found 2"):
        shard_rows(4, 2, 2)


@given(SHAPES, st.integers(1, 5))
def test_slices_of_all_ranks_cover_every_parameter_once(shapes, world):
    specs = [ParamSpec(f"p{i}", shape) for i, shape in enumerate(shapes)]
    layouts = [unit_layout(0, specs, rank, world) for rank in range(world)]
    assert len({layout.shard_numel for layout in layouts}) == 1
    for i, spec in enumerate(specs):
        covered = []
        for layout in layouts:
            piece = layout.slices[i]
            assert piece.offset % SLICE_ALIGN_NUMEL == 0
            assert piece.offset + piece.numel <= layout.shard_numel
            assert piece.offset == layouts[0].slices[i].offset
            covered += range(piece.global_offset, piece.global_offset + piece.numel)
        assert covered == list(range(spec.numel))


@given(SHAPES)
def test_slices_of_one_rank_do_not_overlap(shapes):
    specs = [ParamSpec(f"p{i}", shape) for i, shape in enumerate(shapes)]
    layout = unit_layout(0, specs, 0, 1)
    end = 0
    for piece in layout.slices:
        assert piece.offset >= end
        end = piece.offset + piece.numel
        assert piece.local_shape == piece.spec.shape


@given(SHAPES, st.integers(1, 200))
def test_units_keep_order_and_bound(shapes, unit_numel):
    specs = [ParamSpec(f"p{i}", shape) for i, shape in enumerate(shapes)]
    units = split_into_units(specs, unit_numel)
    assert [spec for unit in units for spec in unit] == specs
    assert all(len(unit) == 1 or sum(s.numel for s in unit) <= unit_numel for unit in units)
