"""The protocol of units, whose parameters' gradients, states and weights travel together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.rows import ParamSlice, ParamSpec, UnitLayout
from lightning_superscale.ops.events import Waitable
from lightning_superscale.optim.weights.store import WeightStore

PublishEvent = Waitable[None]
"""An upload of new weights: work that is queued on the parameters' device after `wait` sees them."""


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
        store: keeps the weights between their uses.
    """

    store: WeightStore

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

    def seal(self) -> None:
        """Note that the unit and its state are complete, before user code can make views of its weights."""

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


def shaped(flat: Tensor, piece: ParamSlice) -> Tensor:
    """The view of one slice's 1D elements in the shape of its rows, with the parameter's own strides."""
    strides = piece.spec.strides
    if strides is None or not piece.numel:
        return flat.view(piece.local_shape)
    return flat.as_strided(piece.local_shape, strides, flat.storage_offset())


def flattened(tensor: Tensor, spec: ParamSpec) -> Tensor:
    """A tensor of a parameter's shape, or of rows of it, in 1D and in the order of the parameter's memory.

    It is a view where it can be one.
    """
    if spec.strides is None:
        return tensor.reshape(-1)
    return tensor.permute(spec.dims_in_memory).reshape(-1)


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
