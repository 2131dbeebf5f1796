"""The store of weights that flow: what it does about new ones before, at and without a use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.offload.weight_flow.weights import FlowingWeights
from lightning_superscale.ops.cpu.memory import RecycledMemory
from lightning_superscale.ops.cpu.pool import default_pool
from lightning_superscale.zero.buckets.unit import BucketUnit
from tests.helpers.interrupts import interrupted_everywhere, is_written_later


class New:
    """New weights, twos: of a step on this host, or gathered on the device."""

    def __init__(self, weights: FlowingWeights, *, is_gathered: bool) -> None:
        self.said: list[str] = []
        self.is_there = False
        self._weights, self._is_gathered = weights, is_gathered

    def begin(self) -> None:
        self.said.append("begin")

    def are_on_host(self) -> bool:
        return self.is_there and not self._is_gathered

    def wait(self) -> None:
        self.said.append("wait")
        if self._is_gathered:
            with self._weights.filling(is_whole=True):
                self._weights.unit.weights.fill_(2.0)

    def abandon(self) -> None:
        self.said.append("abandon")


def flowing(shard_world_size: int) -> FlowingWeights:
    """Weights of a layer, with a second host buffer that holds twos."""
    layer = nn.Linear(6, 6)
    named, device = list(layer.named_parameters()), torch.device("cpu")
    unit = BucketUnit(0, named, 0, shard_world_size, RecycledMemory(), streams_to=device)
    numel = unit.full.shard_numel
    weights = FlowingWeights(unit, CpuLink(), [torch.zeros(numel), torch.full((numel,), 2.0)])
    unit.keep_in(weights)
    return weights


def step(weights: FlowingWeights, *, is_gathered: bool) -> New:
    new = New(weights, is_gathered=is_gathered)
    if not is_gathered:
        for i in range(len(weights.unit.params)):
            weights.switch(i, 1)
    weights.receive(new)
    return new


def are_twos(weights: FlowingWeights) -> bool:
    return all(bool((param == 2).all()) for param in weights.unit.params)


KINDS = pytest.mark.parametrize("is_gathered", [False, True], ids=["stepped here", "gathered"])


@KINDS
def test_a_use_waits_for_new_weights_once(is_gathered):
    weights = flowing(2 if is_gathered else 1)
    new = step(weights, is_gathered=is_gathered)
    assert new.said == []
    weights.acquire()
    weights.acquire()
    assert new.said == ["wait"]
    assert weights.is_present
    assert are_twos(weights)
    weights.release()
    weights.synchronize()
    assert are_twos(weights)


@KINDS
def test_a_read_between_uses_waits_for_new_weights_once(is_gathered):
    weights = flowing(2 if is_gathered else 1)
    new = step(weights, is_gathered=is_gathered)
    assert new.said == []
    assert are_twos(weights)
    assert are_twos(weights)
    assert new.said == ["wait"]


@KINDS
def test_without_a_use_new_weights_end_in_host_memory(is_gathered):
    weights = flowing(2 if is_gathered else 1)
    step(weights, is_gathered=is_gathered)
    assert weights.wait_new()
    assert weights.device_bytes == 0
    weights.synchronize()
    assert are_twos(weights)
    assert not weights.wait_new()


@KINDS
def test_a_foreseen_use_waits_for_nothing_and_copies_only_what_is_there(is_gathered):
    weights = flowing(2 if is_gathered else 1)
    new = step(weights, is_gathered=is_gathered)
    weights.prefetch()
    assert new.said == ["begin"]
    assert weights.device_bytes == weights.full_bytes
    assert weights._link.bytes.h2d == 0
    new.is_there = True
    weights.prefetch()
    assert (weights._link.bytes.h2d > 0) is not is_gathered
    weights.acquire()
    assert new.said == ["begin", "begin", "wait"]
    assert are_twos(weights)


def test_the_failure_of_a_rank_reaches_what_is_under_way():
    weights = flowing(2)
    weights.abandon()
    new = step(weights, is_gathered=True)
    weights.abandon()
    assert new.said == ["abandon"]


def test_no_copy_writes_to_memory_that_an_interrupt_freed():
    """Emptying a storage frees it under the tensors that a lost copy keeps: the heap was corrupted."""
    weights = []

    def begin():
        weights.append(flowing(1))
        return weights[-1].prefetch

    places = []
    for place in interrupted_everywhere(begin):
        places.append(place)
        weights[-1].release()
        assert not is_written_later(weights[-1].full_bytes, default_pool().drain), place
    assert any(place.startswith("pool.py") for place in places)
    weights[-1].acquire()
    assert weights[-1].is_present
