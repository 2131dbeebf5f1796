"""Universal checkpoints know of no sequence axis: ranks that share sequences and one process go on from each other's.

Weights and states are compared bit for bit; where each goes on from there is held by test_sequence_axis.py.
"""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.run.techniques.registry import TECHNIQUES
from tests.helpers.ranks import run_ranks
from tests.helpers.shared_tokens import SharedTokens, dealt_loader
from tests.helpers.trainers import trainer

# Stage and engine of the two ranks: whole states, sharded ones on the host, and sharded weights.
CASES = [(0, None), (2, "superoffload"), (3, None)]


class States(L.Callback):
    """Weights and the optimizer's states, whole, at the start of training and at its end."""

    def __init__(self) -> None:
        self.found: dict[str, dict] = {}

    def take(self, trainer, module, when: str) -> None:
        run = trainer.strategy.run
        weights = run.module_state(module, is_local=False)
        states = run.optimizer_state(module, trainer.strategy.optimizers[0], is_local=False)["state"]
        self.found[when] = copy.deepcopy({"weights": dict(weights), "states": states})

    def on_train_start(self, trainer, module):
        self.take(trainer, module, "start")

    def on_train_end(self, trainer, module):
        self.take(trainer, module, "end")


def fit(world_size: int, stage: int, engine, path: str, *, max_epochs: int, ckpt_path=None):
    """Trains, saves to `path` where that is one, and returns the states at start and end."""
    states = States()
    strategy = lss.SuperScaleStrategy(stage, engine, checkpoint=lss.CheckpointConfig(), sequence=world_size)
    runner = trainer(strategy, devices=world_size, max_epochs=max_epochs, callbacks=[states])
    runner.fit(SharedTokens(), dealt_loader(8), ckpt_path=ckpt_path)
    if path:
        runner.save_checkpoint(path)
    return states.found


def at_two_ranks(rank, world_size, folder):
    """By case: what was saved, and what was loaded of one process's checkpoint."""
    del TECHNIQUES["sequence"]  # these modules take their part of the tokens themselves
    found = []
    for number, (stage, engine) in enumerate(CASES):
        saved = fit(world_size, stage, engine, f"{folder}/two-{number}", max_epochs=1)["end"]
        loaded = fit(world_size, stage, engine, "", max_epochs=2, ckpt_path=f"{folder}/one")["start"]
        found.append((saved, loaded))
    return found


def assert_equal(mine, theirs) -> None:
    assert mine["weights"].keys() == theirs["weights"].keys()
    for name, value in theirs["weights"].items():
        assert torch.equal(mine["weights"][name], value), name
    assert mine["states"].keys() == theirs["states"].keys() != set()
    for index, state in theirs["states"].items():
        assert {"exp_avg", "exp_avg_sq", "step"} <= mine["states"][index].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(mine["states"][index][key]), torch.as_tensor(value)), f"{key} of {index}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder, one process's saved states, and what two ranks saved and loaded."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = fit(1, 0, None, f"{folder}/one", max_epochs=1)["end"]
    return folder, saved, run_ranks(2, at_two_ranks, str(folder), limit_s=120)


@pytest.mark.parametrize("number", range(len(CASES)), ids=str)
def test_one_process_goes_on_from_ranks_that_share_sequences(checkpoints, number):
    folder, _, two = checkpoints
    loaded = fit(1, 0, None, "", max_epochs=2, ckpt_path=f"{folder}/two-{number}")["start"]
    assert_equal(loaded, two[0][number][0])


@pytest.mark.parametrize("number", range(len(CASES)), ids=str)
def test_ranks_that_share_sequences_go_on_from_one_process(checkpoints, number):
    _, saved, two = checkpoints
    assert_equal(two[0][number][1], saved)
