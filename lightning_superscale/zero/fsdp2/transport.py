"""FSDP2 transport (ZeRO-3): parameters are sharded by rows; FSDP2 gathers them, this file moves all else.

Parameters that FSDP2 can't take stay whole in buckets. A bucket transport carries those; both transports share one
reducer and one schedule, so that what ranks reduce has one order, whichever kind of unit it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from operator import attrgetter

from torch import Tensor, nn

from lightning_superscale.comm.collectives import local_grad
from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.comm.dtensor import local_rows_of
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.bucketing import Grouping, NamedParam
from lightning_superscale.optim.grad_dtypes import AS_WEIGHTS, GradientDtypes
from lightning_superscale.optim.transport import IsScaling
from lightning_superscale.optim.unit import DeltaSink, GradientDelta, PublishEvent, ShardUnit, check_dense
from lightning_superscale.optim.weights.store import Incoming
from lightning_superscale.zero.buckets.transport import BucketTransport, SharedParts
from lightning_superscale.zero.fsdp2.accumulated_grads import UnshardedGrads, lost_gradients
from lightning_superscale.zero.fsdp2.gather_order import OrderDeparted
from lightning_superscale.zero.fsdp2.grouping import fsdp2_units_of, split_by_kind
from lightning_superscale.zero.fsdp2.module import ShardedModule
from lightning_superscale.zero.fsdp2.unit import Fsdp2Unit
from lightning_superscale.zero.grad_schedule import Departure, GradSchedule, NewGrad
from lightning_superscale.zero.reducer import GradientReducer


class Fsdp2Transport:
    """Carries the gradients of one optimizer's parameters to a sink, and new weights back.

    A gradient never stays where autograd left it, in the gathered parameter. *Streamed*, it goes to the reducer at
    once. Otherwise it waits unsharded for the step, so that `zero_grad()` between two backward calls means what it does
    in plain PyTorch; and where users may look at gradients, `average_grads()` makes `param.grad` this rank's rows
    of the average, or adds them to those of earlier backward calls, as FSDP2 would.

    Args:
        sharded: the module, already sharded; several transports may share it.
        sink: receives every delta.
        ranks: collectives and agreement with the other ranks; made after sharding, of the sharded parameters.
        grouping: decides which parameters that FSDP2 can't take share a bucket, and which states stay on the device.
        label: names the optimizer in errors.
        no_sync: micro-batches before the last of a step accumulate unsharded gradients, so that ranks talk once per
            step; False reduces each, so that no rank keeps unsharded gradients between them.
        dtypes: of gradients on their way to other ranks.
    """

    def __init__(
        self,
        sharded: ShardedModule,
        *,
        sink: DeltaSink,
        ranks: Communicator,
        grouping: Grouping,
        label: str = "optimizer",
        no_sync: bool = True,
        dtypes: GradientDtypes = AS_WEIGHTS,
    ) -> None:
        self._sharded = sharded
        self._ranks = ranks
        self._sink = sink
        self.grouping = grouping
        self._schedule = GradSchedule(no_sync=no_sync)
        self._reducer = GradientReducer(ranks, label, sink, dtypes)
        self._buckets = BucketTransport(
            [],
            grouping=grouping,
            sink=sink,
            ranks=ranks,
            label=label,
            dtypes=dtypes,
            shared=SharedParts(reducer=self._reducer, schedule=self._schedule),
        )
        self._waiting = UnshardedGrads()
        self._has_averaged_any = False
        self._place: dict[nn.Parameter, tuple[Fsdp2Unit, int]] = {}
        self._units: dict[int, Fsdp2Unit] = {}
        sharded.attach(self)

    @property
    def units(self) -> Sequence[ShardUnit]:
        return self._reducer.units

    @property
    def is_local(self) -> bool:
        return False

    @property
    def observed(self) -> Sequence[nn.Parameter]:
        return ()  # FSDP2's groups decide what travels together

    def units_of(self, named_params: Sequence[NamedParam], grouping: Grouping) -> list[list[NamedParam]]:
        sharded, plain = split_by_kind(self._sharded, named_params)
        return fsdp2_units_of(self._sharded, sharded, grouping) + self._buckets.units_of(plain, grouping)

    def add_params(self, named_params: Sequence[NamedParam]) -> list[ShardUnit]:
        axis = self._ranks.mesh.shard
        sharded, plain = split_by_kind(self._sharded, named_params)
        added: list[ShardUnit] = []
        for members in fsdp2_units_of(self._sharded, sharded, self.grouping):
            index, group = len(self._reducer.units), self._sharded.group_of(members[0][1]).index
            unit = Fsdp2Unit(index, group, members, axis.rank, axis.size)
            self._units[index] = unit
            self._reducer.add_unit(unit)
            self._place.update((param, (unit, i)) for i, param in enumerate(unit.params))
            added.append(unit)
        added += self._buckets.add_params(plain)
        self._sharded.give_to(self, (param for _, param in sharded))
        return added

    def regroup(self, grouping: Grouping) -> None:
        self.wait_all_published()
        self.grouping = grouping
        self._units = {}
        self._place = {}
        self._buckets.regroup(grouping)

    def place_of(self, param: nn.Parameter) -> tuple[ShardUnit, int] | None:
        return self._place.get(param) or self._buckets.place_of(param)

    # Gradients

    def stream(self) -> None:
        """Give gradients to the reducer during backward, from now on."""
        self._buckets.stream()

    def watch_edits(self, is_scaling: IsScaling | None = None) -> None:
        """Refuse, at the step, gradients that user code edited, or that came of unscaled losses."""
        self._waiting.watch(is_scaling)
        self._buckets.watch_edits(is_scaling)

    def blocked(self) -> AbstractContextManager[None]:
        """While open, more micro-batches of the same step follow.

        Without no_sync, streamed gradients are reduced on exit, so that every rank has to enter and leave.
        """
        return self._schedule.blocked(self._reduce)

    def holding(self) -> AbstractContextManager[None]:
        return self._schedule.holding()

    def rehearsal(self) -> AbstractContextManager[None]:
        return self._buckets.rehearsal()  # both transports share one reducer

    def take_grad(self, param: nn.Parameter, unsharded: nn.Parameter) -> None:
        """Take the gradient that backward accumulated into `unsharded`, or leave it there for the next micro-batch."""
        match self._schedule.new_grad:
            case NewGrad.LEAVES:
                self._put(param, self._taken(param, unsharded))
                self._reducer.launch_complete()
            case NewGrad.WAITS:
                self._waiting.add(param, self._taken(param, unsharded))
            case NewGrad.ACCUMULATES:
                return

    def _taken(self, param: nn.Parameter, unsharded: nn.Parameter) -> Tensor:
        grad = unsharded.grad
        if grad is None:
            raise AssertionError(f"no gradient to take from {self._fqn_of(param)}")
        check_dense(self._fqn_of(param), grad)
        unsharded.grad = None
        return local_grad(grad, unsharded)

    def _put(self, param: nn.Parameter, grad: Tensor) -> None:
        unit, i = self._place[param]
        self._reducer.put(unit, i, grad.reshape(-1))

    def average_grads(self) -> None:
        """Make `param.grad` this rank's rows of the average over ranks, as FSDP2 does, unless gradients are streamed.

        Every rank calls it after backward.
        """
        if self._schedule.is_streamed:
            return
        self._enter_step()
        is_manual = self._waiting.is_watching
        for param in () if is_manual else self._place:
            if not self._waiting.has(param):
                param.grad = None
        present = self._finish(self._error_of(self._put_sharded), sink=self._show)
        self._has_averaged_any |= bool(present & self._units.keys())
        if self._buckets.units:
            self._buckets.average_grads()
        self._sharded.order.step_agreed()
        if not is_manual:
            self._schedule.mark_averaged()

    def collect(self) -> None:
        """Send the sink the gradients that it still lacks. Every rank calls it at the step.

        Gradients that were averaged before stay in `param.grad`; others are gone afterwards.

        Raises:
            SuperScaleError: on all ranks when any refuses its gradients or ranks went apart; or no rank has a gradient,
                although the parameters' modules ran forward.
        """
        if self._schedule.departure is Departure.AVERAGED and not self._waiting.is_watching:
            self._schedule.end_step()
            self._hand_over()
            return
        self._enter_step()
        has_seen_any = self._waiting.has_seen_any or self._has_averaged_any
        self._has_averaged_any = False
        if self._waiting.is_watching:
            present = self._finish(self._error_of(self._put_sharded, self._buckets.check_left))
            if self._buckets.units:
                self._buckets.average_grads()
            self._schedule.end_step()
            self._hand_over()
        else:
            present = self._reduce()
        self._sharded.order.step_agreed()
        used = self._sharded.graphs.take_used({unit.group for unit in self._units.values()})
        if self._waiting.is_watching and used and not has_seen_any and not present & self._units.keys():
            raise lost_gradients(self._sharded.groups[min(used)].fqn)

    def _hand_over(self) -> None:
        """Give the sink this rank's rows of averages."""
        shown_of = self._waiting.shown if self._waiting.is_watching else attrgetter("grad")
        for unit in self._units.values():
            shown = [(i, grad) for i, p in enumerate(unit.params) if (grad := shown_of(p)) is not None]
            if shown:
                self._sink(GradientDelta(unit, [(i, local_rows_of(grad).reshape(-1)) for i, grad in shown]))
        self._buckets.hand_over()

    def _show(self, delta: GradientDelta) -> None:
        """A sink that puts this rank's rows of averaged gradients into `param.grad`."""
        for i, rows in delta.slices:
            self._waiting.show(delta.unit.params[i], rows, delta.unit.shard.slices[i])

    def _enter_step(self) -> None:
        try:
            self._sharded.order.enter_step()
        except OrderDeparted:
            self.discard()
            raise

    def _reduce(self) -> set[int]:
        """Reduce all gradients that are left; returns indices of units of which any rank had a gradient."""
        return self._finish(self._error_of(self._put_sharded, self._buckets.put_left))

    def _error_of(self, *puts: Callable[[], None]) -> SuperScaleError | None:
        """Call functions that give the reducer gradients; returns the error of the first that raised one, or None.

        The error is returned for the agreement to raise on all ranks: other ranks are on their way into it.
        """
        try:
            for put in puts:
                put()
        except SuperScaleError as error:
            return error
        return None

    def _finish(self, error: SuperScaleError | None, sink: DeltaSink | None = None) -> set[int]:
        return self._reducer.finish(error, order=self._sharded.order.digest(), sink=sink)

    def _put_sharded(self) -> None:
        """Give the reducer the gradients that wait, and those that lie where autograd left them.

        Raises:
            SuperScaleError: a gradient can't be used; names the parameter.
        """
        self._waiting.check(self._place, self._fqn_of, self._ranks.mesh.world.size)
        for param, grad in self._waiting.take_all():
            self._put(param, grad)
        for param in self._place:
            unsharded = self._sharded.unsharded_param(param)
            if unsharded is not None and unsharded.grad is not None:
                self._put(param, self._taken(param, unsharded))

    def _fqn_of(self, param: nn.Parameter) -> str:
        unit, i = self._place[param]
        return unit.full.slices[i].fqn

    def join_agreement(self, error: OrderDeparted) -> None:
        """Raise an error on all ranks, through the agreement of the step in which other ranks wait."""
        self._reducer.finish(error)

    def discard(self) -> None:
        """Forget the gradients of an interrupted step."""
        self._buckets.discard()
        self._waiting.clear()
        for param in filter(self._sharded.holds, self._place):  # none after the module was released
            unsharded = self._sharded.unsharded_param(param)
            if unsharded is not None:
                unsharded.grad = None

    # Weights

    def take_edits(self) -> list[nn.Parameter]:
        own = [param for unit in self._units.values() for param in unit.store.watch.take_edited()]
        return [*own, *self._buckets.take_edits()]

    def publish(self, unit: ShardUnit, event: PublishEvent | None, stepped: Sequence[int]) -> None:
        """Reshard the unit's group and let its store wait for the new rows, or gather the unit if it is a bucket.

        Every rank calls it for the same units in the same order.
        """
        own = self._units.get(unit.index)
        if own is None:
            self._buckets.publish(unit, event, stepped)
            # Buckets are few and small, and any module may read them, so no gather is left under way.
            self._buckets.wait_published([unit])
            return
        self._sharded.reshard(own.group, [own.params[i] for i in stepped])
        if event is not None:
            own.store.receive(Incoming(event, partial(own.take_inbox, stepped)))

    def wait_published(self, units: Iterable[ShardUnit]) -> None:
        """Return when gathers that are queued from now on read the new rows of these units; buckets have theirs."""
        for unit in units:
            own = self._units.get(unit.index)
            if own is not None:
                own.store.wait_new()

    def wait_uploads(self, group: int) -> bool:
        """Bring new rows of a group's units to where its gather reads them; returns whether there were any."""
        waited = [unit.store.wait_new() for unit in self._units.values() if unit.group == group]
        return any(waited)

    def wait_all_published(self) -> None:
        self.wait_published(self.units)

    def released(self, plain: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Look parameters up by the plain ones that replaced them: states stay sharded after training ends."""
        self._place = {plain.get(param, param): place for param, place in self._place.items()}

    def abandon(self) -> None:
        """Stop waiting for other ranks, since one of them failed and weights under way may never arrive."""
        self.discard()
        self._buckets.abandon()
        for unit in self._units.values():
            unit.store.abandon()

    def close(self) -> None:
        """Remove every hook; with the last transport of the module, its parameters become plain and whole again.

        Also where weights under way have failed, which is raised then.
        """
        with ExitStack() as rest:
            rest.callback(self._give_back)
            for unit in reversed(self.units):
                rest.callback(self.wait_published, [unit])

    def _give_back(self) -> None:
        self._waiting.clear()
        self._buckets.close()
        for unit in self._units.values():
            unit.store.close()
        self._sharded.detach(self)
