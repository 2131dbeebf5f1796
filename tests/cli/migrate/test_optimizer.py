"""Optimizer sections: DeepSpeed's Adam is AdamW without decay, retired and absent optimizers are told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_superscale.cli.migrate.optimizer import _TORCHS, OptimizerSections


def made(optimizer: dict) -> torch.optim.Optimizer:
    names: dict = {}
    exec("\n".join(OptimizerSections(optimizer, {}).lines), names)
    return names["configure_optimizers"](nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("section", "expected", "weight_decay"),
    [
        ({"type": "AdamW", "params": {"lr": 1e-4}}, torch.optim.AdamW, 0.0),
        ({"type": "Adam", "params": {"lr": 1e-4}}, torch.optim.AdamW, 0.0),
        ({"type": "Adam", "params": {"lr": 1e-4, "adam_w_mode": False}}, torch.optim.Adam, 0),
        ({"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}, torch.optim.AdamW, 0.01),
        ({"type": "OneBitAdam", "params": {"lr": 1e-4, "weight_decay": 0.1}}, torch.optim.AdamW, 0.1),
        ({"type": "Adagrad", "params": {"lr": 1e-4}}, torch.optim.Adagrad, 0),
        ({"type": "SGD", "params": {"lr": 1e-4}}, torch.optim.SGD, 0),
    ],
)
def test_the_class_and_its_decay(section, expected, weight_decay):
    optimizer = made(section)
    assert type(optimizer) is expected
    assert optimizer.param_groups[0]["weight_decay"] == weight_decay
    assert optimizer.param_groups[0]["lr"] == 1e-4


def test_betas_are_a_tuple():
    assert made({"type": "AdamW", "params": {"betas": [0.8, 0.9]}}).param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("name", ["Lamb", "Lion", "Muon", "MuAdam"])
def test_an_optimizer_that_torch_has_not_is_told_and_makes_no_line(name):
    sections = OptimizerSections({"type": name, "params": {"lr": 0.1}}, {})
    assert [row.fate.outcome for row in sections.rows] == ["none", "none"]
    assert sections.lines == []


def test_an_optimizer_that_nobody_has_is_unknown():
    (row,) = OptimizerSections({"type": "AdammW"}, {}).rows
    assert row.fate.outcome == "unknown"
    assert "did you mean 'AdamW'?" in row.fate.text


def test_torchs_optimizers_are_all_known():
    classes = {name for name, one in vars(torch.optim).items() if isinstance(one, type)} - {"Optimizer", "Muon"}
    assert set(_TORCHS) == classes


def test_arguments_of_a_retired_optimizer_are_retired():
    params = {"lr": 1e-3, "freeze_step": 4, "var_freeze_step": 3}
    fates = [row.fate.outcome for row in OptimizerSections({"type": "ZeroOneAdam", "params": params}, {}).rows]
    assert fates == ["retired", "became", "retired", "retired"]


def test_unknown_keys_and_parameters_are_unknown():
    sections = OptimizerSections(
        {"type": "AdamW", "params": {"learning_rate": 1}, "kind": 1},
        {"type": "WarmupLR", "params": {"steps": 3}, "x": 1},
    )
    unknown = {row.key for row in sections.rows if row.fate.outcome == "unknown"}
    assert unknown == {"optimizer.params.learning_rate", "optimizer.kind", "scheduler.params.steps", "scheduler.x"}


def test_a_scheduler_alone_asks_for_the_optimizer():
    sections = OptimizerSections({}, {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 0.25}})
    assert any("self.make_optimizer()  # yours, built with lr=0.25" in line for line in sections.lines)


def test_momentum_that_is_not_cycled_is_told():
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_min_mom": 0.7}
    rows = {row.key: row.fate for row in OptimizerSections({}, {"type": "OneCycle", "params": params}).rows}
    assert rows["scheduler.params.cycle_min_mom"].outcome == "none"
    assert rows["scheduler.params.cycle_min_lr"].outcome == "became"
