"""A sampler whose order depends on nothing but its seed and the epoch, and that can begin anywhere in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any, TypeVar, Union, cast

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, DistributedSampler

from lightning_superscale.errors import SuperScaleError

T = TypeVar("T", covariant=True)


class ResumableSampler(DistributedSampler[T]):
    """Samples in an order that is the same at any number of ranks, and that a resumed run goes on with.

    Pass it as a DataLoader's sampler: `DataLoader(data, batch_size=8, sampler=ResumableSampler(data))`. A strategy of
    this package, or a strategy of Lightning's with UniversalCheckpointIO, tells it which samples are this rank's, saves
    with every checkpoint how many samples of the epoch optimizer steps have used, and goes on after those: at any
    number of ranks, batch size and number of workers no sample of the epoch comes twice and none is left out.

    Ranks take turns in the order: sample i of an epoch is that of rank i modulo their number, so that batch k of all
    ranks together is the k-th slice of the order. It is the order of torch's DistributedSampler with the same seed.
    Steps see the same samples at another number of ranks if batch_size * ranks * accumulate_grad_batches stays as it
    is, for example with `batch_size=global_batch // trainer.world_size`.

    Args:
        dataset: what has the samples; its length is known.
        shuffle: whether each epoch has an order of its own.
        seed: what the orders are drawn from; the same on all ranks.
        drop_last: at the end of an epoch that ranks can't divide, leave out the last samples; otherwise the first ones
            of the epoch fill up. Either concerns fewer samples than there are ranks, and none if ranks divide them.
        num_replicas, rank: how many processes share the samples, and which this one is; the strategy sets both.

    Raises:
        SuperScaleError: a dataset without a length.
    """

    _start = 0
    _skipped_epochs = 0
    _is_placed = True

    def __init__(
        self,
        dataset: Dataset[T],
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: Union[int, None] = None,
        rank: Union[int, None] = None,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise SuperScaleError(
                f"ResumableSampler got a {type(dataset).__name__}; expected a dataset with a length. The position in a "
                "stream is known to the stream alone: give its loader state_dict() and load_state_dict()."
            )
        super().__init__(dataset, num_replicas or 1, rank or 0, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self._is_placed = num_replicas is not None

    @property
    def num_in_epoch(self) -> int:
        """The number of different samples of an epoch, over all ranks."""
        return len(cast(Sized, self.dataset))

    def place(self, num_replicas: int, rank: int) -> None:
        """Set how many processes share the samples, and which this one is."""
        self.num_replicas, self.rank, self._is_placed = num_replicas, rank, True
        self.num_samples = self.num_left(0)
        self.total_size = self.num_samples * num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as a Trainer counts them: it counts one that `max_steps` has cut short as a whole one."""
        super().set_epoch(epoch + self._skipped_epochs)

    def start_at(self, epoch: int, position: int) -> None:
        """Let passes begin after the first `position` samples of an epoch, over all ranks; later epochs follow it."""
        self._skipped_epochs += epoch - self.epoch
        self.epoch, self._start = epoch, position

    def num_left(self, position: int) -> int:
        """The number of samples that each rank has after the first `position` of an epoch."""
        left = max(0, self.num_in_epoch - position)
        return left // self.num_replicas if self.drop_last else math.ceil(left / self.num_replicas)

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch's samples that are this rank's.

        Raises:
            SuperScaleError: there are several ranks, and nobody said which this one is.
        """
        if not self._is_placed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise SuperScaleError(
                f"ResumableSampler was not told which samples are rank {dist.get_rank()}'s of {dist.get_world_size()}: "
                "expected a strategy of lightning_superscale, or one of Lightning's with "
                "plugins=[UniversalCheckpointIO()]. Elsewhere call sampler.place(num_replicas, rank)."
            )
        order = self._order()
        rest = order[self._start :]
        num = self.num_left(self._start) * self.num_replicas
        rest = rest[:num] if self.drop_last else rest + _repeated(order, num - len(rest))
        return iter(rest[self.rank :: self.num_replicas])

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_in_epoch))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self.num_in_epoch, generator=generator).tolist()


def as_resumable(sampler: DistributedSampler[Any], dataset: Dataset[Any]) -> None:
    """Make a resumable sampler of torch's own, in place: it has the same ranks, and torch's order of the dataset."""
    sampler.__class__, sampler.dataset = ResumableSampler, dataset
    cast(ResumableSampler[Any], sampler).place(sampler.num_replicas, sampler.rank)


def _repeated(order: list[int], num: int) -> list[int]:
    """The first `num` of an order that begins anew at its end."""
    return (order * math.ceil(num / max(1, len(order))))[:num]
