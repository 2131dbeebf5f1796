"""Reads of a parameter wait for its new weights, by whatever road; and cost nothing once these are there."""

from __future__ import annotations

import copy
import io
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lightning_superscale.optim.weights.param_classes import data_ptr_of, set_data, watched_classes
from lightning_superscale.optim.weights.store import OnDevice
from lightning_superscale.optim.weights.watch import WeightWatch


class Ones:
    """New weights that arrive when they are waited for. Satisfies `NewWeights`."""

    def __init__(self, layer: nn.Module) -> None:
        self._memory = [param.detach() for param in layer.parameters()]
        self.num_waits = 0

    def begin(self) -> None: ...

    def are_on_host(self) -> bool:
        return False

    def wait(self) -> None:
        self.num_waits += 1
        for memory in self._memory:
            memory.fill_(1)

    def abandon(self) -> None: ...


def late(layer: nn.Module | None = None) -> tuple[nn.Module, Ones, OnDevice]:
    """A layer of zeros whose weights become ones, once somebody waits."""
    layer = layer or nn.Linear(4, 4)
    with torch.no_grad():
        for param in layer.parameters():
            param.zero_()
    new, store = Ones(layer), OnDevice(list(layer.parameters()))
    store.receive(new)
    return layer, new, store


def saved(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return torch.load(file)["weight"]


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight * 2 / 2

    @staticmethod
    def backward(ctx, grad):
        return grad


ROADS = {
    "operation": lambda layer: layer.weight * 1,
    "method": lambda layer: layer.weight.clone(),
    "parameters()": lambda layer: next(layer.parameters()) + 0,
    "state_dict()": lambda layer: layer.state_dict()["weight"],
    "torch.save": saved,
    "functional call": lambda layer: (
        torch.func.functional_call(layer, dict(layer.named_parameters()), torch.eye(4)) - 1
    ),
    "vmap": lambda layer: torch.func.vmap(lambda row: row * 1)(layer.weight),
    "view": lambda layer: layer.weight.view(-1).view(4, 4),
    "detach": lambda layer: layer.weight.detach(),
    "data": lambda layer: layer.weight.data,
    "item": lambda layer: torch.full((4, 4), layer.weight[0, 0].item()),
    "tolist": lambda layer: torch.tensor(layer.weight.tolist()),
    "numpy": lambda layer: torch.from_numpy(np.asarray(layer.weight.detach())),
    "deepcopy": lambda layer: copy.deepcopy(layer).weight,
    "foreach": lambda layer: torch._foreach_mul([layer.bias, layer.weight], 1)[1],
    "keyword": lambda layer: torch.mul(input=torch.ones(4, 4), other=layer.weight),
    "aten": lambda layer: torch.ops.aten.mul.Tensor(layer.weight, 1),
    "autograd function": lambda layer: Twice.apply(layer.weight),
    "vector": lambda layer: nn.utils.parameters_to_vector(layer.parameters())[:16].view(4, 4),
    "storage": lambda layer: (
        torch.tensor(layer.weight.untyped_storage().tolist(), dtype=torch.uint8)[:64].view(torch.float32).view(4, 4)
    ),
    "print": lambda layer: torch.full((4, 4), float("1." in repr(layer.weight))),
    "another thread": lambda layer: in_thread(lambda: layer.weight * 1),
}


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(20)
    return found[0]


@pytest.mark.parametrize("road", ROADS)
def test_every_read_waits_for_new_weights(road):
    layer, new, _ = late()
    assert torch.equal(ROADS[road](layer), torch.ones(4, 4))
    assert new.num_waits == 1
    assert torch.equal(layer.bias, torch.ones(4))
    assert new.num_waits == 1


WRITES = {
    "copy_": lambda weight: weight.copy_(torch.full((4, 4), 3.0)),
    "mul_": lambda weight: weight.mul_(3),
    "slice": lambda weight: weight.__setitem__(slice(None), 3.0),
    "data.mul_": lambda weight: weight.data.mul_(3),
    "out": lambda weight: torch.add(torch.ones(4, 4), torch.full((4, 4), 2.0), out=weight),
    "foreach": lambda weight: torch._foreach_mul_([weight], 3),
}


@pytest.mark.parametrize("way", WRITES)
def test_a_write_is_not_overwritten_by_weights_that_arrive_later(way):
    layer, new, store = late()
    with torch.no_grad():
        WRITES[way](layer.weight)
    assert new.num_waits == 1
    assert not store.wait_new()
    assert torch.equal(layer.weight, torch.full((4, 4), 3.0))


def test_what_reads_no_values_does_not_wait():
    layer, new, _ = late()
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device.type, weight.requires_grad) == (
        (4, 4),
        torch.float32,
        "cpu",
        True,
    )
    assert (weight.numel(), weight.size(0), weight.is_leaf, weight._version) == (16, 4, True, weight._version)
    weight.grad = torch.ones(4, 4)
    layer.zero_grad()
    weight.requires_grad_(True)
    torch.optim.AdamW(layer.parameters())
    assert isinstance(weight, nn.Parameter)
    assert data_ptr_of(weight)
    set_data(weight, weight.grad if weight.grad is not None else torch.zeros(4, 4))
    assert new.num_waits == 0


def test_reads_cost_nothing_once_the_weights_are_there():
    layer, _, store = late()
    quiet, waiting = watched_classes(nn.Parameter)
    assert type(layer.weight) is waiting
    store.wait_new()
    assert type(layer.weight) is quiet
    # torch looks for `__torch_function__` once per operation, and finds that there is none to call.
    assert not torch.overrides.has_torch_function((layer.weight,))


def test_threads_that_read_at_one_time_all_see_the_new_weights():
    layer, new, _ = late()
    found: list[bool] = []
    go = threading.Barrier(4)

    def read():
        go.wait(20)
        found.append(bool((layer.weight == 1).all()))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [True] * 4
    assert new.num_waits == 1


def test_a_failed_wait_is_raised_once_and_leaves_parameters_readable():
    layer, new, _ = late()

    def fail():
        raise RuntimeError("the host has lost them")

    new.wait = fail
    with pytest.raises(RuntimeError, match="lost them"):
        layer.weight.sum()
    assert layer.weight.sum() == 0


def test_parameters_have_their_own_class_again_after_the_run_and_in_copies():
    layer, _, store = late()
    assert type(copy.deepcopy(layer).weight) is nn.Parameter
    store.close()
    assert [type(param) for param in layer.parameters()] == [nn.Parameter] * 2


class Tagged(nn.Parameter):
    """A parameter class with an operation handler of its own."""

    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(getattr(func, "__name__", "?"))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_classes_with_an_operation_handler_of_their_own_keep_it():
    layer = nn.Linear(4, 4)
    layer.weight = Tagged(torch.zeros(4, 4))
    layer, new, store = late(layer)
    Tagged.seen.clear()
    assert torch.equal(torch.mul(layer.weight, 1), torch.ones(4, 4))
    assert "mul" in Tagged.seen
    assert new.num_waits == 1
    store.close()
    assert type(layer.weight) is Tagged


def test_weights_of_a_class_that_cannot_be_watched_are_waited_for_at_once(monkeypatch):
    # An object can't change its class to one whose instances have another layout in memory.
    monkeypatch.setattr("lightning_superscale.optim.weights.watch.watched_classes", lambda cls: (int, int))
    layer, new, _ = late()
    assert new.num_waits == 1
    assert type(layer.weight) is nn.Parameter


def test_edits_through_data_are_noted_by_parameter():
    layer, _, store = late()
    store.wait_new()
    assert store.watch.take_edited() == []
    layer.weight.data.clamp_(0)
    assert store.watch.is_edited(layer.weight)
    assert [id(param) for param in store.watch.take_edited()] == [id(layer.weight)]
    assert store.watch.take_edited() == []


def test_another_watch_takes_parameters_over():
    layer = nn.Linear(4, 4)
    first = WeightWatch([layer.weight, layer.bias], lambda: None)
    second = WeightWatch([layer.weight], lambda: None)
    first.close()
    quiet, _ = watched_classes(nn.Parameter)
    assert (type(layer.weight), type(layer.bias)) == (quiet, nn.Parameter)
    layer.weight.data.zero_()
    assert [id(param) for param in second.take_edited()] == [id(layer.weight)]
    second.close()
    assert type(layer.weight) is nn.Parameter


def test_observed_reads_are_noted_and_nothing_waits():
    layer = nn.Linear(4, 4)
    waits: list[int] = []
    watch = WeightWatch(list(layer.parameters()), lambda: waits.append(1))
    watch.observe()
    layer.weight.sum()
    assert watch.read == {id(layer.weight)}
    assert not waits
    watch.close()
