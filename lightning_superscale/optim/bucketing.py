"""Which parameters share a unit: in the order in which their gradients become ready, cut by size and by home.

[Note: Observed order] Units follow the reverse of the order in which modules registered their parameters, which is
about that of backward. After the first step the true order is known, and who departs from it moves
(`OptimizerEngine.regroup`): a bucket whose last gradient comes late would hold the others back.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_superscale.layout.rows import ParamSpec, split_into_units

NamedParam = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class Grouping:
    """The way in which a transport groups parameters into units.

    Attributes:
        unit_bytes: upper bound of a unit's weights; a larger parameter has a unit of its own.
        order: a parameter's place among the gradients of a step, as observed; those that it lacks come before all,
            last registered first.
        on_device: parameters whose states stay on the device though others' are on the host; they share no unit.
        block_of: parameters whose weights stream from the host with a block of modules, by its number. Blocks share no
            unit, nor does what comes before one with what comes after it.
    """

    unit_bytes: int
    order: Mapping[nn.Parameter, int] = field(default_factory=dict)
    on_device: frozenset[nn.Parameter] = frozenset()
    block_of: Mapping[nn.Parameter, int] = field(default_factory=dict)

    def in_order(self, named_params: Sequence[NamedParam]) -> list[NamedParam]:
        """Parameters in the order of their gradients."""
        last_first = named_params[::-1]
        return sorted(last_first, key=lambda named: self.order.get(named[1], -1))

    def units_of(self, named_params: Sequence[NamedParam]) -> list[list[NamedParam]]:
        """Members of every unit, units in the order in which they are complete, those on the device last.

        Args:
            named_params: in registration order.
        """
        ordered = self.in_order(named_params)
        place = {param: place for place, (_, param) in enumerate(ordered)}
        kinds: dict[tuple[bool, int, torch.dtype, torch.device], list[NamedParam]] = {}
        run, last = 0, None
        for fqn, param in ordered:
            block = self.block_of.get(param)
            run, last = run + (block != last), block
            kinds.setdefault((param in self.on_device, run, param.dtype, param.device), []).append((fqn, param))
        numbered = [
            (is_on_device, max(place[param] for _, param in unit), unit)
            for (is_on_device, _, dtype, _), members in kinds.items()
            for unit in self._cut(members, dtype)
        ]
        return [unit for _, _, unit in sorted(numbered, key=lambda entry: entry[:2])]

    def _cut(self, members: Sequence[NamedParam], dtype: torch.dtype) -> list[list[NamedParam]]:
        params = dict(members)
        specs = [ParamSpec(fqn, tuple(param.shape)) for fqn, param in members]
        cut = split_into_units(specs, max(1, self.unit_bytes // dtype.itemsize))
        return [[(spec.fqn, params[spec.fqn]) for spec in unit] for unit in cut]


def is_same_cut(old: Iterable[Sequence[Hashable]], new: Iterable[Sequence[Hashable]]) -> bool:
    """Whether units hold the same members and come in the same order; the order inside a unit is nobody's matter."""
    return [frozenset(unit) for unit in old] == [frozenset(unit) for unit in new]


def last_ready(
    named_params: Sequence[NamedParam], bytes_of: Mapping[nn.Parameter, int], budget_bytes: int
) -> frozenset[nn.Parameter]:
    """Parameters whose states fit a budget together: those whose gradients come last, as far as each still fits.

    Their step is the one that nothing hides: after them there is no backward left, and the next forward needs
    them first.

    Args:
        named_params: in the order of their gradients.
        bytes_of: what each one's states take where they would go.
    """
    chosen: list[nn.Parameter] = []
    for _, param in reversed(named_params):
        if bytes_of[param] <= budget_bytes:
            budget_bytes -= bytes_of[param]
            chosen.append(param)
    return frozenset(chosen)
