"""The machine that a simulation runs on: ports that transfers share, collectives, and queues of work; on simpy.

[Note: Shared ports] Transfers that use a port at the same time have an equal share of it each, so two take as long as
one after the other, and both end later than each by itself. A collective goes at the pace of its slowest rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.estimation.links import Hop, Kind, Links, Port
from lightning_superscale.simulation.symmetry import GroupClass

Work: TypeAlias = Generator[Any, Any, None]
"""What simpy runs: it yields the events that it waits for."""

PortOf = tuple[int, Port]
"""A port of the ranks of one class."""


def new_environment() -> Any:
    """An empty simpy environment, at time 0.

    Raises:
        SuperScaleError: simpy is not installed.
    """
    try:
        simpy: Any = importlib.import_module("simpy")
    except ImportError as error:
        raise SuperScaleError(
            "a simulation needs simpy, which is not installed: pip install 'lightning-superscale[simulation]'"
        ) from error
    return simpy.Environment()


@dataclass(slots=True, eq=False)
class _Transfer:
    ports: Sequence[PortOf]
    left: float
    done: Any


class SharedPorts:
    """The ports of all ranks ([Note: Shared ports])."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self._active: list[_Transfer] = []
        self._loads: dict[PortOf, int] = {}
        self._since = 0.0
        self._plans = 0

    def transfer(self, ports: Sequence[PortOf], seconds: float) -> Any:
        """The event of a transfer's end.

        Args:
            ports: all that it uses at once.
            seconds: that it takes where it has its ports for itself.
        """
        done = self._env.event()
        if seconds <= 0:
            return done.succeed()
        self._advance()
        self._active.append(_Transfer(ports, seconds, done))
        for port in ports:
            self._loads[port] = self._loads.get(port, 0) + 1
        self._plan()
        return done

    def _share(self, one: _Transfer) -> int:
        """The number of transfers that its fullest port is shared by."""
        return max(self._loads[port] for port in one.ports)

    def _advance(self) -> None:
        passed = self._env.now - self._since
        self._since = self._env.now
        for one in self._active:
            one.left -= passed / self._share(one)

    def _plan(self) -> None:
        self._plans += 1
        if self._active:
            first = min(self._active, key=lambda one: one.left * self._share(one))
            self._env.process(self._finish(first, self._plans))

    def _finish(self, first: _Transfer, plan: int) -> Work:
        yield self._env.timeout(max(0.0, first.left) * self._share(first))
        if plan != self._plans:
            return  # others have come or gone since
        self._advance()
        self._active.remove(first)
        for port in first.ports:
            self._loads[port] -= 1
        first.done.succeed()
        self._plan()


@dataclass(slots=True)
class Traffic:
    """Collectives of one rank, counted as `CollectiveCount` in comm/mesh.py does: bytes of its inputs.

    Attributes:
        calls, nbytes: by kind.
    """

    calls: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)

    def add(self, kind: Kind, nbytes: int, size: int) -> None:
        """Count one.

        Args:
            nbytes: as `Links.hops` takes them.
            size: ranks of the group.
        """
        self.calls[kind] = self.calls.get(kind, 0) + 1
        own = nbytes // size if kind == "all_gather" else nbytes
        self.nbytes[kind] = self.nbytes.get(kind, 0) + own


@dataclass(slots=True)
class _Meeting:
    done: Any
    arrived: int = 0


class Collectives:
    """Collectives of all groups: one begins when the last of its ranks has come."""

    def __init__(self, env: Any, ports: SharedPorts, links: Links) -> None:
        self._env = env
        self._ports = ports
        self._links = links
        self._meetings: dict[tuple[GroupClass, str, int], _Meeting] = {}
        self._numbers: dict[tuple[int, GroupClass, str], int] = {}

    def run(self, own: int, group: GroupClass, queue: str, kind: Kind, nbytes: int) -> Work:
        """Take part in a group's next collective of a queue, until it is done.

        Args:
            own: the class of the rank that calls.
            queue: names the order that its ranks issue it in.
            nbytes: as `Links.hops` takes them.
        """
        number = self._numbers.get((own, group, queue), 0)
        self._numbers[own, group, queue] = number + 1
        meeting = self._meetings.setdefault((group, queue, number), _Meeting(self._env.event()))
        meeting.arrived += 1
        if meeting.arrived == len(group.members):
            del self._meetings[group, queue, number]
            hops = self._links.hops(kind, nbytes, group.shape)
            self._env.process(self._go(group, hops, meeting.done))
        yield meeting.done

    def _go(self, group: GroupClass, hops: Sequence[Hop], done: Any) -> Work:
        for hop in hops:
            yield self._env.timeout(hop.latency)
            yield self._ports.transfer([(member, hop.port) for member in group.members], hop.seconds)
        done.succeed()


class Queue:
    """Work that one rank does in order, beside other work: a stream, a link or a thread."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self._last: Any = None

    def submit(self, work: Work) -> Any:
        """The event of the work's end; it begins when that of the work before has ended."""
        self._last = self._env.process(self._after(self._last, work))
        return self._last

    @staticmethod
    def _after(before: Any, work: Work) -> Work:
        if before is not None:
            yield before
        yield from work
