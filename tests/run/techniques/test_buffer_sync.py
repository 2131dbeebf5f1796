"""Buffers that forward changes and reads: training and evaluation on several ranks equal DDP, which broadcasts them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, loader, trainer


class Running(nn.Module):
    """Adds the mean of what it saw, each rank's own, to what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(33))

    def forward(self, x):
        if self.training:
            self.seen.mul_(0.5).add_(x.detach().mean(0))
        return x + self.seen


class Drifting(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.net[1] = Running()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


def trained(rank, world_size, strategy):
    from lightning.pytorch.strategies import DDPStrategy

    module = Drifting()
    how = DDPStrategy(find_unused_parameters=True) if strategy == "ddp" else strategy
    run = trainer(how, devices=world_size)
    run.fit(module, loader(48), loader(32))
    weights = {name: param.detach().clone() for name, param in module.net.named_parameters()}
    return weights, float(run.callback_metrics["val_loss"]), module.net[1].seen.clone()


@pytest.mark.parametrize("strategy", ["superscale", "zero3", "superoffload"])
def test_every_rank_reads_the_first_ones_buffers(strategy):
    expected, found = run_ranks(2, trained, "ddp"), run_ranks(2, trained, strategy)
    for rank in range(2):
        for name, weight in expected[rank][0].items():
            assert torch.equal(found[rank][0][name], weight), name
    assert torch.equal(found[0][2], expected[0][2])
    # DDP evaluates each rank with what its own last batch left; here all have the first one's.
    assert found[0][1] == expected[0][1]
