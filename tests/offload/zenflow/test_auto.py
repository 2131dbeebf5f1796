"""What is chosen where the length of windows and the share of columns are "auto"."""

from __future__ import annotations

import pytest
import torch

from lightning_superscale.offload.zenflow.auto import StepSeconds, choose_interval, choose_share, usual


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
