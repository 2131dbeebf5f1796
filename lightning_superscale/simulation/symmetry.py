"""Ranks that do the same at the same time, of which one is enough to simulate.

[Note: Symmetric ranks] Two ranks behave alike if they compute alike, and if whom they wait for behaves alike. So ranks
are divided by what they compute, and then, as long as a division makes new ones, by the classes of the ranks in each of
their groups (colour refinement). Ten thousand equal ranks are one class; one slow rank among them makes a few more: its
own, those of the ranks that share one of its groups, and all others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_superscale.estimation.links import GroupShape

Groups = Sequence[Sequence[int]]
"""The ranks of each group along one axis; every rank is in one of them."""


@dataclass(frozen=True, slots=True)
class GroupClass:
    """Groups along one axis whose ranks have the same classes.

    Attributes:
        members: the classes that they have, in order.
        shape: how their ranks are spread over nodes.
    """

    axis: str
    members: tuple[int, ...]
    shape: GroupShape


@dataclass(frozen=True, slots=True)
class Symmetry:
    """The classes of all ranks.

    Attributes:
        class_of: each rank's class, by rank.
        groups: by class, the class of its group along each axis.
    """

    class_of: Sequence[int]
    groups: Sequence[Mapping[str, GroupClass]]

    @property
    def num_classes(self) -> int:
        return len(self.groups)


def symmetry_of(axes: Mapping[str, Groups], kinds: Sequence[Hashable], ranks_per_node: int) -> Symmetry:
    """Divide ranks into classes ([Note: Symmetric ranks]).

    Args:
        axes: the groups along each axis, by its name.
        kinds: of each rank, what tells it from others by itself.
    """
    shapes = {axis: [_shape_of(ranks, ranks_per_node) for ranks in groups] for axis, groups in axes.items()}
    colors = _numbered(kinds)
    while True:
        seen: list[list[Hashable]] = [[color] for color in colors]
        for axis, groups in axes.items():
            for ranks, shape in zip(groups, shapes[axis], strict=True):
                key = (shape, tuple(sorted(_counted(colors[rank] for rank in ranks).items())))
                for rank in ranks:
                    seen[rank].append(key)
        refined = _numbered([tuple(each) for each in seen])
        if max(refined) == max(colors):
            break
        colors = refined
    found: list[dict[str, GroupClass]] = [{} for _ in range(max(colors) + 1)]
    for axis, groups in axes.items():
        for ranks, shape in zip(groups, shapes[axis], strict=True):
            members = tuple(sorted({colors[rank] for rank in ranks}))
            for color in members:
                found[color][axis] = GroupClass(axis, members, shape)
    return Symmetry(colors, found)


def _shape_of(ranks: Sequence[int], ranks_per_node: int) -> GroupShape:
    on_node = _counted(rank // ranks_per_node for rank in ranks)
    return GroupShape(len(on_node), max(on_node.values()))


def _counted(values: Iterable[int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _numbered(keys: Sequence[Hashable]) -> list[int]:
    """Each key's number, in the order in which they come first."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]
