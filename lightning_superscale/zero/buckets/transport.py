"""Bucket transport (ZeRO-0/1/2): plain parameters that view flat buffers, gradients taken by post-accumulate hooks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.bucketing import Grouping, NamedParam
from lightning_superscale.optim.grad_dtypes import AS_WEIGHTS, GradientDtypes
from lightning_superscale.optim.transport import IsScaling
from lightning_superscale.optim.unit import DeltaSink, PublishEvent, ShardUnit, check_dense, flattened
from lightning_superscale.optim.weights.store import Incoming, Uploaded
from lightning_superscale.zero.buckets.all_gather import Gathers, gathers_for
from lightning_superscale.zero.buckets.unit import BucketUnit
from lightning_superscale.zero.grad_schedule import Departure, GradSchedule, NewGrad
from lightning_superscale.zero.grads_in_param import GradsInParam
from lightning_superscale.zero.manual_averages import ManualAverages
from lightning_superscale.zero.reducer import Reducer, reducer_for


class SharedParts(NamedTuple):
    """What several transports have in common; None for a part of a transport's own.

    Attributes:
        reducer: of transports of the same optimizer.
        schedule: of such transports.
        gathers: of all transports of a run.
    """

    reducer: Reducer | None = None
    schedule: GradSchedule | None = None
    gathers: Gathers | None = None


NOTHING_SHARED = SharedParts()


class BucketTransport:
    """Carries the gradients of one optimizer's parameters to a sink, and new weights back.

    Gradients either stay in `param.grad`, as in plain PyTorch, until `collect()`; or they are *streamed*: each leaves
    `param.grad` as soon as the last backward of a step has made it, and its unit is reduced once complete.

    Args:
        named_params: trainable parameters without duplicates, in registration order.
        grouping: decides which parameters share a unit.
        sink: receives every delta.
        ranks: collectives with the other ranks, and the agreement with them.
        label: names the optimizer in errors.
        no_sync: micro-batches before the last of a step accumulate in `param.grad`, so that ranks talk once
            per step; False reduces each, so that no rank keeps unsharded gradients between them.
        dtypes: of gradients on their way to other ranks.
        streams_to: the device of parameters whose weights stream (`Grouping.block_of`).
        shared: what other transports share with this one.

    Attributes:
        units: the buckets, in the order of their indices, which skip those of the other transport's units.
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
        shared: SharedParts = NOTHING_SHARED,
    ) -> None:
        self.grouping = grouping
        self._streams_to = streams_to
        self._sink = sink
        self._ranks = ranks
        self._reducer = shared.reducer or reducer_for(ranks, label, sink, dtypes)
        self._schedule = shared.schedule or GradSchedule(no_sync=no_sync or self.is_local)
        self._in_param = GradsInParam(ranks, label, dtypes)
        self._label, self._num_steps = label, 0
        self._averages: ManualAverages | None = None
        self._place: dict[nn.Parameter, tuple[BucketUnit, int]] = {}
        self._hooks: dict[nn.Parameter, RemovableHandle] = {}
        self._observed: dict[nn.Parameter, None] = {}
        self._late_gathers = shared.gathers or gathers_for(ranks, are_late=bool(grouping.block_of))
        self._late_gathers.join()
        self._of_index: dict[int, BucketUnit] = {}
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
            index = len(self._reducer.units)
            unit = BucketUnit(index, members, axis.rank, axis.size, memory, streams_to=streams_to)
            self.units.append(unit)
            self._of_index[index] = unit
            self._reducer.add_unit(unit)
            added.append(unit)
            self._in_param.follow(unit.params)
            for i, param in enumerate(unit.params):
                self._place[param] = (unit, i)
                if self._schedule.is_streamed:
                    self._hook(param)
        return added

    def regroup(self, grouping: Grouping) -> None:
        self.wait_all_published()
        self.grouping = grouping
        self.units = []
        self._of_index = {}
        self._place = {}
        self._reducer.forget_units()

    def place_of(self, param: nn.Parameter) -> tuple[BucketUnit, int] | None:
        """The unit of a parameter and the parameter's index there, or None when no unit holds it."""
        return self._place.get(param)

    # Gradients

    def stream(self) -> None:
        """From now on, take gradients during the last backward of a step rather than at the step."""
        self._schedule.stream()
        for param in self._place:
            self._hook(param)

    def watch_edits(self, is_scaling: IsScaling | None = None) -> None:
        """Refuse, at the step, gradients that user code changed in place: they are only this rank's share.

        On one rank only gradients of losses that were not scaled are refused, if `is_scaling` is given.
        """
        if not self.is_local or is_scaling is not None:
            self._in_param.watch(self._place, is_scaling)

    def average_with(self, averages: ManualAverages) -> None:
        """Let ranks average gradients after each manual backward, together with those of other optimizers."""
        self._averages = averages
        averages.add(self)

    def _hook(self, param: nn.Parameter) -> None:
        """Take a parameter's gradients during backward from now on; one that is frozen, from its first gradient on."""
        if param not in self._hooks and param.requires_grad:
            self._hooks[param] = param.register_post_accumulate_grad_hook(self._on_grad)  # type: ignore[no-untyped-call]

    def blocked(self) -> AbstractContextManager[None]:
        """While open, more micro-batches of the step follow.

        With no_sync, gradients accumulate in `param.grad`; without, and streamed, they are reduced on exit, so that
        every rank has to enter and leave.
        """
        return self._schedule.blocked(self._reduce)

    def holding(self) -> AbstractContextManager[None]:
        return self._schedule.holding()

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        observed = dict(self._observed)
        try:
            with self._reducer.rehearsal():
                yield
        finally:
            self._observed = observed

    def _on_grad(self, param: nn.Parameter) -> None:
        self._late_gathers.issue_all()
        if self._schedule.new_grad is not NewGrad.LEAVES:
            return
        self._observed.setdefault(param)
        unit, i = self._place[param]
        self._reducer.put(unit, i, self._take(unit, i))
        self._reducer.launch_complete()

    def _take(self, unit: BucketUnit, i: int) -> Tensor:
        param = unit.params[i]
        grad = param.grad
        if grad is None:
            raise AssertionError(f"no gradient to take from {unit.full.slices[i].fqn}")
        check_dense(unit.full.slices[i].fqn, grad)
        param.grad = None
        return flattened(grad.detach(), unit.full.slices[i].spec)

    def average_grads(self) -> None:
        """Make gradients in `param.grad` averages over ranks, as DDP does, unless they are streamed.

        Every rank calls it after backward.
        """
        if not self.is_local and not self._schedule.is_streamed:
            self._late_gathers.issue_all()
            self._in_param.average(self.units)
            self._schedule.mark_averaged()

    def mark_shares(self, flags: Tensor) -> None:
        """Set the flags of parameters whose gradient is this rank's share.

        Raises:
            SuperScaleError: a gradient is sparse; names the parameter.
        """
        self._late_gathers.issue_all()
        for unit in self.units:
            for param, piece in zip(unit.params, unit.full.slices, strict=True):
                if param.grad is not None:
                    check_dense(piece.fqn, param.grad)
        self._in_param.mark_shares(self.units, flags)

    def average_marked(self, agreed: Tensor) -> None:
        """Overwrite the gradients of parameters with a flag with averages over ranks. Every rank calls it."""
        self._in_param.average_marked(self.units, agreed)

    def collect(self) -> None:
        """Send the sink the gradients that it still lacks: those in `param.grad`, and those of incomplete units.

        Gradients that are not streamed stay in `param.grad` until the user's `zero_grad()`, as in plain PyTorch. Every
        rank calls it.
        """
        if self._schedule.departure is Departure.AVERAGED:
            self._schedule.end_step()
            self.hand_over()
        elif self._averages is not None:
            self._collect_averages(self._averages)
        else:
            self._reduce()

    def _collect_averages(self, averages: ManualAverages) -> None:
        """Hand over averages, and reduce what no manual backward has averaged."""
        self._num_steps += 1
        agreed = averages.before_step(f"step {self._num_steps - 1} of {self._label}").tolist()
        shares = {param for unit in self.units for param in unit.params if agreed[self._ranks.flag_of[param]]}
        self._reduce(shares)
        self._in_param.hand_over(self.units, self._sink, but=shares)

    def hand_over(self) -> None:
        """Give the sink this rank's rows of averaged gradients. Every rank calls it."""
        self._in_param.hand_over(self.units, self._sink)

    def _reduce(self, shares: Collection[nn.Parameter] | None = None) -> None:
        """Reduce the gradients of all parameters that have any, or of some parameters."""
        error: SuperScaleError | None = None
        try:
            self.put_left(shares)
        except SuperScaleError as found:
            error = found  # the agreement raises it on all ranks: the others are on their way into it
        self._reducer.finish(error)

    def put_left(self, shares: Collection[nn.Parameter] | None = None) -> None:
        """Give the reducer the gradients that are still in `param.grad`.

        Args:
            shares: the parameters whose gradients it gets; None for all.

        Raises:
            SuperScaleError: a gradient can't be used; names the parameter.
        """
        self._late_gathers.issue_all()
        for unit in self.units:
            for i, grad in self._left_in_params(unit):
                if shares is None or unit.params[i] in shares:
                    self._reducer.put(unit, i, grad)

    def check_left(self) -> None:
        """Check the gradients that are still in `param.grad`.

        Raises:
            SuperScaleError: a gradient can't be used; names the parameter.
        """
        for unit in self.units:
            self._left_in_params(unit)

    def _left_in_params(self, unit: BucketUnit) -> list[tuple[int, Tensor]]:
        slices = []
        for i, param in enumerate(unit.params):
            if param.grad is None:
                continue
            if self._schedule.is_streamed:
                self._hook(param)
                slices.append((i, self._take(unit, i)))
            else:
                check_dense(unit.full.slices[i].fqn, param.grad)
                self._in_param.check(param, unit.full.slices[i].fqn)
                slices.append((i, flattened(param.grad.detach(), unit.full.slices[i].spec)))
        return slices

    def discard(self) -> None:
        """Forget the gradients of an interrupted step."""
        self._reducer.discard()
        self._schedule.end_step()

    # Weights

    def take_edits(self) -> list[nn.Parameter]:
        return [param for unit in self.units for param in unit.take_edits()]

    def publish(self, unit: ShardUnit, event: PublishEvent | None, stepped: Sequence[int]) -> None:
        """Start or queue the gather of the stepped weights, and hand the unit's store what it has to wait for.

        Every rank calls it for the same units in the same order.
        """
        bucket = self._of_index[unit.index]
        self._start_publishing(bucket, event, stepped)
        if bucket.is_aliased:
            bucket.store.wait_new()  # a view that user code keeps can't wait

    def _start_publishing(self, bucket: BucketUnit, event: PublishEvent | None, stepped: Sequence[int]) -> None:
        bucket.mark_stepped(stepped)
        if bucket.is_whole:
            if event is not None:
                bucket.store.receive(Uploaded(event))
        elif event is not None:
            bucket.store.receive(self._late_gathers.add(bucket, event, stepped))
        elif self._ranks.shard.gathers_rows:
            pending = self._ranks.shard.all_gather_rows(bucket.rows_of_ranks())
            bucket.store.receive(Incoming(pending, lambda: None))  # each row arrives where forward reads it
        else:
            bucket.pack_rows(stepped)
            pending = self._ranks.shard.all_gather(bucket.gathered())
            bucket.store.receive(Incoming(pending, partial(bucket.unpack_gathered, stepped)))

    def wait_published(self, units: Iterable[ShardUnit]) -> None:
        """Return when work that is queued from now on sees the new weights of these units."""
        for unit in units:
            self._of_index[unit.index].store.wait_new()

    def wait_all_published(self) -> None:
        self.wait_published(self.units)

    def abandon(self) -> None:
        """Stop waiting for other ranks, since one of them failed and weights under way may never arrive."""
        self.discard()
        for unit in self.units:
            unit.store.abandon()

    def close(self) -> None:
        """Remove every hook and give parameters their own storage back, also where weights under way have failed."""
        with ExitStack() as rest:
            rest.callback(self._give_back)
            for unit in reversed(self.units):
                rest.callback(self.wait_published, [unit])

    def _give_back(self) -> None:
        self._late_gathers.close()
        self._in_param.close()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        for unit in self.units:
            unit.release()
        self._ranks.mesh.memory.clear()
