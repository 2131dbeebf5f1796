"""Columns of parameters of any shape and memory format, and the choice of the most important."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.layout.rows import ParamSlice, ParamSpec, dims_in_memory, shard_rows, unit_layout
from lightning_superscale.offload.zenflow.columns import (
    ColumnLayout,
    bytes_by_owner,
    column_layout,
    columns_in_memory,
    memory_of_columns,
    most_important,
    others,
    put_columns,
    rows_of_columns,
)
from lightning_superscale.optim.unit import flattened

SHAPES = [(), (5,), (1, 4), (6, 5), (7, 3, 2, 2), (4, 1, 3), (0, 3), (3, 0)]
TENSORS = {
    **{str(shape): torch.arange(torch.Size(shape).numel()).float().view(shape) for shape in SHAPES},
    "channels_last": torch.arange(120).float().view(5, 4, 3, 2).contiguous(memory_format=torch.channels_last),
    "transposed": torch.arange(24).float().view(4, 6).t(),
    "rows inside": torch.arange(24).float().view(2, 4, 3).permute(1, 0, 2),
}
BY_ROWS_ONLY = ("transposed", "rows inside")


def spec_of(tensor: torch.Tensor) -> ParamSpec:
    is_contiguous = tensor.is_contiguous()
    return ParamSpec("p", tuple(tensor.shape), None if is_contiguous else tensor.stride())


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_columns_of_all_ranks_are_the_parameter(name, num_ranks):
    whole = TENSORS[name]
    if name in BY_ROWS_ONLY and num_ranks > 1:
        pytest.skip("a parameter that is cut into rows has them one after the other")
    spec = spec_of(whole)
    for rank in range(num_ranks):
        (piece,) = unit_layout(0, [spec], rank, num_ranks).slices
        layout = column_layout(piece, 0.5)
        start, stop = shard_rows(spec.num_rows, rank, num_ranks)
        rows = whole[start:stop] if whole.dim() else whole.reshape(-1)[start:stop].reshape(piece.local_shape)
        in_memory = flattened(rows, spec)
        by_columns = columns_in_memory(in_memory, layout).contiguous().view(-1)
        assert layout.numel == piece.numel == by_columns.numel()
        assert torch.equal(rows_of_columns(by_columns, piece, layout), rows)
        assert torch.equal(memory_of_columns(columns_in_memory(in_memory, layout), layout), in_memory)
        # A view, so that what is written to it reaches the states.
        rows_of_columns(by_columns, piece, layout).zero_()
        assert not by_columns.any()


def test_a_column_has_the_weights_of_one_input_channel():
    weight = TENSORS["(6, 5)"]
    (piece,) = unit_layout(0, [spec_of(weight)], 0, 1).slices
    columns = columns_in_memory(weight.reshape(-1), column_layout(piece, 0.4))
    assert torch.equal(columns[3], weight[:, 3])


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_columns_are_put_where_they_were_taken(name, share):
    spec = spec_of(TENSORS[name])
    (piece,) = unit_layout(0, [spec], 0, 1).slices
    layout = column_layout(piece, 0.5)
    flat = flattened(TENSORS[name], spec).clone()
    columns = torch.arange(layout.num_columns)[: round(share * layout.num_columns)]
    columns = columns.flip(0) + layout.num_columns - len(columns) if share < 1 else columns
    new = -1 - torch.rand(len(columns), layout.column_numel)
    expected = columns_in_memory(flat, layout).clone()
    expected[columns] = new
    put_columns(flat, layout, columns, new)
    assert torch.equal(columns_in_memory(flat, layout), expected)


@pytest.mark.parametrize(
    ("shape", "topk", "selected"),
    [((4, 10), 0.1, 1), ((4, 10), 0.25, 3), ((4, 10), 0.0, 0), ((4, 10), 1.0, 10), ((4, 10), 0.04, 0), ((7,), 0.0, 1)],
)
def test_the_share_of_selected_columns_is_rounded(shape, topk, selected):
    (piece,) = unit_layout(0, [ParamSpec("p", shape)], 0, 1).slices
    assert column_layout(piece, topk).num_selected == selected


def test_a_parameter_that_is_not_split_has_one_column_that_is_deferred():
    (piece,) = unit_layout(0, [ParamSpec("p", (4, 10))], 0, 1).slices
    assert column_layout(piece, 1.0, is_split=False) == ColumnLayout(1, 40, 40, 0)


def test_a_transposed_parameter_is_split_as_another():
    transposed = TENSORS["transposed"]
    assert dims_in_memory((6, 4), transposed.stride()) == (1, 0)
    (piece,) = unit_layout(0, [spec_of(transposed)], 0, 1).slices
    layout = column_layout(piece, 0.5)
    assert layout == ColumnLayout(4, 6, 6, 2, is_by_columns=True)
    in_memory = flattened(transposed, piece.spec)
    assert torch.equal(columns_in_memory(in_memory, layout)[3], transposed[:, 3])


@pytest.mark.parametrize(("topk", "num_selected"), [(0.0, 0), (0.9, 0), (1.0, 1)])
def test_one_whose_rows_are_inside_is_whole(topk, num_selected):
    (piece,) = unit_layout(0, [spec_of(TENSORS["rows inside"])], 0, 1).slices
    assert column_layout(piece, topk) == ColumnLayout(1, 24, 24, num_selected)


def test_bytes_that_are_moved_to_divide_by_owner():
    """In passes over all elements, of 2 bytes; a transposed copy counts twice."""

    def moved(shape, memory=None, topk=0.25, interval=4):
        spec = ParamSpec("p", shape, memory)
        return bytes_by_owner(column_layout(ParamSlice(spec, (0, spec.num_rows), 0), topk), 2, interval) / 2

    assert moved((8, 16)) == 4 + 2 + 2 + (4 + 1.5 + 4) / 4
    assert moved((8, 16), interval=1) == 4 + 2 + 2 + (4 + 1.5 + 4)
    assert moved((4, 6), memory=(1, 4), topk=0.5) == 2 + 1 + 1 / 4, "it lies column by column"
    assert moved((8, 16), topk=0) == 2 + 2 / 4, "all of it is the host's"
    assert moved((16,)) == 2 + 2, "all of it is the device's"
    assert moved((0, 3)) == 0


def test_ties_go_to_lower_numbers_and_nan_comes_first():
    assert most_important(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.5]), 2).tolist() == [1, 2]
    assert most_important(torch.tensor([3.0, 1.0, torch.nan, 2.0]), 2).tolist() == [0, 2]
    assert most_important(torch.zeros(1000), 7).tolist() == list(range(7))
    assert most_important(torch.tensor([1.0, 2.0]), 0).tolist() == []


def test_others_are_the_rest():
    assert others(torch.tensor([1, 3]), 5).tolist() == [0, 2, 4]
    assert others(torch.tensor([], dtype=torch.int64), 2).tolist() == [0, 1]
