"""Classes of ranks that behave alike."""

from __future__ import annotations

from lightning_superscale.estimation.links import GroupShape
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.simulation.symmetry import symmetry_of


def axes_of(mesh: MeshSpec):
    return {
        "shard": mesh.groups(*mesh.shard_axes),
        "replicate": mesh.groups(*mesh.replica_axes),
        "sequence": mesh.groups("sequence"),
    }


def test_equal_ranks_are_one_class():
    found = symmetry_of(axes_of(MeshSpec(shard=10_000)), [1.0] * 10_000, 8)
    assert found.num_classes == 1
    assert found.groups[0]["shard"].shape == GroupShape(1250, 8)
    assert found.groups[0]["replicate"].shape == GroupShape(1, 1)


def test_one_slow_rank_of_one_group():
    found = symmetry_of(axes_of(MeshSpec(shard=16)), [1.0] * 15 + [2.0], 8)
    assert found.class_of == [0] * 15 + [1]
    assert found.groups[0]["shard"] == found.groups[1]["shard"]
    assert found.groups[0]["shard"].members == (0, 1)


def test_a_slow_rank_parts_those_that_wait_for_it_from_those_that_wait_for_these():
    mesh = MeshSpec(replicate=2, shard=4)  # ranks 0 to 3 are one shard group, 4 to 7 the other
    found = symmetry_of(axes_of(mesh), [1.0] * 7 + [2.0], 8)
    # The slow rank, its shard group, its replica (3), and the rest of that one's shard group.
    assert [found.class_of[rank] for rank in (0, 1, 2)] == [found.class_of[0]] * 3
    assert [found.class_of[rank] for rank in (4, 5, 6)] == [found.class_of[4]] * 3
    assert found.num_classes == 4
    own = found.groups[found.class_of[0]]
    assert own["shard"].members == tuple(sorted({found.class_of[0], found.class_of[3]}))
    assert own["replicate"].members == tuple(sorted({found.class_of[0], found.class_of[4]}))


def test_groups_on_one_node_differ_from_groups_on_two():
    groups = {"shard": [[0, 1], [2, 3]], "replicate": [[0], [1], [2], [3]], "sequence": [[0], [1], [2], [3]]}
    found = symmetry_of(groups, [1.0] * 4, 3)
    assert found.class_of == [0, 0, 1, 1]
    assert [each["shard"].shape for each in found.groups] == [GroupShape(1, 2), GroupShape(2, 1)]
