"""Master weights and optimizer states of one unit, and the protocol that says where they may live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_superscale.ops.masters import follow_weights
from lightning_superscale.zero.units import PublishEvent, ShardUnit, slice_view


class UnitState(Protocol):
    """What the optimizer engine needs of one unit's states, on whatever device they live.

    All buffers are flat and follow `unit.shard`.

    Attributes:
        master: fp32 master weights [shard_numel].
        exp_avg, exp_avg_sq: moments, or None for an optimizer that keeps states of its own.
        weight_out: where a step writes new weights in the parameters' 16-bit dtype; None when the
            parameters are fp32, and then `master` is what is published.
        is_shared: `master` is the parameters' own storage, so that there is nothing to publish.
    """

    master: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    weight_out: Tensor | None
    is_shared: bool

    def receive(self, slices: Sequence[tuple[int, Tensor]]) -> None:
        """Take gradient deltas: the first of a slice in a step replaces, later ones add."""

    def grad(self, i: int) -> Tensor | None:
        """This step's whole gradient of slice i, ready to read where the states live; None without one."""

    def clear_grads(self) -> None:
        """Forget this step's gradients."""

    def upload(self, stepped: Sequence[int]) -> PublishEvent | None:
        """Move new weights of the stepped slices to `unit.weights`; None when they are already there."""

    def reload(self, slices: Sequence[int]) -> None:
        """Follow weights that somebody changed: a master that no longer rounds to its weight becomes that weight."""

    def release(self) -> None:
        """Free what the garbage collector does not."""


class ResidentState:
    """States on the parameters' own device. On one rank nothing is copied: gradients are used where they are."""

    def __init__(self, unit: ShardUnit, *, has_moments: bool) -> None:
        numel = unit.shard.shard_numel
        self.unit = unit
        self.is_shared = unit.dtype == torch.float32
        self.master = unit.weights if self.is_shared else unit.weights.float()
        self.exp_avg = torch.zeros(numel, dtype=torch.float32, device=unit.device) if has_moments else None
        self.exp_avg_sq = torch.zeros(numel, dtype=torch.float32, device=unit.device) if has_moments else None
        self.weight_out = None if self.is_shared else unit.weights
        self._grads: dict[int, Tensor] = {}

    def receive(self, slices: Sequence[tuple[int, Tensor]]) -> None:
        for i, grad in slices:
            if i in self._grads:
                self._grads[i] = self._grads[i] + grad
            else:
                self._grads[i] = grad

    def grad(self, i: int) -> Tensor | None:
        return self._grads.get(i)

    def clear_grads(self) -> None:
        self._grads.clear()

    def upload(self, stepped: Sequence[int]) -> PublishEvent | None:
        if self.weight_out is None and not self.is_shared:
            raise AssertionError("resident weights without an output can't be published")
        return None

    def reload(self, slices: Sequence[int]) -> None:
        if self.is_shared:
            return
        for i in slices:
            piece = self.unit.shard.slices[i]
            follow_weights(slice_view(self.master, piece), slice_view(self.unit.weights, piece))

    def release(self) -> None:
        self._grads.clear()


def master_slice(unit: ShardUnit, state: UnitState, i: int) -> Tensor:
    """Master weights of slice i in the shape of its rows."""
    piece = unit.shard.slices[i]
    return slice_view(state.master, piece).view(piece.local_shape)
