"""States of one unit whose selected columns are on the device and the others on the host.

[Note: Owners] Every column has one owner, which holds its master, its moments and the number of steps that these have
absorbed: the device of a selected column, the host of a deferred one. The host has room for all columns, so that flat
buffers stay what the rest of the package expects of a unit's state; `merge` copies the device's columns there. A
selection moves what changes its owner, and resets nothing.

Masters and moments that are bf16 are rounded on either side as anywhere else. The random numbers of stochastic rounding
follow a parameter's elements column by column, so that neither the number of ranks nor a column's owner changes them.

In the host's buffers a parameter lies column by column ([Note: Columns] in columns.py). Buffers of deferred columns
alone, and the device's of selected ones, have the columns one after the other, ascending.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_superscale.layout.memory import Home
from lightning_superscale.layout.rows import SLICE_ALIGN_NUMEL, align_up
from lightning_superscale.offload.engine import OffloadContext
from lightning_superscale.offload.host_state import compensation_of
from lightning_superscale.offload.link.dtype import dtype_on_link
from lightning_superscale.offload.link.link import LinkFence
from lightning_superscale.offload.zenflow.columns import (
    ColumnLayout,
    columns_in_memory,
    memory_of_columns,
    most_important,
    put_columns,
    rows_of_columns,
)
from lightning_superscale.offload.zenflow.split_slice import SentBytes, SplitSlice
from lightning_superscale.offload.zenflow.sums import GradientSums
from lightning_superscale.ops.cpu.adamw import adamw_commit, adamw_commit_peek
from lightning_superscale.ops.events import note_use
from lightning_superscale.ops.state_dtypes import follow_weights, forget_lost
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment, Rounding
from lightning_superscale.optim.unit import ShardUnit, slice_view
from lightning_superscale.optim.unit_state import StateBytes, adam_buffers, roundings_of

_ENERGY_NUMEL = 2**20
"""Elements of a gradient whose squares are summed up at a time."""


class SplitState:
    """Masters and moments of one unit, split by columns between the device and the host. Satisfies `HostUnitState`.

    Args:
        layouts: of the unit's slices.
        sums_home: where the gradients of a window add up.

    Attributes:
        slices: by slice index.
        sent: bytes that crossed the link.
    """

    flowing = None
    host_copy_numel = 0
    masters_lead = True

    def __init__(
        self, unit: ShardUnit, context: OffloadContext, layouts: Sequence[ColumnLayout], *, sums_home: Home
    ) -> None:
        numel = unit.shard.shard_numel
        self.unit = unit
        self.homes: frozenset[Home] = frozenset({"host", "device"})
        self.transfer_dtype = dtype_on_link(context.link_dtype, unit.dtype)
        self._context = context
        self._link = context.link
        self._pool = context.pool
        self._sums_home = sums_home
        self.sent = SentBytes()
        dtypes = context.dtypes
        self.master = context.arena.zeros(numel, dtypes.master_of(unit.dtype), is_pinned=False)
        self.exp_avg, self.exp_avg_sq = (context.arena.zeros(numel, dtypes.moments, is_pinned=False) for _ in range(2))
        self.compensation = compensation_of(context.arena, numel, unit.dtype, dtypes)
        self._lay_out(layouts)
        self.reload(range(len(self.slices)))

    def _lay_out(self, layouts: Sequence[ColumnLayout]) -> None:
        """Make the buffers of columns of one owner; the device owns the first ones of each slice."""
        unit, context = self.unit, self._context
        self.slices: list[SplitSlice] = []
        selected_numel = deferred_numel = 0
        roundings = roundings_of(unit, context.dtypes)
        for piece, layout, rounding in zip(unit.shard.slices, layouts, roundings, strict=True):
            if rounding is not None and layout.num_columns > 1:
                rounding = replace(rounding, first_element=piece.rows[0])
            one = SplitSlice(piece, layout, selected_numel, deferred_numel, rounding)
            one.choose(torch.arange(layout.num_selected), unit.device)
            self.slices.append(one)
            selected_numel = align_up(selected_numel + layout.selected_numel, SLICE_ALIGN_NUMEL)
            deferred_numel = align_up(deferred_numel + layout.deferred_numel, SLICE_ALIGN_NUMEL)
        on_host = [flat for flat in (self.master, self.exp_avg, self.exp_avg_sq, self.compensation) if flat is not None]
        self._device_states = tuple(
            torch.zeros(selected_numel, dtype=flat.dtype, device=unit.device) for flat in on_host
        )
        # Masters, moments and compensation: the device's buffer of selected columns, and the host's with room for all.
        self._both = tuple(zip(self._device_states, on_host, strict=True))
        self.sums = GradientSums(unit, context, deferred_numel, self._sums_home, self.sent)
        # The weights that are in place, and the next ones; both, so that edits of the former can be told from updates
        # that are on their way.
        self._weights = [
            context.arena.zeros(deferred_numel, self.transfer_dtype, is_pinned=context.is_pinned) for _ in range(2)
        ]

    def resize(self, layouts: Sequence[ColumnLayout]) -> None:
        """Change how many columns the device owns, between windows, with all weights in place.

        The host's buffers have all masters and moments (`merge`). Gradients that are whole stay.
        """
        grads = [(one.has_grad, one.whole) for one in self.slices]
        self._lay_out(layouts)
        for i, (one, (has_grad, whole)) in enumerate(zip(self.slices, grads, strict=True)):
            one.has_grad, one.whole = has_grad, whole
            self._spread(i, self._both)
            weights = self._to_host(self._weight_columns(i).index_select(0, one.on_device[1]))
            self._placed_of(one).copy_(weights.reshape(-1))

    # What every state has

    def bytes(self) -> Sequence[StateBytes]:
        master, moments = self.master.dtype, self.exp_avg.dtype
        selected, deferred = self._device_states[0].numel(), self.sums.total.numel()
        kept = [
            *adam_buffers(self, "host"),
            StateBytes("deferred gradients", torch.float32, 1, self.sums.home, deferred),
            StateBytes("transfer buffers", self.transfer_dtype, 3, "host", deferred),
            StateBytes("selected masters", master, 1, "device", selected),
            StateBytes("selected states", moments, 2, "device", selected),
        ]
        if self.compensation is not None:
            kept.append(StateBytes("selected compensation", self.compensation.dtype, 1, "device", selected))
        return kept

    @property
    def bytes_per_element(self) -> int:
        """Bytes of one element's master, moments and compensation."""
        return sum(flat.element_size() for flat in self._device_states)

    def master_of(self, i: int) -> Tensor:
        return slice_view(self.master, self.slices[i].piece)

    def view_of(self, flat: Tensor, i: int) -> Tensor:
        return rows_of_columns(slice_view(flat, self.slices[i].piece), self.slices[i].piece, self.slices[i].layout)

    def rounding_of(self, i: int) -> Rounding | None:
        return self.slices[i].rounding

    def weight_out_of(self, i: int) -> Tensor | None:
        raise AssertionError("a split state is stepped by its own rule")

    def has_grad(self, i: int) -> bool:
        return self.slices[i].has_grad

    def grad(self, i: int) -> Tensor | None:
        one = self.slices[i]
        if not one.has_grad:
            return None
        columns = torch.empty(one.layout.num_columns, one.layout.column_numel, dtype=self.transfer_dtype)
        if one.whole is not None:
            columns.copy_(self._to_host(one.whole))
        if one.grad is not None:
            columns[one.selected] = self._to_host(one.grad).to(self.transfer_dtype)
        if one.deferred_grad is not None:
            theirs = self._to_host(one.deferred_grad).to(self.transfer_dtype)
            columns[one.deferred] = theirs.view(len(one.deferred), one.layout.column_numel)
        if one.arrival is not None:
            one.arrival.synchronize()
            columns[one.deferred] = one.deferred_columns_of(self.sums.arrived)
        return memory_of_columns(columns, one.layout)

    def clear_grads(self) -> None:
        for one in self.slices:
            one.forget()

    def upload(self, stepped: Sequence[int]) -> None:
        """New weights are where the unit keeps its weights."""

    def release(self) -> None:
        self.clear_grads()

    # Gradients

    def add_grads(self, slices: Sequence[tuple[int, Tensor]], *, undivided: Collection[int] = ()) -> None:
        """Take gradient deltas. The caller first waits for the host to have added up the last step's.

        Args:
            undivided: slices whose gradient stays on the device, whole, until `divide`.
        """
        for i, grad in slices:
            one = self.slices[i]
            one.has_grad = True
            one.edited = None
            # Transposed as a whole: then columns can be taken by rows of memory, which is much faster.
            in_memory = columns_in_memory(grad.to(self.unit.dtype), one.layout)
            columns = in_memory.contiguous()
            if i in undivided:
                own = columns.clone() if columns is in_memory else columns
                one.whole = own if one.whole is None else one.whole + columns
            else:
                self._take(one, columns)

    def divide(self, i: int) -> None:
        """Give each owner its columns of a gradient that is whole."""
        one = self.slices[i]
        whole, one.whole = one.whole, None
        if whole is not None:
            self._take(one, whole)

    def energy(self, i: int) -> Tensor:
        """Squared norm of each column of a gradient that is whole, before any scaling, fp64 [num_columns]."""
        whole = self.slices[i].whole
        if whole is None:
            return torch.zeros(self.slices[i].layout.num_columns, dtype=torch.float64, device=self.unit.device)
        # Some columns at a time: whole, in fp64, a gradient would be the largest tensor of a step.
        num_at_once = max(1, _ENERGY_NUMEL // max(1, whole.shape[1]))
        return torch.cat([some.double().square().sum(1) for some in torch.split(whole, num_at_once)])

    def _take(self, one: SplitSlice, columns: Tensor) -> None:
        selected, deferred = one.on_device
        if one.layout.num_selected:
            mine = columns.index_select(0, selected)
            one.grad = mine if one.grad is None else one.grad + mine
        if one.layout.deferred_numel:
            self.sums.take(one, columns.index_select(0, deferred).view(-1))

    # The device's columns

    def segments_on_device(self, hypers: Mapping[int, AdamWHyper], scale: Tensor | None) -> list[AdamWSegment]:
        """The updates of selected columns. Their new weights are in place after `place_selected`."""
        segments = []
        for i, hyper in hypers.items():
            one = self.slices[i]
            if one.grad is None or not one.grad.numel():
                continue
            param, exp_avg, exp_avg_sq, *lost = (one.selected_of(flat).view(-1) for flat in self._device_states)
            segments.append(
                AdamWSegment(
                    param=param,
                    exp_avg=exp_avg,
                    exp_avg_sq=exp_avg_sq,
                    grad=one.grad.reshape(-1),
                    hyper=hyper,
                    device_scale=scale,
                    rounding=one.rounding,
                    compensation=lost[0] if lost else None,
                    selection=one.device_rows if one.is_numbered else None,
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
        put_columns(self.unit.local_rows(i), self.slices[i].layout, columns, new.to(self.unit.dtype))

    def _weight_columns(self, i: int) -> Tensor:
        return columns_in_memory(self.unit.local_rows(i), self.slices[i].layout)

    # The host's columns

    def update_host(self, hypers: Mapping[int, AdamWHyper], ahead: Mapping[int, AdamWHyper]) -> None:
        """Step deferred columns' masters and moments by a window's gradients, and make their next weights.

        Any thread may call it; it blocks until the weights that these take the place of have left the host.

        Args:
            ahead: the update, by slice, that the next weights are ahead by, with the same gradients once more.
        """
        self._step_host(adamw_commit, {i: hyper for i, hyper in hypers.items() if i not in ahead}, {})
        self._step_host(adamw_commit_peek, {i: hypers[i] for i in ahead}, ahead)

    def _step_host(
        self, op: Callable[..., object], hypers: Mapping[int, AdamWHyper], ahead: Mapping[int, AdamWHyper]
    ) -> None:
        segments = []
        for i, hyper in hypers.items():
            one, layout = self.slices[i], self.slices[i].layout
            if not layout.deferred_numel:
                continue
            if one.uploaded is not None:
                one.uploaded.synchronize()
            grad = one.deferred_of(self.sums.of_ended)
            segments.append(
                AdamWSegment(
                    param=slice_view(self.master, one.piece),
                    exp_avg=slice_view(self.exp_avg, one.piece),
                    exp_avg_sq=slice_view(self.exp_avg_sq, one.piece),
                    grad=grad,
                    hyper=hyper,
                    next_grad=grad if i in ahead else None,
                    next_hyper=ahead.get(i),
                    weight_out=self.next_of(one),
                    rounding=one.rounding,
                    compensation=None if self.compensation is None else slice_view(self.compensation, one.piece),
                    selection=one.rows if layout.is_split or one.is_numbered else None,
                )
            )
        if segments:
            op(segments, pool=self._pool)

    def _placed_of(self, one: SplitSlice) -> Tensor:
        return one.deferred_of(self._weights[one.front])

    def next_of(self, one: SplitSlice) -> Tensor:
        """The weights of a slice's deferred columns that take the place of those that are in place, 1D."""
        return one.deferred_of(self._weights[1 - one.front])

    def show_masters(self, i: int) -> None:
        """Make the masters of deferred columns, rounded, their next weights."""
        one = self.slices[i]
        if one.uploaded is not None:
            one.uploaded.synchronize()
        masters = one.columns_of(self.master)[one.deferred]
        self.next_of(one).copy_(masters.to(self.unit.dtype).view(-1))

    def fence(self) -> LinkFence | None:
        """A point of the device's work for `send_weights`, from the thread that runs the model."""
        return self._link.fence()

    def send_weights(self, slices: Iterable[int], after: LinkFence | None) -> None:
        """Start to move deferred columns' next weights to the device. Any thread may call it."""
        for i in slices:
            one = self.slices[i]
            if not one.layout.deferred_numel:
                continue
            source = self.next_of(one)
            self.sent.weights += source.nbytes
            with self._link.allocating():
                landing = torch.empty(source.numel(), dtype=self.unit.dtype, device=self.unit.device)
            one.landing = (landing, self._link.h2d(landing, source, after))

    def place_deferred(self, slices: Iterable[int]) -> None:
        """Write the weights that were sent to where forward reads them."""
        for i in slices:
            one = self.slices[i]
            sent, one.landing = one.landing, None
            if not one.layout.deferred_numel:
                continue
            if sent is None:
                raise AssertionError(f"the weights of {one.piece.fqn} were not sent")
            landing, one.uploaded = sent
            one.uploaded.wait()
            self._place(i, one.on_device[1], landing.view(len(one.deferred), one.layout.column_numel))
            note_use(landing)
            one.front = 1 - one.front

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
        self.sent.moved += (len(leaves) + len(enters)) * one.layout.column_numel * self.bytes_per_element
        for flat, here in self._both:
            columns, there = one.selected_of(flat), one.columns_of(here)
            there[leaves] = self._to_host(columns[torch.searchsorted(before, leaves).to(columns.device)])
            kept = columns[torch.searchsorted(before, stays).to(columns.device)]
            entering = self._to_device(there[enters])
            columns[torch.searchsorted(selected, stays).to(columns.device)] = kept
            columns[torch.searchsorted(selected, enters).to(columns.device)] = entering
        placed = torch.empty(one.layout.num_columns, one.layout.column_numel, dtype=self.transfer_dtype)
        placed[one.deferred] = self._placed_of(one).view(len(one.deferred), one.layout.column_numel)
        placed[leaves] = one.columns_of(self.master)[leaves].to(self.unit.dtype).to(self.transfer_dtype)
        one.choose(selected, self.unit.device)
        self._placed_of(one).copy_(placed[one.deferred].view(-1))

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
        """Copy all but masters of slice i's selected columns from the host's buffers to the device."""
        self._spread(i, self._both[1:])

    def _spread(self, i: int, buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
        one = self.slices[i]
        if one.layout.selected_numel:
            for flat, here in buffers:
                one.selected_of(flat).copy_(self._to_device(one.columns_of(here)[one.selected]))

    def window_of(self, i: int) -> Tensor:
        """The open window's sum of slice i's gradients in the shape of its rows, fp32 on the host.

        0 in selected columns.
        """
        total = self.slices[i].deferred_of(self.sums.total)
        return self._rows_of_deferred(i, total if total.device.type == "cpu" else self._to_host(total))

    def next_weights_of(self, i: int) -> Tensor:
        """Deferred columns' weights that are not in place yet, in the shape of slice i's rows, fp32 on the host.

        0 in selected columns.
        """
        return self._rows_of_deferred(i, self.next_of(self.slices[i]))

    def _rows_of_deferred(self, i: int, flat: Tensor) -> Tensor:
        one = self.slices[i]
        columns = torch.zeros(one.layout.num_columns, one.layout.column_numel)
        columns[one.deferred] = flat.float().view(len(one.deferred), one.layout.column_numel)
        return rows_of_columns(columns.view(-1), one.piece, one.layout)

    def take_over(
        self, i: int, selected: Tensor | None, kept: Tensor | None, *, is_late: bool, masters_lead: bool
    ) -> None:
        """Begin with the masters and moments that were loaded into the host's buffers.

        Args:
            selected: the columns that the device owns; None for those that it owns now.
            kept: what `window_of` gave, or if `is_late`, what `next_weights_of` gave.
            is_late: whether weights are not in place yet; those of the masters where `kept` is None.
            masters_lead: whether deferred columns' weights may be others than the rounded masters; otherwise a weight
                that is not was edited.
        """
        one = self.slices[i]
        one.edited = None
        if selected is not None:
            one.choose(selected, self.unit.device)
        self._spread(i, self._both)
        if is_late and kept is None:
            self.show_masters(i)
        elif kept is not None and one.layout.deferred_numel:
            columns = torch.empty(one.layout.num_columns, one.layout.column_numel)
            rows_of_columns(columns.view(-1), one.piece, one.layout).copy_(kept)
            there = self.next_of(one) if is_late else one.deferred_of(self.sums.total)
            there.copy_(columns[one.deferred].view(-1))
        masters, columns = one.columns_of(self.master), self._weight_columns(i)
        weights = self._to_host(columns.index_select(0, one.on_device[1]))
        if not masters_lead:
            own = masters[one.deferred]
            follow_weights(own, weights)
            masters[one.deferred] = own
        self._placed_of(one).copy_(weights.reshape(-1))
        follow_weights(one.selected_of(self._device_states[0]), columns.index_select(0, one.on_device[0]))

    def reload(self, slices: Sequence[int]) -> None:
        """Follow weights that other code changed, element by element: those that are not what was placed there.

        Nothing is updated meanwhile ([Note: Edits] in edits.py).
        """
        for i in slices:
            one, columns = self.slices[i], self._weight_columns(i)
            selected, deferred = one.on_device
            mine, there = one.selected_of(self._device_states[0]), columns.index_select(0, selected)
            if self.compensation is not None:
                forget_lost(one.selected_of(self._device_states[-1]), there, mine)
            follow_weights(mine, there)
            weights = self._to_host(columns.index_select(0, deferred))
            placed, new = (flat.view(weights.shape) for flat in (self._placed_of(one), self.next_of(one)))
            is_own = placed.to(self.unit.dtype) == weights
            if one.landing is not None:
                one.landing[1].synchronize()
            masters = one.columns_of(self.master)
            if self.compensation is not None:
                lost = one.columns_of(self.compensation)
                lost[one.deferred] = torch.where(is_own, lost[one.deferred], 0)
            masters[one.deferred] = torch.where(is_own, masters[one.deferred], weights.to(masters.dtype))
            new.copy_(torch.where(is_own, new, weights.to(self.transfer_dtype)))
            placed.copy_(weights)
            if not one.has_grad and not is_own.all():
                one.edited = ~is_own if one.edited is None else one.edited | ~is_own
            if one.landing is not None:
                self.send_weights([i], self.fence())
