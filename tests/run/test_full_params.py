"""Whole weights within a run: read and edited alike under every strategy."""

from __future__ import annotations

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.errors import SuperScaleError
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import loader, trainer
from tests.helpers.universal import Mixed

STRATEGIES = {
    "replicated": lambda: "superscale",
    "zero1": lambda: "zero1",
    "zero2": lambda: "zero2",
    "zero3": lambda: "zero3",
    "superoffload": lambda: "superoffload",
    "zero3 superoffload": lambda: lss.SuperScaleStrategy(zero=3, offload="superoffload"),
    "flow": lambda: lss.SuperScaleStrategy(offload={"weights": "flow", "wrap": ["net.0", "net.3"]}),
}


class Clamped(Mixed):
    """Clamps a weight after every second step, and remembers what it saw before."""

    def __init__(self, is_plain: bool = False) -> None:
        super().__init__()
        self.is_plain, self.seen = is_plain, []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx % 2:
            return
        if self.is_plain:
            weights = dict(self.named_parameters())
            self._look(weights)
            return
        with self.trainer.strategy.full_params() as weights:
            self.seen.append({name: weight.clone() for name, weight in weights.items()})
        with self.trainer.strategy.full_params(writes=True) as weights:
            weights["net.0.weight"].clamp_(-0.1, 0.1)
            if self.trainer.global_rank == 0:
                weights["few"].add_(0.25)  # rank 0's edits count
            else:
                weights["few"].add_(9.0)

    def _look(self, weights):
        self.seen.append({name: weight.detach().clone() for name, weight in weights.items()})
        with torch.no_grad():
            weights["net.0.weight"].clamp_(-0.1, 0.1)
            weights["few"].add_(0.25)


def _train(rank, world_size, names):
    """Weights at the end, and those seen on the way."""
    ends = {}
    for name in names:
        module = Clamped()
        run = trainer(STRATEGIES[name](), devices=world_size, use_distributed_sampler=False)
        run.fit(module, loader())
        ends[name] = (dict(module.state_dict()), module.seen)
    return ends


def _train_plainly(rank, world_size):
    module = Clamped(is_plain=True)
    trainer("auto").fit(module, loader())
    return dict(module.state_dict()), module.seen


def _same(found, expected, name):
    weights, seen = found
    for key, value in expected[0].items():
        assert torch.equal(weights[key], value), f"{name}: {key}"
    assert len(seen) == len(expected[1]) > 2
    for step, (mine, theirs) in enumerate(zip(seen, expected[1], strict=True)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), f"{name}: step {step}"


def test_weights_are_read_and_edited_as_in_a_plain_run():
    expected = _train_plainly(0, 1)
    for name, found in _train(0, 1, STRATEGIES).items():
        _same(found, expected, name)


def test_every_rank_sees_the_same_whole_weights_and_takes_those_of_the_first():
    """Ranks get the same batches, so that two of them average equal gradients, and the plain run is the oracle."""
    [expected] = run_ranks(1, _train_plainly)
    for ends in run_ranks(2, _train, list(STRATEGIES)):
        for name, found in ends.items():
            _same(found, expected, name)


def test_reading_is_not_editing():
    class Edits(Mixed):
        def on_train_batch_end(self, *_):
            with self.trainer.strategy.full_params() as weights:
                weights["few"].add_(1)

    with pytest.raises(SuperScaleError, match="few changed within full_params.*writes=True"):
        trainer("superscale").fit(Edits(), loader())
    run = trainer("superscale")
    with pytest.raises(SuperScaleError, match=r"while trainer.fit\(\) runs"), run.strategy.full_params():
        pass
