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

    Flat buffers follow `unit.shard`.

    Attributes:
        master: fp32 master weights [shard_numel]; None when the parameters' own rows are the masters.
        exp_avg, exp_avg_sq: moments, or None for an optimizer that keeps states of its own.
    """

    @property
    def master(self) -> Tensor | None: ...
    @property
    def exp_avg(self) -> Tensor | None: ...
    @property
    def exp_avg_sq(self) -> Tensor | None: ...
    @property
    def is_on_host(self) -> bool:
        """Whether they live in host memory and weights on a device go there over a link."""

    @property
    def num_transfer_buffers(self) -> int:
        """Host buffers of the weights' dtype beside masters and moments."""

    @property
    def num_host_copies(self) -> int:
        """Host buffers of weights that are on the device only while they are used; 0 where masters are these."""

    def master_of(self, i: int) -> Tensor:
        """fp32 master weights of slice i, 1D."""

    def weight_out_of(self, i: int) -> Tensor | None:
        """Where a step writes slice i's new weights in the parameters' 16-bit dtype; None when they are fp32."""

    def receive(self, slices: Sequence[tuple[int, Tensor]]) -> None:
        """Take gradient deltas: the first of a slice in a step replaces, later ones add."""

    def grad(self, i: int) -> Tensor | None:
        """This step's whole gradient of slice i, ready to read where the states live; None without one."""

    def clear_grads(self) -> None:
        """Forget this step's gradients."""

    def upload(self, stepped: Sequence[int]) -> PublishEvent | None:
        """Move new weights of the stepped slices to `unit.inbox()`; None when they are in `unit.local_rows()`."""

    def reload(self, slices: Sequence[int]) -> None:
        """Follow weights that somebody changed: a master that no longer rounds to its weight becomes that weight."""

    def release(self) -> None:
        """Free what the garbage collector does not."""


class ResidentState:
    """States on the parameters' own device; fp32 parameters are their own masters."""

    def __init__(self, unit: ShardUnit, *, has_moments: bool) -> None:
        numel = unit.shard.shard_numel
        self.unit = unit
        self.is_on_host = False
        self.num_transfer_buffers = self.num_host_copies = 0
        self.master: Tensor | None = None
        if unit.dtype != torch.float32:
            self.master = torch.zeros(numel, dtype=torch.float32, device=unit.device)
            for i in range(len(unit.params)):
                self.master_of(i).copy_(unit.local_rows(i))
        self.exp_avg = torch.zeros(numel, dtype=torch.float32, device=unit.device) if has_moments else None
        self.exp_avg_sq = torch.zeros(numel, dtype=torch.float32, device=unit.device) if has_moments else None
        self._grads: dict[int, Tensor] = {}

    def master_of(self, i: int) -> Tensor:
        return self.unit.local_rows(i) if self.master is None else slice_view(self.master, self.unit.shard.slices[i])

    def weight_out_of(self, i: int) -> Tensor | None:
        return None if self.master is None else self.unit.local_rows(i)

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
        return None

    def reload(self, slices: Sequence[int]) -> None:
        if self.master is None:
            return
        for i in slices:
            follow_weights(self.master_of(i), self.unit.local_rows(i))

    def release(self) -> None:
        self._grads.clear()


def master_slice(unit: ShardUnit, state: UnitState, i: int) -> Tensor:
    """Master weights of slice i in the shape of its rows."""
    return state.master_of(i).view(unit.shard.slices[i].local_shape)
