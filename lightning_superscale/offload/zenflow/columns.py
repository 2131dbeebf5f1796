"""The columns of parameters: how rows in memory are a matrix, and which of its columns matter most.

[Note: Columns] Column j of a weight [out, in] holds what it does with input channel j. Any parameter is such a matrix:
a row for each of its rows, and a column for each element of a row, in the order of its memory. Every rank has some rows
of every column, so that ranks need to sum up one number per column to choose the same ones.

States that are stepped by columns lie in memory column by column, so that any can be stepped without the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lightning_superscale.config.zenflow import ZenFlowConfig
from lightning_superscale.layout.rows import ParamSlice
from lightning_superscale.optim.unit import ShardUnit, shaped

# The share of columns from which transposing all of them is faster than writing these one by one (about 0.9 ns per
# element of all columns against 1.3 to 5 ns per element of these, bf16, one thread of a CPU).
_MANY = 0.5
# A transposed copy takes as long as two straight ones of so many bytes: 4.5 and 9 GB/s of one core, measured.
_TRANSPOSED = 2


@dataclass(frozen=True, slots=True)
class ColumnLayout:
    """The columns of one rank's rows of a parameter.

    Attributes:
        num_columns: 1 for a parameter that is not split, whose only column is all of its rows.
        column_numel: elements of a column on this rank.
        num_rows: elements of a column on all ranks.
        num_selected: number of columns that are stepped at every step.
        is_by_columns: whether the parameter lies column by column in memory, as a transposed one does.
    """

    num_columns: int
    column_numel: int
    num_rows: int
    num_selected: int
    is_by_columns: bool = False

    @property
    def numel(self) -> int:
        """Elements of all columns on this rank."""
        return self.num_columns * self.column_numel

    @property
    def selected_numel(self) -> int:
        """Elements of the selected columns on this rank."""
        return self.num_selected * self.column_numel

    @property
    def selected_share(self) -> float:
        """Share of the elements on this rank that are in selected columns; 0 where there is none."""
        return self.selected_numel / max(1, self.numel)

    @property
    def deferred_numel(self) -> int:
        """Elements of the other columns on this rank."""
        return self.numel - self.selected_numel

    @property
    def has_deferred(self) -> bool:
        """Whether some columns are not selected, be they of no element on this rank."""
        return self.num_selected < self.num_columns

    @property
    def is_split(self) -> bool:
        """Whether some columns are selected and some are not."""
        return 0 < self.num_selected < self.num_columns


def column_layout(piece: ParamSlice, topk: float, *, is_split: bool = True) -> ColumnLayout:
    """The columns of some rows of a parameter.

    A parameter of one dim has one column, which is selected. One in whose memory the dim of rows is neither the first
    nor the last has one column too, which is not, unless all are.

    Args:
        topk: the share of columns that are selected, from 0 to 1, rounded to the nearest number of them.
        is_split: False for a parameter that is stepped as a whole, as one column.
    """
    spec = piece.spec
    if len(spec.shape) < 2:
        return ColumnLayout(1, piece.numel, spec.numel, 1)
    if not is_split or not spec.row_numel:
        return ColumnLayout(1, piece.numel, spec.numel, 0)
    is_by_rows = spec.dims_in_memory[0] == 0 or spec.shape[0] == 1
    if not is_by_rows and spec.dims_in_memory[-1] != 0:
        return ColumnLayout(1, piece.numel, spec.numel, int(topk == 1))
    num_selected = math.floor(topk * spec.row_numel + 0.5)
    num_rows_here = piece.rows[1] - piece.rows[0]
    return ColumnLayout(spec.row_numel, num_rows_here, spec.num_rows, num_selected, is_by_columns=not is_by_rows)


def layout_of(piece: ParamSlice, config: ZenFlowConfig, topk: float) -> ColumnLayout:
    """The columns of some rows of a parameter, which is not split if `config` excludes it."""
    is_excluded = any(fnmatchcase(piece.fqn, pattern) for pattern in config.exclude or ())
    return column_layout(piece, topk, is_split=not is_excluded)


def layouts_of(unit: ShardUnit, config: ZenFlowConfig, topk: float) -> list[ColumnLayout]:
    """The columns of a unit's slices."""
    return [layout_of(piece, config, topk) for piece in unit.shard.slices]


def columns_in_memory(flat: Tensor, layout: ColumnLayout) -> Tensor:
    """The columns [num_columns, column_numel] of 1D elements that lie as the parameter's memory has them; a view."""
    if layout.is_by_columns:
        return flat.view(layout.num_columns, layout.column_numel)
    return flat.view(layout.column_numel, layout.num_columns).t()


def put_columns(flat: Tensor, layout: ColumnLayout, columns: Tensor, new: Tensor) -> None:
    """Write some columns of 1D elements that lie as the parameter's memory has them.

    Scattered columns of a matrix that lies row by row are slow to write one by one: many of them are put among all
    columns, which are transposed as a whole there and back.

    Args:
        columns: their numbers, int64 on the device of `flat`.
        new: [len(columns), column_numel], of the dtype of `flat`.
    """
    here = columns_in_memory(flat, layout)
    if layout.is_by_columns or len(columns) < _MANY * layout.num_columns:
        here.index_copy_(0, columns, new)
    elif len(columns) == layout.num_columns:  # all of them, and they are ascending
        flat.view(layout.column_numel, layout.num_columns).copy_(new.t())
    else:
        every = here.contiguous()
        every.index_copy_(0, columns, new)
        flat.view(layout.column_numel, layout.num_columns).copy_(every.t())


def bytes_by_owner(layout: ColumnLayout, itemsize: int, interval: int) -> float:
    """Bytes per element that are read and written in a step to give each owner its gradients, and to place all weights.

    Args:
        itemsize: bytes of an element of gradients and weights.
        interval: steps after which new weights of deferred columns are placed.
    """
    if not layout.numel:
        return 0.0
    selected, deferred = layout.selected_share, 1 - layout.selected_share
    is_transposed = layout.is_split and not layout.is_by_columns
    transposed = 2.0 * _TRANSPOSED if is_transposed else 0.0
    # Single columns of a matrix that lies row by row have an element in nearly every line of memory.
    placed_at_once = (2.0 if is_transposed else 2 * selected) if selected else 0.0
    placed_late = 2 * transposed + 2 * deferred
    return itemsize * (transposed + 2.0 + placed_at_once + placed_late / interval)


def memory_of_columns(columns: Tensor, layout: ColumnLayout) -> Tensor:
    """The inverse of `columns_in_memory`: 1D elements as the parameter's memory has them."""
    return (columns if layout.is_by_columns else columns.t()).reshape(-1)


def rows_of_columns(flat: Tensor, piece: ParamSlice, layout: ColumnLayout) -> Tensor:
    """The rows of a parameter, in their shape, from 1D elements that lie in memory column by column; a view."""
    if layout.num_columns == 1:
        return shaped(flat, piece)
    shape = piece.local_shape
    inner = [dim for dim in piece.spec.dims_in_memory if dim != 0]
    cells = flat.view(*(shape[dim] for dim in inner), layout.column_numel)
    places = {0: len(inner), **{dim: at for at, dim in enumerate(inner)}}
    return cells.permute([places[dim] for dim in range(len(shape))])


def most_important(importance: Tensor, num_selected: int) -> Tensor:
    """The columns of greatest importance, ascending; of equal ones those with lower numbers.

    NaN counts as the greatest importance, as it does in torch.

    Args:
        importance: [num_columns].

    Returns:
        [num_selected] int64 on the CPU.
    """
    order = torch.sort(importance.cpu(), descending=True, stable=True).indices
    return order[:num_selected].sort().values.contiguous()


def others(selected: Tensor, num_columns: int) -> Tensor:
    """The columns that are not selected, ascending; int64 on the CPU."""
    is_other = torch.ones(num_columns, dtype=torch.bool)
    is_other[selected] = False
    return is_other.nonzero().view(-1)
