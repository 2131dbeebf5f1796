"""One rank's steps: what its device does, and what it waits for meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_superscale.estimation.links import Exchange, Kind
from lightning_superscale.simulation.host import HostOptimizer
from lightning_superscale.simulation.machine import Collectives, Queue, Traffic, Work
from lightning_superscale.simulation.program import Piece, Program
from lightning_superscale.simulation.symmetry import GroupClass

Waiting = Literal["gathers", "reductions", "sequence", "host"]
"""What a device waits for, or copies out of and into buffers."""

# Groups of FSDP2 that are gathered at a time: the next one while one is used.
_GATHERED_GROUPS = 2


@dataclass(slots=True)
class StepRecord:
    """The seconds of one step on one rank.

    Attributes:
        start: when it began.
        model: of forward and backward.
        update: of the optimizer on the device.
        waited: for what the device waited how long.
        traffic: the collectives of the step.
    """

    start: float
    end: float = 0.0
    model: float = 0.0
    update: float = 0.0
    waited: dict[Waiting, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def seconds(self) -> float:
        return self.end - self.start


class SimulatedRank:
    """A rank, or all of one class.

    Args:
        own: its class.
        groups: its group along each axis: "shard", "replicate" and "sequence".
        host: its optimizer on the host; None without states there.
        slowness: by which its forward and backward take longer.
        waits_for_host: whether the host begins when it has all gradients, and all new weights are awaited before the
            next forward.
        hides_nothing: whether device, host and links are the same cores, so that nothing goes on meanwhile.
    """

    def __init__(
        self,
        env: Any,
        own: int,
        program: Program,
        groups: Mapping[str, GroupClass],
        collectives: Collectives,
        host: HostOptimizer | None,
        *,
        slowness: float = 1.0,
        waits_for_host: bool = False,
        hides_nothing: bool = False,
    ) -> None:
        self._env = env
        self._own = own
        self._program = program
        self._groups = groups
        self._collectives = collectives
        self._host = host
        self._slowness = slowness
        self._waits_for_host = waits_for_host
        self._hides_nothing = hides_nothing
        self._gathers, self._reductions = Queue(env), Queue(env)
        self._arrivals: dict[int, Any] = {}  # of new weights from the host
        self._gathered: dict[int, Any] = {}
        self._reduced: dict[int, Any] = {}
        self._shifts: list[Any] = []
        self.record = StepRecord(0.0)

    def steps(self, num_steps: int) -> Work:
        """Run steps; the last one's record is kept, which begins when the one before has ended."""
        for _ in range(num_steps):
            self.record = StepRecord(self._env.now)
            yield from self._pass(self._program.forward)
            yield from self._pass(self._program.backward)
            yield from self._update()
            self.record.end = self._env.now

    # Forward and backward

    def _pass(self, pieces: Sequence[Piece]) -> Work:
        units = self._program.units
        passing = [i for piece in pieces for i in piece.needs if units[i].is_gathered and units[i].gathered_bytes]
        self._gathered = {i: event for i, event in self._gathered.items() if not units[i].is_gathered}
        num_used = 0
        for piece in pieces:
            for index in piece.needs:
                is_passing = index in passing
                if is_passing:
                    self._gather(index)
                    num_used += 1
                yield from self._wait_for_weights(index)
                if is_passing:
                    yield from self._copy("gathers", units[index].copies.weights)
                if is_passing and not self._hides_nothing:
                    for ahead in passing[num_used : num_used + _GATHERED_GROUPS - 1]:
                        self._gather(ahead)
            yield from self._exchange(piece.exchanges)
            seconds = piece.seconds * self._slowness
            self.record.model += seconds
            yield self._env.timeout(seconds)
            for index in piece.completes:
                yield from self._reduce(index)
        yield from self._wait_for_shifts()

    def _exchange(self, exchanges: Sequence[Exchange]) -> Work:
        """Exchange with the ranks that share a sequence. What is shifted along a ring is awaited before the next."""
        if exchanges:
            yield from self._wait_for_shifts()
        for kind, nbytes in exchanges:
            self._count("sequence", kind, nbytes)
            done = self._env.process(self._collective("sequence", "sequence", kind, nbytes))
            if kind == "ring_shift" and not self._hides_nothing:
                self._shifts.append(done)
            else:
                yield from self._wait("sequence", done)

    def _wait_for_shifts(self) -> Work:
        for event in self._shifts:
            yield from self._wait("sequence", event)
        self._shifts.clear()

    def _wait_for_weights(self, index: int) -> Work:
        if index in self._arrivals:
            yield from self._wait("host", self._arrivals[index])
        if index in self._gathered:
            yield from self._wait("gathers", self._gathered[index])

    def _gather(self, index: int) -> None:
        """Gather a unit's weights as soon as this rank has its own part of them."""
        if index not in self._gathered:
            self._count("shard", "all_gather", self._program.units[index].gathered_bytes)
            self._gathered[index] = self._gathers.submit(self._gather_arrived(index, self._arrivals.get(index)))

    def _gather_arrived(self, index: int, arrival: Any) -> Work:
        if arrival is not None:
            yield arrival
        yield from self._collective("shard", "gathers", "all_gather", self._program.units[index].gathered_bytes)

    def _reduce(self, index: int) -> Work:
        nbytes, shards = self._program.units[index].reduced_bytes, self._groups["shard"].shape.size
        yield from self._copy("reductions", self._program.units[index].copies.gradients)
        self._count("shard", "reduce_scatter", nbytes)
        self._count("replicate", "all_reduce", nbytes // shards)
        self._reduced[index] = self._reductions.submit(self._reduction(index))
        if self._hides_nothing:
            yield from self._wait("reductions", self._reduced[index])

    def _reduction(self, index: int) -> Work:
        nbytes = self._program.units[index].reduced_bytes
        shards = self._groups["shard"].shape.size
        yield from self._collective("shard", "reductions", "reduce_scatter", nbytes)
        yield from self._collective("replicate", "reductions", "all_reduce", nbytes // shards)
        if self._host is not None and self._program.units[index].host:
            self._arrivals[index] = self._host.send(index)

    # The step

    def _update(self) -> Work:
        yield from self._wait_each("reductions", self._reduced, sorted(self._reduced))
        hosted = [] if self._host is None else [index for index in self._host.hosted if index in self._reduced]
        gradients = {index: self._arrivals[index] for index in hosted}
        if self._waits_for_host or self._hides_nothing:
            yield from self._wait_each("host", gradients, hosted)
        order = [index for index in self._program.forward_order if index in self._reduced]
        self._reduced, self._gathered, self._arrivals = {}, {}, {}
        if self._host is not None:
            self._arrivals.update(self._host.step([index for index in order if index in hosted], gradients))
        for index in order:
            unit = self._program.units[index]
            if unit.update:
                self.record.update += unit.update
                yield self._env.timeout(unit.update)
            if unit.gathered_bytes and not unit.is_gathered:
                self._gather(index)
        if self._waits_for_host or self._hides_nothing:
            yield from self._wait_each("host", self._arrivals, order)
        if self._hides_nothing:
            yield from self._wait_each("gathers", self._gathered, order)

    def _wait_each(self, what: Waiting, events: Mapping[int, Any], order: Sequence[int]) -> Work:
        for index in order:
            if index in events:
                yield from self._wait(what, events[index])

    def _count(self, axis: str, kind: Kind, nbytes: int) -> None:
        """Count a collective in the step that orders it."""
        size = self._groups[axis].shape.size
        if size > 1 and nbytes:
            self.record.traffic.add(kind, nbytes, size)

    def _collective(self, axis: str, queue: str, kind: Kind, nbytes: int) -> Work:
        group = self._groups[axis]
        if group.shape.size > 1 and nbytes:
            yield from self._collectives.run(self._own, group, queue, kind, nbytes)

    def _copy(self, what: Waiting, seconds: float) -> Work:
        """The device copies what was gathered out of its buffer, or what is reduced into it."""
        if seconds:
            yield from self._wait(what, self._env.timeout(seconds))

    def _wait(self, what: Waiting, event: Any) -> Work:
        before = self._env.now
        yield event
        waited = self._env.now - before
        if waited:
            self.record.waited[what] = self.record.waited.get(what, 0.0) + waited
