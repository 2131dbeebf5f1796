"""ZenFlow's rule against plain AdamW where it must equal it, and against ZenFlow by hand everywhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_superscale.comm.communicator import single_rank
from lightning_superscale.config import OffloadConfig, ZenFlowConfig
from lightning_superscale.layout.rows import ParamSpec
from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.offload.memory import ParamKind
from lightning_superscale.offload.zenflow.auto import SHARES
from lightning_superscale.offload.zenflow.columns import layouts_of
from lightning_superscale.offload.zenflow.engine import ZenFlowEngine
from lightning_superscale.ops.state_dtypes import FP32_STATES
from lightning_superscale.optim.bucketing import Grouping
from lightning_superscale.optim.clipping import ClipByNorm, ClipByValue
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.optim.param_update import adamw_hyper
from lightning_superscale.zero.buckets.transport import BucketTransport
from tests.helpers.engines import offload_context
from tests.helpers.plain import PlainMasterAdamW
from tests.helpers.zenflow_by_hand import ZenFlowByHand

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
NUM_STEPS = 25


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(12, 20)
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.out = nn.Linear(60, 7)
        self.norm = nn.LayerNorm(7)

    def forward(self, x):
        h = self.conv(nn.functional.gelu(self.inp(x)).unsqueeze(1)).flatten(1)
        return self.norm(self.out(h))


def batch(step, dtype):
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(dtype)


def backward(model, step):
    model(batch(step, model.inp.weight.dtype)).float().square().mean().backward()


def engine_of(model, config, *, streams=True, link=None):
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    context = offload_context(link=link, streams=streams, engine="zenflow", zenflow=config)
    zenflow = ZenFlowEngine()
    engine = OptimizerEngine(
        optimizer,
        fqn_of={param: name for name, param in model.named_parameters()},
        ranks=single_rank(),
        make_transport=lambda sink: BucketTransport(
            [],
            grouping=Grouping(2048),
            sink=sink,
            ranks=single_rank(),
            no_sync=True,
            streams_to=torch.device("cpu"),
        ),
        make_state=lambda unit, has_moments, is_on_device: zenflow.make_state(
            unit, context, has_moments=has_moments, streamed=None
        ),
        make_native=lambda optimizer, guard: zenflow.make_step(optimizer, guard, context),
    )
    if streams:
        engine.transport.stream()
    return optimizer, engine


CLIPS = {"plain": None, "norm": ClipByNorm(0.1), "value": ClipByValue(0.01)}
LIKE_ADAMW = {
    "all columns": ZenFlowConfig(topk=1.0),
    "no column, at once": ZenFlowConfig(topk=0.0, update_interval=1, overlap=False),
    "owners change at each step": ZenFlowConfig(topk=0.3, update_interval=1, select_interval=1, overlap=False),
    "warm-up only": ZenFlowConfig(topk=0.3, warmup_steps=NUM_STEPS),
    "on the device": ZenFlowConfig(
        topk=0.3, update_interval=1, select_interval=1, overlap=False, accumulate_on="device"
    ),
}


@DTYPES
@pytest.mark.parametrize("config", LIKE_ADAMW.values(), ids=LIKE_ADAMW.keys())
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
def test_it_is_adamw_bit_for_bit_where_nothing_is_late(dtype, config, clip):
    model, plain = Net().to(dtype), Net().to(dtype)
    optimizer, engine = engine_of(model, config, streams=clip is not CLIPS["value"])
    limits = {"max_norm": getattr(clip, "max_norm", None), "clip_value": getattr(clip, "clip_value", None)}
    adamw = PlainMasterAdamW(plain.parameters(), **limits, **ADAMW)
    for step in range(NUM_STEPS):
        backward(model, step)
        if clip is not None:
            engine.request_clip(clip)
        engine.step()
        optimizer.zero_grad()
        backward(plain, step)
        adamw.step()
        adamw.zero_grad()
        assert all(map(torch.equal, model.parameters(), plain.parameters())), step
    engine.flush()
    for param, master in zip(model.parameters(), adamw.masters, strict=True):
        assert torch.equal(engine.master_of(param), master)
        own, its = optimizer.state[param], adamw.optimizer.state[master]
        assert all(torch.equal(own[key], its[key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    engine.close()


BY_HAND = {
    "overlap": ZenFlowConfig(topk=0.3),
    "uncorrected": ZenFlowConfig(topk=0.3, delay_correction=0.0),
    "on the device": ZenFlowConfig(topk=0.3, select_interval=4, accumulate_on="device"),
    "on the device, sync": ZenFlowConfig(topk=0.3, update_interval=3, overlap=False, accumulate_on="device"),
    "on the device, one step late": ZenFlowConfig(topk=0.3, update_interval=1, accumulate_on="device"),
    "sync": ZenFlowConfig(topk=0.3, overlap=False),
    "one step late": ZenFlowConfig(topk=0.0, update_interval=1),
    "no column": ZenFlowConfig(topk=0.0, update_interval=3, deferred_lr="sqrt"),
    "chosen often": ZenFlowConfig(topk=0.5, update_interval=2, select_interval=1, deferred_lr=1.5),
    "warm": ZenFlowConfig(topk=0.2, update_interval=5, select_interval=7, warmup_steps=4),
    "excluded": ZenFlowConfig(topk=0.3, exclude=["out.*"]),
}


@DTYPES
@pytest.mark.parametrize("config", BY_HAND.values(), ids=BY_HAND.keys())
def test_it_is_zenflow_by_hand_bit_for_bit(dtype, config):
    model, plain = Net().to(dtype), Net().to(dtype)
    optimizer, engine = engine_of(model, config)
    excluded = ("out.weight",) if config.exclude else ()
    by_hand = ZenFlowByHand(plain, config, excluded)
    its = torch.optim.AdamW(plain.parameters(), **ADAMW)
    for step in range(NUM_STEPS):
        for groups in (optimizer.param_groups, its.param_groups):
            groups[0]["lr"] = 1e-2 * (1 - 0.03 * step)
        backward(model, step)
        engine.step()
        optimizer.zero_grad()
        backward(plain, step)
        hyper = adamw_hyper(its, its.param_groups[0], step + 1, 1.0, None, device=torch.device("cpu"))
        by_hand.step([hyper] * len(by_hand.of))
        plain.zero_grad()
        assert all(map(torch.equal, model.parameters(), plain.parameters())), step
    engine.is_torn = False  # the run says so when a step is counted
    engine.close()
    by_hand.finish()
    for param, one in zip(model.parameters(), by_hand.of, strict=True):
        assert torch.equal(param, one.weight)
        assert torch.equal(optimizer.state[param]["master_param"], one.master)
        assert torch.equal(optimizer.state[param]["exp_avg_sq"], one.exp_avg_sq)


def test_without_columns_a_window_that_counts_once_is_accumulation():
    """Matrices alone, since what has one dim is stepped at every step."""

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20, bias=False), nn.GELU(), nn.Linear(20, 7, bias=False))

    model, plain = net(), net()
    config = ZenFlowConfig(topk=0.0, update_interval=4, overlap=False, deferred_lr="none")
    optimizer, engine = engine_of(model, config)
    adamw = torch.optim.AdamW(plain.parameters(), **ADAMW)

    def run(net, step):
        net(batch(step, torch.float32)).square().mean().backward()

    for step in range(1 + 4 * 5):  # the first is warm-up
        run(model, step)
        engine.step()
        optimizer.zero_grad()
        run(plain, step)
        if step % 4 == 0:
            num = 4 if step else 1
            for param in plain.parameters():
                param.grad.mul_(1 / num)
            adamw.step()
            adamw.zero_grad()
            assert all(map(torch.equal, model.parameters(), plain.parameters())), step
    engine.close()


def kind_of(fqn, param, config):
    return ParamKind(
        spec=ParamSpec(fqn, tuple(param.shape)),
        weights=torch.bfloat16,
        has_moments=True,
        flows=False,
        num_shares=1,
        dtypes=FP32_STATES,
        link_dtype="weights",
        config=OffloadConfig(engine="zenflow", zenflow=config),
    )


def counted_bytes(engine):
    there = {"host": 0, "device": 0}
    for state in engine.states:
        for one in state.bytes():
            numel = state.unit.shard.shard_numel if one.numel is None else one.numel
            there[one.home] += one.copies * one.dtype.itemsize * numel
    return there


def held_bytes(engine):
    """The same without the elements that no column has, which fill slices up to multiples of 64."""
    there = counted_bytes(engine)
    for state in engine.states:
        layouts = [one.layout for one in state.slices]
        numels = {
            "master weights": sum(layout.numel for layout in layouts),
            "optimizer states": sum(layout.numel for layout in layouts),
            "deferred gradients": sum(layout.deferred_numel for layout in layouts),
            "transfer buffers": sum(layout.deferred_numel for layout in layouts),
            "selected masters": sum(layout.selected_numel for layout in layouts),
            "selected states": sum(layout.selected_numel for layout in layouts),
        }
        for one in state.bytes():
            numel = state.unit.shard.shard_numel if one.numel is None else one.numel
            there[one.home] -= one.copies * one.dtype.itemsize * (numel - numels[one.name])
    return there


@pytest.mark.parametrize(("home", "on_host", "on_device"), [("host", 4, 0), ("device", 0, 4)])
@pytest.mark.parametrize("exclude", [None, ["1.*"], ["*.weight"]])
def test_bytes_are_those_that_are_stated(home, on_host, on_device, exclude):
    """By parameter: selected are a quarter of a matrix' columns, what has one dim, and nothing that is excluded."""
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128)).bfloat16()
    config = ZenFlowConfig(topk=0.25, accumulate_on=home, exclude=exclude)
    _, engine = engine_of(model, config)
    total = {"host": 0, "device": 0}
    for fqn, param in model.named_parameters():
        kind = kind_of(fqn, param, config)
        is_excluded = exclude is not None and (exclude == ["*.weight"] or fqn == "1.weight")
        selected = 1.0 if param.ndim == 1 else 0.0 if is_excluded else 0.25
        stated = ZenFlowEngine().memory(kind)
        expected = {
            "host": 12 + (1 - selected) * (on_host + 3 * 2),
            "device": selected * 12 + (1 - selected) * on_device,
        }
        for memory, each in expected.items():
            assert stated.bytes(memory, param.numel()) == each * param.numel()
            total[memory] += stated.bytes(memory, param.numel())
    assert counted_bytes(engine) == total
    engine.close()


@pytest.mark.parametrize("home", ["host", "device"])
@pytest.mark.parametrize("sizes", [(128, 64), (100, 60)], ids=["aligned", "padded"])
def test_bytes_of_an_auto_share_are_the_most_that_any_choice_holds(home, sizes):
    """The host holds most with the smallest share, the device with the largest; padding is not stated."""
    model = nn.Sequential(nn.Linear(*sizes), nn.Linear(*reversed(sizes))).bfloat16()
    config = ZenFlowConfig(topk="auto", accumulate_on=home)
    _, engine = engine_of(model, config)
    stated = {"host": 0, "device": 0}
    for fqn, param in model.named_parameters():
        model_of = ZenFlowEngine().memory(kind_of(fqn, param, config))
        for memory in stated:
            stated[memory] += model_of.bytes(memory, param.numel())
    held = []
    for share in reversed(SHARES):  # the largest is what warm-up has
        for state in engine.states:
            state.resize(layouts_of(state.unit, config, share))
        held.append(held_bytes(engine))
        padded = counted_bytes(engine)
        assert all(padded[memory] >= held[-1][memory] for memory in stated)
        assert (padded == held[-1]) == (sizes == (128, 64))
    assert {memory: max(one[memory] for one in held) for memory in stated} == stated
    assert held[-1]["host"] == stated["host"]
    assert held[0]["device"] == stated["device"]
    engine.close()


@pytest.mark.parametrize("overflows_at", range(3, 9))
def test_a_step_that_overflows_changes_nothing_and_counts_in_no_window(overflows_at):
    config = ZenFlowConfig(topk=0.3, update_interval=3, select_interval=4)
    first, second = Net(), Net()
    (optimizer, engine), (other, expected) = engine_of(first, config), engine_of(second, config)
    for step in range(14):
        for one in (engine, expected):
            one.scale_losses(1.0)
        if step == overflows_at:
            (first(batch(99, torch.float32)).square().mean() * float("inf")).backward()
            assert not engine.step()
            optimizer.zero_grad()
        for model, (its_optimizer, one) in ((first, (optimizer, engine)), (second, (other, expected))):
            backward(model, step)
            assert one.step()
            its_optimizer.zero_grad()
        assert all(map(torch.equal, first.parameters(), second.parameters())), step
    for one in (engine, expected):
        one.flush()
    for param, its in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(engine.master_of(param), expected.master_of(its))
    for one in (engine, expected):
        one.close()


@DTYPES
@pytest.mark.parametrize(("home", "times_sent"), [("host", 12), ("device", 3)])
def test_deferred_columns_cross_the_link_once_a_step_and_once_a_window(dtype, home, times_sent):
    """(1 - k)(1 + 1 / S) of the weights' bytes, and 2 (1 - k) / S of them with sums on the device.

    DeepSpeed 0.19.6 moves 2 (1 + 1 / S) of them, whatever k is.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 20, bias=False), nn.Linear(20, 10, bias=False)).to(dtype)
    link = CpuLink()
    config = ZenFlowConfig(topk=0.25, update_interval=4, select_interval=1000, accumulate_on=home)
    optimizer, engine = engine_of(model, config, link=link)
    for step in range(1 + 4 * 5):
        if step == 1 + 4 * 2:
            engine._rule.quiesce()
            before = (link.bytes.d2h, link.bytes.h2d)
        model(torch.randn(3, 40).to(dtype)).float().square().mean().backward()
        engine.step()
        optimizer.zero_grad()
    engine._rule.quiesce()
    deferred = 0.75 * (40 * 20 + 20 * 10) * dtype.itemsize
    assert link.bytes.d2h - before[0] == times_sent * deferred
    assert link.bytes.h2d - before[1] == 3 * deferred
    engine.close()


def test_an_edit_between_steps_takes_the_place_of_an_update_that_is_on_its_way():
    model = Net()
    optimizer, engine = engine_of(model, ZenFlowConfig(topk=0.3, update_interval=2))
    for step in range(8):  # the window that ends with it is on its way
        backward(model, step)
        engine.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.inp.weight[3].fill_(0.25)
    engine.wait_idle()
    engine.flush()
    assert torch.equal(engine.master_of(model.inp.weight)[3], torch.full((12,), 0.25))
    before = model.inp.weight.detach().clone()
    for one in optimizer.param_groups:
        one["lr"] = 0.0
    for step in range(4):  # what was on its way arrives
        backward(model, step)
        engine.step()
        optimizer.zero_grad()
    assert torch.equal(model.inp.weight[3], before[3])
    engine.close()


def test_moments_that_user_code_changes_are_stepped_from():
    """The learning rate finder empties states; others edit them. Both owners of columns follow."""
    first, second = Net(), Net()
    runs = [engine_of(model, ZenFlowConfig(topk=0.3, update_interval=1, overlap=False)) for model in (first, second)]
    for step in range(6):
        for model, (optimizer, engine) in zip((first, second), runs, strict=True):
            backward(model, step)
            engine.step()
            optimizer.zero_grad()
            if step == 3:
                state = optimizer.state[model.inp.weight]
                if model is first:
                    state["exp_avg"].mul_(0.5)
                else:
                    state["exp_avg"] = state["exp_avg"] * 0.5
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    for _, engine in runs:
        engine.close()


def test_an_error_of_the_host_is_raised_where_its_weights_are_awaited():
    model = Net()
    optimizer, engine = engine_of(model, ZenFlowConfig(topk=0.3, update_interval=2))
    backward(model, 0)
    engine.step()
    engine._rule._deferred._update = lambda *_: 1 / 0
    backward(model, 1)
    engine.step()
    backward(model, 2)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.close()  # says it once
