"""Ranks that part ways, by epochs of different lengths or a save by one rank alone: every rank says which, and why."""

from __future__ import annotations

import time

import pytest
from torch.utils.data import DataLoader, Subset

from lightning_superscale.errors import SuperScaleError
from tests.helpers.extent import IS_ALL, only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, dataset, loader, trainer

SECONDS = 25.0


class SavesAlone(Regressor):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.is_global_zero and batch_idx == 1:
            self.trainer.save_checkpoint("alone.ckpt")


def part_ways(rank, world_size, strategy, num_epochs):
    """What this rank says when ranks part ways, and after how many seconds.

    Args:
        num_epochs: epochs whose lengths differ between ranks; None for epochs alike and a save by one rank alone.
    """
    start = time.monotonic()
    is_uneven = num_epochs is not None
    batches = DataLoader(Subset(dataset(), range(24 + 8 * rank)), batch_size=8) if is_uneven else loader(48)
    run = trainer(strategy, devices=world_size, max_epochs=num_epochs or 1, use_distributed_sampler=not is_uneven)
    with pytest.raises(SuperScaleError) as error:
        run.fit(Regressor() if is_uneven else SavesAlone(), batches)
    return str(error.value), time.monotonic() - start


STRATEGIES = ["zero2", "zero3", "superoffload"] if IS_ALL else ["zero2"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_save_by_one_rank_alone_is_named(strategy):
    for said, seconds in run_ranks(2, part_ways, strategy, None, limit_s=90):
        assert "trainer.save_checkpoint() (every rank must call it, also where rank 0 alone writes)" in said
        assert seconds < SECONDS


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("num_epochs", "place", "other"),
    [
        (1, "rank 0 at the end of training, after an epoch of 3 batches", "rank 1 at"),
        pytest.param(
            2,
            "'the start of an epoch, after one of 3 batches",
            "on rank 0 and 'the start of a forward' on rank 1",
            marks=only_in_test_all,
        ),
    ],
)
def test_epochs_of_different_lengths_are_named(strategy, num_epochs, place, other):
    for said, seconds in run_ranks(2, part_ways, strategy, num_epochs, limit_s=90):
        assert place in said
        assert "drop_last=True, a DistributedSampler" in said
        assert other in said
        assert seconds < SECONDS
