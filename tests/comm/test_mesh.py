"""Groups of a mesh on real ranks: who talks to whom along each axis, and along several at once."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightning_superscale.comm import collectives
from lightning_superscale.comm.mesh import DataMesh, MeshAxis, build_mesh, single_mesh
from lightning_superscale.layout.mesh import AXES, BATCH_AXES, DATA_AXES, MeshSpec
from tests.helpers.ranks import run_ranks


def partners(rank, world_size, specs):
    """By spec and axis: this rank's place, the size, and whom it hears there; and how many groups the axes have."""
    found = []
    for spec in specs:
        mesh = build_mesh(spec, timedelta(seconds=30))
        told = {}
        for name in ("shard", "replicate", "gather", "data", "batch", "tensor", "sequence", "world"):
            axis = getattr(mesh, name)
            ranks = [torch.zeros(1, dtype=torch.long) for _ in range(axis.size)]
            if axis.group is None:
                ranks[0][0] = rank
            else:
                dist.all_gather(ranks, torch.tensor([rank]), group=axis.group)
            told[name] = (axis.rank, axis.size, torch.cat(ranks).tolist())
        own = [mesh.gather.group, mesh.sequence.group, mesh.users]
        shared = {
            id(axis.group) for axis in (mesh.shard, mesh.replicate, mesh.data, mesh.batch, mesh.tensor, mesh.world)
        }
        own_ids = [id(group) for group in own if group is not None]
        found.append((told, mesh.num_shares, len(set(own_ids)) == len(own_ids) and shared.isdisjoint(own_ids)))
        assert (mesh["sequence"], mesh["tensor"]) == (mesh.sequence, mesh.tensor)
    return found


SPECS = [
    MeshSpec(shard=4),
    MeshSpec(replicate=2, shard=2),
    MeshSpec(shard=2, tensor=2),
    MeshSpec(shard=2, sequence=2),
    MeshSpec(replicate=2, sequence=2),
    MeshSpec(replicate=2, sequence=2, shards_states=False),
    MeshSpec(sequence=4),
    MeshSpec(sequence=2, tensor=2),
]


def test_every_rank_hears_those_of_its_group():
    # Two times two ranks, of which the inner ones share sequences: they divide states, unless nothing does.
    whole, pairs, across = [[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    alone = [[0], [1], [2], [3]]
    by_hand = {
        SPECS[3]: {"shard": whole, "replicate": alone, "data": whole, "batch": across, "sequence": pairs},
        SPECS[4]: {"shard": pairs, "replicate": across, "data": whole, "batch": across, "sequence": pairs},
        SPECS[5]: {"shard": alone, "replicate": whole, "data": whole, "batch": across, "sequence": pairs},
        SPECS[6]: {"shard": whole, "replicate": alone, "data": whole, "batch": alone, "sequence": whole},
        SPECS[7]: {"shard": across, "replicate": alone, "data": across, "batch": alone, "sequence": across},
    }
    for rank, found in enumerate(run_ranks(4, partners, SPECS)):
        for spec, (told, num_shares, has_own_groups) in zip(SPECS, found, strict=True):
            axes = {
                "shard": spec.shard_axes, "gather": spec.shard_axes, "replicate": spec.replica_axes, "world": AXES,
                "data": DATA_AXES, "batch": BATCH_AXES, "tensor": ("tensor",), "sequence": ("sequence",),
            }  # fmt: skip
            for name, heard in told.items():
                group = next(group for group in spec.groups(*axes[name]) if rank in group)
                assert heard == (group.index(rank), len(group), group), (spec, name)
            for name, groups in by_hand.get(spec, {}).items():
                assert told[name][2] == next(group for group in groups if rank in group), (spec, name)
            assert num_shares == told["shard"][1] * spec.tensor
            # Gathers, what a forward exchanges and user code's operations each meet nothing else.
            assert has_own_groups, spec


def test_an_axis_that_there_is_not_is_named():
    with pytest.raises(KeyError, match="a mesh has the axes replicate, shard, sequence, tensor; found 'pipeline'"):
        single_mesh()["pipeline"]


def test_one_rank_has_every_axis():
    mesh = single_mesh()
    assert {mesh[name].size for name in AXES} == {mesh.data.size, mesh.batch.size, mesh.num_shares} == {1}


@pytest.mark.parametrize(("device_type", "runs_on_host"), [("cpu", True), ("cuda", False), ("xpu", False)])
def test_the_backend_of_a_group_is_that_of_the_device(monkeypatch, device_type, runs_on_host):
    """torch makes such groups where it is not told a backend."""
    monkeypatch.setattr(collectives.dist, "get_backend_config", lambda _group: "cpu:gloo,cuda:nccl")
    axis = MeshAxis("shard", 0, 2, group=object())
    mesh = DataMesh(axis, axis, axis, axis, device_type=device_type)
    assert collectives.AxisCollectives(axis, mesh).runs_on_host is runs_on_host
