"""The host's thread of a ZenFlow run, which adds gradients up and steps windows, and the seconds that it takes.

[Note: Sums in turn] A step's gradients are added up unit by unit, in the order in which backward makes them, and a
unit's next gradient waits for its own sum only. So the host may add for a whole step, and not merely until backward
begins, though each gradient has one buffer to arrive in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future

from lightning_superscale.offload.link.link import LinkEvent
from lightning_superscale.ops.threads import one_thread
from lightning_superscale.timeline import Timeline

# What looking at events that are complete may take.
_A_WAIT_S = 1e-4


class HostWork:
    """Work of one thread, in order: a step's sums, then the updates of windows that end with it.

    Args:
        timeline: the record of steps, in which a wait is a stall.
        thread: runs the work, in order; a thread of its own if None.

    Attributes:
        has_failed: whether an error was raised where work was waited for.
        arrived_at: when the last gradients had arrived, by `time.perf_counter`; never before the step was queued.
        adding_s, updating_s: seconds of the last sums, and of the last updates.
    """

    def __init__(self, timeline: Timeline, thread: Executor | None = None) -> None:
        self.timeline = timeline
        self._thread = thread or one_thread("lightning-superscale windows")
        self._adding: dict[int, Future[None]] = {}  # by unit
        self._updating: Future[None] | None = None
        self.has_failed = False
        self.arrived_at = self.adding_s = self.updating_s = 0.0

    def add(self, unit: int, arrivals: Iterable[LinkEvent], work: Callable[[], None]) -> None:
        """Add a unit's gradients of a step up once they have arrived, when the last step's are added up."""
        if not self._adding:
            self.adding_s, self.arrived_at = 0.0, time.perf_counter()

        def run() -> None:
            begun = self._await(arrivals)
            work()
            self.adding_s += time.perf_counter() - begun

        self._adding[unit] = self._thread.submit(run)

    def update(self, arrivals: Iterable[LinkEvent], work: Callable[[], None]) -> None:
        """Step windows once their gradients have arrived, and are added up."""
        arrivals = list(arrivals)
        if arrivals:
            self.arrived_at = time.perf_counter()

        def run() -> None:
            begun = self._await(arrivals)
            work()
            self.updating_s = time.perf_counter() - begun

        self._updating = self._thread.submit(run)

    def _await(self, arrivals: Iterable[LinkEvent]) -> float:
        begun = time.perf_counter()
        for event in arrivals:
            event.synchronize()
        now = time.perf_counter()
        if now - begun > _A_WAIT_S:  # otherwise they had arrived before, while the thread was at work
            self.arrived_at = now
        return now

    def wait_added_of(self, unit: int) -> None:
        """Wait until a unit's gradients are added up."""
        self._wait(self._adding.get(unit), "sums")
        self._adding.pop(unit, None)  # not before: after an interrupt it still has to be waited for

    def wait_added(self) -> None:
        """Wait until gradients of all units are added up."""
        for unit in list(self._adding):
            self.wait_added_of(unit)

    def wait_updated(self) -> None:
        """Wait until windows are stepped, and their weights sent."""
        self._wait(self._updating, "update of windows")
        self._updating = None

    def wait(self) -> None:
        """Wait until the thread has nothing to do."""
        self.wait_added()
        self.wait_updated()

    def _wait(self, work: Future[None] | None, name: str) -> None:
        try:
            if work is None:
                return
            if work.done():
                work.result()
                return
            with self.timeline.stalled(name):
                work.result()
        except Exception:
            self.has_failed = True
            raise

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
