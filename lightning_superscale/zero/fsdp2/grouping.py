"""Groups the parameters of stage 3 into units: by FSDP2 group, while parameters that FSDP2 can't take get buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lightning_superscale.comm.dtensor import is_cut
from lightning_superscale.optim.bucketing import Grouping, NamedParam
from lightning_superscale.zero.fsdp2.module import ShardedModule


class _GroupKey(NamedTuple):
    """The properties that all parameters of one unit share.

    Attributes:
        group: index of the FSDP2 group.
        is_on_device: whether their states stay on the device.
        is_cut: whether ranks of the tensor axis hold different parts of them, so that their norms add up.
    """

    group: int
    dtype: torch.dtype
    is_on_device: bool
    is_cut: bool


def split_by_kind(
    sharded: ShardedModule, named_params: Sequence[NamedParam]
) -> tuple[list[NamedParam], list[NamedParam]]:
    """Split parameters into those that FSDP2 shards and those that it can't take, each in the given order."""
    own = [named for named in named_params if sharded.holds(named[1])]
    return own, [named for named in named_params if not sharded.holds(named[1])]


def fsdp2_units_of(
    sharded: ShardedModule, named_params: Sequence[NamedParam], grouping: Grouping
) -> list[list[NamedParam]]:
    """Members of every unit of sharded parameters, in the order of their gradients: inner groups from last to first.

    Parameters of a group with inner groups are used before and after these, so their gradients are complete last.
    """
    by_group: dict[_GroupKey, list[NamedParam]] = {}
    for fqn, param in reversed(named_params):
        group, is_on_device = sharded.group_of(param).index, param in grouping.on_device
        key = _GroupKey(group, param.dtype, is_on_device, is_cut(param))
        by_group.setdefault(key, []).append((fqn, param))

    def place(key: _GroupKey) -> tuple[bool, int, str]:
        return sharded.groups[key.group].has_inner, -key.group, str(key)

    return [by_group[key] for key in sorted(by_group, key=place)]
