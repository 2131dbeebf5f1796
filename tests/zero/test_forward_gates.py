"""Publish-before-forward gates: a forward never reads weights that have not arrived."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.zero.forward_gates import PublishGates
from tests.helpers.engines import build_engine
from tests.helpers.played_device import Device

WAIT_S = 20


class HeldLink(CpuLink):
    """An upload happens only when the test lets it: a slow link without a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = threading.Event()
        self.may_go.set()
        self.num_waiting = 0

    def h2d(self, dst, src, after=None):
        self.bytes.h2d += src.numel() * src.element_size()
        link = self

        class Held:
            is_done = False

            def wait(self) -> None:
                if not self.is_done:
                    link.num_waiting += 1
                    assert link.may_go.wait(WAIT_S), "nobody let the upload go"
                    dst.copy_(src)
                    self.is_done = True

            synchronize = wait

        return Held()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x).tanh())


class ReadsElsewhere(Two):
    """Uses `second`'s weight without calling `second`."""

    def forward(self, x):
        return F.linear(self.first(x).tanh(), self.second.weight, self.second.bias)


class ReadsUnseen(Two):
    """Reads `second`'s weight as a C++ extension does, which torch does not call `__torch_function__` for."""

    def forward(self, x):
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(self.first(x).tanh(), self.second.weight, self.second.bias)


def one_step(model, engine, gates, x):
    gates.enter_step()
    engine.optimizer.zero_grad()
    model(x).pow(2).sum().backward()
    engine.step()


def build(cls):
    model, link = cls(), HeldLink()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine = build_engine(model, optimizer, is_offloaded=True, is_streamed=True, unit_bytes=1, link=link)
    return model, engine, link, PublishGates(model, engine.transport, per_module=True)


def test_forward_waits_at_the_gate_of_the_module_that_owns_the_weights():
    model, engine, link, gates = build(Two)
    x = torch.ones(1, 4)
    one_step(model, engine, gates, x)
    twin, plain = Two(), None
    plain = torch.optim.AdamW(twin.parameters(), lr=0.1)
    twin(x).pow(2).sum().backward()
    plain.step()
    link.may_go.clear()
    gates.enter_step()
    result = []
    runner = threading.Thread(target=lambda: result.append(model(x)), daemon=True)
    runner.start()
    while link.num_waiting == 0 and runner.is_alive():
        pass
    assert not result, "forward ran on weights that had not arrived"
    link.may_go.set()
    runner.join(WAIT_S)
    assert torch.equal(result[0], twin(x))
    gates.close()
    engine.close()


def test_a_device_that_is_measured_is_bracketed_at_each_gate():
    device = Device()
    waits = device.waits()
    model, engine, _, gates = build(Two)
    gates.close()
    gates = PublishGates(model, engine.transport, per_module=True, waits=waits)
    wait = engine.transport.wait_published

    def slow(units):
        device.now += 1
        wait(units)

    engine.transport.wait_published = slow
    waits.ask()
    waits.end_backward(0)
    waits.begin_forward(1)
    model(torch.ones(1, 4))
    waits.end_forward()
    assert waits.take() == sum(1 for module in model.modules() if module._forward_pre_hooks) == 2
    gates.close()
    engine.close()


def test_module_gate_leaves_later_modules_uploads_alone():
    model, engine, link, gates = build(Two)
    x = torch.ones(1, 4)
    one_step(model, engine, gates, x)
    gates.enter_step()
    before = link.num_waiting
    model.first(x)
    assert link.num_waiting - before == 2, "the first module's gate waits for its weight and bias only"
    model.second(x)
    assert link.num_waiting - before == 4
    gates.close()
    engine.close()


def units_of(engine, name):
    return [u for u in engine.transport.units if u.full.slices[0].fqn.startswith(name)]


@pytest.mark.parametrize(("cls", "is_at_root"), [(ReadsElsewhere, False), (ReadsUnseen, True)])
def test_weights_read_outside_their_module_are_gated_at_the_root_unless_the_read_waits(cls, is_at_root):
    model, engine, link, gates = build(cls)
    x = torch.ones(1, 4)
    one_step(model, engine, gates, x)
    assert [gates.is_at_modules(u) for u in units_of(engine, "second")] == [not is_at_root] * 2
    assert all(gates.is_at_modules(u) for u in units_of(engine, "first"))
    for i in range(3):
        before = link.num_waiting
        gates.enter_step()
        assert link.num_waiting - before == (2 if is_at_root else 0)
        if i == 0:
            model(x)
            assert link.num_waiting - before == 4
        one_step(model, engine, gates, x)
    twin = cls()
    plain = torch.optim.AdamW(twin.parameters(), lr=0.1)
    for _ in range(4):
        plain.zero_grad()
        twin(x).pow(2).sum().backward()
        plain.step()
    gates.close()
    engine.close()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("per_module", [True, False])
def test_closed_gates_leave_no_hooks(per_module):
    model, engine, _, gates = build(Two)
    gates.close()
    gates = PublishGates(model, engine.transport, per_module=per_module)
    gates.close()
    engine.close()
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(
        p._post_accumulate_grad_hooks in (None, {}) or not p._post_accumulate_grad_hooks for p in model.parameters()
    )
