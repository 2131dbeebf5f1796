"""The order of samples, and who has which."""

from __future__ import annotations

import itertools

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import lightning_superscale as lss
from lightning_superscale.errors import SuperScaleError
from tests.helpers.numbered import Numbers
from tests.helpers.ranks import run_ranks


def drawn(num: int, replicas: int, start: int = 0, epoch: int = 0, **options) -> list[int]:
    """What all ranks draw, in the order of steps."""
    parts = []
    for rank in range(replicas):
        sampler = lss.ResumableSampler(Numbers(num), seed=5, **options)
        sampler.place(replicas, rank)
        sampler.set_epoch(epoch)
        sampler.start_at(epoch, start)
        parts.append(list(sampler))
    assert len({len(part) for part in parts}) == 1
    return [sample for samples in zip(*parts, strict=True) for sample in samples]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("num", [7, 24])
def test_the_order_is_that_of_torchs_sampler(shuffle, drop_last, num):
    for replicas, epoch in itertools.product((1, 2, 3, 9), (0, 4)):
        for rank in range(replicas):
            if drop_last and num < replicas:
                continue  # torch's fills up where it would have no samples
            options = {"shuffle": shuffle, "seed": 5, "drop_last": drop_last}
            torchs = DistributedSampler(Numbers(num), replicas, rank, **options)
            ours = lss.ResumableSampler(Numbers(num), num_replicas=replicas, rank=rank, **options)
            torchs.set_epoch(epoch)
            ours.set_epoch(epoch)
            assert (list(ours), len(ours)) == (list(torchs), len(torchs))


@pytest.mark.parametrize("start", [0, 6, 12, 18, 24])
def test_any_number_of_ranks_draws_the_rest_of_the_same_order(start):
    order = drawn(24, 1)
    assert sorted(order) == list(range(24))
    for replicas in (1, 2, 3, 6):
        assert drawn(24, replicas, start) == order[start:]


@pytest.mark.parametrize("start", range(8))
def test_what_ranks_cant_divide_is_filled_up_or_left_out_at_the_end(start):
    order = drawn(7, 1)
    for replicas in (2, 3, 5):
        filled, cut = drawn(7, replicas, start), drawn(7, replicas, start, drop_last=True)
        rest = order[start:]
        assert filled[: len(rest)] == rest
        assert filled[len(rest) :] == (order * 2)[: len(filled) - len(rest)]
        assert len(filled) - len(rest) < replicas
        assert cut == rest[: len(cut)]
        assert len(rest) - len(cut) < replicas


def test_epochs_have_orders_of_their_own():
    orders = [tuple(drawn(24, 2, epoch=epoch)) for epoch in range(3)]
    assert len(set(orders)) == 3
    assert len({tuple(drawn(24, 2, epoch=epoch, shuffle=False)) for epoch in range(3)}) == 1


def draws_untold(rank, world_size):
    try:
        next(iter(DataLoader(Numbers(), sampler=lss.ResumableSampler(Numbers()))))
    except SuperScaleError as error:
        return str(error)
    return ""


def test_ranks_that_nobody_told_apart_are_refused():
    for rank, said in enumerate(run_ranks(2, draws_untold)):
        assert f"was not told which samples are rank {rank}'s of 2" in said
        assert "UniversalCheckpointIO" in said
    assert not dist.is_initialized()


def test_a_stream_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(SuperScaleError, match="got a Stream; expected a dataset with a length"):
        lss.ResumableSampler(Stream())
