"""What the worker takes next."""

from __future__ import annotations

import threading

import pytest

from lightning_superscale.offload.superoffload.worker import StepThread

WAIT_S = 20.0


class Busy:
    """A worker whose thread waits until `go`; what it ran afterwards, in order."""

    def __init__(self) -> None:
        self.worker, self.ran = StepThread(), []
        self._may_go = threading.Event()
        begun = threading.Event()

        def hold() -> None:
            begun.set()
            assert self._may_go.wait(WAIT_S)

        self.worker.settle(hold)
        assert begun.wait(WAIT_S)

    def ahead(self, name, has_arrived=True):
        return self.worker.look_ahead(lambda: self.ran.append(name), lambda: has_arrived)

    def go(self) -> list:
        self._may_go.set()
        self.worker.close()
        return self.ran


def test_the_newest_goes_first():
    busy = Busy()
    for name in "abc":
        busy.ahead(name)
    assert busy.go() == ["c", "b", "a"]


def test_of_those_that_have_arrived_and_the_oldest_where_none_has():
    busy = Busy()
    for name, has_arrived in (("a", False), ("b", True), ("c", False), ("d", True), ("e", False)):
        busy.ahead(name, has_arrived)
    assert busy.go() == ["d", "b", "a", "c", "e"]


def test_what_was_taken_back_does_not_run_and_settling_keeps_its_order():
    busy = Busy()
    futures = [busy.ahead(name) for name in "abc"]
    assert [future.cancel() for future in futures] == [True] * 3
    for name in "xyz":
        busy.worker.settle(lambda name=name: busy.ran.append(name))
    assert busy.go() == ["x", "y", "z"]


def test_a_failure_reaches_whoever_asks_and_stops_nothing():
    busy = Busy()

    def fail() -> None:
        raise MemoryError("no host memory")

    after = busy.ahead("after")
    failing = busy.worker.look_ahead(fail, lambda: True)
    assert busy.go() == ["after"]
    assert after.result(WAIT_S) is None
    with pytest.raises(MemoryError, match="no host memory"):
        failing.result(WAIT_S)
