"""Edits of deferred columns' weights: which updates they outlast, and what a checkpoint keeps of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_superscale.config import ZenFlowConfig
from lightning_superscale.offload.zenflow.edits import edits_of, load_edits, saved_edits
from tests.offload.zenflow.test_step import engine_of

SYNC = ZenFlowConfig(topk=0.0, update_interval=3, overlap=False)
LATE = ZenFlowConfig(topk=0.0, update_interval=3, delay_correction=0.0)


class Run:
    """One matrix, all of whose columns the host has."""

    def __init__(self, config: ZenFlowConfig) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3, bias=False)
        self.optimizer, self.engine = engine_of(self.model, config)
        self.step()  # of warm-up

    @property
    def weight(self) -> nn.Parameter:
        return self.model.weight

    def step(self) -> None:
        self.model(torch.ones(2, 4)).square().sum().backward()
        self.engine.step()
        self.optimizer.zero_grad()

    def edit(self) -> None:
        with torch.no_grad():
            self.weight[1].fill_(0.25)

    def slice(self):
        return self.engine.states[0].slices[0]

    def close(self) -> torch.Tensor:
        self.engine.is_torn = False
        self.engine.close()
        return self.weight.detach().clone()


@pytest.mark.parametrize("config", [SYNC, LATE], ids=["sync", "late"])
def test_an_update_whose_gradients_came_before_an_edit_leaves_it(config):
    run, plain = Run(config), Run(config)
    for _ in range(2):  # of the window's three
        run.step()
        plain.step()
    run.edit()
    found, expected = run.close(), plain.close()
    assert torch.equal(found[1], torch.full((4,), 0.25))
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert torch.equal(run.optimizer.state[run.weight]["exp_avg"], plain.optimizer.state[plain.weight]["exp_avg"])


@pytest.mark.parametrize("config", [SYNC, LATE], ids=["sync", "late"])
def test_an_update_with_a_later_gradient_goes_on_from_the_edit(config):
    run = Run(config)
    run.step()
    run.edit()
    run.step()
    found = run.close()
    assert not torch.equal(found[1], torch.full((4,), 0.25))
    assert (found[1] - 0.25).abs().max() < 0.1


def test_an_edit_of_what_is_on_its_way_stands():
    run = Run(LATE)
    for _ in range(3):
        run.step()
    run.edit()
    run.engine.wait_idle()
    assert torch.equal(run.engine.master_of(run.weight)[1], torch.full((4,), 0.25))
    assert torch.equal(run.close()[1], torch.full((4,), 0.25))


def test_which_weights_were_edited_is_saved_in_the_parameters_shape():
    run = Run(SYNC)
    run.step()
    assert saved_edits(run.slice()) is None
    assert edits_of(run.engine.states[0], [0]) == []
    run.edit()
    run.engine.flush()
    saved = saved_edits(run.slice())
    expected = torch.zeros(3, 4, dtype=torch.uint8)
    expected[1] = 1
    assert torch.equal(saved, expected)
    assert torch.equal(run.optimizer.state[run.weight]["zenflow_edits"], expected)
    other = Run(SYNC)
    load_edits(other.slice(), saved)
    assert torch.equal(other.slice().edited, run.slice().edited)
    other.close()
    run.close()
    run = Run(SYNC)
    run.edit()
    run.engine.flush()
    run.step()
    assert saved_edits(run.slice()) is None
    assert "zenflow_edits" not in run.optimizer.state[run.weight]
    run.close()
