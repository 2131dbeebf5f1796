"""Fabric on two ranks: the same bits as the Trainer's strategy, its checkpoints at another number of ranks, its end."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import dataset, trainer
from tests.plugins.fabric.loops import adamw, assert_equal, launched, loop, model

PARAMETERS = {name for name, _ in model().named_parameters()}
STRATEGIES = ("superscale", "zero1", "zero2", "zero3", "superoffload", "zenflow")
# Those that step as AdamW, and whose norm is that of whole gradients.
EXACT = ("superscale", "zero1", "zero2", "superoffload")


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return adamw(self.net)


def under_trainer(strategy, rank):
    module, data = Module(), dataset(64)
    sampler = DistributedSampler(data, 2, rank, shuffle=False)  # as Fabric deals; the Trainer would shuffle
    runner = trainer(strategy, devices=2, max_epochs=1)
    runner.fit(module, DataLoader(data, batch_size=8, sampler=sampler))
    return {name: param.detach().clone() for name, param in module.net.named_parameters()}


def under_fabric(strategy):
    fabric, plain = launched(strategy, devices=2), model()
    module, optimizer = fabric.setup(plain, adamw(plain))
    # From stage 2 on the Trainer's strategy reduces each micro-batch, which adds in another order than a loop's sum.
    loop(fabric, module, optimizer, num=64, micro_batches=1)
    fabric.strategy.teardown()  # applies what zenflow's host has kept back, and gives sharded weights back whole
    return {name: param.detach().clone() for name, param in plain.named_parameters()}


def clipped(strategy, folder=None):
    """Weights after a loop that clips, and the norms of its steps; with a folder it goes on from a checkpoint too."""
    fabric, plain = launched(strategy, devices=2), model()
    module, optimizer = fabric.setup(plain, adamw(plain))
    norms = loop(fabric, module, optimizer, clip={"max_norm": 0.05}, num=64)
    first = weights_of(fabric, module)
    if folder is not None:
        fabric.save(f"{folder}/{strategy}", {"model": module, "optimizer": optimizer, "step": 2})
        loop(fabric, module, optimizer, clip={"max_norm": 0.05}, num=64)
        second = weights_of(fabric, module)
        state = {"model": module, "optimizer": optimizer, "step": 0}
        fabric.load(f"{folder}/{strategy}", state)
        assert state["step"] == 2
        assert_equal(weights_of(fabric, module), first)
        loop(fabric, module, optimizer, clip={"max_norm": 0.05}, num=64)
        assert_equal(weights_of(fabric, module), second)
        with torch.no_grad():
            module(torch.ones(4, 17))
        fabric.strategy.teardown()
    return first, norms


def weights_of(fabric, module):
    """Whole parameters; sharded ones on rank 0 alone. Statistics of batch norm are each rank's own meanwhile."""
    state = fabric.strategy.get_module_state_dict(module._forward_module)
    return {name: value.clone() for name, value in state.items() if name in PARAMETERS}


def runs(rank, world_size, folder):
    found = {name: (under_fabric(name), under_trainer(name, rank), clipped(name, folder)) for name in STRATEGIES}
    return {**found, "ddp": clipped("ddp")}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, runs, str(folder))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_are_those_of_the_trainers_strategy(found, strategy):
    for ranks in found[1]:
        own, theirs, _ = ranks[strategy]
        assert_equal(own, theirs)


@pytest.mark.parametrize("strategy", EXACT)
def test_clipped_steps_are_those_of_ddp(found, strategy):
    for ranks in found[1]:
        (own, norms), (theirs, others) = ranks[strategy][2], ranks["ddp"]
        assert norms == others
        assert_equal(own, theirs)


def test_the_norm_of_sharded_gradients_is_that_of_ddp_but_for_its_order(found):
    # Two orders of a sum of n squares, all positive, differ by at most n roundings; its root by half of that.
    bound = sum(param.numel() for param in model().parameters()) * 2.0**-24 / 2
    for ranks in found[1]:
        (own, *_), (theirs, *_) = ranks["zero3"][2][1], ranks["ddp"][1]
        assert abs(own / theirs - 1) <= bound


def test_one_process_goes_on_from_the_checkpoint_of_two_ranks(found):
    folder, ranks = found
    fabric, plain = launched("superoffload"), model()
    module, optimizer = fabric.setup(plain, adamw(plain))
    state = {"model": module, "optimizer": optimizer, "step": 0}
    fabric.load(folder / "zero3", state)
    assert_equal({name: param.detach() for name, param in plain.named_parameters()}, ranks[0]["zero3"][2][0])
    assert optimizer.state_dict()["state"][0]["step"] == 2
    fabric.strategy.teardown()


def fails(rank, world_size):
    fabric, plain = launched("zero2", devices=2), model()
    message = ""
    try:
        fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=0.1 * (rank + 1)))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    fabric.strategy.teardown()
    return message


def test_ranks_that_differ_are_refused_on_all_of_them():
    assert all("lr" in message for message in run_ranks(2, fails))
