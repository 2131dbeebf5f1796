"""Functions that the engines share for states of one unit in host memory: their weights, buffers and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_superscale.layout.rows import UnitLayout
from lightning_superscale.offload.link.arena import HostArena
from lightning_superscale.offload.link.link import Link, LinkEvent
from lightning_superscale.offload.weight_flow.weights import FlowingWeights, LateUpload
from lightning_superscale.ops.events import AllOf, Done
from lightning_superscale.ops.state_dtypes import StateDtypes
from lightning_superscale.optim.unit import PublishEvent
from lightning_superscale.optim.unit_state import StateBytes, UnitState, adam_buffers


class OffloadableUnit(Protocol):
    """The members of a shard unit that host states use."""

    @property
    def shard(self) -> UnitLayout: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def local_rows(self, i: int) -> Tensor: ...
    def inbox(self) -> Tensor: ...


def way_of_weights(flowing: FlowingWeights | None, upload: Callable[[], Sequence[LinkEvent]]) -> PublishEvent:
    """The event of a unit's new weights.

    It stands for an upload that begins now, if weights are kept on the device; for no work, if whole weights stay on
    the host; and for an upload that begins with `wait`, if ranks gather them first.

    Args:
        upload: starts the copies of the new weights.
    """
    if flowing is None:
        return AllOf(upload())
    return Done(None) if flowing.unit.is_whole else LateUpload(upload)


def weights_on_host(unit: OffloadableUnit, i: int, flowing: FlowingWeights | None, link: Link) -> Tensor:
    """The current weights of slice i in host memory, 1D: the rows that they flow from, or a copy. Blocks the host."""
    if flowing is not None:
        return flowing.rows_with_edits(i)
    weights = torch.empty(unit.shard.slices[i].numel, dtype=unit.dtype)
    link.d2h(weights, unit.local_rows(i)).synchronize()
    return weights


def host_buffers(state: UnitState, num_transfer_buffers: int) -> list[StateBytes]:
    """The buffers that a state keeps in host memory: masters, moments, and buffers of transfers."""
    return [
        *adam_buffers(state, "host"),
        StateBytes("transfer buffers", state.transfer_dtype, num_transfer_buffers, "host"),
    ]


def compensation_of(arena: HostArena, numel: int, dtype: torch.dtype, dtypes: StateDtypes) -> Tensor | None:
    """A zeroed buffer [numel] for the compensation of a unit's 16-bit masters; None where they have none.

    Args:
        dtype: of the unit's weights.
    """
    return arena.zeros(numel, torch.bfloat16, is_pinned=False) if dtypes.compensates(dtype) else None
