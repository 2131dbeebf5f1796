"""Defects of DeepSpeed's ZenFlow (0.19.6 and 0.19.8), none of which is ours.

| what it does | held by |
|---|---|
| scrambles weights when it starts | `test_step.py`: weights are those of plain AdamW from the first step on |
| NaN with its default, an interval that it chooses | `plugins/trainer/test_zenflow.py::test_what_warm_up_chose...` |
| takes the interval for gradient accumulation | `plugins/trainer/test_zenflow_composition.py` |
| moments in bf16 stay where they are when gradients shrink | here |
| a new selection empties moments and not their count | here: steps of a constant gradient stay at the rate |
| resumes without selection, schedule and moments | `plugins/trainer/test_zenflow.py::test_a_run_resumes...` |
| bias correction counts micro-steps, and two sets of moments take turns | here |
| a new selection drops the update that is on its way | here |
| waits for the window before the last, so that gradients get 3 S steps old | here: they are at most S steps late |
| buffers collide where warm-up or selections are no multiple of the interval | here |
| clipping and overflows don't reach selected columns | `test_step.py`, `plugins/trainer/test_zenflow_composition.py` |
| nothing is applied at the end | here |
| groups lose their weight decay and betas | `plugins/trainer/test_zenflow_composition.py::test_it_is_zenflow_by_hand` |
| needs an optimizer in its config, or crashes | all of it: the user's own |
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_superscale.config import ZenFlowConfig
from lightning_superscale.offload.zenflow import state
from tests.offload.zenflow.test_step import engine_of

LR, NUM_STEPS = 1e-3, 41
CONFIGS = {
    "overlap": {},
    "sync": {"overlap": False},
    "sums on the device": {"accumulate_on": "device"},
    "selects often": {"select_interval": 1},
    "odd numbers": {"update_interval": 4, "warmup_steps": 3, "select_interval": 5},
    "long windows": {"update_interval": 16},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_constant_gradient_moves_each_weight_by_the_rate_at_each_step_and_is_never_later_than_a_window(
    options, monkeypatch
):
    """Adam's step is the rate where gradients are all alike, whoever owns a column and whenever it changes owners."""
    config = ZenFlowConfig(**{"topk": 0.25, "delay_correction": 0.0, **options})
    round_of = iter(range(1000))

    def others_each_time(importance, num_selected):
        start = next(round_of) * num_selected
        return (torch.arange(start, start + num_selected) % len(importance)).sort().values

    monkeypatch.setattr(state, "most_important", others_each_time)
    model = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(12, 3, bias=False))
    before = [param.detach().clone() for param in model.parameters()]
    optimizer, engine = engine_of(model, config)
    optimizer.param_groups[0].update(lr=LR, weight_decay=0.0)
    for step in range(1, NUM_STEPS + 1):
        sum(param.sum() for param in model.parameters()).backward()
        engine.step()
        optimizer.zero_grad()
        for param, start in zip(model.parameters(), before, strict=True):
            moved = (start - param.detach()) / LR
            assert moved.max() <= step + 1e-2, step
            assert moved.min() >= step - config.update_interval - 1e-2, step
    engine.is_torn = False  # the run says so when a step is counted
    engine.close()
    for param, start in zip(model.parameters(), before, strict=True):
        assert torch.allclose((start - param.detach()) / LR, torch.tensor(float(NUM_STEPS)), atol=1e-2)


@pytest.mark.parametrize("topk", [0.0, 0.25, 1.0])
def test_second_moments_follow_gradients_that_shrink(topk):
    """With weights in bf16: in bf16 a second moment of beta 0.999 would stay where it is.

    The window in which they shrink has the square of a mean where AdamW has the mean of squares: 4 steps' at most.
    """
    model = nn.Linear(8, 4, bias=False).bfloat16()
    optimizer, engine = engine_of(model, ZenFlowConfig(topk=topk))
    optimizer.param_groups[0].update(betas=(0.9, 0.999), lr=0.0)
    expected = 0.0
    for step in range(401):
        scale = 1.0 if step < 100 else 0.0625
        (model.weight.sum() * scale).backward()
        engine.step()
        optimizer.zero_grad()
        expected = 0.999 * expected + 0.001 * scale**2
    engine.is_torn = False
    engine.close()
    found = optimizer.state[model.weight]["exp_avg_sq"]
    assert torch.allclose(found, torch.tensor(expected), rtol=0, atol=4 * 0.001)
