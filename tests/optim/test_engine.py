"""The engine against plain PyTorch, bit for bit, whatever the program, the residence and the bucket size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.native import loader
from lightning_superscale.optim.adamw_step import AdamWRule
from lightning_superscale.optim.clipping import ClipByNorm, ClipByValue
from lightning_superscale.optim.mixed_step import MixedStep
from lightning_superscale.optim.param_update import ParamUpdate
from tests.helpers.engines import build_engine
from tests.helpers.plain import PlainMasterAdamW, assert_equal_states
from tests.helpers.programs import PROGRAMS, Programs, plain_backward

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
WAYS = {
    "resident": {"is_offloaded": False},
    "host-held": {"is_offloaded": True},
    "host-streamed": {"is_offloaded": True, "is_streamed": True},
    "deferred-held": {"is_offloaded": True, "is_deferred": True},
    "deferred": {"is_offloaded": True, "is_streamed": True, "is_deferred": True},
}


def batches(num: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 12, generator=generator).to(dtype) for _ in range(num)]


@pytest.fixture(params=WAYS, ids=str)
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_fp32_step_equals_torch_adamw(way, program):
    plain, model = Programs(), Programs()
    expected = torch.optim.AdamW(plain.parameters(), **ADAMW)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(model, optimizer, **way)
    for x in batches(5, torch.float32):
        expected.zero_grad()
        program(plain, x)
        expected.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        program(model, x)
        engine.step()
    engine.close()
    states = [expected.state[p] for p in plain.parameters()]
    assert_equal_states(list(model.parameters()), optimizer, list(plain.parameters()), states)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_bf16_step_equals_plain_master_adamw(way, program):
    plain, model = Programs(torch.bfloat16), Programs(torch.bfloat16)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(model, optimizer, **way)
    for x in batches(5, torch.bfloat16):
        oracle.zero_grad()
        program(plain, x)
        oracle.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        program(model, x)
        engine.step()
    engine.transport.wait_all_published()
    engine.flush()
    params = list(model.parameters())
    states = [oracle.optimizer.state.get(master, {}) for master in oracle.masters]
    assert_equal_states(params, optimizer, list(plain.parameters()), states)
    masters = engine.state_dict()["state"]
    for i, master in enumerate(oracle.masters):
        if oracle.params[i].grad is not None:
            assert torch.equal(masters[i]["master_param"], master)
    engine.close()


@pytest.mark.parametrize("unit_bytes", [1, 500, 2048, 1 << 20])
@pytest.mark.parametrize("clip", [None, ClipByNorm(0.05), ClipByValue(0.003)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_equals_plain_for_every_unit_size(way, unit_bytes, clip, dtype):
    plain, model = Programs(dtype), Programs(dtype)
    oracle = PlainMasterAdamW(
        plain.parameters(),
        max_norm=clip.max_norm if isinstance(clip, ClipByNorm) else None,
        clip_value=clip.clip_value if isinstance(clip, ClipByValue) else None,
        **ADAMW,
    )
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(model, optimizer, unit_bytes=unit_bytes, num_threads=2, **way)
    for x in batches(4, dtype):
        oracle.zero_grad()
        plain_backward(plain, x)
        oracle.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plain_backward(model, x)
        if clip is not None:
            engine.request_clip(clip)
        engine.step()
    engine.close()
    for param, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(param, expected)


def test_norm_then_value_clipping_applies_both():
    plain, model = Programs(), Programs()
    oracle = PlainMasterAdamW(plain.parameters(), max_norm=0.05, clip_value=0.004, **ADAMW)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(model, optimizer, is_offloaded=True)
    x = batches(1, torch.float32)[0]
    plain_backward(plain, x)
    oracle.step()
    plain_backward(model, x)
    engine.request_clip(ClipByNorm(0.05))
    engine.request_clip(ClipByValue(0.004))
    engine.step()
    engine.close()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_value_then_norm_clipping_is_refused():
    model = Programs()
    engine = build_engine(model, torch.optim.AdamW(model.parameters()), is_offloaded=False)
    engine.request_clip(ClipByValue(0.1))
    with pytest.raises(SuperScaleError, match="found a clip by norm after a clip by value"):
        engine.request_clip(ClipByNorm(0.1))
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulated_micro_batches_equal_plain(way, dtype):
    plain, model = Programs(dtype), Programs(dtype)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(model, optimizer, **way)
    for _ in range(3):
        xs = batches(3, dtype)
        oracle.zero_grad()
        for x in xs:
            plain_backward(plain, x)
        oracle.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        with engine.transport.blocked():
            for x in xs[:2]:
                plain_backward(model, x)
        plain_backward(model, xs[2])
        engine.step()
    engine.close()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
        lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
    ],
    ids=["SGD", "RMSprop", "AMSGrad", "Adagrad"],
)
def test_other_optimizers_step_through_their_own_code(way, make, dtype):
    plain, model = Programs(dtype), Programs(dtype)
    masters = [nn.Parameter(p.detach().float().clone()) for p in plain.parameters()]
    expected, optimizer = make(masters), make(list(model.parameters()))
    engine = build_engine(model, optimizer, **way)
    assert engine.why_not_native is not None
    for x in batches(4, dtype):
        plain.zero_grad()
        plain_backward(plain, x)
        for param, master in zip(plain.parameters(), masters, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
        expected.step()
        with torch.no_grad():
            for param, master in zip(plain.parameters(), masters, strict=True):
                param.copy_(master)
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plain_backward(model, x)
        engine.step()
    engine.transport.wait_all_published()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    engine.close()


def test_native_step_runs_the_optimizers_hooks_and_leaves_held_gradients(way):
    model = Programs()
    optimizer = torch.optim.AdamW(model.parameters())
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    engine = build_engine(model, optimizer, **way)
    plain_backward(model, batches(1, torch.float32)[0])
    engine.step()
    assert seen == ["post"]
    is_streamed = way.get("is_streamed", False)
    assert (model.inp.weight.grad is None) == is_streamed
    engine.close()


def test_step_on_the_bare_optimizer_is_refused():
    model = Programs()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = build_engine(model, optimizer, is_offloaded=True)
    with pytest.raises(SuperScaleError, match=r"behind their fp32 masters. Call step\(\) on what self.optimizers\(\)"):
        optimizer.step()
    engine.close()
    optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradient_raises_before_anything_changes(way, bad):
    model = Programs()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(model, optimizer, error_if_nonfinite=True, **way)
    x = batches(1, torch.float32)[0]
    plain_backward(model, x)
    engine.step()
    engine.transport.wait_all_published()
    before = [p.detach().clone() for p in model.parameters()]
    engine.flush()
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters() if p in optimizer.state]
    optimizer.zero_grad()
    (model.trunk(x).sum() * bad).backward()
    with pytest.raises(SuperScaleError, match=r"error_if_nonfinite.*NaN or infinite \(.*\).*as before this step"):
        engine.step()
    engine.transport.wait_all_published()
    assert all(map(torch.equal, model.parameters(), before))
    engine.flush()
    after = [optimizer.state[p]["exp_avg"] for p in model.parameters() if p in optimizer.state]
    assert all(map(torch.equal, after, moments))
    # The next clean step is as if the bad one had not been.
    optimizer.zero_grad()
    plain_backward(model, x)
    engine.step()
    engine.close()
    twin = Programs()
    expected = torch.optim.AdamW(twin.parameters(), **ADAMW)
    for _ in range(2):
        expected.zero_grad()
        plain_backward(twin, x)
        expected.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_parameter_unfrozen_and_added_later_is_adopted(way):
    plain, model = Programs(), Programs()
    for m in (plain, model):
        m.inp.requires_grad_(False)
    expected = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], **ADAMW)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
    engine = build_engine(model, optimizer, **way)
    for n, x in enumerate(batches(4, torch.float32)):
        if n == 2:
            for m, o in ((plain, expected), (model, optimizer)):
                m.inp.requires_grad_(True)
                o.add_param_group({"params": list(m.inp.parameters()), "lr": 3e-3})
        expected.zero_grad()
        plain_backward(plain, x)
        expected.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plain_backward(model, x)
        engine.step()
    engine.close()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_engine_continues_bit_for_bit(way, dtype):
    xs = batches(6, dtype)

    def train(model, optimizer, engine, part):
        for x in part:
            engine.transport.wait_all_published()
            optimizer.zero_grad()
            plain_backward(model, x)
            engine.step()
        engine.transport.wait_all_published()

    straight = Programs(dtype)
    opt = torch.optim.AdamW(straight.parameters(), **ADAMW)
    engine = build_engine(straight, opt, **way)
    train(straight, opt, engine, xs[:3])
    weights = {k: v.clone() for k, v in straight.state_dict().items()}
    saved = engine.state_dict()
    saved = {
        "param_groups": saved["param_groups"],
        "state": {i: {k: v.clone() for k, v in s.items()} for i, s in saved["state"].items()},
    }
    train(straight, opt, engine, xs[3:])
    engine.close()

    resumed = Programs(dtype)
    resumed.load_state_dict(weights)
    opt2 = torch.optim.AdamW(resumed.parameters(), lr=123.0)
    engine2 = build_engine(resumed, opt2, **way)
    engine2.load_state_dict(saved)
    train(resumed, opt2, engine2, xs[3:])
    engine2.close()
    assert all(map(torch.equal, resumed.parameters(), straight.parameters()))


def test_state_of_plain_adamw_loads_and_ours_loads_in_plain():
    xs = batches(4, torch.float32)
    plain, model = Programs(), Programs()
    expected = torch.optim.AdamW(plain.parameters(), **ADAMW)
    for x in xs[:2]:
        expected.zero_grad()
        plain_backward(plain, x)
        expected.step()
    model.load_state_dict(plain.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(model, optimizer, is_offloaded=True)
    engine.load_state_dict(expected.state_dict())
    for x in xs[2:]:
        optimizer.zero_grad()
        plain_backward(model, x)
        engine.step()
        engine.transport.wait_all_published()
        expected.zero_grad()
        plain_backward(plain, x)
        expected.step()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    other = torch.optim.AdamW(Programs().parameters(), **ADAMW)
    other.load_state_dict(engine.state_dict())
    engine.close()


def test_state_of_another_group_structure_is_refused():
    model = Programs()
    params = list(model.parameters())
    engine = build_engine(model, torch.optim.AdamW(params), is_offloaded=True)
    other = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    with pytest.raises(SuperScaleError, match=r"parameter groups of \[2, 7\] parameters, this run's has \[9\]"):
        engine.load_state_dict(other.state_dict())
    engine.close()


def test_grad_norm_is_the_global_norm_without_clipping(way):
    model = Programs()
    engine = build_engine(model, torch.optim.AdamW(model.parameters()), **way)
    with pytest.raises(SuperScaleError, match="neither has happened yet"):
        engine.grad_norm()
    x = batches(1, torch.float32)[0]
    twin = Programs()
    plain_backward(twin, x)
    expected = torch.cat([p.grad.flatten().double() for p in twin.parameters() if p.grad is not None]).norm()
    plain_backward(model, x)
    engine.step()
    # fp32 squares summed in blocks: relative error of the sum at most 2**-24 * (256 + 5), halved by the root.
    assert abs(engine.grad_norm().item() - expected.item()) <= expected.item() * 2**-24 * 140
    engine.close()


def test_sparse_gradients_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True))
    engine = build_engine(model, torch.optim.AdamW(model.parameters()), is_offloaded=True)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(SuperScaleError, match="'0.weight' has a gradient of layout torch.sparse_coo"):
        engine.step()
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_native_library_steps_are_the_same(way, dtype):
    plain, model = Programs(dtype), Programs(dtype)
    oracle = PlainMasterAdamW(plain.parameters(), max_norm=0.05, **ADAMW)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    with loader.without_native():
        engine = build_engine(model, optimizer, **way)
        for x in batches(3, dtype):
            oracle.zero_grad()
            plain_backward(plain, x)
            oracle.step()
            engine.transport.wait_all_published()
            optimizer.zero_grad()
            plain_backward(model, x)
            engine.request_clip(ClipByNorm(0.05))
            engine.step()
        engine.close()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_fused_adamw_equals_torchs_fused_kernel_where_it_is_vectorised():
    # torch steps the last numel % 16 elements in a scalar tail of other roundings, so sizes are multiples of 16.
    torch.manual_seed(0)
    start = torch.randn(64, 32)
    ours, plain = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
    for module in (ours, plain):
        module.weight.data = start.clone()
    expected = torch.optim.AdamW(plain.parameters(), fused=True, **ADAMW)
    optimizer = torch.optim.AdamW(ours.parameters(), fused=True, **ADAMW)
    engine = build_engine(ours, optimizer, is_offloaded=True)
    for _ in range(10):
        x = torch.randn(8, 32)
        for module in (plain, ours):
            engine.transport.wait_all_published()
            module.weight.grad = None
            module(x).pow(2).sum().backward()
        expected.step()
        engine.step()
    engine.close()
    assert torch.equal(ours.weight, plain.weight)


def test_state_put_straight_into_the_optimizer_is_taken_over_and_stays_bound(way):
    """Also at unequal step counts within one group, which share no hyperparameters."""
    plain, model = Programs(), Programs()
    expected = torch.optim.AdamW(plain.parameters(), **ADAMW)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine = build_engine(model, optimizer, **way)
    for step, x in enumerate(batches(6, torch.float32)):
        if step == 3:
            for chosen in (expected, optimizer):
                first = chosen.state[chosen.param_groups[0]["params"][0]]
                first["exp_avg"] = torch.full_like(first["exp_avg"], 0.25)
                first["step"] = torch.tensor(40.0)
        plain_backward(plain, x)
        expected.step()
        expected.zero_grad()
        plain_backward(model, x)
        engine.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
    engine.flush()
    assert_equal_states(
        list(model.parameters()), optimizer, list(plain.parameters()), [expected.state[p] for p in plain.parameters()]
    )


class Homes:
    """A state that says where it lives."""

    def __init__(self, *homes) -> None:
        self.homes = frozenset(homes)


def test_a_state_of_two_homes_is_stepped_by_the_hosts_rule():
    stepped = []

    class Rule(AdamWRule):
        def __init__(self, name) -> None:
            self._name = name

        def step(self, due, grad_scale, clip_value):
            stepped.extend((self._name, item.state.homes) for item in due)
            yield from ()

    states = [Homes("device"), Homes("host"), Homes("device", "host")]
    due = [ParamUpdate(None, {}, None, state, 0) for state in states]
    rule = MixedStep(None, None, host=Rule("host"), device=Rule("device"))
    assert list(rule.step(due, 1.0, None)) == []
    assert stepped == [("device", {"device"}), ("host", {"host"}), ("host", {"device", "host"})]
