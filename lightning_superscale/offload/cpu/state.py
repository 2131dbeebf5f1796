"""States of one unit in host memory, stepped there by the native kernel.

With 16-bit weights a parameter takes, in bytes, fp32 master, exp_avg and exp_avg_sq (12), and one 16-bit buffer (2)
that holds the gradient until the step has read it and the new weight from then on. Where masters have the dtype that
crosses the link (fp32 weights; bf16 masters; link_dtype="fp32"), a parameter takes its master and moments, and a
gradient buffer; the master itself is uploaded. Weights that flow have one more buffer (2) on the host, which the step
writes and forward streams from; where masters have the weights' dtype, the master is that buffer. Where ranks share
steps, the buffer holds whole weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_superscale.layout.memory import Home
from lightning_superscale.offload.engine import OffloadContext
from lightning_superscale.offload.host_state import (
    compensation_of,
    host_buffers,
    way_of_weights,
    weights_on_host,
)
from lightning_superscale.offload.link.dtype import add_late_gradient, dtype_on_link, send_gradient
from lightning_superscale.offload.link.link import LinkEvent
from lightning_superscale.offload.weight_flow.weights import FlowingWeights, StreamedUnit
from lightning_superscale.ops.state_dtypes import follow_weights, forget_lost
from lightning_superscale.ops.types import Rounding
from lightning_superscale.optim.unit import PublishEvent, ShardUnit
from lightning_superscale.optim.unit_state import StateBytes, roundings_of, view_by_rows


class HostState:
    """Master and moments of one unit on the host; gradients come and weights go over the link. Satisfies `UnitState`.

    Args:
        has_moments: False for an optimizer that keeps states of its own.
        streamed: the same unit, if its weights flow; None if they stay on the device.

    Attributes:
        transfer_dtype: dtype of the gradient buffer, and of the weights that are uploaded.
        flowing: the store of its weights, if they flow.
    """

    masters_lead = False

    def __init__(
        self,
        unit: ShardUnit,
        context: OffloadContext,
        *,
        has_moments: bool,
        streamed: StreamedUnit | None = None,
    ) -> None:
        link, arena, dtypes, is_pinned = context.link, context.arena, context.dtypes, context.is_pinned
        numel, dtype = unit.shard.shard_numel, unit.dtype
        self.transfer_dtype = dtype_on_link(context.link_dtype, dtype)
        has_own_weights = dtypes.master_of(dtype) != self.transfer_dtype
        self.unit = unit
        self.homes: frozenset[Home] = frozenset({"host"})
        self.num_transfer_buffers = 1
        self._link = link
        self._roundings = roundings_of(unit, dtypes)
        # A master of the dtype that crosses the link is uploaded itself, so it is pinned.
        self.master = arena.zeros(
            numel,
            dtypes.master_of(dtype),
            is_pinned=is_pinned and not has_own_weights,
            in_forks=streamed is not None and not has_own_weights,
        )
        self.exp_avg = arena.zeros(numel, dtypes.moments, is_pinned=False) if has_moments else None
        self.exp_avg_sq = arena.zeros(numel, dtypes.moments, is_pinned=False) if has_moments else None
        self.compensation = compensation_of(arena, numel, dtype, dtypes)
        self._grads = arena.zeros(numel, self.transfer_dtype, is_pinned=is_pinned)
        self._weight_out = self._grads if has_own_weights else None
        self.flowing: FlowingWeights | None = None
        self.host_copy_numel = 0
        if streamed is not None:
            weights = self.master
            if has_own_weights or not streamed.is_whole:
                self.host_copy_numel = streamed.full.shard_numel
                weights = arena.zeros(self.host_copy_numel, dtype, is_pinned=is_pinned, in_forks=True)
            if has_own_weights and streamed.is_whole:
                self._weight_out = weights
            self.flowing = FlowingWeights(streamed, link, [weights])
        # The host may wait for a copy long after it was started: the event keeps what it reads, and where a step is
        # dropped with copies under way, the link's next copy into the same buffer comes after them.
        self._arrivals: dict[int, LinkEvent] = {}
        self.reload(range(len(unit.shard.slices)))

    def bytes(self) -> Sequence[StateBytes]:
        return host_buffers(self, self.num_transfer_buffers)

    def master_of(self, i: int) -> Tensor:
        return self._slice(self.master, i)

    def view_of(self, flat: Tensor, i: int) -> Tensor:
        return view_by_rows(self.unit, flat, i)

    def rounding_of(self, i: int) -> Rounding | None:
        return self._roundings[i]

    def weight_out_of(self, i: int) -> Tensor | None:
        return None if self._weight_out is None else self._slice(self._weight_out, i)

    def add_grads(self, slices: Sequence[tuple[int, Tensor]]) -> None:
        for i, grad in slices:
            here = self._slice(self._grads, i)
            if i in self._arrivals:
                add_late_gradient(self._link, here, grad, self.unit.dtype, self._arrivals[i])
            else:
                self._arrivals[i] = send_gradient(self._link, here, grad, self.unit.dtype)

    def has_grad(self, i: int) -> bool:
        return i in self._arrivals

    def grad(self, i: int) -> Tensor | None:
        if i not in self._arrivals:
            return None
        self._arrivals[i].synchronize()
        return self._slice(self._grads, i)

    def _slice(self, flat: Tensor, i: int) -> Tensor:
        piece = self.unit.shard.slices[i]
        return flat[piece.offset : piece.offset + piece.numel]

    def clear_grads(self) -> None:
        self._arrivals.clear()

    def upload(self, stepped: Sequence[int]) -> PublishEvent:
        """Send new weights of stepped slices only: the buffer of others may hold a gradient or old weights."""
        return way_of_weights(self.flowing, lambda: self._upload(stepped))

    def _upload(self, stepped: Sequence[int]) -> list[LinkEvent]:
        source = self.master if self._weight_out is None else self._weight_out
        inbox = self.unit.inbox()
        if len(stepped) == len(self.unit.shard.slices):
            return [self._link.h2d(inbox, source)]
        pieces = [self.unit.shard.slices[i] for i in stepped]
        spans = [slice(piece.offset, piece.offset + piece.numel) for piece in pieces]
        return [self._link.h2d(inbox[span], source[span]) for span in spans]

    def reload(self, slices: Sequence[int]) -> None:
        for i in slices:
            weights = weights_on_host(self.unit, i, self.flowing, self._link)
            if self.compensation is not None:
                forget_lost(self._slice(self.compensation, i), weights, self.master_of(i))
            follow_weights(self.master_of(i), weights)

    def release(self) -> None:
        self._arrivals.clear()
