"""What ZenFlow says of itself: counted bytes against the design's model, ages, shares of energy, waits, a recording."""

from __future__ import annotations

import dataclasses
import time
import warnings

import pytest
import torch
from torch import nn

from lightning_superscale.comm.communicator import ranks_of
from lightning_superscale.config import ZenFlowConfig
from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.offload.zenflow.engine import ZenFlowEngine
from lightning_superscale.offload.zenflow.report import (
    LEAST_SELECTIONS,
    MOST_STEPS_TO_SELECTION,
    Shares,
    expected_age,
    shares_of,
)
from lightning_superscale.offload.zenflow.state import SplitState
from lightning_superscale.offload.zenflow.sums import GradientSums
from lightning_superscale.offload.zenflow.windows import Schedule
from lightning_superscale.optim.step_rule import EACH_STEP, StepGuard
from lightning_superscale.timeline import Timeline
from tests.helpers.engines import build_engine, offload_context
from tests.offload.zenflow.test_step import ADAMW, engine_of

WIDTHS = (200, 100, 50)


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Two matrices of 25000 elements."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))).to(dtype)


NUMEL = sum(a * b for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))


def give_gradients(model: nn.Module, step: int, scale=None) -> None:
    """Gradients of random columns, each matrix' own, in the engine's way: by a backward."""
    generator = torch.Generator().manual_seed(step)
    loss = 0.0
    for param in model.parameters():
        columns = torch.rand(param.shape[1], generator=generator) if scale is None else scale[: param.shape[1]]
        grad = torch.randn(param.shape, generator=generator) * columns
        loss = loss + (param.float() * grad).sum()
    loss.backward()


def trained(config: ZenFlowConfig, num_steps: int, *, model=None, scale=None, link=None):
    """The engine after some steps."""
    model = model or net()
    optimizer, engine = engine_of(model, config, link=link)
    for step in range(num_steps):
        give_gradients(model, step, scale)
        engine.step()
        optimizer.zero_grad()
    return engine


def told(engine) -> dict:
    return {figure.name: figure for figure in engine.rule.figures()}


def ended(engine) -> None:
    engine.is_torn = False  # the run says so when a step is counted
    engine.close()


CONFIGS = {
    "overlap": {},
    "sync": {"overlap": False},
    "long window": {"update_interval": 8, "select_interval": 16},
    "warm-up": {"warmup_steps": 7},
    "half": {"topk": 0.5, "update_interval": 2},
    "no column": {"topk": 0.0},
    "sums on the device": {"accumulate_on": "device"},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("num_steps", [61, 78])
def test_bytes_over_the_link_are_those_of_the_model(options, num_steps):
    """(1 - k) M of gradients and (1 - k) M / S of weights at a step, and 12 c k M / R for what changes its owner."""
    config, link, moved = ZenFlowConfig(**{"select_interval": 16, **options}), CpuLink(), []
    real = SplitState.move

    def counts(self, i, selected):
        moved.append((~torch.isin(self.slices[i].selected, selected)).sum() * self.slices[i].layout.column_numel)
        real(self, i, selected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SplitState, "move", counts)
        engine = trained(config, num_steps, link=link)
    figures, whole = told(engine), 2 * NUMEL
    deferred = (1 - config.topk) * whole
    for name, expected in (
        ("gradient_bytes_per_step", deferred / (4 if config.accumulate_on == "device" else 1)),
        ("weight_bytes_per_step", deferred / config.update_interval),
    ):
        assert figures[name].expected == pytest.approx(expected, rel=0.02), name
        assert figures[name].measured == pytest.approx(expected, rel=0.02), name
    if config.topk:
        # The first selection moves what no gradient has chosen; whole rounds count, over both matrices.
        moved = moved[2 : 2 + (len(moved) - 2) // 2 * 2]
        churn = sum(moved) / len(moved) * 2 / (config.topk * NUMEL)
        expected = 12 * churn * config.topk * whole / config.select_interval
        assert figures["selection_bytes_per_step"].measured == pytest.approx(
            float(expected), rel=0.1
        )  # random columns move
        all_move = 12 * min(config.topk, 1 - config.topk) * whole / config.select_interval
        assert figures["selection_bytes_per_step"].expected == pytest.approx(all_move, rel=0.02)
    ended(engine)


def test_all_bytes_that_cross_are_told():
    """Over steps from one selection to the next but two, so that as many windows arrive as end."""
    link, config = CpuLink(), ZenFlowConfig(topk=0.25, select_interval=8)
    model = net()
    optimizer, engine = engine_of(model, config, link=link)
    for step in range(1, 1 + 30):
        give_gradients(model, step)
        engine.step()
        optimizer.zero_grad()
        engine._rule.quiesce()
        if step == 6:  # from the first one after the first windows on, which may be shorter
            before = link.bytes.d2h + link.bytes.h2d
    figures = told(engine)
    crossed = (link.bytes.d2h + link.bytes.h2d - before) / 24
    names = ("gradient_bytes_per_step", "weight_bytes_per_step", "selection_bytes_per_step")
    assert sum(figures[name].measured for name in names) == pytest.approx(crossed, rel=0.02)
    ended(engine)


def test_gradients_of_a_step_that_overflows_count_for_no_other_step():
    model = net(torch.float32)
    optimizer, engine = engine_of(model, ZenFlowConfig(topk=0.25))
    for step in range(16):
        engine.scale_losses(1.0)
        if step % 5 == 4:
            (model[0].weight * float("inf")).sum().backward()
            assert not engine.step()
        else:
            give_gradients(model, step)
            assert engine.step()
        optimizer.zero_grad()
    assert told(engine)["gradient_bytes_per_step"].measured == 0.75 * NUMEL * 4
    ended(engine)


@pytest.mark.parametrize("options", [{}, {"accumulate_on": "device"}, {"topk": 0.3}, {"exclude": ["1.*"]}])
def test_host_bytes_are_those_of_the_model(options):
    """12 bytes of each parameter, and of deferred ones 4 for a window's sum and three buffers of weights' dtype."""
    config = ZenFlowConfig(**options)
    engine = trained(config, 2)
    excluded = 100 * 50 if config.exclude else 0
    deferred = (1 - config.topk) * (NUMEL - excluded) + excluded
    stated = 12 * NUMEL + ((4 if config.accumulate_on == "host" else 0) + 3 * 2) * deferred
    figure = told(engine)["host_bytes"]
    assert figure.expected == pytest.approx(stated, rel=0.02)
    assert figure.measured == pytest.approx(stated, rel=0.02)
    ended(engine)


def late_by_hand(config: ZenFlowConfig, num_steps: int) -> float:
    """The mean age of what was applied after the warm-up, gradient by gradient."""
    schedule = Schedule(config, config.update_interval, {})
    open_window, ages = [], []
    for step in range(1, num_steps + 1):
        open_window.append(step)
        if schedule.ends((0, 0), step):
            applied_at = step + (not schedule.waits(step))
            ages += [applied_at - of for of in open_window if not schedule.is_warm(step)]
            open_window = []
    return sum(ages) / len(ages)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": False},
        {"update_interval": 1},
        {"update_interval": 3, "select_interval": 7},
        {"topk": 0.0, "update_interval": 5},
        {"update_interval": 4, "select_interval": 2},
        {"warmup_steps": 6},
    ],
)
def test_the_mean_age_is_that_of_each_gradient(options):
    config = ZenFlowConfig(**options)
    num_steps = 50
    engine = trained(config, num_steps, model=nn.Linear(20, 3, bias=False))
    figure = told(engine)["deferred_age_steps"]
    assert figure.measured == pytest.approx(late_by_hand(config, num_steps))
    assert figure.expected == pytest.approx(late_by_hand(config, 10_000), rel=2e-3)
    assert figure.expected == expected_age(config, config.update_interval)
    ended(engine)


def test_nothing_is_late_where_all_columns_are_selected():
    engine = trained(ZenFlowConfig(topk=1.0), 12)
    figures = told(engine)
    assert figures["deferred_age_steps"].expected is None
    assert figures["gradient_bytes_per_step"].expected == figures["gradient_bytes_per_step"].measured == 0
    assert "selected_energy_share" not in figures
    ended(engine)


def test_the_share_of_energy_is_of_the_columns_that_were_chosen():
    energy = torch.tensor([1.0, 5.0, 2.0, 12.0], dtype=torch.float64)
    found = shares_of("w", energy, torch.tensor([0, 2]), torch.tensor([1, 3]))
    assert found == ("w", 20.0, 17.0, 3.0)


def test_the_share_of_energy_is_measured_at_each_selection():
    """Two matrices of two columns' worth, one of which changes its mind."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    optimizer, engine = engine_of(model, ZenFlowConfig(topk=0.5, update_interval=2, select_interval=2))
    grads = {2: [1.0, 2.0, 3.0, 0.0], 4: [2.0, 0.0, 2.0, 1.0], 6: [0.0, 3.0, 0.0, 4.0]}
    seen = []
    for step in range(1, 7):
        (model.weight * torch.tensor([grads.get(step, [1.0] * 4)])).sum().backward()
        engine.step()
        optimizer.zero_grad()
        figures = told(engine)
        seen.append((figures["selected_energy_share"].measured, figures["kept_energy_share"].measured))
    none, first, second, third = (None, None), (13 / 14, None), (8 / 9, 4 / 9), (1.0, 0.0)
    expected = (none, first, first, second, second, third)
    assert seen == [pytest.approx(pair) if None not in pair else pair for pair in expected]
    ended(engine)


FLAT, STEEP = torch.ones(200), torch.tensor([100.0] * 20 + [1.0] * 180)


def told_of_low_energy(found) -> list[str]:
    return [str(one.message) for one in found if "columns that ZenFlow steps at once held" in str(one.message)]


def test_columns_that_matter_alike_are_warned_of_once_and_not_at_once():
    config = ZenFlowConfig(topk=0.1, update_interval=2, select_interval=2)
    model = net()
    optimizer, engine = engine_of(model, config)
    by_step = []
    for step in range(20):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            give_gradients(model, step, FLAT)
            engine.step()
            optimizer.zero_grad()
        by_step.append(told_of_low_energy(found))
    assert [step for step, said in enumerate(by_step) if said] == [
        6
    ]  # where the second matrix chose for the third time
    (said,) = by_step[6]
    share = told(engine)["selected_energy_share"].measured
    assert 0.1 < share < 0.3
    for words in (
        f"at the last {LEAST_SELECTIONS} selections",
        "expected at least 50%",
        "1.5 steps late",
        "Raise ZenFlowConfig.topk (found 0.1)",
        "update_interval (found 2)",
        "exclude",
    ):
        assert words in said
    assert "'0.weight' has the least" in said or "'1.weight' has the least" in said
    assert "offload='superoffload'" in said
    ended(engine)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, STEEP),
        ({"topk": 0.6}, FLAT),
        ({"overlap": False, "update_interval": 1, "select_interval": 1}, FLAT),
    ],
    ids=["energy in few columns", "many columns", "nothing is late"],
)
def test_what_is_no_reason_to_warn(options, scale):
    config = ZenFlowConfig(**{"topk": 0.1, "update_interval": 2, "select_interval": 2, **options})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ended(trained(config, 20, scale=scale))
    assert not told_of_low_energy(found)


def test_a_run_warns_once_whatever_its_optimizers_and_its_ranks_are():
    context = offload_context(engine="zenflow", zenflow=ZenFlowConfig(topk=0.5))
    low = Shares("w", 10.0, 4.0, 3.0)

    def said_by(rank: int) -> int:
        axis = dataclasses.replace(context.ranks.mesh.world, rank=rank)
        its = dataclasses.replace(context, ranks=ranks_of(dataclasses.replace(context.ranks.mesh, world=axis), ()))
        engine = ZenFlowEngine()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for optimizer in (torch.optim.AdamW(net().parameters()), torch.optim.AdamW(net().parameters())):
                rule = engine.make_step(optimizer, StepGuard(optimizer), its)
                for _ in range(2 * LEAST_SELECTIONS):
                    rule._report.selected([low])
                rule.close()
        return len(told_of_low_energy(found))

    assert said_by(rank=0) == 1
    assert said_by(rank=1) == 0


def test_a_share_that_recovers_is_not_warned_of():
    config = ZenFlowConfig(topk=0.1, update_interval=2, select_interval=2)
    model = net()
    optimizer, engine = engine_of(model, config)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in range(30):
            give_gradients(model, step, FLAT if step % 4 > 1 else STEEP)  # of every two selections one
            engine.step()
            optimizer.zero_grad()
    assert not told_of_low_energy(found)
    ended(engine)


def test_gradients_that_are_not_finite_or_not_there_say_nothing_of_shares():
    model = nn.Linear(4, 3, bias=False)
    optimizer, engine = engine_of(model, ZenFlowConfig(topk=0.5, update_interval=1, select_interval=1))
    for value in (0.0, float("inf"), float("nan")):
        (model.weight * value).sum().backward()
        engine.step()
        optimizer.zero_grad()
        assert told(engine)["selected_energy_share"].measured is None
    ended(engine)


def test_waiting_for_a_slow_host_is_a_stall_in_the_step_after_a_window(monkeypatch):
    """A window's update takes longer than a step; without overlap it is waited for at once."""
    for overlap in (True, False):
        model = nn.Linear(200, 100, bias=False)
        optimizer, engine = engine_of(model, ZenFlowConfig(topk=0.0, update_interval=2, overlap=overlap))
        timeline = engine._rule._host.timeline = Timeline(torch.device("cpu"))
        real = engine._rule._deferred._update

        def slow(*args, real=real):
            time.sleep(0.2)
            real(*args)

        engine._rule._deferred._update = slow
        stalls = []
        for step in range(7):  # windows end with steps 0, 2, 4 and 6
            before = timeline.stalled_seconds
            give_gradients(model, step)
            engine.step()
            optimizer.zero_grad()
            stalls.append(timeline.stalled_seconds - before)
        waits = {0, 3, 5} if overlap else {0, 2, 4, 6}
        assert {step for step, stall in enumerate(stalls) if stall > 0.15} == waits, stalls
        ended(engine)


def test_waiting_for_sums_is_a_stall(monkeypatch):
    real = GradientSums.absorb

    def slow(self, *args, **kwargs):
        time.sleep(0.02)
        real(self, *args, **kwargs)

    monkeypatch.setattr(GradientSums, "absorb", slow)
    model = net()
    optimizer, engine = engine_of(model, ZenFlowConfig(topk=0.0, update_interval=100))
    timeline = engine._rule._host.timeline = Timeline(torch.device("cpu"))
    for step in range(4):
        if step == 2:
            before = timeline.stalled_seconds
        give_gradients(model, step)
        engine.step()
        optimizer.zero_grad()
    assert timeline.stalled_seconds - before > 0.02
    ended(engine)


def starts(config: ZenFlowConfig, num_steps: int) -> list[int]:
    """Of each step, when a recording that begins at the next one would best begin, counted from 0."""
    model, found = nn.Linear(20, 3, bias=False), []
    optimizer, engine = engine_of(model, config)
    for step in range(num_steps):
        assert engine.rule.cycle.num_steps == config.update_interval + 1
        found.append(step + engine.rule.cycle.starts_in)
        give_gradients(model, step)
        engine.step()
        optimizer.zero_grad()
    ended(engine)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Windows end with steps 1, 5, 9, 13, ..., counted from 1; columns are chosen at 2, 10, 18: shown from 1, 9, 17.
        ({"select_interval": 8}, [0, 1] + [8] * 7 + [9] + [16] * 6),
        ({"select_interval": 1}, [0, 1] + [4] * 3 + [5] + [8] * 3 + [9] + [12] * 3 + [13] + [16] * 2),
        ({"select_interval": 8, "warmup_steps": 3}, [2] * 3 + [3] + [10] * 7 + [11] + [18] * 4),
        ({"select_interval": MOST_STEPS_TO_SELECTION * 2}, [0, *range(1, 16)]),
        ({"topk": 0.0}, [1, *range(1, 16)]),
    ],
)
def test_a_recording_begins_with_the_step_before_a_selection(options, expected):
    assert starts(ZenFlowConfig(**options), 16) == expected


def test_steps_are_alike_without_deferred_columns():
    engine = trained(ZenFlowConfig(topk=1.0), 1)
    assert engine.rule.cycle == EACH_STEP
    ended(engine)


def test_a_part_of_the_parameters_on_the_device_says_nothing_of_its_own():
    model = net(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    on_device = frozenset({model[1].weight})
    config = ZenFlowConfig(topk=0.25)
    engine = build_engine(model, optimizer, is_offloaded=True, zenflow=config, on_device=on_device)
    for step in range(10):
        give_gradients(model, step)
        engine.step()
        optimizer.zero_grad()
    assert told(engine)["gradient_bytes_per_step"].measured == 0.75 * 200 * 100 * 4
    assert engine.rule.cycle.num_steps == 5
    ended(engine)
