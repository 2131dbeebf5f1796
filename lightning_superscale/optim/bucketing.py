"""Groups parameters into units, in the order in which their gradients become ready, by size and by home.

[Note: Observed order] Units follow the reverse of the order in which modules registered their parameters, which is
about that of backward. After the first step the true order is known, and parameters that depart from it move to
other units (`rebuild_buckets.regroup`): a bucket whose last gradient comes late would hold the others back.
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
        unit_bytes: upper bound of a unit's weights in bytes; a larger parameter has a unit of its own.
        order: each parameter's place among the gradients of a step, as observed; parameters without one come before
            all others, last registered first.
        on_device: parameters whose states stay on the device though others' are on the host; they share no unit.
        block_of: number of the block of modules with which a parameter's weights stream from the host. Two blocks
            share no unit, nor do parameters before a block and parameters after it.
    """

    unit_bytes: int
    order: Mapping[nn.Parameter, int] = field(default_factory=dict)
    on_device: frozenset[nn.Parameter] = frozenset()
    block_of: Mapping[nn.Parameter, int] = field(default_factory=dict)

    def in_order(self, named_params: Sequence[NamedParam]) -> list[NamedParam]:
        """The parameters in the order in which their gradients become ready.

        Args:
            named_params: in registration order.
        """
        last_first = named_params[::-1]
        return sorted(last_first, key=lambda named: self.order.get(named[1], -1))

    def units_of(self, named_params: Sequence[NamedParam]) -> list[list[NamedParam]]:
        """Members of every unit, in the order in which the units are complete; units on the device come last.

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
    """Whether units hold the same members and come in the same order; the order inside a unit does not matter."""
    return [frozenset(unit) for unit in old] == [frozenset(unit) for unit in new]


def last_ready(
    named_params: Sequence[NamedParam], bytes_of: Mapping[nn.Parameter, int], budget_bytes: int
) -> frozenset[nn.Parameter]:
    """Parameters whose states fit a budget together: from the last gradient backwards, each that still fits.

    Nothing hides the step of these parameters: no backward is left after their gradients, and the next forward needs
    them first.

    Args:
        named_params: in the order of their gradients.
        bytes_of: bytes of each parameter's states in the home that they would move to.
        budget_bytes: bytes free there.
    """
    chosen: list[nn.Parameter] = []
    for _, param in reversed(named_params):
        if bytes_of[param] <= budget_bytes:
            budget_bytes -= bytes_of[param]
            chosen.append(param)
    return frozenset(chosen)
