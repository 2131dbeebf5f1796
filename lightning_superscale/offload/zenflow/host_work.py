"""The host's thread of a ZenFlow run, which adds gradients up and steps windows, and the seconds that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from lightning_superscale.offload.link.link import LinkEvent
from lightning_superscale.ops.threads import one_thread
from lightning_superscale.timeline import Timeline


class HostWork:
    """Work of one thread, in order: a step's sums, then the updates of windows that end with it.

    Args:
        timeline: the record of steps, in which a wait is a stall.

    Attributes:
        has_failed: whether an error was raised where work was waited for.
        arrived_at: when the last gradients had arrived, by `time.perf_counter`.
        adding_s, updating_s: seconds of the last sums, and of the last updates.
    """

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self._thread = one_thread("lightning-superscale windows")
        self._adding: Future[None] | None = None
        self._updating: Future[None] | None = None
        self.has_failed = False
        self.arrived_at = self.adding_s = self.updating_s = 0.0

    def add(self, arrivals: Iterable[LinkEvent], work: Callable[[], None]) -> None:
        """Add gradients up once they have arrived."""

        def run() -> None:
            begun = self._await(arrivals)
            work()
            self.adding_s = time.perf_counter() - begun

        self._adding = self._thread.submit(run)

    def update(self, arrivals: Iterable[LinkEvent], work: Callable[[], None]) -> None:
        """Step windows once their gradients have arrived, and are added up."""

        def run() -> None:
            begun = self._await(arrivals)
            work()
            self.updating_s = time.perf_counter() - begun

        self._updating = self._thread.submit(run)

    def _await(self, arrivals: Iterable[LinkEvent]) -> float:
        events = list(arrivals)
        for event in events:
            event.synchronize()
        now = time.perf_counter()
        if events:
            self.arrived_at = now
        return now

    def wait_added(self) -> None:
        """Wait until gradients are added up."""
        self._wait(self._adding, "sums")
        self._adding = None  # not before: after an interrupt it still has to be waited for

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
            if work is not None:
                with self.timeline.stalled(name):
                    work.result()
        except Exception:
            self.has_failed = True
            raise

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
