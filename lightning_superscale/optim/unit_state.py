"""Master weights and optimizer states of one unit, and the protocol that says where they may live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_superscale.comm.dtensor import tensor_part_name
from lightning_superscale.layout.memory import Home
from lightning_superscale.ops.state_dtypes import FP32_STATES, StateDtypes, follow_weights, forget_lost
from lightning_superscale.ops.types import Rounding
from lightning_superscale.optim.unit import PublishEvent, ShardUnit, shaped, slice_view

# An entry beside exp_avg and exp_avg_sq in the optimizer's own state, present where bf16 masters are compensated.
COMPENSATION_KEY = "compensation"


@dataclass(frozen=True, slots=True)
class StateBytes:
    """One kind of buffer that a unit's state really has.

    `MemoryModel` states the buffers that there should be.

    Attributes:
        name: as `explain()` prints it.
        copies: number of such buffers.
        home: the memory that they are in.
        numel: elements of each; None for one per element of the unit's rows.
    """

    name: str
    dtype: torch.dtype
    copies: int = 1
    home: Home = "device"
    numel: int | None = None


class UnitState(Protocol):
    """The states of one unit, on whatever device they live, as the optimizer engine uses them.

    Flat buffers follow `unit.shard`.

    Attributes:
        master: master weights [shard_numel]; None when the parameters' own rows are the masters.
        exp_avg, exp_avg_sq: moments [shard_numel]; None for an optimizer that keeps states of its own.
        compensation: [shard_numel], the parts of updates that rounding to 16-bit masters lost (Kahan); None without.
        masters_lead: whether masters may have updates that weights lack, so that weights do not stand for them.
    """

    @property
    def masters_lead(self) -> bool: ...
    @property
    def master(self) -> Tensor | None: ...
    @property
    def exp_avg(self) -> Tensor | None: ...
    @property
    def exp_avg_sq(self) -> Tensor | None: ...
    @property
    def compensation(self) -> Tensor | None: ...
    @property
    def homes(self) -> frozenset[Home]:
        """The memories that the states are in, one or both.

        With "host", gradients go there over a link, and the offload engine's rule steps the unit; without, nothing
        leaves the device.
        """

    def bytes(self) -> Sequence[StateBytes]:
        """The buffers that the state keeps between steps, without host copies of weights that flow."""

    @property
    def transfer_dtype(self) -> torch.dtype:
        """The dtype of gradients and new weights on their way to the states and back."""

    @property
    def host_copy_numel(self) -> int:
        """Elements of host buffers for weights that are on the device only while used; 0 where masters are these."""

    def master_of(self, i: int) -> Tensor:
        """Master weights of slice i, 1D."""

    def view_of(self, flat: Tensor, i: int) -> Tensor:
        """Slice i of one of the state's flat buffers, in the shape of its rows; a view."""

    def rounding_of(self, i: int) -> Rounding | None:
        """The rounding of slice i's updates; None where all states are fp32."""

    def weight_out_of(self, i: int) -> Tensor | None:
        """The tensor that a step writes slice i's new weights to; None when the masters are the weights."""

    def add_grads(self, slices: Sequence[tuple[int, Tensor]]) -> None:
        """Take gradient deltas, as in `GradientDelta.slices`: later deltas of a slice in a step add to the first."""

    def has_grad(self, i: int) -> bool:
        """Whether slice i has a gradient this step, also one that is still on its way to the states."""

    def grad(self, i: int) -> Tensor | None:
        """This step's whole gradient of slice i, 1D, ready to read where the states live; None without one.

        Blocks the calling thread until the gradient is there.
        """

    def clear_grads(self) -> None:
        """Forget this step's gradients."""

    def upload(self, stepped: Sequence[int]) -> PublishEvent | None:
        """Start to move new weights of the stepped slices to `unit.inbox()`; None if `unit.local_rows()` has them."""

    def reload(self, slices: Sequence[int]) -> None:
        """Follow weights that other code changed: a master that does not round to its weight becomes that weight."""

    def release(self) -> None:
        """Free memory and registrations that the garbage collector does not."""


def adam_buffers(state: UnitState, home: Home) -> list[StateBytes]:
    """The buffers of a state that has master, compensation and moments in one home, as far as it has them."""
    kept = []
    if state.master is not None:
        kept.append(StateBytes("master weights", state.master.dtype, 1, home))
    if state.compensation is not None:
        kept.append(StateBytes("compensation", state.compensation.dtype, 1, home))
    if state.exp_avg is not None:
        kept.append(StateBytes("optimizer states", state.exp_avg.dtype, 2, home))
    return kept


class ResidentState:
    """States on the parameters' own device; parameters of the masters' dtype are their own masters.

    Satisfies `UnitState`.
    """

    masters_lead = False

    def __init__(self, unit: ShardUnit, *, has_moments: bool, dtypes: StateDtypes = FP32_STATES) -> None:
        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(unit.shard.shard_numel, dtype=dtype, device=unit.device)

        self.unit = unit
        self.homes: frozenset[Home] = frozenset({"device"})
        self.host_copy_numel = 0
        self.transfer_dtype = unit.dtype
        self.master: Tensor | None = None
        if unit.dtype != dtypes.master_of(unit.dtype):
            self.master = zeros(dtypes.master_of(unit.dtype))
            for i in range(len(unit.params)):
                self.master_of(i).copy_(unit.local_rows(i))
        self.exp_avg = zeros(dtypes.moments) if has_moments else None
        self.exp_avg_sq = zeros(dtypes.moments) if has_moments else None
        self.compensation = zeros(torch.bfloat16) if dtypes.compensates(unit.dtype) else None
        self._roundings = roundings_of(unit, dtypes)
        self._grads: dict[int, Tensor] = {}

    def master_of(self, i: int) -> Tensor:
        return self.unit.local_rows(i) if self.master is None else slice_view(self.master, self.unit.shard.slices[i])

    def rounding_of(self, i: int) -> Rounding | None:
        return self._roundings[i]

    def view_of(self, flat: Tensor, i: int) -> Tensor:
        return view_by_rows(self.unit, flat, i)

    def weight_out_of(self, i: int) -> Tensor | None:
        return None if self.master is None else self.unit.local_rows(i)

    def bytes(self) -> Sequence[StateBytes]:
        return adam_buffers(self, "device")

    def add_grads(self, slices: Sequence[tuple[int, Tensor]]) -> None:
        for i, grad in slices:
            if i in self._grads:
                self._grads[i] = self._grads[i] + grad
            else:
                self._grads[i] = grad

    def has_grad(self, i: int) -> bool:
        return i in self._grads

    def grad(self, i: int) -> Tensor | None:
        return self._grads.get(i)

    def clear_grads(self) -> None:
        self._grads.clear()

    def upload(self, stepped: Sequence[int]) -> PublishEvent | None:
        return None

    def reload(self, slices: Sequence[int]) -> None:
        for i in slices:
            weights, master = self.unit.local_rows(i), None if self.master is None else self.master_of(i)
            if self.compensation is not None:
                forget_lost(slice_view(self.compensation, self.unit.shard.slices[i]), weights, master)
            if master is not None:
                follow_weights(master, weights)

    def release(self) -> None:
        self._grads.clear()


def view_by_rows(unit: ShardUnit, flat: Tensor, i: int) -> Tensor:
    """Slice i of a flat buffer that has the order of the unit's weights, in the shape of its rows; a view."""
    return shaped(slice_view(flat, unit.shard.slices[i]), unit.shard.slices[i])


def roundings_of(unit: ShardUnit, dtypes: StateDtypes) -> tuple[Rounding | None, ...]:
    """The rounding of each slice's updates, by slice index; None where all states are fp32.

    Random numbers follow a parameter's elements, so the number of ranks does not change them.
    """
    return tuple(
        dtypes.rounding(unit.dtype, tensor_part_name(param, piece.fqn), piece.global_offset)
        for param, piece in zip(unit.params, unit.shard.slices, strict=True)
    )


def master_slice(unit: ShardUnit, state: UnitState, i: int) -> Tensor:
    """Master weights of slice i in the shape of its rows."""
    return shaped(state.master_of(i), unit.shard.slices[i]) if state.master is None else state.view_of(state.master, i)


def load_master(unit: ShardUnit, state: UnitState, i: int, saved: Tensor | None, rest: dict[str, Tensor]) -> None:
    """Take over a saved master of slice i, in whatever dtype it was kept, with what its rounding had lost.

    Args:
        saved: the master's rows, in their shape; None where none was saved because the weights are the master.
        rest: the parameter's other saved states. A compensation that this run does not keep is taken out of it, and
            added to the master if that is fp32; a compensation that this run keeps and `rest` lacks is put in.
    """
    master = master_slice(unit, state, i)
    if state.compensation is None:
        lost = rest.pop(COMPENSATION_KEY, None)
        if lost is not None and master.dtype == torch.float32:
            saved = (master if saved is None else saved).float() + lost.to(master.device).float()
    if saved is None:
        return
    master.copy_(saved)
    if state.compensation is not None and COMPENSATION_KEY not in rest:
        rest[COMPENSATION_KEY] = saved.to(master.device).float() - master.float()
