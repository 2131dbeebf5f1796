"""Schedules as code: the rate at every step is that of DeepSpeed's formulas, written out here by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_superscale.cli.migrate.optimizer import OptimizerSections
from lightning_superscale.cli.migrate.schedulers import PARAMS, schedule_of
from lightning_superscale.errors import SettingError

LR = 0.03
STEPS = 60
# A rate here is `lr * factor`, there `min + (max - min) * share`: at most eight operations on either side, which
# round by half of an eps each; cosines and logarithms within one eps each.
RTOL = 10 * torch.finfo(torch.float64).eps
# Where a rate falls to zero, the terms that cancel have the size of the largest rate.
ATOL = RTOL * 0.1


def warm(params, at):
    steps = max(2, params["warmup_num_steps"])
    if at >= steps:
        return None
    return at / steps if params.get("warmup_type") == "linear" else math.log(at + 1) / math.log(steps)


def warmup_lr(params, step):
    low, high = params.get("warmup_min_lr", 0.0), params.get("warmup_max_lr", LR)
    share = warm(params, max(0, step - 1))
    return high if share is None else low + (high - low) * share


def warmup_decay(params, step):
    low, high, at = params.get("warmup_min_lr", 0.0), params.get("warmup_max_lr", 0.001), max(0, step - 1)
    share = warm(params, at)
    total = params["total_num_steps"]
    if share is None:
        share = max(0.0, (total - at) / max(1, total - params["warmup_num_steps"]))
    return low + (high - low) * share


def warmup_cosine(params, step):
    if step == 0:
        return 0.0
    at, low = step - 1, params.get("warmup_min_ratio", 0.0)
    share = warm(params, at)
    if share is not None:
        return LR * (low + share * (1 - low))
    floor, length = params.get("cos_min_ratio", 0.0001), max(1, params["total_num_steps"] - params["warmup_num_steps"])
    progress = min(1.0, (at - params["warmup_num_steps"] + 1) / length)
    return LR * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def range_test(params, step):
    interval = step / params["lr_range_test_step_size"]
    interval = math.floor(interval) if params.get("lr_range_test_staircase") else interval
    return params["lr_range_test_min_lr"] * (1 + params.get("lr_range_test_step_rate", 1.0) * interval)


def one_cycle(params, step):
    first = params["cycle_first_step_size"]
    second = params.get("cycle_second_step_size", first)
    low, high = params["cycle_min_lr"], params["cycle_max_lr"]
    if step > first + second:
        steps = params.get("decay_step_size", 0)
        return low / (1 + params.get("decay_lr_rate", 0.0) * (step - first - second) / steps) if steps else low
    is_up = step <= first
    share = step / first if is_up else (first + second - step) / second
    stairs = params.get("cycle_first_stair_count", 0)
    stairs = stairs if is_up else params.get("cycle_second_stair_count", stairs)
    if stairs:
        share = math.floor(stairs * step / first if is_up else stairs * (first + second - step) / second) / stairs
    return low + (high - low) * share


WARMUP = {"warmup_num_steps": 10}
CYCLE = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 20, "cycle_momentum": False}
CASES = [
    ("WarmupLR", warmup_lr, WARMUP),
    ("WarmupLR", warmup_lr, {**WARMUP, "warmup_min_lr": 0.001, "warmup_max_lr": 0.1, "warmup_type": "linear"}),
    ("WarmupLR", warmup_lr, {"warmup_num_steps": 1, "warmup_max_lr": 0.1}),
    ("WarmupDecayLR", warmup_decay, {**WARMUP, "warmup_max_lr": 0.1, "total_num_steps": 40}),
    (
        "WarmupDecayLR",
        warmup_decay,
        {**WARMUP, "warmup_min_lr": 0.002, "warmup_max_lr": 0.1, "warmup_type": "linear", "total_num_steps": 70},
    ),
    ("WarmupCosineLR", warmup_cosine, {**WARMUP, "cos_min_ratio": 0.1, "total_num_steps": 40}),
    (
        "WarmupCosineLR",
        warmup_cosine,
        {**WARMUP, "warmup_min_ratio": 0.2, "cos_min_ratio": 0.1, "warmup_type": "linear", "total_num_steps": 70},
    ),
    # Defaults, as DeepSpeed's documentation has them.
    ("WarmupDecayLR", warmup_decay, {**WARMUP, "total_num_steps": 40}),
    ("WarmupCosineLR", warmup_cosine, {**WARMUP, "total_num_steps": 40}),
    ("LRRangeTest", range_test, {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 7}),
    (
        "LRRangeTest",
        range_test,
        {
            "lr_range_test_min_lr": 0.01,
            "lr_range_test_step_size": 7,
            "lr_range_test_step_rate": 0.3,
            "lr_range_test_staircase": True,
        },
    ),
    ("OneCycle", one_cycle, CYCLE),
    ("OneCycle", one_cycle, {**CYCLE, "cycle_second_step_size": 15, "decay_step_size": 5, "decay_lr_rate": 0.5}),
    ("OneCycle", one_cycle, {**CYCLE, "cycle_first_stair_count": 4, "cycle_second_stair_count": 5}),
]


def rates(name: str, params: dict, num_steps: int = STEPS) -> list[float]:
    """The rate of every step, with the lines that are printed."""
    sections = OptimizerSections({"type": "AdamW", "params": {"lr": LR}}, {"type": name, "params": params})
    assert {row.fate.outcome for row in sections.rows} == {"became"}
    names: dict = {}
    exec("\n".join(sections.lines), names)
    made = names["configure_optimizers"](nn.Linear(1, 1))
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("name", "formula", "params"), CASES)
def test_rates_are_those_of_the_formula(name, formula, params):
    expected = [formula(params, step) for step in range(STEPS)]
    assert len(set(expected)) > 4 or params["warmup_num_steps"] == 1
    torch.testing.assert_close(
        torch.tensor(rates(name, params), dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=RTOL,
        atol=ATOL,
    )


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("WarmupLr", {}, "did you mean 'WarmupLR'"),
        ("WarmupLR", {"warmup_max_lr": [0.1, 0.2]}, "warmup_max_lr is given per parameter group"),
        ("WarmupLR", {"warmup_min_lr": 0.1}, "needs warmup_max_lr"),
        ("WarmupDecayLR", {}, "needs total_num_steps"),
        ("OneCycle", {"cycle_min_lr": 0.1}, "cycle_max_lr"),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0}, "cycle_max_lr must be above 0"),
        ("WarmupLR", {"warmup_num_steps": "many"}, "warmup_num_steps must be a number, found 'many'"),
    ],
)
def test_what_is_no_schedule_is_refused(name, params, says):
    with pytest.raises(SettingError, match=says):
        schedule_of(name, params, None)


def test_every_schedule_has_a_case():
    assert {name for name, _, _ in CASES} == set(PARAMS)
