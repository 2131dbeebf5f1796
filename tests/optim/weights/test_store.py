"""Stores of weights that stay on the device: who waits for new ones, and how often."""

from __future__ import annotations

import contextlib
import sys
from functools import partial

import torch

from lightning_superscale.ops.events import Done
from lightning_superscale.optim.weights import store, watch
from lightning_superscale.optim.weights.store import Incoming, OnDevice, Uploaded


class Event:
    """An upload that the test completes."""

    def __init__(self) -> None:
        self.num_waits, self.is_there = 0, False

    def is_waitable(self) -> bool:
        return self.is_there

    def wait(self) -> None:
        self.num_waits += 1


def test_new_weights_are_waited_for_once():
    its_store, event = OnDevice(), Event()
    assert not its_store.wait_new()
    its_store.receive(Uploaded(event))
    assert event.num_waits == 0
    assert its_store.wait_new()
    assert not its_store.wait_new()
    assert event.num_waits == 1


class InterruptsAt:
    """Raises at one line of the code that waits for new weights."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame, event, arg):
        return self if frame.f_code.co_filename in (store.__file__, watch.__file__) and self._goes_on(event) else None

    def _goes_on(self, event) -> bool:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return True


def test_weights_can_be_read_after_an_interrupt_at_any_line_of_their_wait():
    line = 0
    while True:
        line += 1
        param, event = torch.nn.Parameter(torch.ones(2)), Event()
        its_store = OnDevice([param])
        its_store.receive(Uploaded(event))
        tracer = InterruptsAt(line)
        sys.settrace(tracer)
        with contextlib.suppress(KeyboardInterrupt):
            its_store.wait_new()
        sys.settrace(None)
        assert param.detach().sum() == 2
        assert event.num_waits >= 1
        if tracer.left > 0:  # the wait has fewer lines
            break
    assert line > 15


def test_an_upload_may_be_copied_on_as_soon_as_it_is_waitable():
    event = Event()
    new = Uploaded(event)
    new.begin()
    assert not new.are_on_host()
    event.is_there = True
    assert new.are_on_host()
    assert event.num_waits == 0


def test_uploads_of_this_rank_outlive_the_failure_of_another():
    its_store, event = OnDevice(), Event()
    its_store.receive(Uploaded(event))
    its_store.abandon()
    its_store.wait_new()
    assert event.num_waits == 1


class GatheredUnit:
    def __init__(self) -> None:
        self.unpacked: list[list[int]] = []

    def unpack_gathered(self, stepped) -> None:
        self.unpacked.append(stepped)


def test_gathers_are_unpacked_unless_another_rank_failed():
    for is_abandoned in (False, True):
        store, unit = OnDevice(), GatheredUnit()
        store.receive(Incoming(Done(torch.ones(1)), partial(unit.unpack_gathered, [0, 2])))
        if is_abandoned:
            store.abandon()
        store.wait_new()
        assert unit.unpacked == ([] if is_abandoned else [[0, 2]])


def test_filling_needs_nothing_on_the_device():
    with OnDevice().filling(is_whole=False):
        pass
