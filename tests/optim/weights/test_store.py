"""Stores of weights that stay on the device: who waits for new ones, and how often."""

from __future__ import annotations

from functools import partial

import torch

from lightning_superscale.ops.events import Done
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
    store, event = OnDevice(), Event()
    assert not store.wait_new()
    store.receive(Uploaded(event))
    assert event.num_waits == 0
    assert store.wait_new()
    assert not store.wait_new()
    assert event.num_waits == 1


def test_an_upload_may_be_copied_on_as_soon_as_it_is_waitable():
    event = Event()
    new = Uploaded(event)
    new.begin()
    assert not new.are_on_host()
    event.is_there = True
    assert new.are_on_host()
    assert event.num_waits == 0


def test_uploads_of_this_rank_outlive_the_failure_of_another():
    store, event = OnDevice(), Event()
    store.receive(Uploaded(event))
    store.abandon()
    store.wait_new()
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
