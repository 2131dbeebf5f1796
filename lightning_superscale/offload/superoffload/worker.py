"""The thread that looks ahead and settles.

[Note: Newest first] Where the host is slower than backward, some buckets wait for it when backward ends, and the next
forward has to hide them. It needs the first layers first, whose gradients came last. So the thread takes the newest
gradient first, of those that have arrived: what is left then belongs to later layers, evenly, and no forward waits
as long as a step's work on the host takes no longer than a whole step. Oldest first, the first layer would wait for
all of the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

T = TypeVar("T")


class StepWorker(Protocol):
    """Runs one task at a time beside the thread that runs the model."""

    def look_ahead(self, task: Callable[[], None], has_arrived: Callable[[], bool]) -> Future[None]:
        """Run a task once; of those that wait, the newest whose gradients have arrived first.

        Cancelling the future takes it back. Where none has arrived, the oldest begins, and waits.
        """

    def settle(self, task: Callable[[], T]) -> Future[T]:
        """Run a task once, in the order of these calls; earlier ones that look ahead are to be taken back before."""

    def close(self) -> None:
        """No more tasks; waits for those that run."""


class _Ahead(NamedTuple):
    future: Future[None]
    task: Callable[[], None]
    has_arrived: Callable[[], bool]


class StepThread:
    """A thread of its own."""

    def __init__(self) -> None:
        # One thread: units are worked on one after the other, each by all of the pool's threads.
        self._executor = ThreadPoolExecutor(1, "lightning-superscale step")
        self._lock = threading.Lock()
        self._waiting: list[_Ahead] = []

    def look_ahead(self, task: Callable[[], None], has_arrived: Callable[[], bool]) -> Future[None]:
        ahead = _Ahead(Future(), task, has_arrived)
        with self._lock:
            self._waiting.append(ahead)
        self._executor.submit(self._run_one)
        return ahead.future

    def _run_one(self) -> None:
        while (ahead := self._next()) is not None:
            if ahead.future.set_running_or_notify_cancel():
                _run(ahead.future, ahead.task)
                return

    def _next(self) -> _Ahead | None:
        with self._lock:
            if not self._waiting:
                return None
            newest = (i for i in reversed(range(len(self._waiting))) if self._waiting[i].has_arrived())
            return self._waiting.pop(next(newest, 0))

    def settle(self, task: Callable[[], T]) -> Future[T]:
        return self._executor.submit(task)

    def close(self) -> None:
        self._executor.shutdown()


def _run(future: Future[Any], task: Callable[[], Any]) -> None:
    try:
        future.set_result(task())
    except BaseException as error:
        future.set_exception(error)  # whoever waits for it raises it
