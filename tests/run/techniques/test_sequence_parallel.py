"""Ranks that share sequences get equal batches and equal random numbers, or all of them are told which differ."""

from __future__ import annotations

import random

import pytest
import torch

from lightning_superscale.run.techniques.sequence_parallel import random_state, set_random_state
from tests.helpers.ranks import RankFailed, run_ranks
from tests.helpers.sequence import VOCABULARY, LanguageModel, Texts, fitted


def test_a_state_that_is_set_draws_the_same_numbers():
    device = torch.device("cpu")
    state = random_state(device)
    drawn = torch.rand(3), random.random()
    set_random_state(state, device)
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]


class OtherTexts(Texts):
    """Gives rank 1 another token in batch 3."""

    def __init__(self, rank: int, at: int) -> None:
        super().__init__()
        if rank == 1:
            self.ids[at, 2] = (self.ids[at, 2] + 1) % VOCABULARY


def _other_batches(rank, world_size):
    fitted(world_size, {"sequence": 2}, OtherTexts(rank, 7), seed=None)


def test_batches_that_differ_are_refused_on_every_rank_with_batch_and_tensor():
    with pytest.raises(RankFailed) as error:
        run_ranks(2, _other_batches)
    for text in ("ranks 0 and 1 share", "training batch 3 has 0 [2, 14] int64 with checksum", "seed_everything"):
        assert str(error.value).count(text) >= 2, text  # on both ranks


def _drawing(rank, world_size, seeds):
    torch.manual_seed(seeds[rank])
    random.seed(seeds[rank])
    run = fitted(world_size, {"sequence": 2}, Texts(), seed=None, max_steps=2)
    return float(torch.rand(())), random.random(), run.strategy.explain()


def test_ranks_with_other_random_states_get_the_first_ones():
    drawn = run_ranks(2, _drawing, [1, 2])
    assert drawn[0][:2] == drawn[1][:2]
    assert "were given the first one's state 1 time" in drawn[1][2]
    assert "random numbers" not in run_ranks(2, _drawing, [3, 3])[0][2]


def test_groups_may_draw_alike_or_apart():
    for seeds in ([3, 3, 3, 3], [3, 3, 4, 4]):
        drawn = run_ranks(4, _drawing, seeds)
        assert all("random numbers" not in explained for _, _, explained in drawn), seeds
    drawn = run_ranks(4, _drawing, [3, 3, 3, 5])
    assert drawn[2][:2] == drawn[3][:2]
    assert "were given the first one's state 1 time" in drawn[3][2]


class Deaf(LanguageModel):
    """Its layers never meet the batch."""

    def loss(self, batch):
        return self.model(torch.tensor(batch[0].tolist())).mean()


def _unshared(rank, world_size, module, dims):
    fitted(world_size, {"sequence": {"size": 2, "dims": dims}}, Texts(), module=module())


@pytest.mark.parametrize(
    ("module", "dims", "told"),
    [
        (Deaf, None, "no layer of the training step met tokens of the batch"),
        (LanguageModel, {"ids": 1}, "SequenceConfig.dims says"),
    ],
)
def test_a_step_that_shares_nothing_is_refused(module, dims, told):
    with pytest.raises(RankFailed) as error:
        run_ranks(2, _unshared, module, dims)
    assert str(error.value).count(told) == 2  # on both ranks
