"""Brings a Trainer's loaders and its count of batches to where the samples of a checkpoint end.

A Trainer counts batches, whose number of samples is another at another number of ranks or another batch size; the
samples of an epoch are what stays the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning_superscale.plugins.data.loader import (
    Position,
    is_loader,
    is_resumable,
    make_resumable,
    position_of,
    resumable_sampler_of,
)
from lightning_superscale.plugins.lightning_private import (
    count_batches,
    end_epoch,
    train_loaders,
    training_batches,
)


def place_loader(loader: Any, trainer: Any, ranks: Mapping[str, int]) -> Any:
    """Tell a loader of a Trainer which samples are this rank's, and let it be resumed if it trains.

    Args:
        ranks: the sampler's `num_replicas` and `rank`.

    Returns:
        The loader itself.

    Raises:
        SuperScaleError: a resumable sampler under batches that are not of `batch_size` samples each.
    """
    if not is_loader(loader):
        return loader
    if (sampler := resumable_sampler_of(loader)) is not None:
        sampler.place(**ranks)
    if trainer.training:
        make_resumable(loader, partial(num_unused_batches, trainer))
    return loader


def num_unused_batches(trainer: Any) -> int:
    """How many batches of the epoch a Trainer has fetched that no optimizer step has used."""
    current, is_last = training_batches(trainer)
    used = current.processed
    if trainer.lightning_module.automatic_optimization:
        is_at_end = used == trainer.num_training_batches or (is_last and used == current.ready)
        used -= 0 if is_at_end else used % trainer.accumulate_grad_batches
    return int(current.ready - used)


def resume_batches(trainer: Any, rank: int) -> None:
    """Let a Trainer that goes on within an epoch count its batches as those of its loaders now are.

    Called when all loaders are there and training is about to start; every rank calls it.

    Warns:
        UserWarning: a loader begins anew in the middle of an epoch.
    """
    if not trainer.fit_loop.epoch_loop.restarting:
        return
    mode, loaders = train_loaders(trainer)
    current, is_last = training_batches(trainer)
    if current.ready == 0:
        return
    positions = [position for loader in loaders if (position := position_of(loader)) is not None]
    resumed = [position for position in positions if position.resumed_at is not None]
    if resumed and is_last:
        for position in resumed:
            position.next_epoch()
        end_epoch(trainer)
    elif resumed:
        count_batches(trainer, _batches_behind(resumed, mode, trainer.num_training_batches))
    if rank == 0 and not is_last:
        for loader in loaders:
            if is_loader(loader) and not is_resumable(loader):
                _warn(loader, current.ready, trainer.num_training_batches)


def _batches_behind(positions: list[Position], mode: str, num_batches: float) -> int:
    """The number of batches of the epoch that lie behind loaders; at its end, they have none any more."""
    shortest_or_longest = min if mode == "min_size" else max
    length = shortest_or_longest(position.num_batches(0) for position in positions)
    deciding = [p for p in positions if p.num_batches(0) == length] if mode == "max_size_cycle" else positions
    left = shortest_or_longest(position.num_batches(position.resumed_at or 0) for position in deciding)
    if length - left < num_batches:
        return length - left
    for position in positions:
        position.finish()  # the epoch is over by `limit_train_batches`, or what is left fills no batch
    return int(num_batches)


def _warn(loader: Any, num_done: int, num_batches: float) -> None:
    warnings.warn(
        f"the run goes on after {num_done} of {num_batches} batches of an epoch, and the {type(loader).__name__} over "
        f"{type(loader.dataset).__name__} with a {type(loader.sampler).__name__} begins anew: samples of the epoch "
        "come twice, and others never. Give it sampler=lightning_superscale.ResumableSampler(dataset), or resume from "
        "a checkpoint of the end of an epoch.",
        stacklevel=2,
    )
