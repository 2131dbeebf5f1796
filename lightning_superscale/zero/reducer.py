"""Reduces gradients over ranks, unit by unit, during backward and at the step.

[Note: Order of reductions] Ranks may run different branches and different numbers of backward calls, so units are
complete at different times on different ranks. Collectives have to be issued in one order all the same. Units are
launched strictly in one agreed order, as far as this rank's backward completed them; at the step ranks agree on which
parameters have a gradient anywhere, launch the remaining units with zeros for gradients that this rank lacks, and then
reduce in one more round the gradients that came after their unit's launch. The agreed facts of one step choose the
next step's order: units that had late gradients, such as a block under reentrant checkpointing, wait for the step;
parameters without a gradient anywhere are not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.ops.events import Event
from lightning_superscale.optim.grad_dtypes import AS_WEIGHTS, GradientDtypes
from lightning_superscale.optim.unit import DeltaSink, GradientDelta, ShardUnit, slice_view


class ReducedUnit(ShardUnit, Protocol):
    """The members of a unit of any kind that the reducer uses."""

    def packed(self, grads: Mapping[int, Tensor], scale: float, dtype: torch.dtype) -> Tensor:
        """Gradients times `scale` in the buffer that a reduce-scatter reads, [shard_world_size, shard_numel].

        Args:
            grads: whole gradients by index of the parameter, 1D; those that lack count as zeros.
            dtype: of the buffer.
        """


class Reducer(Protocol):
    """Takes one optimizer's gradients as backward makes them, and gives a sink this rank's rows of their averages.

    Attributes:
        units: the units that it reduces, by index. Transports that share one reducer have one sequence of units.
    """

    @property
    def units(self) -> Sequence[ReducedUnit]: ...

    def add_unit(self, unit: ReducedUnit) -> None:
        """Add a unit, whose index is the number of units before it."""

    def forget_units(self) -> None:
        """Forget all units and gradients, and start anew. Every rank calls it between two steps."""

    def put(self, unit: ReducedUnit, i: int, grad: Tensor) -> None:
        """Take one parameter's whole gradient, 1D, which no other code changes afterwards. Issues no collective."""

    def launch_complete(self) -> None:
        """Launch the units that are complete, and give the sink the averages that have arrived.

        Called after each `put` of a backward.
        """

    def finish(self, error: BaseException | None, order: str = "", *, sink: DeltaSink | None = None) -> set[int]:
        """Reduce everything that any rank has put. Every rank calls it once per step.

        Args:
            error: the reason why this rank can't go on; None where it can.
            order: a text that must be equal on all ranks, e.g. a digest of the order in which modules were gathered.
            sink: receives the averages that this call delivers; None for the reducer's own sink.

        Returns:
            indices of units of which any rank had a gradient.

        Raises:
            SuperScaleError: on every rank, when any passed an error or ranks are at different steps or orders.
        """

    def discard(self) -> None:
        """Forget the gradients of this step."""

    def rehearsal(self) -> AbstractContextManager[None]:
        """While open, `finish` counts no step, and chooses no order of the next one."""


@dataclass(slots=True)
class _Flight:
    """One unit's reduction under way.

    Attributes:
        slices: indices of the slices to deliver as soon as the result is there.
        over_shard: the reduce-scatter over the shard axis; None once its result went into the all-reduce.
        over_replicas: the all-reduce over the replicate axis; None before it, and once its result is there.
        result: this rank's reduced rows, [shard_numel], once they are there.
    """

    unit: ReducedUnit
    slices: tuple[int, ...]
    over_shard: Event[Tensor] | None
    over_replicas: Event[Tensor] | None = None
    result: Tensor | None = None


@dataclass(slots=True)
class _UnitGrads:
    """The gradients that one unit got on this rank in this step, by index of the parameter.

    Attributes:
        waiting: gradients that the unit's launch will reduce.
        late: gradients that came after the launch.
        present: indices of all parameters that got one.
    """

    waiting: dict[int, Tensor] = field(default_factory=dict)
    late: dict[int, Tensor] = field(default_factory=dict)
    present: set[int] = field(default_factory=set)
    is_launched: bool = False


class GradientReducer:
    """Averages gradients over all data-parallel ranks and gives each rank its rows. Satisfies `Reducer`.

    Args:
        label: names the optimizer in errors.
        sink: receives this rank's rows of the averages.
        dtypes: of gradients on their way to other ranks.
    """

    def __init__(self, ranks: Communicator, label: str, sink: DeltaSink, dtypes: GradientDtypes = AS_WEIGHTS) -> None:
        self._ranks = ranks
        self._label = label
        self._sink = sink
        self._dtypes = dtypes
        self._scale = 1.0 / ranks.mesh.data.size
        self.units: list[ReducedUnit] = []
        self._order: list[ReducedUnit] = []
        self._expected: dict[int, set[int]] = {}
        self._num_launched = 0
        self._grads: dict[int, _UnitGrads] = {}
        self._flights: list[_Flight] = []
        self._num_steps = 0

    def add_unit(self, unit: ReducedUnit) -> None:
        self.units.append(unit)
        self._order.append(unit)
        self._expected[unit.index] = set(range(len(unit.params)))

    def forget_units(self) -> None:
        self.discard()
        self.units = []
        self._order = []
        self._expected = {}
        self._num_steps = 0

    def put(self, unit: ReducedUnit, i: int, grad: Tensor) -> None:
        grads = self._grads.setdefault(unit.index, _UnitGrads())
        grads.present.add(i)
        into = grads.late if grads.is_launched else grads.waiting
        into[i] = into[i] + grad if i in into else grad

    def launch_complete(self) -> None:
        """Launch the units that are next in order and complete, and give the sink the averages that have arrived."""
        while self._num_launched < len(self._order):
            unit = self._order[self._num_launched]
            grads = self._grads.get(unit.index)
            if grads is None or not self._expected[unit.index] <= grads.waiting.keys():
                break
            self._num_launched += 1
            self._launch(unit, grads)
        self._advance(self._sink, block=False)

    def _launch(self, unit: ReducedUnit, grads: _UnitGrads) -> None:
        slices = tuple(sorted(grads.waiting))
        packed = unit.packed(grads.waiting, self._scale, self._dtypes.reduced(unit.params[0]))
        grads.waiting = {}
        grads.is_launched = True
        self._flights.append(_Flight(unit, slices, self._ranks.shard.reduce_scatter(packed)))

    def _advance(self, sink: DeltaSink, *, block: bool) -> None:
        """Advance reductions under way, strictly in order, because each stage of each issues a collective."""
        for flight in self._flights:
            if flight.over_shard is not None:
                if not (block or flight.over_shard.is_complete()):
                    return
                flight.over_replicas = self._ranks.replicate.all_reduce(flight.over_shard.wait())
                flight.over_shard = None
        for flight in self._flights:
            if flight.over_replicas is not None:
                if not (block or flight.over_replicas.is_complete()):
                    return
                flight.result = flight.over_replicas.wait()
                flight.over_replicas = None
                _deliver(flight, flight.slices, sink)

    # The step

    def finish(self, error: BaseException | None, order: str = "", *, sink: DeltaSink | None = None) -> set[int]:
        sink = sink or self._sink
        present, late = self._agree(error, order)
        self._num_steps += 1
        rest = self._order[self._num_launched :]
        expected = {unit.index for unit in self._order}
        rest += [unit for unit in self.units if unit.index not in expected]
        for unit in rest:
            if present[unit.index]:
                self._launch(unit, self._grads.setdefault(unit.index, _UnitGrads()))
        self._advance(sink, block=True)
        for flight in self._flights:
            _deliver(flight, sorted(present[flight.unit.index] - set(flight.slices)), sink)
        self._finish_late(late, sink)
        self._expect(present, late)
        self.discard()
        return {index for index, slices in present.items() if slices}

    def _agree(self, error: BaseException | None, order: str) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
        agreement, flag_of = self._ranks.agreement, self._ranks.flag_of
        vector = agreement.new_flags()
        flags = agreement.flags_of(vector)
        num_params = self._ranks.num_params
        for unit in self.units:
            grads = self._grads.get(unit.index)
            if grads is None:
                continue
            places = [flag_of[unit.params[i]] for i in grads.present]
            places += [num_params + flag_of[unit.params[i]] for i in grads.late]
            flags[places] = 1
        agreed = agreement.agree(vector, label=self._label, step=self._num_steps, order=order, error=error).tolist()
        present, late = {}, {}
        for unit in self.units:
            places = [flag_of[param] for param in unit.params]
            present[unit.index] = {i for i, place in enumerate(places) if agreed[place]}
            late[unit.index] = {i for i, place in enumerate(places) if agreed[num_params + place]}
        return present, late

    def _finish_late(self, late: Mapping[int, set[int]], sink: DeltaSink) -> None:
        self._flights.clear()
        for unit in self.units:
            if late[unit.index]:
                grads = self._grads[unit.index] if unit.index in self._grads else _UnitGrads()
                packed = unit.packed(grads.late, self._scale, self._dtypes.reduced(unit.params[0]))
                slices = tuple(sorted(late[unit.index]))
                self._flights.append(_Flight(unit, slices, self._ranks.shard.reduce_scatter(packed)))
        self._advance(sink, block=True)

    def _expect(self, present: Mapping[int, set[int]], late: Mapping[int, set[int]]) -> None:
        self._expected = {index: set(slices) for index, slices in present.items() if slices}
        self._order = [u for u in self.units if u.index in self._expected and not late[u.index]]

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        before = self._order, self._expected, self._num_steps
        try:
            yield
        finally:
            self._order, self._expected, self._num_steps = before

    def discard(self) -> None:
        self._num_launched = 0
        self._grads.clear()
        self._flights.clear()


def _deliver(flight: _Flight, slices: Sequence[int], sink: DeltaSink) -> None:
    if flight.result is not None and slices:
        pieces = flight.unit.shard.slices
        sink(GradientDelta(flight.unit, [(i, slice_view(flight.result, pieces[i])) for i in slices]))


class LocalReducer:
    """The reducer of a single rank: collects each unit's gradients and gives them to the sink. Satisfies `Reducer`.

    A unit's gradients leave in backward once all are there that the last step's backward made, so that an unused
    parameter doesn't hold them back. A gradient that comes after that leaves by itself: in a second backward of the
    step, of a block that a reentrant checkpoint uses again, or of a parameter that the last step did not use.

    Args:
        sink: receives the gradients as they are.
    """

    def __init__(self, sink: DeltaSink) -> None:
        self._sink = sink
        self.units: list[ReducedUnit] = []
        self._put: list[tuple[ReducedUnit, int, Tensor]] = []
        self._waiting: dict[int, dict[int, Tensor]] = {}
        self._sent: dict[int, set[int]] = {}
        self._expected: dict[int, set[int]] = {}

    def add_unit(self, unit: ReducedUnit) -> None:
        self.units.append(unit)

    def forget_units(self) -> None:
        self.discard()
        self.units = []
        self._expected = {}

    def put(self, unit: ReducedUnit, i: int, grad: Tensor) -> None:
        self._put.append((unit, i, grad))

    def launch_complete(self) -> None:
        put, self._put = self._put, []
        for unit, i, grad in put:
            if unit.index in self._sent:
                self._sent[unit.index].add(i)
                self._sink(GradientDelta(unit, [(i, grad)]))
                continue
            waiting = self._waiting.setdefault(unit.index, {})
            if i in waiting:
                waiting[i].add_(grad)
            else:
                waiting[i] = grad
            expected = self._expected.get(unit.index)
            if len(waiting) == len(unit.params) or (expected is not None and expected <= waiting.keys()):
                self._send(unit, self._sink)

    def _send(self, unit: ReducedUnit, sink: DeltaSink) -> None:
        waiting = self._waiting.pop(unit.index)
        self._sent[unit.index] = set(waiting)
        sink(GradientDelta(unit, sorted(waiting.items())))

    def finish(self, error: BaseException | None, order: str = "", *, sink: DeltaSink | None = None) -> set[int]:
        if error is not None:
            raise error
        sink = sink or self._sink
        left: dict[int, list[tuple[int, Tensor]]] = {}
        for unit, i, grad in self._put:
            left.setdefault(unit.index, []).append((i, grad))
        self._put = []
        for unit in self.units:
            if unit.index in self._waiting:
                self._send(unit, sink)
            if unit.index in left:
                sink(GradientDelta(unit, left[unit.index]))
        # The next step's backward is expected to make the gradients that were put before the last launch_complete().
        # Gradients that were put since then came from backward calls in which none leaves.
        self._expected, self._sent = self._sent, {}
        return self._expected.keys() | left.keys()

    def discard(self) -> None:
        self._put = []
        self._waiting.clear()
        self._sent.clear()

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        before = self._expected
        try:
            yield
        finally:
            self._expected = before


def reducer_for(ranks: Communicator, label: str, sink: DeltaSink, dtypes: GradientDtypes = AS_WEIGHTS) -> Reducer:
    """The reducer of one optimizer's gradients.

    Args:
        label: names the optimizer in errors.
        sink: receives this rank's rows of the averages.
        dtypes: of gradients on their way to other ranks.
    """
    return LocalReducer(sink) if ranks.mesh.is_single else GradientReducer(ranks, label, sink, dtypes)
