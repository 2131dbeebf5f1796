"""What is chosen where the length of windows and the share of columns are "auto"."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.comm.communicator import single_rank
from lightning_superscale.config import ZenFlowConfig
from lightning_superscale.offload.zenflow.auto import AutoNumbers, StepSeconds, choose_interval, choose_share, usual


@pytest.mark.parametrize(
    ("device", "adding", "updating", "interval"),
    [
        (1.0, 0.0, 0.5, 1),  # 0.83 s are left
        (1.0, 0.06, 2.0, 3),  # 0.73 s
        (1.0, 0.06, 2.9, 4),
        (1.0, 0.0, 26.0, 32),
        (1.0, 0.6, 0.1, 32),  # adding up alone takes longer than the step
    ],
)
def test_the_shortest_window_is_chosen_in_which_the_host_is_done(device, adding, updating, interval):
    chosen = choose_interval([StepSeconds(device, adding, updating)])
    assert chosen.value == interval
    assert ("no window is long enough" in chosen.reason) == (interval == 32 and adding > 0.5)


def test_the_rank_that_needs_most_decides():
    ranks = [StepSeconds(1.0, 0.0, 0.5), StepSeconds(1.0, 0.0, 2.0), StepSeconds(1.0, 0.0, 1.0)]
    chosen = choose_interval(ranks)
    assert chosen.value == 3
    assert "2000.0 ms to step all deferred columns" in chosen.reason
    assert "rank 1" in chosen.reason


def test_the_first_steps_do_not_count():
    steps = [StepSeconds(9.0, 9.0, 9.0)] * 3 + [StepSeconds(1.0, 2.0, 3.0)] * 2 + [StepSeconds(2.0, 3.0, 4.0)] * 3
    assert usual(steps) == StepSeconds(2.0, 3.0, 4.0)
    assert usual(steps[:2]) == StepSeconds(9.0, 9.0, 9.0)


@pytest.mark.parametrize(("steepness", "share"), [(0.5, 0.05), (0.02, 0.15), (0.0, 0.25)])
def test_the_smallest_share_is_chosen_that_holds_half_of_the_energy(steepness, share):
    energy = torch.exp(-steepness * torch.arange(400, dtype=torch.float64))
    chosen = choose_share([energy[torch.randperm(400)], energy[:200]])
    assert chosen.value == share
    assert "% of the gradient's energy" in chosen.reason
    assert choose_share([torch.zeros(10)]).value == 0.25


ENERGY = torch.tensor([9.0] + 19 * [0.1], dtype=torch.float64)


@pytest.mark.parametrize("asked", [("auto", "auto"), ("auto", 6), (0.2, "auto"), (0.2, 6)])
def test_each_number_that_is_auto_has_its_reason_and_after_a_resume_the_checkpoint(asked):
    config = ZenFlowConfig(**dict(zip(("topk", "update_interval"), asked, strict=True)))
    numbers = AutoNumbers(config)
    assert numbers.reasons == []
    numbers._steps = [StepSeconds(1.0, 0.0, 2.0)] * 8
    if not numbers.are_chosen:
        numbers.choose([ENERGY], single_rank().mesh)
    whys = {
        "topk": "topk=0.05: these columns hold 83 % of the gradient's energy (topk='auto')",
        "update_interval": "update_interval=3: a step takes the device 1000.0 ms, and the host 2000.0 ms to step all "
        "deferred columns and 0.0 ms to add up gradients (update_interval='auto')",
    }
    are_auto = [name for name, value in zip(whys, asked, strict=True) if value == "auto"]
    assert numbers.reasons == [whys[name] for name in are_auto]

    resumed = AutoNumbers(config)
    assert resumed.load(numbers.saved()) == bool(are_auto)
    values = {"topk": 0.05, "update_interval": 3}
    assert resumed.reasons == [
        f"{name}={values[name]}: the checkpoint that this run resumed from has it ({name}='auto')" for name in are_auto
    ]
