"""Units that follow the observed order, states that change their home: nothing but their place changes."""

from __future__ import annotations

import gc
import weakref
from datetime import timedelta

import pytest
import torch
from torch import nn

from lightning_superscale.comm.communicator import ranks_of
from lightning_superscale.comm.mesh import build_mesh
from lightning_superscale.config import ZenFlowConfig
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.optim.bucketing import Grouping, is_same_cut, last_ready
from lightning_superscale.optim.clipping import ClipByNorm
from lightning_superscale.optim.rebuild_buckets import regroup
from lightning_superscale.zero.forward_gates import PublishGates
from tests.helpers.engines import build_engine
from tests.helpers.plain import PlainMasterAdamW, assert_equal_states
from tests.helpers.programs import Programs, extra_backward_of_a_part, plain_backward
from tests.helpers.ranks import run_ranks

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def batch(step: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(dtype)


class Shuffled(nn.Module):
    """Registers its layers in another order than forward uses them."""

    def __init__(self, dtype=torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(12, 12, dtype=dtype)
        self.first = nn.Linear(12, 12, dtype=dtype)
        self.middle = nn.Linear(12, 12, dtype=dtype)
        self.unused = nn.Linear(12, 12, dtype=dtype)

    def forward(self, x):
        return self.last(self.middle(self.first(x).tanh()).tanh())


def _named(*numels: int) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", nn.Parameter(torch.zeros(numel))) for i, numel in enumerate(numels)]


def test_without_an_observed_order_units_follow_the_reverse_of_registration():
    named = _named(4, 4, 4, 4)
    assert Grouping(32).units_of(named) == [[named[3], named[2]], [named[1], named[0]]]


def test_units_follow_the_observed_order_and_what_it_lacks_comes_first():
    named = _named(4, 4, 4, 4)
    order = {named[1][1]: 0, named[3][1]: 1, named[0][1]: 2}
    assert Grouping(32, order).units_of(named) == [[named[2], named[1]], [named[3], named[0]]]


def test_parameters_of_another_dtype_or_home_share_no_unit_and_the_devices_come_last():
    named = _named(4, 4, 4)
    named.insert(1, ("half", nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))))
    on_device = frozenset({named[3][1]})
    units = Grouping(2**20, on_device=on_device).units_of(named)
    assert units == [[named[1]], [named[2], named[0]], [named[3]]]


def test_the_order_inside_a_unit_moves_nobody():
    assert is_same_cut([[1, 2], [3]], [[2, 1], [3]])
    assert not is_same_cut([[1, 2], [3]], [[3], [1, 2]])
    assert not is_same_cut([[1, 2]], [[1], [2]])


def test_the_last_ready_parameters_that_fit_stay_on_the_device():
    named = _named(2, 4, 4, 8)
    costs = {param: param.numel() for _, param in named}
    assert last_ready(named, costs, 12) == {named[3][1], named[2][1]}
    assert last_ready(named, costs, 6) == {named[2][1], named[0][1]}
    assert last_ready(named, costs, 1) == frozenset()
    assert last_ready(named, costs, 100) == {param for _, param in named}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_deferred", [True, False])
@pytest.mark.parametrize("unit_bytes", [1, 600])
def test_states_change_their_units_and_homes_while_training(dtype, is_deferred, unit_bytes):
    """Host to device, back, and partly; with clipping, a second backward of a part, and an edit just before."""
    plain, model = Programs(dtype), Programs(dtype)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(
        model, optimizer, is_offloaded=True, is_streamed=True, is_deferred=is_deferred, unit_bytes=unit_bytes
    )
    params = list(model.parameters())
    order = {param: (7 * i) % len(params) for i, param in enumerate(params)}
    homes = [frozenset(), frozenset(params), frozenset(params[::2]), frozenset(), frozenset(params[:2])]
    for step in range(10):
        if step % 2 == 1:
            with torch.no_grad():
                for first in (next(iter(plain.parameters())), params[0]):
                    first.mul_(0.5)
                oracle.masters[0].copy_(next(iter(plain.parameters())))
            regroup(engine, Grouping(unit_bytes, order if step % 4 == 1 else {}, homes[(step - 1) // 2]))
        program = extra_backward_of_a_part if step % 3 == 2 else plain_backward
        oracle.max_norm = 1e-3 if step % 2 else 1e6
        oracle.zero_grad()
        program(plain, batch(step, dtype))
        oracle.step()
        program(model, batch(step, dtype))
        engine.request_clip(ClipByNorm(oracle.max_norm))
        engine.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        pairs = zip(engine.transport.units, engine.states, strict=True)
        on_device = {param for unit, state in pairs if "host" not in state.homes for param in unit.params}
        assert on_device == (homes[(step - 1) // 2] if step else frozenset())
    engine.close()
    states = [oracle.optimizer.state.get(master, {}) for master in oracle.masters]
    assert_equal_states(list(model.parameters()), optimizer, list(plain.parameters()), states)


def test_units_follow_the_order_of_the_first_backward():
    model = Shuffled()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(
        model, optimizer, is_offloaded=True, is_streamed=True, is_deferred=True, unit_bytes=2 * 12 * 13
    )
    names = {param: fqn for fqn, param in model.named_parameters()}

    def units() -> list[set[str]]:
        return [{names[p].split(".")[0] for p in unit.params} for unit in engine.transport.units]

    assert units() == [{"unused"}, {"middle"}, {"first"}, {"last"}]
    model(batch(0)).float().sum().backward()
    engine.step()
    engine.transport.wait_all_published()
    optimizer.zero_grad()
    order = {param: place for place, param in enumerate(engine.transport.observed)}
    assert regroup(engine, Grouping(2 * 12 * 13, order))
    assert units() == [{"unused"}, {"last"}, {"middle"}, {"first"}]
    assert not regroup(engine, Grouping(2 * 12 * 13, order))
    engine.close()


@pytest.mark.parametrize("engine", ["cpu", "superoffload", "zenflow"])
def test_old_units_and_states_are_freed_at_once(engine):
    """Without Python's collector, which would let old states lie in memory beside the new ones for many steps."""
    model = Shuffled()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    built = build_engine(
        model,
        optimizer,
        is_offloaded=True,
        is_streamed=True,
        is_deferred=engine == "superoffload",
        zenflow=ZenFlowConfig() if engine == "zenflow" else None,
        unit_bytes=1,
    )
    model(batch(0)).float().sum().backward()
    built.step()
    built.transport.wait_all_published()
    optimizer.zero_grad()
    old = [weakref.ref(state.master) for state in built.states]
    old += [weakref.ref(state.exp_avg) for state in built.states]
    old += [weakref.ref(unit.weights) for unit in built.transport.units]
    gc.collect()
    gc.disable()
    try:
        regroup(built, Grouping(2**20))
        left = [ref for ref in old if ref() is not None]
    finally:
        gc.enable()
    assert left == []
    built.close()


def test_a_parameter_that_is_never_used_does_not_hold_its_unit_back():
    model = Shuffled()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(model, optimizer, is_offloaded=True, is_streamed=True, unit_bytes=2**20)
    sent = []
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)).float().sum().backward()
        sent.append(sum(state.grad(i) is not None for state in engine.states for i in range(len(state.unit.params))))
        engine.step()
        engine.transport.wait_all_published()
    engine.close()
    assert sent == [0, 6, 6]  # of 8 parameters; before the first step nobody knew


def _on_ranks(rank: int, world_size: int) -> tuple[list[torch.Tensor], bool]:
    model = Shuffled()
    ranks = ranks_of(build_mesh(MeshSpec(shard=world_size), timedelta(seconds=30)), model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(
        model, optimizer, is_offloaded=True, is_streamed=True, is_deferred=True, unit_bytes=1, ranks=ranks
    )
    gates = PublishGates(model, engine.transport, per_module=True)
    params = list(model.parameters())
    moved = True
    for step in range(6):
        if step in (1, 3, 4):
            order = {p: i for i, p in enumerate(engine.transport.observed)}
            moved &= regroup(engine, Grouping(600, order, frozenset(params[: 2 * (step - 1)])))
            gates.close()
            gates = PublishGates(model, engine.transport, per_module=True)
        gates.enter_step()
        optimizer.zero_grad()
        model(batch(10 * step + rank)).float().pow(2).mean().backward()
        engine.request_clip(ClipByNorm(1e6))
        engine.step()
    engine.transport.wait_all_published()
    gates.close()
    engine.close()
    return [p.detach().float() for p in model.parameters()], moved


def test_two_ranks_move_together():
    results = run_ranks(2, _on_ranks, limit_s=60)
    plain = Shuffled()
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    for step in range(6):
        grads = []
        for rank in range(2):
            oracle.zero_grad()
            plain(batch(10 * step + rank)).float().pow(2).mean().backward()
            grads.append([None if p.grad is None else p.grad.clone() for p in plain.parameters()])
        for i, param in enumerate(plain.parameters()):
            if grads[0][i] is not None:
                param.grad = sum((g[i] * 0.5).float() for g in grads).bfloat16()
        oracle.step()
    for result, moved in results:
        assert moved
        for found, expected in zip(result, plain.parameters(), strict=True):
            assert torch.equal(found, expected.detach().float())
