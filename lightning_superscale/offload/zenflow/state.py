"""States of one unit whose selected columns are on the device and the others on the host.

[Note: Owners] Every column has one owner, which holds its master, its moments and the number of steps that these have
absorbed: the device of a selected column, the host of a deferred one. The host has room for all columns, so that flat
buffers stay what the rest of the package expects of a unit's state; `merge` copies the device's columns there. A
selection moves what changes its owner, and resets nothing.

In the host's buffers a parameter lies column by column ([Note: Columns] in columns.py). Buffers of deferred columns
alone, and the device's of selected ones, have the columns one after the other, ascending.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_superscale.layout.memory import Home
from lightning_superscale.layout.rows import SLICE_ALIGN_NUMEL, ParamSlice, align_up
from lightning_superscale.offload.engine import OffloadContext
from lightning_superscale.offload.link.dtype import add_late_gradient, dtype_on_link, send_gradient
from lightning_superscale.offload.link.link import LinkEvent
from lightning_superscale.offload.zenflow.columns import (
    ColumnLayout,
    columns_in_memory,
    memory_of_columns,
    most_important,
    others,
    rows_of_columns,
)
from lightning_superscale.ops.cpu.flat import accumulate, cast_scale
from lightning_superscale.ops.events import note_use
from lightning_superscale.ops.state_dtypes import follow_weights
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment, RowSelection
from lightning_superscale.optim.unit import ShardUnit, slice_view
from lightning_superscale.optim.unit_state import StateBytes

Edits = Sequence[tuple[int, Tensor, Tensor]]
"""By slice index: which elements of its deferred columns were edited, and their weights, fp32 1D."""


class _Slice:
    """One slice's columns: who owns which, and where they are in the buffers of one owner's columns alone.

    Attributes:
        selected, deferred: numbers of the columns of each owner, ascending, int64 on the CPU.
        on_device: the same two on the unit's device.
        selected_at, deferred_at: first element in the device's buffers, and in those of deferred columns.
        has_grad: whether this step has a gradient, be it of no element on this rank.
        arrival: the copy of this step's gradient of deferred columns; None without one.
        grad: this step's gradient of selected columns, [num_selected, column_numel]; None without one.
        energy: this step's squared norm of each column before any scaling, fp64 [num_columns], on the unit's device;
            None where it was not asked for.
        edited: which elements [num_deferred, column_numel] of the deferred columns' weights other code has changed
            after the last gradient; None where it changed none.
    """

    selected: Tensor
    deferred: Tensor
    rows: RowSelection
    on_device: tuple[Tensor, Tensor]

    def __init__(self, piece: ParamSlice, layout: ColumnLayout, selected_at: int, deferred_at: int) -> None:
        self.piece = piece
        self.layout = layout
        self.selected_at = selected_at
        self.deferred_at = deferred_at
        self.has_grad = False
        self.arrival: LinkEvent | None = None
        self.grad: Tensor | None = None
        self.energy: Tensor | None = None
        self.edited: Tensor | None = None

    def choose(self, selected: Tensor, device: torch.device) -> None:
        """Set which columns the device owns."""
        self.selected = selected
        self.deferred = others(selected, self.layout.num_columns)
        self.rows = RowSelection(self.deferred, max(self.layout.column_numel, 1), max(self.layout.num_rows, 1))
        self.on_device = (self.selected.to(device), self.deferred.to(device))

    def forget(self) -> None:
        """Forget this step's gradient."""
        self.has_grad = False
        self.arrival = self.grad = self.energy = None

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


class SplitState:
    """Masters and moments of one unit, split by columns between the device and the host. Satisfies `HostUnitState`.

    Args:
        layouts: of the unit's slices.
        num_windows: buffers of deferred gradients; two where the host applies one window during the next.

    Attributes:
        slices: by slice index.
    """

    flowing = None
    compensation = None
    host_copy_numel = 0
    masters_lead = True

    def __init__(
        self, unit: ShardUnit, context: OffloadContext, layouts: Sequence[ColumnLayout], *, num_windows: int
    ) -> None:
        arena, numel = context.arena, unit.shard.shard_numel
        self.unit = unit
        self.homes: frozenset[Home] = frozenset({"host", "device"})
        self.transfer_dtype = dtype_on_link(context.link_dtype, unit.dtype)
        self._link = context.link
        self._pool = context.pool
        self._landing: list[LinkEvent] = []
        self.slices: list[_Slice] = []
        selected_numel = deferred_numel = 0
        for piece, layout in zip(unit.shard.slices, layouts, strict=True):
            one = _Slice(piece, layout, selected_numel, deferred_numel)
            one.choose(torch.arange(layout.num_selected), unit.device)
            self.slices.append(one)
            selected_numel = align_up(selected_numel + layout.selected_numel, SLICE_ALIGN_NUMEL)
            deferred_numel = align_up(deferred_numel + layout.deferred_numel, SLICE_ALIGN_NUMEL)
        self.master, self.exp_avg, self.exp_avg_sq = (
            arena.zeros(numel, torch.float32, is_pinned=False) for _ in range(3)
        )
        self._device_states = tuple(torch.zeros(selected_numel, device=unit.device) for _ in range(3))
        # Masters and moments: the device's buffer of selected columns, and the host's that has room for all.
        self._both = tuple(zip(self._device_states, (self.master, self.exp_avg, self.exp_avg_sq), strict=True))
        self._arrived = arena.zeros(deferred_numel, self.transfer_dtype, is_pinned=context.is_pinned)
        self._windows = tuple(arena.zeros(deferred_numel, torch.float32, is_pinned=False) for _ in range(num_windows))
        # The weights that are on the device, and the buffer for the next ones; both, so that edits of the former can be
        # told from updates that have not been applied.
        self._weights = [
            arena.zeros(deferred_numel, self.transfer_dtype, is_pinned=context.is_pinned) for _ in range(2)
        ]
        self.reload(range(len(self.slices)))

    # What every state has

    def bytes(self) -> Sequence[StateBytes]:
        fp32, link = torch.float32, self.transfer_dtype
        selected, deferred = self._device_states[0].numel(), self._arrived.numel()
        return [
            StateBytes("master weights", fp32, home="host"),
            StateBytes("optimizer states", fp32, copies=2, home="host"),
            StateBytes("deferred gradients", fp32, len(self._windows), "host", deferred),
            StateBytes("transfer buffers", link, 3, "host", deferred),
            StateBytes("selected masters", fp32, 1, "device", selected),
            StateBytes("selected states", fp32, 2, "device", selected),
        ]

    def master_of(self, i: int) -> Tensor:
        return slice_view(self.master, self.slices[i].piece)

    def view_of(self, flat: Tensor, i: int) -> Tensor:
        return rows_of_columns(slice_view(flat, self.slices[i].piece), self.slices[i].piece, self.slices[i].layout)

    def rounding_of(self, i: int) -> None:
        return None

    def weight_out_of(self, i: int) -> Tensor | None:
        raise AssertionError("a split state is stepped by its own rule")

    def has_grad(self, i: int) -> bool:
        return self.slices[i].has_grad

    def grad(self, i: int) -> Tensor | None:
        one = self.slices[i]
        if not one.has_grad:
            return None
        columns = torch.empty(one.layout.num_columns, one.layout.column_numel, dtype=self.transfer_dtype)
        if one.grad is not None:
            columns[one.selected] = self._to_host(one.grad).to(self.transfer_dtype)
        if one.arrival is not None:
            one.arrival.synchronize()
            columns[one.deferred] = one.deferred_columns_of(self._arrived)
        return memory_of_columns(columns, one.layout)

    def clear_grads(self) -> None:
        for one in self.slices:
            one.forget()

    def upload(self, stepped: Sequence[int]) -> None:
        """New weights are where the unit keeps its weights."""

    def release(self) -> None:
        self.clear_grads()

    # Gradients

    def add_grads(self, slices: Sequence[tuple[int, Tensor]], *, measures: bool = False) -> None:
        """Take gradient deltas. The caller first waits for the host to have added up the last step's.

        Args:
            measures: whether this step chooses columns, by the energy of its gradients.
        """
        for i, grad in slices:
            one = self.slices[i]
            one.has_grad = True
            one.edited = None
            columns = columns_in_memory(grad.to(self.unit.dtype), one.layout)
            if measures and one.layout.is_split:
                energy = columns.double().square().sum(1)
                one.energy = energy if one.energy is None else one.energy + energy
            selected, deferred = one.on_device
            if one.layout.num_selected:
                mine = columns.index_select(0, selected)
                one.grad = mine if one.grad is None else one.grad + mine
            if one.layout.deferred_numel:
                theirs, here = columns.index_select(0, deferred).view(-1), one.deferred_of(self._arrived)
                if one.arrival is None:
                    one.arrival = send_gradient(self._link, here, theirs, self.unit.dtype)
                else:
                    add_late_gradient(self._link, here, theirs, self.unit.dtype, one.arrival)

    # The device's columns

    def segments_on_device(self, hypers: Mapping[int, AdamWHyper], scale: Tensor | None) -> list[AdamWSegment]:
        """The updates of selected columns. Their new weights are in place after `place_selected`."""
        segments = []
        for i, hyper in hypers.items():
            one = self.slices[i]
            if one.grad is None or not one.grad.numel():
                continue
            param, exp_avg, exp_avg_sq = (one.selected_of(flat).view(-1) for flat in self._device_states)
            segments.append(
                AdamWSegment(
                    param=param,
                    exp_avg=exp_avg,
                    exp_avg_sq=exp_avg_sq,
                    grad=one.grad.reshape(-1),
                    hyper=hyper,
                    device_scale=scale,
                )
            )
        return segments

    def place_selected(self, slices: Sequence[int]) -> None:
        """Write the masters of selected columns to the weights that forward reads."""
        for i in slices:
            one = self.slices[i]
            if one.layout.selected_numel:
                self._place(i, one.on_device[0], one.selected_of(self._device_states[0]))

    def _place(self, i: int, columns: Tensor, new: Tensor) -> None:
        weights = self._weight_columns(i)
        weights.index_copy_(0, columns, new.to(weights.dtype))

    def _weight_columns(self, i: int) -> Tensor:
        return columns_in_memory(self.unit.local_rows(i), self.slices[i].layout)

    # The host's columns

    def take_deferred(self, i: int) -> LinkEvent | None:
        """The copy of this step's gradient of deferred columns, whose sum a thread of the host makes."""
        arrival, self.slices[i].arrival = self.slices[i].arrival, None
        return arrival

    def absorb(self, i: int, window: int, scale: float, clip_value: float | None, *, is_first: bool) -> None:
        """Add the gradient that arrived to a window's sum, scaled and then clipped.

        Args:
            is_first: the window has no gradient of this slice yet; its buffer holds an older one.
        """
        one = self.slices[i]
        arrived, total = one.deferred_of(self._arrived), one.deferred_of(self._windows[window])
        if clip_value is not None:
            arrived, scale = (arrived.float() * scale).clamp_(-clip_value, clip_value), 1.0
        if is_first:
            cast_scale(total, arrived, scale, pool=self._pool)
        else:
            accumulate(total, arrived, scale, pool=self._pool)

    def segments_on_host(self, window: int, hypers: Mapping[int, AdamWHyper]) -> list[AdamWSegment]:
        """The updates of deferred columns by a window's gradients, whose weights are in place after `place_deferred`.

        Blocks the calling thread until the weights of the last such updates are on the device.
        """
        segments = []
        landing, self._landing = self._landing, []
        for event in landing:
            event.synchronize()
        for i, hyper in hypers.items():
            one, layout = self.slices[i], self.slices[i].layout
            if not layout.deferred_numel:
                continue
            segments.append(
                AdamWSegment(
                    param=slice_view(self.master, one.piece),
                    exp_avg=slice_view(self.exp_avg, one.piece),
                    exp_avg_sq=slice_view(self.exp_avg_sq, one.piece),
                    grad=one.deferred_of(self._windows[window]),
                    hyper=hyper,
                    weight_out=one.deferred_of(self._weights[1]),
                    selection=one.rows if layout.is_split else None,
                )
            )
        return segments

    def edits_of(self, slices: Iterable[int]) -> Edits:
        """The weights of deferred columns that other code changed after the last gradient; masters have them."""
        return [
            (i, edited, self.slices[i].columns_of(self.master)[self.slices[i].deferred][edited])
            for i in slices
            if (edited := self.slices[i].edited) is not None
        ]

    def keep_edits(self, edits: Edits) -> None:
        """Let edits stand that an update on the host has overwritten, which came after all of its gradients."""
        for i, edited, values in edits:
            one = self.slices[i]
            masters = one.columns_of(self.master)
            masters[one.deferred] = masters[one.deferred].masked_scatter(edited, values)
            new = one.deferred_of(self._weights[1]).view(edited.shape)
            new.masked_scatter_(edited, values.to(new.dtype))

    def place_deferred(self, slices: Iterable[int]) -> None:
        """Write the weights that the last `segments_on_host` gave to where forward reads them."""
        landings = []
        for i in slices:
            one = self.slices[i]
            if not one.layout.deferred_numel:
                continue
            source = one.deferred_of(self._weights[1])
            with self._link.allocating():
                landing = torch.empty(source.numel(), dtype=self.unit.dtype, device=self.unit.device)
            landings.append((i, landing, self._link.h2d(landing, source)))
        for i, landing, event in landings:
            one = self.slices[i]
            event.wait()
            self._place(i, one.on_device[1], landing.view(-1, one.layout.column_numel))
            note_use(landing)
            one.deferred_of(self._weights[0]).copy_(one.deferred_of(self._weights[1]))
            self._landing.append(event)

    # Owners

    def select(self, i: int, importance: Tensor) -> None:
        """Give the most important columns of slice i to the device, and what is not among them any more to the host.

        No window of the slice is open or on its way.
        """
        self.move(i, most_important(importance, self.slices[i].layout.num_selected))

    def move(self, i: int, selected: Tensor) -> None:
        """Let the device own these columns of slice i, and the host the others."""
        one = self.slices[i]
        before = one.selected
        leaves, enters = before[~torch.isin(before, selected)], selected[~torch.isin(selected, before)]
        stays = selected[torch.isin(selected, before)]
        for flat, here in self._both:
            columns, there = one.selected_of(flat), one.columns_of(here)
            there[leaves] = self._to_host(columns[torch.searchsorted(before, leaves).to(columns.device)])
            kept = columns[torch.searchsorted(before, stays).to(columns.device)]
            entering = self._to_device(there[enters])
            columns[torch.searchsorted(selected, stays).to(columns.device)] = kept
            columns[torch.searchsorted(selected, enters).to(columns.device)] = entering
        one.choose(selected, self.unit.device)
        one.deferred_of(self._weights[0]).copy_(one.columns_of(self.master)[one.deferred].view(-1))

    def _to_host(self, columns: Tensor) -> Tensor:
        there = torch.empty(columns.shape, dtype=columns.dtype)
        self._link.d2h(there, columns).synchronize()
        return there

    def _to_device(self, columns: Tensor) -> Tensor:
        there = torch.empty(columns.shape, dtype=columns.dtype, device=self.unit.device)
        event = self._link.h2d(there, columns)
        event.wait()
        event.synchronize()
        return there

    def merge(self, i: int) -> None:
        """Copy the device's masters and moments of slice i to the host's buffers, which then have all its columns."""
        one = self.slices[i]
        if one.layout.selected_numel:
            for flat, here in self._both:
                one.columns_of(here)[one.selected] = self._to_host(one.selected_of(flat))

    def spread_moments(self, i: int) -> None:
        """Copy moments of slice i's selected columns from the host's buffers to the device."""
        self._spread(i, self._both[1:])

    def _spread(self, i: int, buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
        one = self.slices[i]
        if one.layout.selected_numel:
            for flat, here in buffers:
                one.selected_of(flat).copy_(self._to_device(one.columns_of(here)[one.selected]))

    def window_of(self, i: int, window: int) -> Tensor:
        """A window's sum of slice i's gradients in the shape of its rows, fp32 on the host; 0 in selected columns."""
        one = self.slices[i]
        columns = torch.zeros(one.layout.num_columns, one.layout.column_numel)
        columns[one.deferred] = one.deferred_columns_of(self._windows[window])
        return rows_of_columns(columns.view(-1), one.piece, one.layout)

    def take_over(
        self, i: int, selected: Tensor | None, window: int, total: Tensor | None, *, is_applied: bool
    ) -> None:
        """Begin with the masters and moments that were loaded into the host's buffers.

        Args:
            selected: the columns that the device owns; None for those that it owns now.
            window: the buffer for `total`.
            total: what `window_of` gave.
            is_applied: whether the weights are the rounded masters; otherwise deferred masters have an update that is
                not on the device yet, and `place_deferred` brings it there.
        """
        one = self.slices[i]
        one.edited = None
        if selected is not None:
            one.choose(selected, self.unit.device)
        self._spread(i, self._both)
        if total is not None and one.layout.deferred_numel:
            columns = torch.empty(one.layout.num_columns, one.layout.column_numel)
            rows_of_columns(columns.view(-1), one.piece, one.layout).copy_(total)
            one.deferred_of(self._windows[window]).copy_(columns[one.deferred].view(-1))
        masters, columns = one.columns_of(self.master), self._weight_columns(i)
        weights = self._to_host(columns.index_select(0, one.on_device[1])).to(self.transfer_dtype)
        if is_applied:
            own = masters[one.deferred]
            follow_weights(own, weights.to(self.unit.dtype))
            masters[one.deferred] = own
        one.deferred_of(self._weights[0]).copy_(weights.reshape(-1))
        one.deferred_of(self._weights[1]).copy_(masters[one.deferred].to(self.unit.dtype).view(-1))
        follow_weights(one.selected_of(self._device_states[0]), columns.index_select(0, one.on_device[0]))

    def reload(self, slices: Sequence[int]) -> None:
        """Follow weights that other code changed, element by element: those that are not what was placed there.

        An edit takes the place of an update that is on its way, and of a later one that has no gradient of a step after
        the edit. Nothing is updated meanwhile.
        """
        for i in slices:
            one, columns = self.slices[i], self._weight_columns(i)
            selected, deferred = one.on_device
            follow_weights(one.selected_of(self._device_states[0]), columns.index_select(0, selected))
            weights = self._to_host(columns.index_select(0, deferred)).to(self.transfer_dtype)
            placed, new = (one.deferred_of(flat).view(weights.shape) for flat in self._weights)
            masters, is_edited = one.columns_of(self.master), placed != weights
            masters[one.deferred] = torch.where(is_edited, weights.float(), masters[one.deferred])
            new.copy_(torch.where(is_edited, weights, new))
            placed.copy_(weights)
            if not one.has_grad and is_edited.any():
                one.edited = is_edited if one.edited is None else one.edited | is_edited
