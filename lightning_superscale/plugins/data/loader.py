"""Data loaders that say how far steps have come, and go on there.

[Note: Where a loader stands] A position is a number of samples of the epoch's order, over all ranks. It counts batches
that a Trainer's steps have used: not those that workers have fetched ahead, nor micro-batches of a window whose step is
still to come, since gradients are not saved. Lightning saves it, because a loader with `state_dict()` and
`load_state_dict()` is one that it asks. A pass over the loader draws its samples when its first batch is wanted:
Lightning makes iterators before it knows the epoch that a resumed run is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.plugins.data.sampler import ResumableSampler, as_resumable
from lightning_superscale.plugins.lightning_private import wrapped_sampler

_VERSION_KEY, _VERSION = "resumable_sampler", 1
_derived: set[type] = set()
_REMEDY = "Give the loader a sampler=lightning_superscale.ResumableSampler(dataset) in both runs"


class Position:
    """Where one loader stands.

    Args:
        sampler: the loader's.
        batch_size: samples per batch of one rank.
        drop_last: whether the loader leaves out a last batch that is not full.
        num_unused: returns how many of the batches that were handed out no step has used yet.
    """

    def __init__(
        self, sampler: ResumableSampler[Any], batch_size: int, drop_last: bool, num_unused: Callable[[], int]
    ) -> None:
        self.sampler = sampler
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._num_unused = num_unused
        self._loaded: tuple[int, int] | None = None  # epoch and position where the next pass begins
        self._epoch = 0
        self._passes: list[list[int]] = []  # where each of the last two began, and how many batches it has handed out

    def begin(self) -> None:
        """A pass begins: where it was loaded to, and otherwise with the first sample of the epoch."""
        self._epoch, start = self._loaded or (self.sampler.epoch, 0)
        self._loaded = None
        self._passes = [*self._passes[-1:], [start, 0]]
        self.sampler.start_at(self._epoch, start)

    def handed_out(self) -> None:
        """One more batch went to a step."""
        self._passes[-1][1] += 1

    @property
    def resumed_at(self) -> int | None:
        """The sample at which the next pass will begin, if a checkpoint said so."""
        return None if self._loaded is None else self._loaded[1]

    def finish(self) -> None:
        """Let the next pass, which a checkpoint is about, have no samples."""
        if self._loaded is not None:
            self._loaded = (self._loaded[0], self.sampler.num_in_epoch)

    def next_epoch(self) -> None:
        """Let the next pass be of the epoch after that of the checkpoint, from its first sample on."""
        if self._loaded is not None:
            self._loaded = (self._loaded[0] + 1, 0)

    def num_batches(self, position: int) -> int:
        """The number of batches of an epoch after its first `position` samples."""
        samples = self.sampler.num_left(position)
        return samples // self._batch_size if self._drop_last else -(-samples // self._batch_size)

    def state_dict(self) -> dict[str, int]:
        """Where a run that goes on from here has to begin."""
        epoch, position = self._loaded or (self.sampler.epoch, 0)
        if self._loaded is None and self._passes:
            unused = self._num_unused()
            start, batches = self._passes[-1]
            if unused > batches and len(self._passes) > 1:  # a short loader began anew within a step
                unused -= batches
                start, batches = self._passes[-2]
            used = max(0, batches - unused) * self._batch_size * self.sampler.num_replicas
            epoch, position = self._epoch, min(start + used, self.sampler.num_in_epoch)
        return {_VERSION_KEY: _VERSION, "epoch": epoch, "position": position, **self._what()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run stood.

        Raises:
            SuperScaleError: the state of another kind of loader, of another dataset or of another order.
        """
        if state.get(_VERSION_KEY) != _VERSION:
            raise SuperScaleError(
                f"the checkpoint's state of a data loader has the keys {sorted(map(str, state))[:8]}; expected that of "
                f"a ResumableSampler, version {_VERSION}: it says nothing of samples over all ranks. {_REMEDY}, or "
                "resume from a checkpoint of the end of an epoch."
            )
        for name, value in self._what().items():
            if state[name] != value:
                raise SuperScaleError(
                    f"ResumableSampler has {name}={value}, and the checkpoint's had {name}={state[name]}: samples "
                    "would come twice or never. Resume with the same dataset and sampler, or from a checkpoint of the "
                    "end of an epoch."
                )
        self._loaded = (state["epoch"], state["position"])

    def _what(self) -> dict[str, int]:
        sampler = self.sampler
        return {"num_in_epoch": sampler.num_in_epoch, "seed": sampler.seed, "shuffle": int(sampler.shuffle)}


@cache
def _resumable(base: Any) -> Any:
    """Derive the class of a DataLoader that has a position. A loader takes a class with no other base."""

    class Resumable(base):
        def __iter__(self) -> Iterator[Any]:
            return _one_pass(super().__iter__, self.position)

        def state_dict(self) -> dict[str, Any]:
            return dict(self.position.state_dict())

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            self.position.load_state_dict(state_dict)

    return Resumable


def _one_pass(iterate: Callable[[], Iterator[Any]], position: Position) -> Iterator[Any]:
    position.begin()
    for batch in iterate():
        position.handed_out()
        yield batch


@cache
def _guarded(base: Any) -> Any:
    """Derive the class of a loader with a state of its own, which takes none but such."""

    class Guarded(base):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            if _VERSION_KEY in state_dict:
                raise SuperScaleError(
                    f"the checkpoint's position is that of samples over all ranks, and a {base.__name__} with a "
                    f"{type(sampler_of(self)).__name__} can't go there. {_REMEDY}."
                )
            super().load_state_dict(state_dict)

    return Guarded


def position_of(loader: Any) -> Position | None:
    """Where a loader stands that `make_resumable` has made resumable."""
    found = getattr(loader, "position", None)
    return found if isinstance(found, Position) else None


def sampler_of(loader: Any) -> Any:
    """The sampler that a DataLoader draws from, which is its batches' where it has such."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def resumable_sampler_of(loader: Any) -> ResumableSampler[Any] | None:
    """The ResumableSampler that a DataLoader draws from, if it has one."""
    found = sampler_of(loader)
    return found if isinstance(found, ResumableSampler) else None


def is_resumable(loader: Any) -> bool:
    """Whether a loader can say where it stands."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def make_resumable(loader: Any, num_unused: Callable[[], int]) -> None:
    """Let a DataLoader that trains be resumed, if its sampler is resumable or the loader has a state of its own.

    A loader with a state of its own, such as torchdata's, counts batches of one rank, which fit no other number of
    ranks. So its sampler, if it is torch's for several ranks, becomes a resumable one with the same order.

    Args:
        num_unused: returns how many of the batches that were handed out no step has used yet.

    Raises:
        SuperScaleError: batches that are not of `batch_size` samples each.
    """
    if is_resumable(loader) and _is_of_all(loader):
        as_resumable(sampler_of(loader), loader.dataset)
    sampler = resumable_sampler_of(loader)
    if sampler is None:
        if is_resumable(loader):
            _derive(loader, _guarded)
        return
    batches = loader.batch_sampler
    if batches is not None and not _is_plain(batches):
        raise SuperScaleError(
            f"ResumableSampler is drawn from by a {type(batches).__name__}; expected batches of batch_size samples, so "
            "that their number tells the samples. Pass batch_size and sampler to the DataLoader, or give the loader "
            "state_dict() and load_state_dict() of its own."
        )
    _derive(loader, _resumable)
    size, drop_last = (1, False) if batches is None else (batches.batch_size, batches.drop_last)
    loader.position = Position(sampler, size, drop_last, num_unused)


def _is_of_all(loader: Any) -> bool:
    """Whether ranks divide all samples of the dataset among them, each once."""
    sampler, num = sampler_of(loader), len(loader.dataset)
    if type(sampler) is DistributedSampler:
        return sampler.dataset is loader.dataset
    # torchdata's draws with a seed of each rank's own, so that Lightning's ranks would share some samples.
    inner = wrapped_sampler(sampler)
    is_shuffle = type(inner).__name__ == "RandomSampler" and type(inner).__module__.startswith("torchdata.")
    return is_shuffle and not inner.replacement and inner.num_samples == num


def _is_plain(batches: Any) -> bool:
    """Whether they are torch's or torchdata's batches of `batch_size` samples, and not those of a subclass."""
    name = type(batches).__module__.partition(".")[0]
    return type(batches) is BatchSampler or (name == "torchdata" and type(batches).__name__ == "BatchSampler")


def _derive(loader: Any, derive: Callable[[Any], Any]) -> None:
    base = type(loader)
    if base not in _derived:
        loader.__class__ = derive(base)
        loader.__class__.__name__ = loader.__class__.__qualname__ = base.__name__
        _derived.add(type(loader))


def is_loader(loader: Any) -> bool:
    """Whether it is a DataLoader over samples that have numbers."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
