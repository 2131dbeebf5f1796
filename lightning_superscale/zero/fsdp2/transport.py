"""FSDP2 transport (ZeRO-3): parameters live in row shards; FSDP2 gathers them, this page moves everything else.

Parameters that FSDP2 can't take stay whole in buckets, as in the bucket transport, and share its reducer: what ranks
reduce has one order, whichever kind of unit it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_superscale.comm.collectives import local_grad
from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.comm.dtensor import local_rows_of
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.bucketing import Grouping, NamedParam
from lightning_superscale.optim.grad_dtypes import AS_WEIGHTS, GradientDtypes
from lightning_superscale.optim.transport import IsScaling
from lightning_superscale.optim.unit import DeltaSink, GradientDelta, PublishEvent, ShardUnit, check_dense
from lightning_superscale.zero.buckets.unit import BucketUnit
from lightning_superscale.zero.fsdp2.accumulated_grads import HeldWholes, lost_gradients, show_rows
from lightning_superscale.zero.fsdp2.gather_order import OrderDeparted
from lightning_superscale.zero.fsdp2.grouping import fsdp2_units_of
from lightning_superscale.zero.fsdp2.module import ShardedModule
from lightning_superscale.zero.fsdp2.unit import Fsdp2Unit
from lightning_superscale.zero.grad_schedule import Flag
from lightning_superscale.zero.grads_in_param import HeldGradients
from lightning_superscale.zero.reducer import GradientReducer


class _Upload(NamedTuple):
    """New weights on their way into a unit's inbox."""

    event: PublishEvent
    stepped: Sequence[int]


class Fsdp2Transport:
    """Carries the gradients of one optimizer's parameters to a sink, and new weights back.

    A gradient never stays where autograd left it, in the gathered parameter. *Streamed*, it goes to the reducer at
    once. *Held*, it waits whole for the step, so that `zero_grad()` between two backward calls means what it does
    in plain PyTorch; and where users may look at gradients, `average_held()` makes `param.grad` this rank's rows
    of the average, as FSDP2 would.

    Args:
        sharded: the module, already sharded; several transports may share it.
        ranks: made after sharding, from the module's parameters of then.
        grouping: which parameters share a bucket, of those that FSDP2 can't take, and which stay on the device.
        no_sync: micro-batches before the last of a step accumulate whole gradients, so that ranks talk once per step;
            False reduces each, so that no rank holds whole gradients between them.
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
        self._label = label
        self.grouping = grouping
        self._no_sync = no_sync
        self._sink = sink
        self._dtypes = dtypes
        self._reducer = GradientReducer(ranks, label, self._deliver, dtypes)
        self._held = HeldWholes()
        self._held_plain = HeldGradients(ranks, label, dtypes)
        self._is_streamed = False
        self._is_manual = False
        self._is_scaling: IsScaling | None = None
        self._is_averaging = False
        self._is_averaged = False
        self._place: dict[nn.Parameter, tuple[Fsdp2Unit | BucketUnit, int]] = {}
        self._is_blocked = False
        self._holding = Flag()
        self._hooks: dict[nn.Parameter, RemovableHandle] = {}
        self._uploads: dict[int, _Upload] = {}
        self.units: list[Fsdp2Unit | BucketUnit] = []
        sharded.attach(self)

    @property
    def is_local(self) -> bool:
        return False

    @property
    def observed(self) -> Sequence[nn.Parameter]:
        return ()  # FSDP2's groups decide what travels together

    def units_of(self, named_params: Sequence[NamedParam], grouping: Grouping) -> list[list[NamedParam]]:
        return fsdp2_units_of(self._sharded, named_params, grouping)

    def add_params(self, named_params: Sequence[NamedParam]) -> list[Fsdp2Unit | BucketUnit]:
        axis = self._ranks.mesh.shard
        added: list[Fsdp2Unit | BucketUnit] = []
        for members in self.units_of(named_params, self.grouping):
            index, first = len(self.units), members[0][1]
            if self._sharded.holds(first):
                group = self._sharded.group_of(first).index
                added.append(self._add(Fsdp2Unit(index, group, members, axis.rank, axis.size)))
            else:
                added.append(self._add(BucketUnit(index, members, axis.rank, axis.size, self._ranks.mesh.memory)))
        for unit in added:
            self._listen(unit)
        return added

    def regroup(self, grouping: Grouping) -> None:
        self.wait_all_published()
        self.grouping = grouping
        self.units = []
        self._place = {}
        self._reducer = GradientReducer(self._ranks, self._label, self._deliver, self._dtypes)

    def _add(self, unit: Fsdp2Unit | BucketUnit) -> Fsdp2Unit | BucketUnit:
        self.units.append(unit)
        self._reducer.add_unit(unit)
        for i, param in enumerate(unit.params):
            self._place[param] = (unit, i)
        return unit

    def _listen(self, unit: Fsdp2Unit | BucketUnit) -> None:
        if isinstance(unit, Fsdp2Unit):
            self._sharded.give_to(self, unit.params)
            return
        self._held_plain.follow(unit.params)
        for param in unit.params:
            if param not in self._hooks:
                self._hooks[param] = param.register_post_accumulate_grad_hook(self._on_plain_grad)  # type: ignore[no-untyped-call]

    def place_of(self, param: nn.Parameter) -> tuple[ShardUnit, int] | None:
        return self._place.get(param)

    # Gradients

    def stream(self) -> None:
        """From now on, give gradients to the reducer during backward."""
        self._is_streamed = True

    def watch_edits(self, is_scaling: IsScaling | None = None) -> None:
        """Refuse edits of held gradients at the step; sharded ones can't be edited before they are averaged."""
        self._is_manual, self._is_scaling = True, is_scaling
        self._held_plain.watch((p for bucket in self._buckets() for p in bucket.params), is_scaling)

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """While open, more micro-batches follow; without no_sync, and streamed, every rank calls it and reduces."""
        before, self._is_blocked = self._is_blocked, self._no_sync
        try:
            yield
        finally:
            self._is_blocked = before
        if not self._no_sync and self._is_streamed:
            self._reduce()

    def holding(self) -> AbstractContextManager[None]:
        return self._holding.raised()

    def _on_plain_grad(self, param: nn.Parameter) -> None:
        if self._is_streamed and not self._is_blocked and not self._holding:
            self.take_grad(param, param)

    def take_grad(self, param: nn.Parameter, whole: nn.Parameter) -> None:
        if not self._is_streamed or self._holding:
            self._held.hold(param, self._taken(param, whole), is_scaled=not self._is_scaling or self._is_scaling())
        elif not self._is_blocked:
            self._put(param, self._taken(param, whole))
            self._reducer.launch_complete()

    def _taken(self, param: nn.Parameter, whole: nn.Parameter) -> Tensor:
        grad = whole.grad
        if grad is None:
            raise AssertionError(f"no gradient to take from {self._fqn_of(param)}")
        check_dense(self._fqn_of(param), grad)
        whole.grad = None
        return local_grad(grad, whole)

    def _put(self, param: nn.Parameter, grad: Tensor) -> None:
        unit, i = self._place[param]
        self._reducer.put(unit, i, grad.reshape(-1))

    def _deliver(self, delta: GradientDelta) -> None:
        if not self._is_averaging:
            self._sink(delta)
            return
        for i, rows in delta.slices:
            show_rows(delta.unit.params[i], rows, delta.unit.shard.slices[i])

    def average_held(self) -> None:
        """Make held gradients what every rank would see under FSDP2: its rows of the averages.

        Every rank calls it after backward.
        """
        if self._is_streamed:
            return
        self._enter_step()
        for unit in self.units:
            for param in unit.params if isinstance(unit, Fsdp2Unit) else ():
                if not self._held.holds(param):
                    param.grad = None
        self._is_averaging = True
        try:
            self._reduce(with_plain=False)
        finally:
            self._is_averaging = False
        if self._buckets():
            self._held_plain.average(self._buckets())
        self._sharded.order.step_agreed()
        self._is_averaged = True

    def collect(self) -> None:
        """Reduce what the step still lacks; averaged gradients stay visible in `param.grad`, others are gone."""
        if self._is_averaged:
            self._hand_over()
            return
        self._enter_step()
        has_seen_any = self._held.has_seen_any
        present = self._reduce()
        self._sharded.order.step_agreed()
        group_of = {unit.index: unit.group for unit in self.units if isinstance(unit, Fsdp2Unit)}
        used = self._sharded.graphs.take_used({*group_of.values()})
        if self._is_manual and used and not has_seen_any and not present & group_of.keys():
            raise lost_gradients(self._sharded.groups[min(used)].fqn)

    def _hand_over(self) -> None:
        self._is_averaged = False
        for unit in self.units:
            if isinstance(unit, Fsdp2Unit):
                shown = [(i, p.grad) for i, p in enumerate(unit.params) if p.grad is not None]
                if shown:
                    self._sink(GradientDelta(unit, [(i, local_rows_of(grad).reshape(-1)) for i, grad in shown]))
        self._held_plain.hand_over(self._buckets(), self._sink)

    def _buckets(self) -> list[BucketUnit]:
        return [unit for unit in self.units if isinstance(unit, BucketUnit)]

    def _enter_step(self) -> None:
        try:
            self._sharded.order.enter_step()
        except OrderDeparted:
            self.discard()
            raise

    def _reduce(self, *, with_plain: bool = True) -> set[int]:
        """Returns: indices of units of which any rank had a gradient."""
        error: SuperScaleError | None = None
        try:
            filled = filter(self._sharded.holds, self._place) if self._is_manual else ()
            self._held.check(filled, self._fqn_of, self._ranks.mesh.world.size)
            for param, grad in self._held.take_all():
                self._put(param, grad)
            for param in self._place:
                self._put_left(param, with_plain=with_plain)
        except SuperScaleError as found:
            error = found  # the other ranks are on their way into the agreement
        return self._reducer.finish(error, order=self._sharded.order.digest())

    def _fqn_of(self, param: nn.Parameter) -> str:
        unit, i = self._place[param]
        return unit.full.slices[i].fqn

    def _put_left(self, param: nn.Parameter, *, with_plain: bool) -> None:
        """Give the reducer a gradient that still lies where autograd left it."""
        if self._sharded.holds(param):
            whole = self._sharded.whole_of(param)
            if whole is not None and whole.grad is not None:
                self._put(param, self._taken(param, whole))
        elif with_plain and param.grad is not None:
            if self._is_streamed:
                self._put(param, self._taken(param, param))
                return
            check_dense(self._fqn_of(param), param.grad)
            self._held_plain.check(param, self._fqn_of(param))
            self._put(param, param.grad.detach())

    def join_agreement(self, error: OrderDeparted) -> None:
        self._reducer.finish(error)

    def discard(self) -> None:
        """Forget gradients of an interrupted step."""
        self._reducer.discard()
        self._held.clear()
        self._held_plain.discard()
        self._is_averaged = False
        for param in self._place:
            whole = self._sharded.whole_of(param) if self._sharded.holds(param) else None
            if whole is not None:
                whole.grad = None

    # Weights

    def publish(self, unit: ShardUnit, event: PublishEvent | None, stepped: Sequence[int]) -> None:
        """Note that new weights are on their way; gathered old ones are let go of, and buckets are gathered."""
        own = self.units[unit.index]
        if isinstance(own, Fsdp2Unit):
            self._sharded.reshard(own.group, [own.params[i] for i in stepped])
            if event is not None:
                self._uploads[own.index] = _Upload(event, stepped)
            return
        own.mark_stepped(stepped)
        # Few and small, and anything may read them, so nothing is left under way.
        if event is not None:
            event.wait()
        if own.is_whole:
            return
        if event is None:
            own.pack_rows(stepped)
        self._ranks.shard.all_gather(own.gathered()).wait()
        own.unpack_gathered(stepped)

    def wait_published(self, units: Iterable[ShardUnit]) -> None:
        for unit in units:
            self._land(unit.index)

    def _land(self, index: int) -> bool:
        unit, upload = self.units[index], self._uploads.pop(index, None)
        if upload is None or not isinstance(unit, Fsdp2Unit):
            return False
        upload.event.wait()
        unit.land(upload.stepped)
        return True

    def land_group(self, group: int) -> bool:
        landed = [self._land(u.index) for u in self.units if isinstance(u, Fsdp2Unit) and u.group == group]
        return any(landed)

    def wait_all_published(self) -> None:
        self.wait_published(self.units)

    def released(self, plain: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Know the parameters by what they became: sharded states outlive the training that made them."""
        self._place = {plain.get(param, param): place for param, place in self._place.items()}

    def abandon(self) -> None:
        """Stop waiting for other ranks: one of them failed, and what is under way may never arrive."""
        self.discard()
        self._uploads.clear()

    def close(self) -> None:
        """Remove every hook; with the last transport of the module, its parameters become plain and whole again."""
        self.wait_all_published()
        self._held.clear()
        self._held_plain.close()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        for unit in self.units:
            if isinstance(unit, BucketUnit):
                unit.release()
        self._sharded.detach(self)
