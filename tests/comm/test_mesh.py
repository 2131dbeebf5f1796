"""Groups of a mesh on real ranks: who talks to whom along each axis, and along several at once."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightning_superscale.comm import collectives
from lightning_superscale.comm.mesh import DataMesh, MeshAxis, build_mesh, single_mesh
from lightning_superscale.layout.mesh import AXES, MeshSpec
from tests.helpers.ranks import run_ranks

AXIS_SETS = [*((name,) for name in AXES), ("replicate", "shard"), ("replicate", "shard", "sequence"), AXES]


def partners(rank, world_size, specs):
    """By spec and axes: this rank's place, the size, and whom it hears there."""
    found = []
    for spec in specs:
        mesh = build_mesh(spec, timedelta(seconds=30))
        told = {}
        for names in AXIS_SETS:
            axis = mesh.flat(*names)
            ranks = [torch.zeros(1, dtype=torch.long) for _ in range(axis.size)]
            if axis.group is None:
                ranks[0][0] = rank
            else:
                dist.all_gather(ranks, torch.tensor([rank]), group=axis.group)
            told[names] = (axis.rank, axis.size, torch.cat(ranks).tolist())
        found.append((told, (mesh.data.size, mesh.batch.size, mesh.gather.size), mesh["sequence"].rank))
    return found


def test_every_rank_hears_those_of_its_group():
    specs = [
        MeshSpec(shard=4),
        MeshSpec(replicate=2, shard=2),
        MeshSpec(shard=2, tensor=2),
        MeshSpec(shard=2, sequence=2),
        MeshSpec(replicate=2, sequence=2),
        MeshSpec(sequence=2, tensor=2),
    ]
    for rank, found in enumerate(run_ranks(4, partners, specs)):
        for spec, (told, sizes, sequence_rank) in zip(specs, found, strict=True):
            for names, heard in told.items():
                group = next(group for group in spec.groups(*names) if rank in group)
                assert heard == (group.index(rank), len(group), group), (spec, names)
            assert sizes == (
                spec.size_of("replicate", "shard", "sequence"),
                spec.size_of("replicate", "shard"),
                spec.shard,
            )
            assert sequence_rank == spec.index_of(rank, "sequence")


def test_an_axis_that_there_is_not_is_named():
    with pytest.raises(KeyError, match="a mesh has the axes replicate, shard, sequence, tensor; found 'pipeline'"):
        single_mesh()["pipeline"]


def test_one_rank_has_every_axis():
    mesh = single_mesh()
    assert {mesh[name].size for name in AXES} == {mesh.data.size, mesh.batch.size, mesh.flat(*AXES).size} == {1}


@pytest.mark.parametrize(("device_type", "runs_on_host"), [("cpu", True), ("cuda", False), ("xpu", False)])
def test_the_backend_of_a_group_is_that_of_the_device(monkeypatch, device_type, runs_on_host):
    """torch makes such groups where it is not told a backend."""
    monkeypatch.setattr(collectives.dist, "get_backend_config", lambda _group: "cpu:gloo,cuda:nccl")
    axis = MeshAxis("shard", 0, 2, group=object())
    mesh = DataMesh(axis, axis, axis, axis, device_type=device_type)
    assert collectives.AxisCollectives(axis, mesh).runs_on_host is runs_on_host
