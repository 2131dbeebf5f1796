"""The protocols of units, whose parameters' gradients, states and weights travel together, and of their stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.rows import ParamSlice, UnitLayout
from lightning_superscale.ops.events import Waitable

PublishEvent = Waitable[None]
"""An upload of new weights: work that is queued on the parameters' device after `wait` sees them."""


class NewWeights(Protocol):
    """New weights of one unit that a step has made, on their way to the unit's store.

    [Note: New weights] New weights come up over a link, from other ranks, or both. The transport knows the way and
    hands this object to the store; the store knows when the weights are used, and waits then. Neither needs to look for
    the other.
    """

    def begin(self) -> None:
        """Start every transfer that can be started without waiting: the weights will be used soon."""

    def are_on_host(self) -> bool:
        """Whether the store's own host memory has the new weights, so that copies may begin before `wait`."""

    def wait(self) -> None:
        """Return when work that is queued from now on sees the new weights, on the device or in the store's memory."""

    def abandon(self) -> None:
        """Let `wait` wait for no other rank any more, since one failed; it may bring no new weights then."""


class WeightStore(Protocol):
    """The place of one unit's weights between their uses, at which new weights are waited for.

    Every unit has one. `OnDevice` keeps them where forward reads them, whole or in shards that FSDP2 gathers;
    `offload/weight_flow/weights.py` keeps them in host memory, and brings them to the device when they are used.
    """

    def receive(self, new: NewWeights) -> None:
        """Keep the new weights of the last step; the next use of the unit's weights waits for them."""

    def wait_new(self) -> bool:
        """Return when work that is queued from now on sees the new weights.

        A store that streams weights also drops the copies that it has ready on the device.

        Returns:
            whether there were new weights.
        """

    def filling(self, *, is_whole: bool) -> AbstractContextManager[None]:
        """While open, the unit's weights on the device can be written; the store keeps what was written.

        Args:
            is_whole: all of the unit's weights are written, so that old values need not be there.
        """

    def abandon(self) -> None:
        """Wait for no other rank any more, since one failed; new weights under way may be lost."""


class OnDevice:
    """Weights that stay where forward, or FSDP2's gather, reads them. Satisfies `WeightStore`."""

    def __init__(self) -> None:
        self._new: NewWeights | None = None

    def receive(self, new: NewWeights) -> None:
        self._new = new

    def wait_new(self) -> bool:
        new, self._new = self._new, None
        if new is not None:
            new.wait()
        return new is not None

    def filling(self, *, is_whole: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def abandon(self) -> None:
        if self._new is not None:
            self._new.abandon()


class Uploaded:
    """New weights that come over a link, or stay in host memory. Satisfies `NewWeights`."""

    def __init__(self, event: PublishEvent) -> None:
        self._event = event

    def begin(self) -> None:
        return

    def are_on_host(self) -> bool:
        return self._event.is_waitable()

    def wait(self) -> None:
        self._event.wait()

    def abandon(self) -> None:
        return


class Incoming:
    """New weights that come into a buffer on the device, and are moved on from there. Satisfies `NewWeights`.

    Args:
        event: the buffer's weights: an upload, or a gather from the other ranks.
        move: brings them from the buffer to where forward, or FSDP2's gather, reads them.
    """

    def __init__(self, event: Waitable[object], move: Callable[[], None]) -> None:
        self._event: Waitable[object] | None = event
        self._move = move

    def begin(self) -> None:
        return

    def are_on_host(self) -> bool:
        return False

    def wait(self) -> None:
        if self._event is not None:
            self._event.wait()
            self._move()

    def abandon(self) -> None:
        self._event = None  # sharded weights stay in shards, and may never be gathered again


class ShardUnit(Protocol):
    """Parameters of one dtype and device that are reduced, stepped and published together.

    Every transport has its own kind of unit: `zero/buckets/unit.py` for whole parameters in a flat buffer,
    `zero/fsdp2/unit.py` for sharded ones. States and engines know only this.

    Attributes:
        index: the unit's place in its transport; the same on every rank.
        shard: this rank's rows; gradients, masters and moments follow it.
        is_whole: whether this rank's rows are all rows.
        has_whole_weights: whether every rank keeps all rows of the weights, between steps too.
        weight_numel: elements of weights that this rank keeps on the device, padding included.
    """

    @property
    def index(self) -> int: ...
    @property
    def params(self) -> tuple[nn.Parameter, ...]: ...
    @property
    def shard(self) -> UnitLayout: ...
    @property
    def is_whole(self) -> bool: ...
    @property
    def has_whole_weights(self) -> bool: ...
    @property
    def weight_numel(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def local_rows(self, i: int) -> Tensor:
        """This rank's rows of weight i, 1D [slice.numel]: a view of the memory that forward or its gather reads."""

    def inbox(self) -> Tensor:
        """The buffer for uploads of new weights, [shard.shard_numel], laid out like `shard`."""


class GradientDelta(NamedTuple):
    """Reduced gradients of some slices of one unit, to be added to this step's gradient.

    A unit sends zero or more deltas per step. None is final: `optimizer.step()` is.

    Attributes:
        slices: (index into `unit.shard.slices`, gradient [slice.numel], in the gradient's own dtype).
            The tensors belong to the receiver; work that produces them was issued on the current stream.
    """

    unit: ShardUnit
    slices: Sequence[tuple[int, Tensor]]


class DeltaSink(Protocol):
    """A function that takes reduced gradients, as the optimizer engine's does."""

    def __call__(self, delta: GradientDelta) -> None: ...


def slice_view(flat: Tensor, piece: ParamSlice) -> Tensor:
    """The 1D view [piece.numel] of one slice in a flat buffer that follows the layout of `piece`."""
    return flat[piece.offset : piece.offset + piece.numel]


def check_dense(fqn: str, grad: Tensor) -> None:
    """Refuse a sparse gradient of the parameter named `fqn`.

    Raises:
        SuperScaleError: the gradient is not strided; names the parameter and the remedy.
    """
    if grad.layout != torch.strided:
        raise SuperScaleError(
            f"parameter {fqn!r} has a gradient of layout {grad.layout}; expected a dense one. "
            "Build its module with sparse=False."
        )
