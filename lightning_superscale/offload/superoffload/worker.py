"""The thread on which superoffload's states look ahead and settle.

[Note: Newest first] Where the host is slower than backward, some buckets wait for it when backward ends, and the next
forward has to hide their steps. Forward needs the first layers first, whose gradients came last. So the thread takes
the newest gradient first, of those that have arrived: the buckets that are left then belong to later layers, evenly,
and no forward waits as long as a step's work on the host takes no longer than a whole step. With the oldest first, the
first layer would wait for all of the rest.

[Note: Settling early] A verdict does not wait for gradients to arrive, so a step is settled while some are still under
way: those of the first layers, which the next forward reads first and whose weights have to go up first. Until these
are there the thread prepares units whose gradients have arrived: it computes their new weights, and uploads them in
their turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from lightning_superscale.ops.threads import one_thread

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Settlement(Protocol[T_co]):
    """The task of making one unit's part of a step final."""

    def has_arrived(self) -> bool:
        """Whether the unit's gradients are there."""

    def prepare(self) -> None:
        """Do the work that may be done before the unit's turn; waits for its gradients. Called at most once."""

    def settle(self) -> T_co:
        """Make the unit's step final, prepared or not; waits for its gradients."""


class StepWorker(Protocol):
    """Runs one task at a time beside the thread that runs the model."""

    def look_ahead(self, task: Callable[[], T], has_arrived: Callable[[], bool]) -> Future[T]:
        """Queue a task that begins when nothing is to be settled: a look at gradients, or a commit of the last ones.

        Of queued tasks, the newest whose gradients have arrived runs first. Where no task's gradients have arrived, the
        oldest begins, and waits. Cancelling the future removes the task.
        """

    def settle(self, units: Sequence[Settlement[T_co]]) -> list[Future[T_co]]:
        """Settle units in this order; `next_to_settle` chooses units to prepare meanwhile.

        The caller cancels tasks that look ahead before.
        """

    def close(self) -> None:
        """Take no more tasks, and wait for those that were queued."""


@dataclass(slots=True)
class Settling:
    """A unit that waits for its turn."""

    future: Future[Any]
    unit: Settlement[Any]
    is_prepared: bool = False


def next_to_settle(queue: Sequence[Settling]) -> tuple[Settling, bool]:
    """Choose the next unit to work on, and whether only to prepare it.

    The first unit is chosen, to be settled, if its gradients have arrived or all others are prepared. Otherwise the
    first unprepared one whose gradients have arrived is prepared, and where there is none, the last, whose gradients
    left first.
    """
    others = [settling for settling in queue[1:] if not settling.is_prepared]
    if not others or queue[0].unit.has_arrived():
        return queue[0], False
    return next((settling for settling in others if settling.unit.has_arrived()), others[-1]), True


class _Ahead(NamedTuple):
    future: Future[Any]
    task: Callable[[], Any]
    has_arrived: Callable[[], bool]


class StepThread:
    """Runs the tasks on a thread of its own. Satisfies `StepWorker`."""

    def __init__(self) -> None:
        # One thread: units are worked on one after the other, each by all of the pool's threads.
        self._executor = one_thread("lightning-superscale step")
        self._lock = threading.Lock()
        self._waiting: list[_Ahead] = []
        self._settling: list[Settling] = []

    def look_ahead(self, task: Callable[[], T], has_arrived: Callable[[], bool]) -> Future[T]:
        ahead = _Ahead(future := Future[T](), task, has_arrived)
        try:
            with self._lock:
                self._waiting.append(ahead)
            self._executor.submit(self._run_one)
        except BaseException:
            ahead.future.cancel()  # nobody else could, and it would run after the step was given up
            raise
        return future

    def settle(self, units: Sequence[Settlement[T_co]]) -> list[Future[T_co]]:
        added = [Settling(Future(), unit) for unit in units]
        with self._lock:  # all at once: with only the first unit queued the thread would wait for its gradients
            self._settling += added
        for _ in added:
            self._executor.submit(self._run_one)
        return [settling.future for settling in added]

    def _run_one(self) -> None:
        if self._settle_one():
            return
        while (ahead := self._next()) is not None:
            if ahead.future.set_running_or_notify_cancel():
                _run(ahead.future, ahead.task)
                return

    def _settle_one(self) -> bool:
        """Settle one unit, and prepare others until its gradients are there; returns whether there was one."""
        while True:
            with self._lock:
                if not self._settling:
                    return False
                chosen, is_early = next_to_settle(self._settling)
                chosen.is_prepared = is_early
                if not is_early:
                    self._settling.remove(chosen)
            if not is_early:
                _run(chosen.future, chosen.unit.settle)
                return True
            try:
                chosen.unit.prepare()
            except BaseException as error:
                with self._lock:
                    self._settling.remove(chosen)
                chosen.future.set_exception(error)  # a wait for the future raises it
                return True

    def _next(self) -> _Ahead | None:
        with self._lock:
            if not self._waiting:
                return None
            newest = (i for i in reversed(range(len(self._waiting))) if self._waiting[i].has_arrived())
            return self._waiting.pop(next(newest, 0))

    def close(self) -> None:
        self._executor.shutdown()


def _run(future: Future[Any], task: Callable[[], Any]) -> None:
    try:
        future.set_result(task())
    except BaseException as error:
        future.set_exception(error)  # a wait for the future raises it
