"""One slice's columns, by owner: the device's and the host's ([Note: Owners] in state.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_superscale.layout.rows import ParamSlice
from lightning_superscale.offload.link.link import LinkEvent
from lightning_superscale.offload.zenflow.columns import ColumnLayout, others
from lightning_superscale.ops.types import Rounding, RowSelection
from lightning_superscale.optim.unit import slice_view


@dataclass(slots=True)
class SentBytes:
    """Bytes of one unit that crossed the link.

    Attributes:
        gradients: of deferred columns, to the host, in steps that were taken.
        pending: the same of a step that may still be dropped.
        weights: of deferred columns, to the device.
        moved: masters and moments of columns that changed their owner, either way.
    """

    gradients: int = 0
    pending: int = 0
    weights: int = 0
    moved: int = 0


class SplitSlice:
    """One slice's columns: who owns which, and where they are in the buffers of one owner's columns alone.

    Attributes:
        selected, deferred: numbers of the columns of each owner, ascending, int64 on the CPU.
        rows: the deferred columns as rows of the host's buffers, which lie column by column.
        device_rows: the selected columns as the rows that the device's buffers have.
        on_device: `selected` and `deferred` on the unit's device.
        rounding: of its updates; None where all states are fp32.
        selected_at, deferred_at: first element in the device's buffers, and in those of deferred columns.
        has_grad: whether this step has a gradient, be it of no element on this rank.
        whole: this step's gradient of all columns, [num_columns, column_numel], while its owners are not known.
        grad: this step's gradient of selected columns, [num_selected, column_numel]; None without one.
        arrival: the copy of this step's gradient of deferred columns, or of a window's; None without one.
        deferred_grad: this step's gradient of deferred columns, 1D, where it adds up on the device.
        landing: new weights of deferred columns that are on their way to the device, and their copy.
        front: which of the two weight buffers has the weights that are in place.
        uploaded: the last copy from these buffers.
        edited: which elements [num_deferred, column_numel] of the deferred columns' weights other code has changed
            after the last gradient; None where it changed none.
    """

    selected: Tensor
    deferred: Tensor
    rows: RowSelection
    device_rows: RowSelection
    on_device: tuple[Tensor, Tensor]

    def __init__(
        self,
        piece: ParamSlice,
        layout: ColumnLayout,
        selected_at: int,
        deferred_at: int,
        rounding: Rounding | None = None,
    ) -> None:
        self.piece = piece
        self.rounding = rounding
        self.layout = layout
        self.selected_at = selected_at
        self.deferred_at = deferred_at
        self.has_grad = False
        self.whole: Tensor | None = None
        self.grad: Tensor | None = None
        self.arrival: LinkEvent | None = None
        self.deferred_grad: Tensor | None = None
        self.landing: tuple[Tensor, LinkEvent] | None = None
        self.front = 0
        self.uploaded: LinkEvent | None = None
        self.edited: Tensor | None = None

    def choose(self, selected: Tensor, device: torch.device) -> None:
        """Set which columns the device owns."""
        self.selected = selected
        self.deferred = others(selected, self.layout.num_columns)
        self.on_device = (self.selected.to(device), self.deferred.to(device))
        column_numel, num_rows = max(self.layout.column_numel, 1), max(self.layout.num_rows, 1)
        self.rows = RowSelection(self.deferred, column_numel, num_rows)
        self.device_rows = RowSelection(self.on_device[0], column_numel, num_rows, is_compact=True)

    @property
    def is_numbered(self) -> bool:
        """Whether updates take random numbers, which follow the elements of all ranks' columns."""
        return self.rounding is not None and self.rounding.is_stochastic

    def forget(self) -> None:
        """Forget this step's gradient."""
        self.has_grad = False
        self.arrival = self.grad = self.whole = self.deferred_grad = None

    def selected_of(self, flat: Tensor) -> Tensor:
        """This slice's columns [num_selected, column_numel] in a buffer of the device's columns."""
        layout = self.layout
        here = flat[self.selected_at : self.selected_at + layout.selected_numel]
        return here.view(layout.num_selected, layout.column_numel)

    def deferred_of(self, flat: Tensor) -> Tensor:
        """This slice's elements, 1D, in a buffer of deferred columns."""
        return flat[self.deferred_at : self.deferred_at + self.layout.deferred_numel]

    def deferred_columns_of(self, flat: Tensor) -> Tensor:
        """The same elements as columns [num_deferred, column_numel], which are empty on a rank that has no row."""
        return self.deferred_of(flat).view(len(self.deferred), self.layout.column_numel)

    def columns_of(self, flat: Tensor) -> Tensor:
        """All columns [num_columns, column_numel] in a buffer of the host's that has room for all."""
        return slice_view(flat, self.piece).view(self.layout.num_columns, self.layout.column_numel)
