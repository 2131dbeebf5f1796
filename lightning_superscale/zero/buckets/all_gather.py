"""All-gathers new weights that the host steps, while the next forward may run already.

[Note: Late gathers] A gather needs this rank's new rows, and the host may still step them while the next forward runs.
So publishing only queues. A thread of the transport issues the queue as rows arrive, in its order, which is the same on
every rank: whatever a rank's own thread does meanwhile (it skips a module, reads one weight for a log, enters a
collective of the user's), no other rank waits for its rows longer than for its host. Gathers have a process group of
their own, because ranks start them at different places among their other collectives.

All optimizers of a run share one queue. With one each, the order of one optimizer's gathers among another's would be
that in which the host happens to finish their rows, which is another one on every rank, and a gather of one would meet
a gather of the other: weights of equal size would change places without an error.

Weights that stream are gathered only when their block is used or about to be: all at once would fill the device. There
the first use that waits for a unit issues the queue up to that unit, and a rank whose forward skips a module issues the
rest of the queue before its backward issues any other collective.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.ops.events import Event, has_streams
from lightning_superscale.ops.threads import one_thread
from lightning_superscale.optim.unit import PublishEvent
from lightning_superscale.optim.weights.store import Incoming, NewWeights
from lightning_superscale.zero.buckets.unit import BucketUnit


class Gathers(Protocol):
    """Gathers of the units of a run's transports, issued in the order in which units are published."""

    def join(self) -> None:
        """Take one more transport, which calls `close` once."""

    def add(self, unit: BucketUnit, event: PublishEvent, stepped: Sequence[int]) -> NewWeights:
        """Queue the gather of a unit. Every rank calls it for the same units in the same order.

        Args:
            event: the upload of this rank's new rows into the unit's inbox.
            stepped: indices of the stepped weights.
        """

    def issue_all(self) -> None:
        """Return when no other rank waits for the calling thread to issue a gather."""

    def close(self) -> None:
        """Leave; the last transport that does lets go of everything."""


class _IssuedElsewhere:
    """A gather that another thread issues. Satisfies `Waitable`, for any number of calls by one thread."""

    def __init__(self, issued: Future[Event[Tensor]]) -> None:
        self._issued = issued

    def wait(self) -> Tensor:
        return self._issued.result().wait()

    def is_waitable(self) -> bool:
        return self._issued.done() and self._issued.result().is_waitable()


class GatherThread:
    """Gathers that a thread of their own issues as rows arrive ([Note: Late gathers]). Satisfies `Gathers`.

    Args:
        queued: the mesh's list of what other collectives wait for ([Note: One order per device] in comm/mesh.py).
    """

    def __init__(self, collectives: AxisCollectives, queued: list[Callable[[], None]]) -> None:
        self._collectives = collectives
        self._queued = queued
        self._under_way: deque[Future[Event[Tensor]]] = deque()
        queued.append(self._wait_issued)
        self._executor = one_thread("lightning-superscale gather")
        self._stream: torch.cuda.Stream | None = None
        self._num_users = 0

    def join(self) -> None:
        self._num_users += 1

    def add(self, unit: BucketUnit, event: PublishEvent, stepped: Sequence[int]) -> NewWeights:
        issued = self._executor.submit(self._issue, unit, event)
        self._under_way.append(issued)
        return Incoming(_IssuedElsewhere(issued), partial(unit.unpack_gathered, stepped))

    def _issue(self, unit: BucketUnit, event: PublishEvent) -> Event[Tensor]:
        with self._on_stream_of(unit):
            event.wait()
            return self._collectives.all_gather(unit.gathered())

    def _on_stream_of(self, unit: BucketUnit) -> AbstractContextManager[object]:
        """Order the gather after the upload alone, not after the work that the model's stream has queued."""
        if not has_streams(unit.device):
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(unit.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)

    def _wait_issued(self) -> None:
        while self._under_way:
            self._under_way[0].exception()  # whoever uses the weights raises it
            self._under_way.popleft()

    def issue_all(self) -> None:
        return

    def close(self) -> None:
        self._num_users -= 1
        if not self._num_users:
            self._executor.shutdown()
            self._queued.remove(self._wait_issued)


class _Queued(NamedTuple):
    """New rows of this rank on their way into the unit's inbox."""

    unit: BucketUnit
    event: PublishEvent
    stepped: Sequence[int]


class _Issued(NamedTuple):
    """A gather under way of one unit's stepped weights."""

    pending: Event[Tensor]
    unit: BucketUnit
    stepped: Sequence[int]


class LateGather:
    """New weights of a unit whose gather waits in the queue of a `LateGathers`. Satisfies `NewWeights`."""

    def __init__(self, gathers: LateGathers, unit: BucketUnit) -> None:
        self._gathers = gathers
        self._unit = unit

    def begin(self) -> None:
        self._gathers.begin(self._unit)

    def are_on_host(self) -> bool:
        return False  # rows of other ranks arrive on the device

    def wait(self) -> None:
        self._gathers.wait(self._unit)

    def abandon(self) -> None:
        self._gathers.clear()


class LateGathers:
    """Gathers that are issued when their units are used ([Note: Late gathers]). Satisfies `Gathers`."""

    def __init__(self, collectives: AxisCollectives) -> None:
        self._collectives = collectives
        self._queue: deque[_Queued] = deque()
        self._issued: dict[BucketUnit, _Issued] = {}
        self._num_users = 0

    def join(self) -> None:
        self._num_users += 1

    def add(self, unit: BucketUnit, event: PublishEvent, stepped: Sequence[int]) -> LateGather:
        self._queue.append(_Queued(unit, event, stepped))
        return LateGather(self, unit)

    def wait(self, unit: BucketUnit) -> None:
        """Return when work that is queued from now on sees this unit's new weights."""
        if self._is_queued(unit):
            while unit not in self._issued:
                self._issue_next()
            while self._queue and self._queue[0].event.is_waitable() and not self._queue[0].unit.is_streamed:
                self._issue_next()
        issued = self._issued.pop(unit, None)
        if issued is not None:
            issued.pending.wait()
            issued.unit.unpack_gathered(issued.stepped)

    def begin(self, unit: BucketUnit) -> None:
        """Start the gather of a unit that is used soon, unless the host still steps it or one before it."""
        while self._is_queued(unit) and self._queue[0].event.is_waitable():
            self._issue_next()

    def _is_queued(self, unit: BucketUnit) -> bool:
        return any(queued.unit is unit for queued in self._queue)

    def issue_all(self) -> None:
        while self._queue:
            self._issue_next()

    def _issue_next(self) -> None:
        unit, event, stepped = self._queue.popleft()
        event.wait()
        self._issued[unit] = _Issued(self._collectives.all_gather(unit.gathered()), unit, stepped)

    def clear(self) -> None:
        """Forget all gathers, after a rank failed."""
        self._queue.clear()
        self._issued.clear()

    def close(self) -> None:
        self._num_users -= 1
        if not self._num_users:
            self.clear()


def gathers_for(ranks: Communicator, *, are_late: bool) -> Gathers:
    """The gathers that all transports of a run share.

    Args:
        are_late: whether any weights stream.
    """
    if are_late or ranks.gather.axis.size == 1:  # on one rank nothing is gathered, and no thread needed
        return LateGathers(ranks.gather)
    return GatherThread(ranks.gather, ranks.mesh.queued)
