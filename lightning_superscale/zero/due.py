"""One parameter that has a gradient this step, with everything that a step needs to know of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_superscale.layout import ParamSlice
from lightning_superscale.zero.states import UnitState
from lightning_superscale.zero.units import ShardUnit


@dataclass(slots=True)
class Due:
    """One parameter to step.

    Attributes:
        group: the optimizer's parameter group that holds it.
        i: index of its slice in `unit`.
        grad: this step's whole gradient of the slice, 1D, where the states live.
    """

    param: nn.Parameter
    group: dict[str, Any]
    unit: ShardUnit
    state: UnitState
    i: int
    grad: Tensor

    @property
    def piece(self) -> ParamSlice:
        return self.unit.shard.slices[self.i]


def by_unit(due: Iterable[Due]) -> dict[int, list[Due]]:
    """Group by unit, last unit first: units follow the backward, uploads the next forward."""
    units: dict[int, list[Due]] = {}
    for item in due:
        units.setdefault(item.unit.index, []).append(item)
    return dict(sorted(units.items(), reverse=True))
