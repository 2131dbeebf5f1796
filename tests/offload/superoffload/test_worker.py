"""What the worker takes next."""

from __future__ import annotations

import threading

import pytest

from lightning_superscale.offload.superoffload.worker import StepThread

WAIT_S = 20.0


class Unit:
    """What is settled; its gradients are there or are not, or are there from some look on."""

    def __init__(self, ran: list, name: str, arrived) -> None:
        self._ran, self._name = ran, name
        self._looks_left = (0 if arrived else 10**6) if isinstance(arrived, bool) else arrived

    def has_arrived(self) -> bool:
        self._looks_left -= 1
        return self._looks_left < 0

    def prepare(self) -> None:
        self._ran.append(f"prepare {self._name}")

    def settle(self):
        self._ran.append(self._name)
        return self._name


class Busy:
    """A worker whose thread waits until `go`; what it ran afterwards, in order."""

    def __init__(self) -> None:
        self.worker, self.ran = StepThread(), []
        self._may_go = threading.Event()
        begun = threading.Event()

        def hold() -> None:
            begun.set()
            assert self._may_go.wait(WAIT_S)

        self.worker.look_ahead(hold, lambda: True)
        assert begun.wait(WAIT_S)

    def ahead(self, name, has_arrived=True):
        return self.worker.look_ahead(lambda: self.ran.append(name), lambda: has_arrived)

    def settle(self, **arrived) -> None:
        """Settle units by name; each with whether its gradients are there, or with how many looks they will be."""
        self.worker.settle([Unit(self.ran, name, when) for name, when in arrived.items()])

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
    busy.settle(x=True, y=True, z=True)
    assert busy.go() == ["x", "y", "z"]


def test_others_are_prepared_while_the_first_to_settle_is_missing():
    busy = Busy()
    busy.settle(a=4, b=False, c=True, d=False)
    # c is there, d left before b; at the fourth look a is there, and the order is that of the next forward again.
    assert busy.go() == ["prepare c", "prepare d", "prepare b", "a", "b", "c", "d"]
    busy = Busy()
    busy.settle(a=1, b=False, c=False)
    assert busy.go() == ["prepare c", "a", "b", "c"]


def test_a_failure_while_preparing_reaches_whoever_asks_for_that_unit():
    busy = Busy()
    units = [Unit(busy.ran, name, name == "c") for name in "abc"]
    units[2].prepare = lambda: (_ for _ in ()).throw(MemoryError("no host memory"))
    a, b, c = busy.worker.settle(units)
    assert busy.go() == ["prepare b", "a", "b"]
    assert (a.result(WAIT_S), b.result(WAIT_S)) == ("a", "b")
    with pytest.raises(MemoryError, match="no host memory"):
        c.result(WAIT_S)


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
