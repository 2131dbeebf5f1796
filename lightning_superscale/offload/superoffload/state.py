"""Host states that step during backward and stay exact: deferred commit.

[Note: Deferred commit] A step of AdamW may turn out wrong after it was taken: the gradient norm asks for clipping,
a gradient is infinite, the backward raises, the learning rate changes. Inverting AdamW is not exact and keeping a
copy of masters and moments costs 12 bytes per parameter. So a step's gradient is *committed* (masters and moments
written) only when the next gradient arrives, in the same pass over memory that *peeks* at the next one, which means
to compute its new weights and store nothing else. Until a verdict, only those weights depend on a gradient; a clip
costs one more peek, an exception or an overflow nothing.

Per slice there are two buffers of the dtype that crosses the link. One holds the gradient that waits for its commit,
the other receives this step's gradient. The pass reads both and writes the new weights over the pending gradient. Then
the buffers swap roles:

    before      A: gradient of step t-1 (pending)      B: gradient of step t (arrived)
    the pass    commits A to masters and moments       peeks at B, new weights -> A
    verdict     A is uploaded                          B is pending
    next step   A receives gradient t+1                B is committed

A step that is told to defer nothing ("direct" in [Note: Three plans] of planner/forecast.py) applies its gradient after
the verdict, in place of what is pending, if nothing is: the gradient's own buffer then gets the new weights, and no
buffers swap roles. Masters of the dtype that crosses the link have these weights themselves after such a step, and are
uploaded instead, where copies need no pinned memory.

Where weights flow, A is not uploaded but streamed from until the next verdict, and a third buffer C, which held the
weights until this one, receives gradient t+1 ([Note: Which host buffer] in offload/weight_flow/weights.py). Where ranks
share a unit's steps, its whole weights have a buffer of their own, and A is uploaded for the gather that fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

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
from lightning_superscale.offload.link.link import LinkEvent, LinkFence
from lightning_superscale.offload.planner.forecast import Passes
from lightning_superscale.offload.weight_flow.weights import FlowingWeights, StreamedUnit
from lightning_superscale.ops.cpu.adamw import adamw_commit, adamw_commit_peek, adamw_peek, submit_adamw_commit
from lightning_superscale.ops.cpu.pool import Ticket
from lightning_superscale.ops.state_dtypes import follow_weights, forget_lost
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment, GradStats, Rounding
from lightning_superscale.optim.unit import PublishEvent, ShardUnit
from lightning_superscale.optim.unit_state import StateBytes, roundings_of, view_by_rows

_Kernel = Callable[..., list[GradStats] | None]
_Numbered = Sequence[tuple[int, AdamWSegment]]


@dataclass(slots=True)
class _Slice:
    """The progress of one slice within a step.

    Attributes:
        front: index of the buffer that receives this step's gradient.
        back: index of the buffer that holds the pending gradient, and then the new weights.
        resting: index of the buffer that holds the weights that flow; None where they don't flow from these buffers.
        arrival: the copy of this step's gradient; None without a gradient.
        looked_at: the hyperparameters with which new weights were computed from this step's gradient; None before.
        pending: the hyperparameters of the gradient in `back`, which waits for its commit; None without one.
        is_applied: whether this step's gradient is in masters and moments already, and the new weights are where a
            direct step puts them.
        is_in_master: whether the master has the settled new weights, and no buffer.
        stats: statistics of this step's gradient, counted when it was looked at; None before.
    """

    front: int = 0
    back: int = 1
    resting: int | None = None
    arrival: LinkEvent | None = None
    looked_at: AdamWHyper | None = None
    pending: AdamWHyper | None = None
    is_applied: bool = False
    is_in_master: bool = False
    stats: GradStats | None = field(default=None)


class _Begun(NamedTuple):
    """Updates of some slices that are under way.

    Attributes:
        numbered: segments by slice; a rank may have no row of a slice.
    """

    ticket: Ticket[list[GradStats] | None]
    hypers: Mapping[int, AdamWHyper]
    numbered: _Numbered


class DeferredState:
    """Master and moments of one unit on the host, one commit behind the weights. Satisfies `UnitState`.

    Args:
        streamed: the same unit, if its weights flow; None if they stay on the device.

    Attributes:
        transfer_dtype: dtype of the transfer buffers.
        flowing: the store of its weights, if they flow.
    """

    masters_lead = False

    def __init__(
        self,
        unit: ShardUnit,
        context: OffloadContext,
        *,
        streamed: StreamedUnit | None = None,
    ) -> None:
        link, arena, dtypes, is_pinned = context.link, context.arena, context.dtypes, context.is_pinned
        numel = unit.shard.shard_numel
        self.unit = unit
        self.homes: frozenset[Home] = frozenset({"host"})
        self.num_transfer_buffers = 2
        self.transfer_dtype = dtype_on_link(context.link_dtype, unit.dtype)
        self._link = link
        self._pool = context.pool
        self._roundings = roundings_of(unit, dtypes)
        self.master = arena.zeros(numel, dtypes.master_of(unit.dtype), is_pinned=False)
        self.exp_avg = arena.zeros(numel, dtypes.moments, is_pinned=False)
        self.exp_avg_sq = arena.zeros(numel, dtypes.moments, is_pinned=False)
        self.compensation = compensation_of(arena, numel, unit.dtype, dtypes)
        # Only pinned memory is copied to a GPU while others work, and masters aren't pinned.
        self._uploads_masters = self.master.dtype == self.transfer_dtype and streamed is None and not is_pinned
        rests = streamed is not None and streamed.is_whole
        num_buffers = 3 if rests else 2
        self._buffers = tuple(
            arena.zeros(numel, self.transfer_dtype, is_pinned=is_pinned, in_forks=rests) for _ in range(num_buffers)
        )
        self._slices = [_Slice(resting=2 if rests else None) for _ in unit.shard.slices]
        self._begun: _Begun | None = None
        self._worked_seconds = self._worked_params = 0.0
        self.flowing: FlowingWeights | None = None
        if streamed is not None:
            whole = []
            if not rests:
                whole = [arena.zeros(streamed.full.shard_numel, unit.dtype, is_pinned=is_pinned, in_forks=True)]
            self.flowing = FlowingWeights(streamed, link, whole or self._buffers, first=2 if rests else 0)
        self.host_copy_numel = 0 if self.flowing is None else self.flowing.unit.full.shard_numel
        self.reload(range(len(self._slices)))

    # Gradients

    def add_grads(self, slices: Sequence[tuple[int, Tensor]]) -> None:
        """Take gradient deltas: later deltas of a slice in a step add to the first.

        The caller first waits for a `look_ahead` of the unit that runs: both would use the same buffer.
        """
        for i, grad in slices:
            known = self._slices[i]
            here = self._span(self._buffers[known.front], i)
            if known.arrival is None:
                known.arrival = send_gradient(self._link, here, grad, self.unit.dtype)
                continue
            add_late_gradient(self._link, here, grad, self.unit.dtype, known.arrival)
            known.looked_at = None

    def has_grad(self, i: int) -> bool:
        return self._slices[i].arrival is not None

    def grad(self, i: int) -> Tensor | None:
        known = self._slices[i]
        if known.arrival is None:
            return None
        known.arrival.synchronize()
        return self._span(self._buffers[known.front], i)

    def order_after_copies(self) -> None:
        """Let the device's later work, which may change gradients, wait for copies of them; the host is not blocked."""
        for known in self._slices:
            if known.arrival is not None:
                known.arrival.wait()

    def has_arrived(self) -> bool:
        """Whether the copy of every gradient that was sent is complete."""
        return all(known.arrival is None or known.arrival.is_complete() for known in self._slices)

    def clear_grads(self) -> None:
        """Forget the gradients of this step, unless `settle` made them pending."""
        self._begun = None  # which waits for what reads them
        for known in self._slices:
            known.arrival = known.looked_at = known.stats = None
            known.is_applied = False

    # Steps

    def look_ahead(self, hypers: Mapping[int, AdamWHyper]) -> None:
        """Compute new weights of slices, and commit the gradients that were pending there. Waits for their gradients.

        Args:
            hypers: by slice index, the hyperparameters of this step's update, clipping included.
        """
        with_commit, without = [], []
        for i, hyper in hypers.items():
            known, numel = self._slices[i], self.unit.shard.slices[i].numel
            grad = self.grad(i)
            if grad is None:
                raise AssertionError(f"slice {i} has no gradient to look ahead to")
            if numel == 0:
                known.looked_at = hyper
            elif known.pending is None:
                without.append((i, self._segment(i, grad, hyper, weight_out=self._back(i))))
            else:
                segment = self._segment(i, self._back(i), known.pending, weight_out=self._back(i))
                segment.next_grad, segment.next_hyper = grad, hyper
                with_commit.append((i, segment))
        self._run(adamw_commit_peek, with_commit, hypers)
        self._run(adamw_peek, without, hypers)

    def _run(self, kernel: _Kernel, numbered: _Numbered, hypers: Mapping[int, AdamWHyper]) -> None:
        if not numbered:
            return
        start = perf_counter()
        seen = kernel([segment for _, segment in numbered], stats=True, pool=self._pool) or []
        passes = Passes.of_width(self.transfer_dtype.itemsize)
        share = {adamw_peek: passes.look, adamw_commit: passes.direct}.get(kernel, 1.0)
        self._note(perf_counter() - start, numbered, share)
        for (i, _), stats in zip(numbered, seen, strict=True):
            known = self._slices[i]
            known.pending, known.looked_at, known.stats = None, hypers[i], stats

    def finish(self, hypers: Mapping[int, AdamWHyper], *, defers: bool) -> int:
        """Compute new weights of slices not applied yet nor looked at with these hyperparameters, the verdict's.

        Args:
            defers: whether to leave gradients to be committed later; if not, those are applied at once before whose
                slices no other gradient is pending.

        Returns:
            number of slices that had been looked at with others.
        """
        slices = self._slices
        redo = {i: hyper for i, hyper in hypers.items() if not slices[i].is_applied and slices[i].looked_at != hyper}
        if not redo:
            return 0
        num_redone = sum(slices[i].looked_at is not None for i in redo)
        at_once = {} if defers else {i: hyper for i, hyper in redo.items() if slices[i].pending is None}
        self.look_ahead({i: hyper for i, hyper in redo.items() if i not in at_once})
        self._apply(at_once)
        return num_redone

    def _apply(self, hypers: Mapping[int, AdamWHyper]) -> None:
        """Step slices for good; new weights go where gradients were, unless masters are uploaded."""
        self._run(adamw_commit, self._to_apply(hypers), hypers)
        self._note_applied(hypers)

    def _to_apply(self, hypers: Mapping[int, AdamWHyper]) -> _Numbered:
        segments = []
        for i, hyper in hypers.items():
            grad = self.grad(i)
            if grad is None:
                raise AssertionError(f"slice {i} has no gradient to step with")
            if grad.numel():
                weight_out = None if self._uploads_masters else grad
                segments.append((i, self._segment(i, grad, hyper, weight_out=weight_out)))
        return segments

    def _note_applied(self, hypers: Mapping[int, AdamWHyper]) -> None:
        for i, hyper in hypers.items():
            self._slices[i].looked_at, self._slices[i].is_applied = hyper, True

    def begin(self, hypers: Mapping[int, AdamWHyper]) -> None:
        """Start to apply gradients where nothing is pending and none was looked at; `settle` waits for it.

        Waits for the gradients; the work itself is under way when this returns.
        """
        slices = self._slices
        at_once = {i: h for i, h in hypers.items() if slices[i].pending is None and slices[i].looked_at is None}
        if numbered := self._to_apply(at_once):
            ticket = submit_adamw_commit([segment for _, segment in numbered], stats=True, pool=self._pool)
            self._begun = _Begun(ticket, at_once, numbered)

    def _end_begun(self) -> None:
        if self._begun is None:
            return
        ticket, hypers, numbered = self._begun
        for (i, _), stats in zip(numbered, ticket.wait() or [], strict=True):
            self._slices[i].stats = stats
        self._note_applied(hypers)
        self._begun = None

    def settle(self, hypers: Mapping[int, AdamWHyper], *, defers: bool = True) -> tuple[list[GradStats], int]:
        """Make this step's update final: the new weights follow from `hypers`, and gradients are pending or applied.

        Args:
            defers: as in `finish`.

        Returns:
            statistics of the gradients, and the number of slices that had been looked at with other hyperparameters.
        """
        self._end_begun()
        num_redone = self.finish(hypers, defers=defers)
        seen = []
        for i, hyper in hypers.items():
            known = self._slices[i]
            if known.stats is not None:
                seen.append(known.stats)
            self._take_turns(known, i)
            known.pending = None if known.is_applied else hyper
            known.arrival = known.looked_at = known.stats = None
            known.is_in_master = known.is_applied and self._uploads_masters
            known.is_applied = False
        return seen, num_redone

    def _take_turns(self, known: _Slice, i: int) -> None:
        if not known.is_applied:
            known.front, known.back = known.back, known.front  # now `front` has the new weights, `back` the gradient
        if known.resting is not None and self.flowing is not None:
            known.front, known.resting = known.resting, known.front
            self.flowing.switch(i, known.resting)

    def sumsq(self) -> float:
        """Sum of squares of this step's gradients, scaled as expected, of the slices that were looked at."""
        return sum(known.stats.sumsq for known in self._slices if known.stats is not None)

    def is_pending(self) -> bool:
        """Whether a gradient waits for its commit, so that masters and moments are behind the last settled step."""
        return any(known.pending is not None for known in self._slices)

    def flush(self) -> None:
        """Commit pending gradients, so that masters and moments are those of the last settled step."""
        self._flush(range(len(self._slices)))

    def _flush(self, slices: Sequence[int]) -> None:
        segments = []
        for i in slices:
            known = self._slices[i]
            if known.pending is not None and self.unit.shard.slices[i].numel:
                segments.append((i, self._segment(i, self._back(i), known.pending, weight_out=None)))
        if segments:
            self._commit(segments)
        for i in slices:
            self._slices[i].pending = None

    def _commit(self, numbered: _Numbered) -> None:
        start = perf_counter()
        adamw_commit([segment for _, segment in numbered], pool=self._pool)
        share = Passes.of_width(self.transfer_dtype.itemsize).commit
        self._note(perf_counter() - start, numbered, share)

    def _note(self, seconds: float, numbered: _Numbered, share: float) -> None:
        """Note what a pass took, whose memory traffic is this share of one that commits and looks."""
        self._worked_seconds += seconds
        self._worked_params += share * sum(segment.param.numel() for _, segment in numbered)

    def take_work(self) -> tuple[float, float]:
        """Seconds of the passes since the last call, and the parameters that could have been committed and looked at.

        Call it while no pass is under way.
        """
        work = (self._worked_seconds, self._worked_params)
        self._worked_seconds = self._worked_params = 0.0
        return work

    def _segment(self, i: int, grad: Tensor, hyper: AdamWHyper, *, weight_out: Tensor | None) -> AdamWSegment:
        return AdamWSegment(
            param=self._span(self.master, i),
            exp_avg=self._span(self.exp_avg, i),
            exp_avg_sq=self._span(self.exp_avg_sq, i),
            grad=grad,
            hyper=hyper,
            weight_out=weight_out,
            rounding=self.rounding_of(i),
            compensation=None if self.compensation is None else self._span(self.compensation, i),
        )

    def _span(self, flat: Tensor, i: int) -> Tensor:
        piece = self.unit.shard.slices[i]
        return flat[piece.offset : piece.offset + piece.numel]

    def _back(self, i: int) -> Tensor:
        """Slice i of the buffer that holds the pending gradient, and then the new weights; 1D."""
        return self._span(self._buffers[self._slices[i].back], i)

    # Weights

    def bytes(self) -> Sequence[StateBytes]:
        return host_buffers(self, self.num_transfer_buffers)

    def master_of(self, i: int) -> Tensor:
        """Master weights of slice i, 1D, as of the last commit; `flush()` brings them to the last step."""
        return self._span(self.master, i)

    def view_of(self, flat: Tensor, i: int) -> Tensor:
        return view_by_rows(self.unit, flat, i)

    def rounding_of(self, i: int) -> Rounding | None:
        return self._roundings[i]

    def weight_out_of(self, i: int) -> Tensor | None:
        """Settled new weights of slice i, 1D; None if the master has them."""
        known = self._slices[i]
        if known.is_in_master:
            return None
        return self._span(self._buffers[known.front if known.resting is None else known.resting], i)

    def fence(self) -> LinkFence | None:
        """The point of the device's work after which uploads may replace its weights. Call it when backward is over."""
        return self._link.fence()

    def upload(self, stepped: Sequence[int], after: LinkFence | None = None) -> PublishEvent:
        """Send settled new weights of the stepped slices to the device. Any thread may call it.

        Args:
            after: the point that `fence` returned, which the copies wait for.
        """
        # A late upload of weights that flow lands in memory that is allocated late: its fence is the one of then.
        fence = after if self.flowing is None else None
        return way_of_weights(self.flowing, lambda: self._upload(stepped, fence))

    def _upload(self, stepped: Sequence[int], after: LinkFence | None) -> list[LinkEvent]:
        with self._link.allocating():  # another thread's forward may still use memory that was freed since the fence
            inbox = self.unit.inbox()
        sources = [self._settled_weights(i) for i in stepped]
        if len(stepped) == len(self._slices) and len({id(source) for source in sources}) == 1:
            pairs = [(inbox, sources[0])]
        else:
            pairs = [(self._span(inbox, i), self._span(flat, i)) for i, flat in zip(stepped, sources, strict=True)]
        return [self._link.h2d(there, here, after) for there, here in pairs]

    def _settled_weights(self, i: int) -> Tensor:
        """The unit's flat tensor on the host that has slice i's settled new weights, which don't flow."""
        known = self._slices[i]
        return self.master if known.is_in_master else self._buffers[known.front]

    def reload(self, slices: Sequence[int]) -> None:
        self._flush(slices)
        for i in slices:
            self._slices[i].looked_at = None
            weights = weights_on_host(self.unit, i, self.flowing, self._link)
            if self.compensation is not None:
                forget_lost(self._span(self.compensation, i), weights, self.master_of(i))
            follow_weights(self.master_of(i), weights)

    def release(self) -> None:
        self.clear_grads()
