"""Bucket transport (ZeRO-0/1/2): plain parameters that view flat buffers, gradients taken by post-accumulate hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_superscale.comm.collectives import Pending
from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.bucketing import Grouping, NamedParam
from lightning_superscale.optim.grad_dtypes import AS_WEIGHTS, GradientDtypes
from lightning_superscale.optim.transport import IsScaling
from lightning_superscale.optim.unit import DeltaSink, GradientDelta, PublishEvent, ShardUnit, check_dense
from lightning_superscale.zero.buckets.all_gather import LateGathers
from lightning_superscale.zero.buckets.unit import BucketUnit
from lightning_superscale.zero.grad_schedule import Flag
from lightning_superscale.zero.grads_in_param import HeldGradients
from lightning_superscale.zero.reducer import GradientReducer


class _Gather(NamedTuple):
    """New weights under way from the other ranks.

    Attributes:
        packed: the stepped weights to unpack once they are there; empty where they arrive in place.
    """

    pending: Pending
    packed: Sequence[int]


class BucketTransport:
    """Carries the gradients of one optimizer's parameters to a sink, and new weights back.

    Gradients are either *held*: they stay in `param.grad`, as in plain PyTorch, until `collect()`; or
    *streamed*: each leaves `param.grad` as soon as its unit is complete in the last backward of a step.

    Args:
        named_params: trainable parameters without duplicates, in registration order.
        grouping: which parameters share a unit.
        sink: receives every delta.
        ranks: the other ranks.
        label: names the optimizer in errors.
        no_sync: micro-batches before the last of a step accumulate in `param.grad`, so that ranks talk once
            per step; False reduces each, so that no rank holds whole gradients between them.
        dtypes: of gradients on their way to other ranks.
        streams_to: the device of parameters whose weights stream (`Grouping.block_of`).
    """

    def __init__(
        self,
        named_params: Sequence[tuple[str, nn.Parameter]],
        *,
        grouping: Grouping,
        sink: DeltaSink,
        ranks: Communicator,
        label: str = "optimizer",
        no_sync: bool = True,
        dtypes: GradientDtypes = AS_WEIGHTS,
        streams_to: torch.device | None = None,
    ) -> None:
        self.grouping = grouping
        self._streams_to = streams_to
        self._sink = sink
        self._dtypes = dtypes
        self._ranks = ranks
        self._label = label
        self._no_sync = no_sync or self.is_local
        self._reducer = GradientReducer(ranks, label, sink, dtypes)
        self._held = HeldGradients(ranks, label, dtypes)
        self._place: dict[nn.Parameter, tuple[BucketUnit, int]] = {}
        self._hooks: dict[nn.Parameter, RemovableHandle] = {}
        self._observed: dict[nn.Parameter, None] = {}
        self._is_streamed = False
        self._is_blocked = False
        self._holding = Flag()
        # Per unit, on one rank: gradients that wait for the rest of their unit, and which were sent this step. The
        # rest is whatever the last step had: an unused parameter doesn't hold its unit back.
        self._waiting: dict[int, dict[int, Tensor]] = {}
        self._sent: dict[int, set[int]] = {}
        self._expected: dict[int, set[int]] = {}
        self._uploads: dict[int, PublishEvent] = {}
        self._gathers: dict[int, _Gather] = {}
        self._late_gathers = LateGathers(ranks.gather)
        self.units: list[BucketUnit] = []
        self.add_params(named_params)

    @property
    def is_local(self) -> bool:
        return self._ranks.mesh.is_single

    @property
    def observed(self) -> Sequence[nn.Parameter]:
        return tuple(self._observed)

    def units_of(self, named_params: Sequence[NamedParam], grouping: Grouping) -> list[list[NamedParam]]:
        return grouping.units_of(named_params)

    def add_params(self, named_params: Sequence[NamedParam]) -> list[BucketUnit]:
        axis = self._ranks.mesh.shard
        added = []
        for members in self.units_of(named_params, self.grouping):
            streams_to = self._streams_to if members[0][1] in self.grouping.block_of else None
            memory = self._ranks.mesh.memory
            unit = BucketUnit(len(self.units), members, axis.rank, axis.size, memory, streams_to=streams_to)
            self.units.append(unit)
            self._reducer.add_unit(unit)
            added.append(unit)
            self._held.follow(unit.params)
            for i, param in enumerate(unit.params):
                self._place[param] = (unit, i)
                if self._is_streamed:
                    self._hook(param)
        return added

    def regroup(self, grouping: Grouping) -> None:
        self.wait_all_published()
        self.grouping = grouping
        self.units = []
        self._place = {}
        self._expected = {}
        self._reducer = GradientReducer(self._ranks, self._label, self._sink, self._dtypes)

    def place_of(self, param: nn.Parameter) -> tuple[BucketUnit, int] | None:
        """The unit of a parameter and its index there, or None when no unit holds it."""
        return self._place.get(param)

    # Gradients

    def stream(self) -> None:
        """From now on, take gradients during the last backward of a step rather than at the step."""
        self._is_streamed = True
        for param in self._place:
            self._hook(param)

    def watch_edits(self, is_scaling: IsScaling | None = None) -> None:
        """Refuse, at the step, held gradients that somebody changed in place: they are only this rank's share."""
        if not self.is_local or is_scaling is not None:
            self._held.watch(self._place, is_scaling)

    def _hook(self, param: nn.Parameter) -> None:
        if param not in self._hooks:
            self._hooks[param] = param.register_post_accumulate_grad_hook(self._on_grad)  # type: ignore[no-untyped-call]

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """While open, more micro-batches of the step follow.

        With no_sync, gradients accumulate in `param.grad`; without, and streamed, they are reduced before
        this returns, so that every rank calls it.
        """
        before, self._is_blocked = self._is_blocked, self._no_sync
        try:
            yield
        finally:
            self._is_blocked = before
        if not self._no_sync and self._is_streamed:
            self._collect_over_ranks()

    def holding(self) -> AbstractContextManager[None]:
        return self._holding.raised()

    def _on_grad(self, param: nn.Parameter) -> None:
        self._late_gathers.issue_all()
        if self._is_blocked or self._holding:
            return
        self._observed.setdefault(param)
        unit, i = self._place[param]
        grad = self._take(unit, i)
        if not self.is_local:
            self._reducer.put(unit, i, grad)
            self._reducer.launch_complete()
            return
        if unit.index in self._sent:
            # A second backward of this step, a block used again by a reentrant checkpoint, or one that nobody expected.
            self._sent[unit.index].add(i)
            self._sink(GradientDelta(unit, [(i, grad)]))
            return
        waiting = self._waiting.setdefault(unit.index, {})
        if i in waiting:
            waiting[i].add_(grad)
        else:
            waiting[i] = grad
        if self._expected.get(unit.index, set(range(len(unit.params)))) <= waiting.keys():
            self._send(unit)

    def _take(self, unit: BucketUnit, i: int) -> Tensor:
        param = unit.params[i]
        grad = param.grad
        if grad is None:
            raise AssertionError(f"no gradient to take from {unit.full.slices[i].fqn}")
        check_dense(unit.full.slices[i].fqn, grad)
        param.grad = None
        return grad.detach().reshape(-1)

    def _send(self, unit: BucketUnit) -> None:
        waiting = self._waiting.pop(unit.index)
        self._sent[unit.index] = set(waiting)
        self._sink(GradientDelta(unit, sorted(waiting.items())))

    def average_held(self) -> None:
        """Make held gradients what every rank would see under DDP: averages. Every rank calls it after backward."""
        if not self.is_local and not self._is_streamed:
            self._late_gathers.issue_all()
            self._held.average(self.units)

    def collect(self) -> None:
        """Send what the step still lacks: held gradients, and units of which only a part arrived.

        Held gradients stay visible in `param.grad` until the user's `zero_grad()`, as in plain PyTorch.
        """
        if self.is_local:
            for unit in self.units:
                if unit.index in self._waiting:
                    self._send(unit)
                slices = self._left_in_params(unit)
                if slices:
                    self._sink(GradientDelta(unit, slices))
            self._expected, self._sent = self._sent, {}
        elif self._held.is_averaged:
            self._held.hand_over(self.units, self._sink)
        else:
            self._collect_over_ranks()

    def _collect_over_ranks(self) -> None:
        self._late_gathers.issue_all()
        error: SuperScaleError | None = None
        try:
            for unit in self.units:
                for i, grad in self._left_in_params(unit):
                    self._reducer.put(unit, i, grad)
        except SuperScaleError as found:
            error = found  # the other ranks are on their way into the agreement
        self._reducer.finish(error)

    def _left_in_params(self, unit: BucketUnit) -> list[tuple[int, Tensor]]:
        slices = []
        for i, param in enumerate(unit.params):
            if param.grad is None:
                continue
            if self._is_streamed:
                slices.append((i, self._take(unit, i)))
            else:
                check_dense(unit.full.slices[i].fqn, param.grad)
                self._held.check(param, unit.full.slices[i].fqn)
                slices.append((i, param.grad.detach().reshape(-1)))
        return slices

    def discard(self) -> None:
        """Forget gradients of an interrupted step."""
        self._waiting.clear()
        self._sent.clear()
        self._reducer.discard()
        self._held.discard()

    # Weights

    def publish(self, unit: ShardUnit, event: PublishEvent | None, stepped: Sequence[int]) -> None:
        """Note that new weights are on their way into `unit.weights`; gather them from the ranks that hold them."""
        bucket = self.units[unit.index]
        bucket.mark_stepped(stepped)
        if bucket.is_whole:
            if event is not None:
                self._uploads[bucket.index] = event
        elif event is not None:
            self._late_gathers.add(bucket, event, stepped)
        elif self._ranks.shard.gathers_rows:
            self._gathers[bucket.index] = _Gather(self._ranks.shard.all_gather_rows(bucket.rows_of_ranks()), ())
        else:
            bucket.pack_rows(stepped)
            self._gathers[bucket.index] = _Gather(self._ranks.shard.all_gather(bucket.gathered()), stepped)

    def is_published(self, unit: ShardUnit) -> bool:
        """Whether waiting for new weights that the host makes would return at once."""
        upload = self._uploads.get(unit.index)
        return (upload is None or upload.is_ready()) and not self._late_gathers.holds(self.units[unit.index])

    def wait_published(self, units: Iterable[ShardUnit]) -> None:
        """Return when whatever runs next sees the new weights of these units."""
        for unit in units:
            self.land(self.units[unit.index])
            self.units[unit.index].leave_unused()

    def land(self, unit: BucketUnit) -> None:
        """The same for one unit, which is used next: weights that stream may be on the device already."""
        upload = self._uploads.pop(unit.index, None)
        if upload is not None:
            upload.wait()
        gather = self._gathers.pop(unit.index, None)
        if gather is not None:
            gather.pending.wait()
            if gather.packed:
                unit.unpack_gathered(gather.packed)
        self._late_gathers.wait(unit)

    def begin_gather(self, unit: BucketUnit) -> None:
        """A unit is used soon: let its new rows come from the other ranks, if this rank's are there."""
        self._late_gathers.begin(unit)

    def wait_all_published(self) -> None:
        self.wait_published(self.units)

    def abandon(self) -> None:
        """Stop waiting for other ranks: one of them failed, and what is under way may never arrive."""
        self.discard()
        self._gathers.clear()
        self._late_gathers.clear()

    def close(self) -> None:
        """Remove every hook and give parameters their own storage back."""
        self.wait_all_published()
        self._held.close()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        for unit in self.units:
            unit.release()
        self._ranks.mesh.memory.clear()
