"""Stepping during backward: exact whatever happens, and really during backward."""

from __future__ import annotations

import pickle
import random
import threading
import time

import pytest
import torch
from torch import nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.offload.superoffload.state import DeferredState
from lightning_superscale.ops.events import Done
from lightning_superscale.optim.clipping import ClipByNorm
from tests.helpers.engines import build_engine
from tests.helpers.extent import IS_ALL
from tests.helpers.plain import PlainMasterAdamW, assert_equal_states
from tests.helpers.plans import keep_to
from tests.helpers.programs import Programs, extra_backward_of_a_part, plain_backward

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
TIMEOUT_S = 20.0
NUM_SEEDS = 200 if IS_ALL else 25


class SlowLink(CpuLink):
    """Copies that take a random while, so that events interleave differently in every run."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def _sleep(self) -> None:
        time.sleep(self._random.choice((0.0, 0.0, 0.0002, 0.001)))

    def d2h(self, dst, src):
        self._sleep()
        return super().d2h(dst, src)

    def h2d(self, dst, src, after=None):
        self._sleep()
        return super().h2d(dst, src)


def batch(step: int, dtype=torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(8, 12, generator=generator) * scale).to(dtype)


def deferred_engine(model, **options):
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    options = {"is_offloaded": True, "is_streamed": True, "is_deferred": True, **options}
    return optimizer, build_engine(model, optimizer, **options)


def finish(engine, optimizer, model, plain, oracle) -> None:
    engine.transport.wait_all_published()
    engine.close()
    states = [oracle.optimizer.state.get(master, {}) for master in oracle.masters]
    assert_equal_states(list(model.parameters()), optimizer, list(plain.parameters()), states)


@pytest.mark.parametrize("clip_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("unit_bytes", [1, 300, 2**30])
@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_any_share_of_clipped_steps_bucket_size_and_threads(clip_share, unit_bytes, num_threads):
    plain, model = Programs(torch.bfloat16), Programs(torch.bfloat16)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    optimizer, engine = deferred_engine(model, unit_bytes=unit_bytes, num_threads=num_threads)
    for step in range(10):
        # A bound far below and far above any norm here.
        clips = (step % 2 if clip_share == 0.5 else clip_share) > 0
        oracle.max_norm = 1e-3 if clips else 1e6
        oracle.zero_grad()
        plain_backward(plain, batch(step))
        oracle.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plain_backward(model, batch(step))
        engine.request_clip(ClipByNorm(oracle.max_norm))
        engine.step()
    finish(engine, optimizer, model, plain, oracle)


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_random_events_leave_what_a_synchronous_step_leaves(seed):
    """Slow copies, late gradients, clips, changed learning rates, interrupted backwards, edits, saves."""
    chance = random.Random(seed)
    # Masters have the link's dtype in the second and the third, so that direct steps upload them.
    dtype, link_dtype = ((torch.bfloat16, "weights"), (torch.bfloat16, "fp32"), (torch.float32, "weights"))[seed % 3]
    plain, model = Programs(dtype), Programs(dtype)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    link = SlowLink(seed)
    unit_bytes = chance.choice((1, 300, 2000))
    optimizer, engine = deferred_engine(model, unit_bytes=unit_bytes, link=link, link_dtype=link_dtype)
    for step in range(8):
        program = chance.choice((plain_backward, plain_backward, extra_backward_of_a_part))
        max_norm = chance.choice((1e-3, 1e6))
        if chance.random() < 0.2:  # an interrupted step leaves nothing behind
            program(model, batch(100 + step, dtype))
            engine.discard_gradients()
            optimizer.zero_grad()
        oracle.zero_grad()
        program(plain, batch(step, dtype))
        program(model, batch(step, dtype))
        if chance.random() < 0.3:
            rate = chance.uniform(1e-3, 1e-2)
            for own in (oracle.optimizer, optimizer):
                own.param_groups[0]["lr"] = rate
        oracle.max_norm = max_norm
        oracle.step()
        engine.request_clip(ClipByNorm(max_norm))
        engine.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        if chance.random() < 0.2:
            engine.state_dict()
        if chance.random() < 0.2:
            with torch.no_grad():
                for params, masters in ((plain.parameters(), oracle.masters), (model.parameters(), ())):
                    first = next(iter(params))
                    first.mul_(0.5)
                    for master in masters[:1]:
                        master.copy_(first)
    finish(engine, optimizer, model, plain, oracle)


def test_a_nan_in_any_bucket_changes_nothing():
    model = Programs(torch.bfloat16)
    optimizer, engine = deferred_engine(model, unit_bytes=1, error_if_nonfinite=True)
    plain_backward(model, batch(0))
    engine.step()
    engine.transport.wait_all_published()
    optimizer.zero_grad()
    before = engine.state_dict()["state"]
    before = {i: {k: v.clone() for k, v in state.items()} for i, state in before.items()}
    weights = [p.detach().clone() for p in model.parameters()]
    for broken in [p for p in model.parameters() if p in optimizer.state]:
        handle = broken.register_hook(lambda grad: grad * float("nan"))
        plain_backward(model, batch(1))
        handle.remove()
        with pytest.raises(SuperScaleError, match="NaN or infinite"):
            engine.step()
        after = engine.state_dict()["state"]
        for i, state in before.items():
            for key, value in state.items():
                assert torch.equal(after[i][key], value), f"{key} of parameter {i}"
        assert all(map(torch.equal, model.parameters(), weights))


def test_an_exception_at_any_bucket_changes_nothing():
    plain, model = Programs(torch.bfloat16), Programs(torch.bfloat16)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    optimizer, engine = deferred_engine(model, unit_bytes=1)
    trained = [model.inp.weight, model.block[0].weight, model.out.weight, model.scale]
    for step, broken in enumerate([None, *trained, None]):
        if broken is not None:

            def fail(grad):
                raise RuntimeError("interrupted")

            handle = broken.register_hook(fail)
            with pytest.raises(RuntimeError, match="interrupted"):
                plain_backward(model, batch(step))
            handle.remove()
            engine.discard_gradients()
            optimizer.zero_grad()
            continue
        oracle.zero_grad()
        plain_backward(plain, batch(step))
        oracle.step()
        plain_backward(model, batch(step))
        engine.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
    finish(engine, optimizer, model, plain, oracle)


class BrokenLink(CpuLink):
    """A copy to the host fails once."""

    is_broken = False

    def d2h(self, dst, src):
        if self.is_broken:
            self.is_broken = False
            raise MemoryError("no host memory")
        return super().d2h(dst, src)


def test_a_failed_copy_is_raised_once_and_training_goes_on():
    plain, model = Programs(torch.bfloat16), Programs(torch.bfloat16)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    link = BrokenLink()
    optimizer, engine = deferred_engine(model, unit_bytes=1, link=link)
    for step in range(4):
        if step == 2:
            link.is_broken = True
            with pytest.raises(MemoryError, match="no host memory"):
                plain_backward(model, batch(step))
            engine.discard_gradients()
            optimizer.zero_grad()
        oracle.zero_grad()
        plain_backward(plain, batch(step))
        oracle.step()
        plain_backward(model, batch(step))
        engine.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
    finish(engine, optimizer, model, plain, oracle)


def test_a_failure_in_the_background_is_raised_at_the_step_and_only_there(monkeypatch):
    plain, model = Programs(torch.bfloat16), Programs(torch.bfloat16)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    optimizer, engine = deferred_engine(model, unit_bytes=1, speculate=True)
    original, broken = DeferredState.look_ahead, []

    def look_ahead(state, hypers):
        if broken:
            broken.pop()
            raise MemoryError("no host memory")
        original(state, hypers)

    monkeypatch.setattr(DeferredState, "look_ahead", look_ahead)
    for step in range(4):
        if step == 2:
            broken.append(True)
            plain_backward(model, batch(step))
            deadline = time.monotonic() + TIMEOUT_S
            while broken and time.monotonic() < deadline:  # the step takes back what has not begun
                time.sleep(0.001)
            with pytest.raises(MemoryError, match="no host memory"):
                engine.step()
            optimizer.zero_grad()
        oracle.zero_grad()
        plain_backward(plain, batch(step))
        oracle.step()
        plain_backward(model, batch(step))
        engine.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
    finish(engine, optimizer, model, plain, oracle)


class HoldBackward(torch.autograd.Function):
    """Passes through; its backward waits until it is told to go on."""

    @staticmethod
    def forward(ctx, x, may_go, outcome):
        ctx.may_go, ctx.outcome = may_go, outcome
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.outcome.append(ctx.may_go.wait(TIMEOUT_S))
        return grad, None, None


def test_a_later_layer_is_stepped_while_an_earlier_one_is_still_in_backward(monkeypatch):
    first, second = nn.Linear(12, 16), nn.Linear(16, 4)
    model = nn.Sequential(first, second).to(torch.bfloat16)
    optimizer, engine = deferred_engine(model, unit_bytes=1, speculate=True)
    looked, waited = threading.Event(), []
    unit = engine.transport.place_of(second.weight)[0].index
    original = DeferredState.look_ahead

    def look_ahead(state, hypers):
        original(state, hypers)
        if state.unit.index == unit:
            looked.set()

    monkeypatch.setattr(DeferredState, "look_ahead", look_ahead)
    for step in range(3):
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        looked.clear()
        hidden = HoldBackward.apply(first(batch(step)), looked, waited)
        second(hidden).float().pow(2).mean().backward()
        engine.request_clip(ClipByNorm(1.0))  # clipping on does not stop it
        engine.step()
    engine.close()
    assert waited == [True, True, True]


class GatedLink(CpuLink):
    """Holds uploads of one size until it is told to go on."""

    def __init__(self, held_numel: int) -> None:
        super().__init__()
        self.may_go = threading.Event()
        self.held_numel = held_numel
        self.outcomes: list[bool] = []
        self.is_armed = False

    def h2d(self, dst, src, after=None):
        if self.is_armed and dst.numel() == self.held_numel:
            self.outcomes.append(self.may_go.wait(TIMEOUT_S))
        super().h2d(dst, src).wait()
        return Done(None)


def test_the_last_upload_waits_for_the_next_forward_and_nobody_waits_for_it_before():
    first, second = nn.Linear(12, 16, bias=False), nn.Linear(16, 32, bias=False)
    model = nn.Sequential(first, second).to(torch.bfloat16)
    link = GatedLink(held_numel=second.weight.numel())
    optimizer, engine = deferred_engine(model, unit_bytes=1, link=link)
    units = {id(m): [engine.transport.place_of(m.weight)[0]] for m in (first, second)}
    for step in range(2):
        optimizer.zero_grad()
        engine.transport.wait_published(units[id(first)])
        if step:
            link.may_go.set()  # the first layer's forward has begun; only now may the second's weights come
        hidden = first(batch(step))
        engine.transport.wait_published(units[id(second)])
        second(hidden).float().pow(2).mean().backward()
        link.is_armed = step == 0
        engine.step()
    link.is_armed = False
    engine.transport.wait_all_published()
    engine.close()
    assert link.outcomes == [True]


def run_steps(model, optimizer, engine, num_steps, *, max_norm, wait_for_looks=True, at=None):
    """Train; `max_norm(step)` is what each step is clipped to. Looks that began are waited for: fewest are in time."""
    rule, plans = engine._rule._host, []
    for step in range(num_steps):
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plans.append(rule.chooser.plan)
        plain_backward(model, batch(step))
        if wait_for_looks:
            for looking in rule._looking.values():
                looking.result(TIMEOUT_S)  # the step takes back what has not begun
        engine.request_clip(ClipByNorm(max_norm(step)))
        engine.step()
    engine.flush()
    return plans


def chosen_by_itself(engine):
    """The engine's rule, with the choice of plans that users have."""
    chooser = engine._rule._host.chooser
    del chooser._chosen, chooser._is_better_awaited  # the helper's, which let plans take turns
    chooser.has_own_memory = True
    chooser._choose()
    return engine._rule._host


def test_nothing_is_looked_at_ahead_while_every_step_clips():
    model = Programs(torch.bfloat16)
    optimizer, engine = deferred_engine(model)
    rule = chosen_by_itself(engine)
    plans = run_steps(model, optimizer, engine, 30, max_norm=lambda step: 1e-4)
    counts = rule.chooser.counts
    engine.close()
    assert set(plans) == {"direct"}
    assert (counts.ahead, counts.redone, counts.late) == (0, 0, 0)
    assert counts.direct > 0
    assert rule.num_redone == 0


def test_looks_are_tried_when_clips_end_and_given_up_when_they_begin_again():
    model = Programs(torch.bfloat16)
    optimizer, engine = deferred_engine(model)
    chosen_by_itself(engine)
    plans = run_steps(model, optimizer, engine, 80, max_norm=lambda step: 1e6 if 20 <= step < 60 else 1e-4)
    engine.close()
    assert "ahead" not in plans[:24]
    assert set(plans[36:60]) == {"ahead"}
    assert "ahead" not in plans[64:]
    clipped_in_vain = [step for step, plan in enumerate(plans) if plan == "ahead" and not 20 <= step < 60]
    assert len(clipped_in_vain) <= 4


def test_without_a_clip_looks_begin_with_the_second_step():
    model = Programs(torch.bfloat16)
    optimizer, engine = deferred_engine(model)
    rule = chosen_by_itself(engine)
    plans = []
    for step in range(4):
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plans.append(rule.chooser.plan)
        plain_backward(model, batch(step))
        engine.step()
    engine.close()
    assert plans == ["direct", "ahead", "ahead", "ahead"]


def test_what_is_certain_to_clip_is_not_looked_at_but_committed():
    """The first unit's squares alone exceed the bound, so that one look a step is in vain and no more."""
    model = Programs(torch.bfloat16)
    optimizer, engine = deferred_engine(model, unit_bytes=1, speculate=True)
    run_steps(model, optimizer, engine, 8, max_norm=lambda step: 1e-9)
    counts = engine._rule._host.chooser.counts
    num_units = len(engine.states)
    engine.close()
    # In the first step the bound is not known yet.
    assert num_units - 1 <= counts.ahead <= num_units + 7
    assert counts.redone >= counts.ahead - 1  # those of the last step are counted with the next


def test_learning_rates_that_change_after_backward_end_looks():
    plain, model = Programs(torch.bfloat16), Programs(torch.bfloat16)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    optimizer, engine = deferred_engine(model)
    rule = chosen_by_itself(engine)
    for step in range(12):
        oracle.zero_grad()
        plain_backward(plain, batch(step))
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plain_backward(model, batch(step))
        for own in (oracle.optimizer, optimizer):
            own.param_groups[0]["lr"] = 1e-3 * (step + 1)
        oracle.step()
        engine.step()
    # The first step's gradients leave when it is taken, which shows no change.
    assert rule.chooser.counts.ahead <= len(engine.states)
    assert rule.chooser.plan == "direct"
    finish(engine, optimizer, model, plain, oracle)


@pytest.mark.parametrize("raises_at", ["quiesce", "the next step's weights"])
def test_a_commit_that_fails_is_raised_with_its_unit(monkeypatch, raises_at):
    model = Programs(torch.bfloat16)
    optimizer, engine = deferred_engine(model, unit_bytes=1)
    rule = engine._rule._host
    keep_to(rule.chooser, "early commit")
    plain_backward(model, batch(0))
    original, failing = DeferredState.flush, [True]

    def flush(state):
        if failing:
            failing.pop()
            raise MemoryError("no host memory")
        original(state)

    monkeypatch.setattr(DeferredState, "flush", flush)
    engine.step()
    for committing in list(rule._committing.values()):
        committing.exception(TIMEOUT_S)
    assert not failing
    # The commit is not lost: the gradient is pending yet.
    assert sum(state.is_pending() for state in engine.states) == 1
    if raises_at == "quiesce":
        with pytest.raises(MemoryError, match="no host memory"):
            engine.quiesce()
    else:
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plain_backward(model, batch(1))
        engine.step()
        with pytest.raises(MemoryError, match="no host memory"):
            engine.transport.wait_all_published()
        engine.discard_gradients()
    rule._committing.clear()
    engine.close()


@pytest.mark.parametrize("plan", ["early commit", "direct"])
def test_a_layer_is_stepped_after_the_next_forward_has_begun(plan):
    """What hides these plans' work: no forward waits for weights that it does not read yet."""
    first, second = nn.Linear(12, 16, bias=False), nn.Linear(16, 32, bias=False)
    model = nn.Sequential(first, second).to(torch.bfloat16)
    optimizer, engine = deferred_engine(model, unit_bytes=1)
    rule = engine._rule._host
    keep_to(rule.chooser, plan)
    units = {id(m): [engine.transport.place_of(m.weight)[0]] for m in (first, second)}
    may_go, held = threading.Event(), []
    state = engine.states[units[id(second)][0].index]
    original = state.settle

    def settle(hypers, **how):
        held.append(may_go.wait(TIMEOUT_S))
        return original(hypers, **how)

    state.settle = settle
    for step in range(2):
        optimizer.zero_grad()
        engine.transport.wait_published(units[id(first)])
        hidden = first(batch(step))
        may_go.set()  # the first layer's forward has run; only now may the second's step
        engine.transport.wait_published(units[id(second)])
        second(hidden).float().pow(2).mean().backward()
        may_go.clear()
        engine.step()
    may_go.set()
    engine.transport.wait_all_published()
    engine.close()
    assert held == [True, True]


def test_an_awaited_step_is_over_when_it_returns():
    """Every unit is stepped by the calling thread, each while the pool has the next ones, and nothing is left."""
    model = Programs(torch.bfloat16)
    optimizer, engine = deferred_engine(model, unit_bytes=1)
    rule = engine._rule._host
    keep_to(rule.chooser, "direct", awaits=True)
    threads, begun = set(), []
    for state in engine.states:

        def settle(hypers, *, original=state.settle, **how):
            threads.add(threading.current_thread())
            begun.append(sum(other._begun is not None for other in engine.states))
            return original(hypers, **how)

        state.settle = settle
    for step in range(4):
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plain_backward(model, batch(step))
        engine.request_clip(ClipByNorm(1e-4))
        engine.step()
        assert not rule._settling
        assert not any(state.is_pending() or state._begun for state in engine.states)
    engine.close()
    assert threads == {threading.current_thread()}
    num_stepped = begun[0]  # a program leaves some parameters without gradients
    assert num_stepped > 1
    assert begun == 4 * list(range(num_stepped, 0, -1))
    counts = rule.chooser.counts
    assert (counts.ahead, counts.redone, counts.late) == (0, 0, 0)
    assert counts.direct == 3 * num_stepped  # those of the last step are counted with the next


def test_commits_run_before_the_next_verdict_and_settling_only_looks():
    model = Programs(torch.bfloat16)
    optimizer, engine = deferred_engine(model, unit_bytes=1)
    rule = engine._rule._host
    keep_to(rule.chooser, "early commit")
    for step in range(4):
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plain_backward(model, batch(step))
        for committing in rule._committing.values():
            committing.result(TIMEOUT_S)
        assert not any(state.is_pending() for state in engine.states)
        engine.request_clip(ClipByNorm(1e-4))
        engine.step()
    engine.close()
    assert rule.chooser.counts.ahead == rule.chooser.counts.direct == 0


@pytest.mark.parametrize("is_awaited", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_direct_step_writes_new_weights_once(dtype, is_awaited):
    """Masters of the dtype that crosses the link are uploaded themselves, and gradients' buffers keep gradients."""
    plain, model = Programs(dtype), Programs(dtype)
    oracle = PlainMasterAdamW(plain.parameters(), max_norm=1e-3, **ADAMW)
    optimizer, engine = deferred_engine(model, unit_bytes=300)
    keep_to(engine._rule._host.chooser, "direct", awaits=is_awaited)
    is_master_sent = dtype == torch.float32
    for step in range(4):
        oracle.zero_grad()
        plain_backward(plain, batch(step, dtype))
        oracle.step()
        optimizer.zero_grad()
        plain_backward(model, batch(step, dtype))
        stepped = [(state, i) for state in engine.states for i in range(len(state._slices)) if state.has_grad(i)]
        sent = [(state, i, state.grad(i).clone()) for state, i in stepped]
        engine.request_clip(ClipByNorm(1e-3))
        engine.step()
        engine.transport.wait_all_published()
        for state, i, grad in sent:
            assert (state.weight_out_of(i) is None) == is_master_sent
            assert torch.equal(state._span(state._buffers[0], i), grad) == is_master_sent
    finish(engine, optimizer, model, plain, oracle)


@pytest.mark.parametrize("clip_share", [0.0, 0.5, 1.0])
def test_dropped_steps_of_scaled_losses_change_nothing_in_any_plan(clip_share):
    """Every third step overflows, so that each plan has one before it, in it and after it."""
    scale = 1024.0
    plain, model = Programs(torch.bfloat16), Programs(torch.bfloat16)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    oracle.grad_scale = 1 / scale
    optimizer, engine = deferred_engine(model, unit_bytes=300)
    for step in range(20):
        engine.scale_losses(scale)
        oracle.max_norm = 1e-3 if step % 2 < 2 * clip_share else 1e6
        overflows = step % 3 == 2
        oracle.zero_grad()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        if not overflows:
            (plain.trunk(batch(step)).float().pow(2).mean() * scale).backward()
            oracle.step()
        factor = float("inf") if overflows else scale
        (model.trunk(batch(step)).float().pow(2).mean() * factor).backward()
        engine.request_clip(ClipByNorm(oracle.max_norm))
        assert engine.step() is not overflows
    finish(engine, optimizer, model, plain, oracle)


@pytest.mark.parametrize("saved_after", range(2, 11))
def test_a_run_goes_on_from_a_save_after_any_plan(saved_after):
    plain, model = Programs(torch.bfloat16), Programs(torch.bfloat16)
    oracle = PlainMasterAdamW(plain.parameters(), max_norm=0.5, **ADAMW)
    optimizer, engine = deferred_engine(model, unit_bytes=300)
    for step in range(14):
        if step == saved_after:
            saved = {"model": model.state_dict(), "optimizer": engine.state_dict()}
            saved = pickle.loads(pickle.dumps(saved))
            engine.close()
            model = Programs(torch.bfloat16)
            model.load_state_dict(saved["model"])
            optimizer, engine = deferred_engine(model, unit_bytes=300)
            engine.load_state_dict(saved["optimizer"])
        oracle.zero_grad()
        plain_backward(plain, batch(step))
        oracle.step()
        engine.transport.wait_all_published()
        optimizer.zero_grad()
        plain_backward(model, batch(step))
        engine.request_clip(ClipByNorm(0.5))
        engine.step()
    finish(engine, optimizer, model, plain, oracle)
