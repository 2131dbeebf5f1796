"""The unit of everything that moves: parameters whose gradients, states and weights travel together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_superscale.layout import ParamSlice, ParamSpec, UnitLayout, unit_layout


class PublishEvent(Protocol):
    """Completion of an upload of new weights."""

    def wait(self) -> None:
        """Make whatever runs next on the parameters' device see the new weights."""


class ShardUnit:
    """Parameters of one dtype and device, and the flat buffer that their weights view.

    Two layouts describe a unit. `full` places whole parameters and is the same on every rank: module
    parameters view it. `shard` places this rank's rows: gradients, masters and moments follow it. On
    one rank they are equal, so nothing is copied between them.

    Attributes:
        weights: [full.shard_numel], the parameters' dtype, on their device.
    """

    def __init__(
        self, index: int, named_params: Sequence[tuple[str, nn.Parameter]], shard_rank: int, shard_world_size: int
    ) -> None:
        specs = [ParamSpec(fqn, tuple(param.shape)) for fqn, param in named_params]
        self.index = index
        self.params = tuple(param for _, param in named_params)
        self.full: UnitLayout = unit_layout(index, specs, 0, 1)
        self.shard: UnitLayout = unit_layout(index, specs, shard_rank, shard_world_size)
        first = self.params[0]
        self.weights = torch.zeros(self.full.shard_numel, dtype=first.dtype, device=first.device)
        for piece, param in zip(self.full.slices, self.params, strict=True):
            view = self.weights[piece.offset : piece.offset + piece.numel].view(piece.local_shape)
            view.copy_(param.detach())
            param.data = view

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def release(self) -> None:
        """Give every parameter a storage of its own again."""
        for param in self.params:
            param.data = param.detach().clone()


class GradientDelta(NamedTuple):
    """Reduced gradients of some slices of one unit: what is to be added to this step's gradient.

    A unit sends zero or more deltas per step. None is final: `optimizer.step()` is.

    Attributes:
        slices: (index into `unit.shard.slices`, gradient [slice.numel], in the gradient's own dtype).
            The tensors belong to the receiver; work that produces them was issued on the current stream.
    """

    unit: ShardUnit
    slices: Sequence[tuple[int, Tensor]]


class DeltaSink(Protocol):
    def __call__(self, delta: GradientDelta) -> None: ...


def slice_view(flat: Tensor, piece: ParamSlice) -> Tensor:
    """The 1D view of one slice in a buffer that follows its layout."""
    return flat[piece.offset : piece.offset + piece.numel]
