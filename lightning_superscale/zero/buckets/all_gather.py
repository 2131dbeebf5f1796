"""All-gathers new weights that the host steps: each gather starts when this rank's forward needs it, or before.

[Note: Late gathers] A gather needs this rank's new rows, and the host may still step them while the next forward
runs. So publishing only queues; the first gate that waits for a unit issues the queue up to that unit, and the units
after it whose rows have arrived. Ranks therefore start the same gathers in the same order but at different places
among their other collectives, which is why gathers have a process group of their own. A rank whose forward skips a
module must not keep the others waiting for its rows: it issues the rest of the queue before its backward issues any
other collective. Weights that stream are gathered only when their block is used or about to be: all at once would fill
the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.ops.events import Event
from lightning_superscale.optim.unit import PublishEvent
from lightning_superscale.zero.buckets.unit import BucketUnit


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
    """The gathers of one transport's units whose rows come from the host, in the order in which units are published."""

    def __init__(self, collectives: AxisCollectives) -> None:
        self._collectives = collectives
        self._queue: deque[_Queued] = deque()
        self._issued: dict[int, _Issued] = {}

    def add(self, unit: BucketUnit, event: PublishEvent, stepped: Sequence[int]) -> LateGather:
        """Queue the gather of a unit. Every rank calls it for the same units in the same order.

        Args:
            event: the upload of this rank's new rows into the unit's inbox.
            stepped: indices of the stepped weights.
        """
        self._queue.append(_Queued(unit, event, stepped))
        return LateGather(self, unit)

    def wait(self, unit: BucketUnit) -> None:
        """Return when work that is queued from now on sees this unit's new weights."""
        if self._is_queued(unit):
            while unit.index not in self._issued:
                self._issue_next()
            while self._queue and self._queue[0].event.is_waitable() and not self._queue[0].unit.is_streamed:
                self._issue_next()
        issued = self._issued.pop(unit.index, None)
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
        """Issue all gathers of the queue, so that no other rank waits for this rank's rows any longer."""
        while self._queue:
            self._issue_next()

    def _issue_next(self) -> None:
        unit, event, stepped = self._queue.popleft()
        event.wait()
        self._issued[unit.index] = _Issued(self._collectives.all_gather(unit.gathered()), unit, stepped)

    def clear(self) -> None:
        """Forget all gathers, after a rank failed."""
        self._queue.clear()
        self._issued.clear()
