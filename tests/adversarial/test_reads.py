"""No read of a weight, by any code at any time, sees a value from before the last step; no write is lost."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

import lightning_superscale as lss
from tests.adversarial.reading_modules import MODULES, Alias, Reads, differences, outcome
from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import loader, trainer

STRATEGIES = {
    "superscale": lambda: "superscale",
    "cpu": lambda: lss.SuperScaleStrategy(zero=0, offload="cpu"),
    "superoffload": lambda: "superoffload",
    "flow": lambda: lss.SuperScaleStrategy(offload={"engine": "superoffload", "weights": "flow", "wrap": ["Linear"]}),
}
OVER_RANKS = {
    "superscale": lambda: "superscale",
    "zero1": lambda: "zero1",
    "zero2": lambda: "zero2",
    "cpu": lambda: lss.SuperScaleStrategy(zero=2, offload="cpu"),
    "superoffload": lambda: "superoffload",
    "flow": lambda: lss.SuperScaleStrategy(
        zero=2, offload={"engine": "superoffload", "weights": "flow", "wrap": ["Linear"]}
    ),
}
# Host memory that weights flow from changes with every step, so that no view of it can follow.
CANT = {("flow", Alias)}


class Unaliased(Reads):
    """Keeps no view of any weight, and notes whether its run believes that it does."""

    def on_train_batch_end(self, *_):
        engines = self.trainer.strategy.assembly.engines.values()
        self.believed = {unit.is_aliased for engine in engines for unit in engine.transport.units}


def found(names, strategies, oracle, devices):
    wrong = {}
    for cls in MODULES:
        expected = outcome(cls, oracle(), devices)
        for name in names:
            if (name, cls) not in CANT and (diff := differences(expected, outcome(cls, strategies[name](), devices))):
                wrong[name, cls.__name__] = diff
    return wrong


@pytest.mark.parametrize("name", STRATEGIES)
def test_on_one_rank(name):
    assert found([name], STRATEGIES, lambda: "auto", 1) == {}


def _over_ranks(rank: int, world_size: int, names):
    return found(names, OVER_RANKS, lambda: DDPStrategy(find_unused_parameters=True), world_size)


def test_over_ranks():
    names = list(OVER_RANKS) if IS_ALL else ["zero1", "superoffload", "flow"]
    assert run_ranks(2, _over_ranks, names, limit_s=300.0) == [{}, {}]


def _believed(rank: int, world_size: int, strategies):
    believed = {}
    for name, precision in itertools.product(strategies, ("32-true", "bf16-true")):
        module = Unaliased()
        trainer(make(name, world_size), devices=world_size, precision=precision).fit(module, loader())
        believed[name, precision] = module.believed
    return believed


def make(name, world_size):
    return (STRATEGIES if world_size == 1 else OVER_RANKS)[name]()


def test_a_run_without_views_of_weights_waits_for_none_early():
    for name, believed in _believed(0, 1, STRATEGIES).items():
        assert believed == {False}, name
    for rank in run_ranks(2, _believed, list(OVER_RANKS)):
        for name, believed in rank.items():
            assert believed == {False}, name


class AssignsWhole(Reads):
    """Gives shards whole weights of its own, as after reading a file by hand."""

    def on_train_start(self):
        torch.manual_seed(9)
        fresh = nn.Sequential(nn.Linear(17, 600), nn.GELU(), nn.Linear(600, 600), nn.GELU(), nn.Linear(600, 5))
        for param, new in zip(self.net.parameters(), fresh.parameters(), strict=True):
            param.data = new.data


def _assigned(rank: int, world_size: int):
    expected = outcome(AssignsWhole, DDPStrategy(), world_size)
    names = ("zero3", "zero3+superoffload")
    strategies = ("zero3", lss.SuperScaleStrategy(zero=3, offload="superoffload"))
    return {
        name: diff
        for name, strategy in zip(names, strategies, strict=True)
        if (diff := differences(expected, outcome(AssignsWhole, strategy, world_size)))
    }


def test_whole_weights_that_are_assigned_to_shards_are_taken_over():
    assert run_ranks(2, _assigned) == [{}, {}]
