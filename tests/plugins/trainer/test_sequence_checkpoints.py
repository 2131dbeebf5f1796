"""Runs that share sequences among some ranks go on among others, in the middle of an epoch.

Among as many ranks every bit is that of the run that was not interrupted. Among others, losses near 20 in fp32 have
roundings of 2^-24 * 20 = 1e-6, and weights differ as in test_sequence_parallel.py. A state that is lost turns whole
steps of 1e-2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch

import lightning_superscale as lss
from tests.helpers.ranks import run_ranks
from tests.helpers.sequence import LanguageModel, Texts
from tests.helpers.trainers import trainer

NUM_STEPS, SAVED_AT, WORLDS = 6, 3, (1, 2, 4)
STRATEGIES = {
    "lightning": ({"zero": 2}, False),
    "universal": ({"zero": 1, "offload": "superoffload"}, True),
    "universal zero3": ({"zero": 3}, True),
}


class Batches:
    """The batches of an epoch, which go on where a checkpoint was written."""

    def __init__(self) -> None:
        self.texts, self.at = Texts(), 0

    def __len__(self) -> int:
        return len(self.texts) // 2

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for at in range(self.at, len(self)):
            self.at = at + 1
            yield [torch.stack(pair) for pair in zip(*(self.texts[2 * at + i] for i in range(2)), strict=True)]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def trained(world_size: int, name: str, num_steps: int, *, resumed: str | None = None, saves: str | None = None):
    """The losses of a fit, and its last weights."""
    options, is_universal = STRATEGIES[name]
    L.seed_everything(5, verbose=False)
    module = LanguageModel()
    run = trainer(
        lss.SuperScaleStrategy(**options, sequence=world_size if world_size > 1 else None),
        devices=world_size,
        max_epochs=-1,
        max_steps=num_steps,
        plugins=[lss.UniversalCheckpointIO()] if is_universal else None,
    )
    run.fit(module, Batches(), ckpt_path=resumed)
    state = run.strategy.run.module_state(module, is_local=False)
    if saves is not None:
        run.save_checkpoint(saves)
    return module.losses, {key: value.clone() for key, value in state.items()}


def save_all(rank, world_size, folder):
    for name in STRATEGIES:
        trained(world_size, name, SAVED_AT, saves=f"{folder}/{name}-{world_size}.ckpt")


def resume_all(rank, world_size, folder):
    """By strategy, the run that was not interrupted, and those that went on, by the ranks that saved."""
    found = {}
    for name in STRATEGIES:
        found[name] = {None: trained(world_size, name, NUM_STEPS)}
        for saved_by in WORLDS:
            path = f"{folder}/{name}-{saved_by}.ckpt"
            found[name][saved_by] = trained(world_size, name, NUM_STEPS, resumed=path)
    return found


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("saved"))
    for world_size in WORLDS:
        run_ranks(world_size, save_all, folder)
    return {world_size: run_ranks(world_size, resume_all, folder)[0] for world_size in WORLDS}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_run_goes_on_where_another_one_stopped(resumed, name, world_size):
    losses, weights = resumed[world_size][name][None]
    assert len(losses) == NUM_STEPS
    for saved_by in WORLDS:
        found, others = resumed[world_size][name][saved_by]
        if saved_by == world_size:
            assert found == losses[SAVED_AT:]
        assert found == pytest.approx(losses[SAVED_AT:], abs=1e-4)
        for key, weight in weights.items():
            if saved_by == world_size:
                assert torch.equal(others[key], weight), (saved_by, key)
            torch.testing.assert_close(others[key], weight, rtol=0, atol=1e-4)
