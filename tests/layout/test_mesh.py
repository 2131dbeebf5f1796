"""Ranks on the axes of a mesh: every rank has one place, and groups divide the world."""

from __future__ import annotations

from itertools import combinations

import pytest

from lightning_superscale.layout.mesh import AXES, DATA_AXES, MeshSpec

SPECS = [
    MeshSpec(),
    MeshSpec(shard=4),
    MeshSpec(replicate=2, shard=3),
    MeshSpec(shard=2, tensor=2),
    MeshSpec(replicate=2, shard=3, sequence=2, tensor=2),
]


def test_hybrid_shards_are_neighbours():
    spec = MeshSpec(replicate=2, shard=3)
    assert spec.groups("shard") == [[0, 1, 2], [3, 4, 5]]
    assert spec.groups("replicate") == [[0, 3], [1, 4], [2, 5]]


def test_tensor_ranks_are_neighbours_and_sequence_ranks_come_next():
    spec = MeshSpec(shard=2, sequence=2, tensor=2)
    assert spec.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert spec.groups("sequence") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert spec.groups("shard", "sequence") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert spec.index_of(6, "shard", "sequence") == 3


def test_ranks_that_share_sequences_divide_states_unless_nothing_does():
    spec = MeshSpec(replicate=2, shard=2, sequence=2)
    assert spec.groups(*spec.shard_axes) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert spec.groups(*spec.replica_axes) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    spec = MeshSpec(replicate=2, sequence=2, shards_states=False)
    assert spec.groups(*spec.shard_axes) == [[0], [1], [2], [3]]
    assert spec.groups(*spec.replica_axes) == [[0, 1, 2, 3]]
    for spec in SPECS:
        assert {*spec.shard_axes, *spec.replica_axes} == {*DATA_AXES}
        assert spec.size_of(*spec.shard_axes) * spec.size_of(*spec.replica_axes) == spec.size_of(*DATA_AXES)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_groups_along_any_axes_divide_the_world(spec):
    for count in range(len(AXES) + 1):
        for axes in combinations(AXES, count):
            groups = spec.groups(*axes)
            assert sorted(rank for group in groups for rank in group) == list(range(spec.world_size))
            for group in groups:
                assert [spec.index_of(rank, *axes) for rank in group] == list(range(spec.size_of(*axes)))
                assert group == sorted(group)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_place_on_every_axis_is_one_rank(spec):
    places = {tuple(spec.index_of(rank, axis) for axis in AXES) for rank in range(spec.world_size)}
    assert len(places) == spec.world_size
    assert [spec.index_of(rank, *AXES) for rank in range(spec.world_size)] == list(range(spec.world_size))
