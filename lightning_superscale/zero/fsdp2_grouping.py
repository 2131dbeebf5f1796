"""Which parameters share a unit in stage 3: those of one FSDP2 group, and buckets of what FSDP2 can't take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_superscale.zero.fsdp2_sharding import ShardedModule
from lightning_superscale.zero.grouping import Grouping, NamedParam

_Key = tuple[int, torch.dtype, bool]


def fsdp2_units_of(
    sharded: ShardedModule, named_params: Sequence[NamedParam], grouping: Grouping
) -> list[list[NamedParam]]:
    """Members of every unit: inner groups from last to first, as their gradients come; then buckets.

    A top group's own parameters frame the inner ones, so their gradients are complete last.
    """
    by_group: dict[_Key, list[NamedParam]] = {}
    for fqn, param in reversed(named_params):
        if sharded.holds(param):
            key = (sharded.group_of(param).index, param.dtype, param in grouping.on_device)
            by_group.setdefault(key, []).append((fqn, param))

    def place(key: _Key) -> tuple[bool, int, str, bool]:
        return sharded.groups[key[0]].has_inner, -key[0], str(key[1]), key[2]

    plain = [(fqn, param) for fqn, param in named_params if not sharded.holds(param)]
    return [by_group[key] for key in sorted(by_group, key=place)] + grouping.units_of(plain)
