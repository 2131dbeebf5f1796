"""What a tensor axis refuses of a module, on real ranks, without a Trainer; and the cuts that it makes."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from lightning_superscale.comm.collectives import AxisCollectives, local_grad
from lightning_superscale.comm.communicator import ranks_of
from lightning_superscale.comm.dtensor import (
    gather_whole,
    is_cut,
    join_parts,
    local_of,
    local_part,
    local_shard,
    placed_like,
    placed_state,
    tensor_shape,
    write_whole,
)
from lightning_superscale.comm.mesh import build_mesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.layout.rows import shard_rows
from lightning_superscale.zero.fsdp2.gather_order import GatherOrder
from lightning_superscale.zero.fsdp2.shard import shard_module
from tests.helpers.ranks import run_ranks
from tests.helpers.tensor_parallel import Transformer, parallelize


class Owner(nn.Module):
    """A network, and a parameter beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Transformer()


def _on_another_mesh(root, mesh):
    parallelize(root.net, init_device_mesh("cpu", (2,)), "rowwise")


def _sharded_by_hand(root, mesh):
    fully_shard(root.net, mesh=mesh.device_mesh["data_parallel"])


def _beside_the_network(root, mesh):
    root.scale = nn.Parameter(distribute_tensor(torch.ones(4), mesh.device_mesh["tensor_parallel"], [Replicate()]))


def _of_another_dtype(root, mesh):
    root.net.blocks[1].feed_forward.down.bfloat16()
    parallelize(root.net, mesh.device_mesh["tensor_parallel"], "rowwise")


REFUSED = {
    lambda root, mesh: None: "tensor_parallel=2, and no parameter of Owner is parallelized.*or remove tensor_parallel",
    _on_another_mesh: "'net.blocks.0.attention.q.weight' is placed on DeviceMesh.*self.device_mesh\\['tensor_parallel",
    _sharded_by_hand: "is placed on DeviceMesh.*leave fully_shard to the strategy",
    _beside_the_network: "'scale' is parallelized, and can't be sharded further: it belongs to Owner itself",
    _of_another_dtype: "can't be sharded further: it is torch.bfloat16 in a group of trainable torch.float32",
}


def _refused(rank, world_size):
    mesh, said = build_mesh(MeshSpec(tensor=2), timedelta(seconds=30)), []
    for spoil in REFUSED:
        root = Owner()
        spoil(root, mesh)
        before = list(root.parameters())
        try:
            shard_module(root, [], mesh, torch.device("cpu"), GatherOrder(None, rank, world_size))
            said.append("nothing")
        except SuperScaleError as error:
            said.append(str(error))
        assert all(a is b for a, b in zip(before, root.parameters(), strict=True)), "refused before anything changed"
    return said


def test_modules_that_no_tensor_axis_can_train_are_refused_by_name():
    for said in run_ranks(2, _refused, limit_s=60):
        for text, message in zip(said, REFUSED.values(), strict=True):
            with pytest.raises(SuperScaleError, match=message):
                raise SuperScaleError(text)


def _cuts(rank, world_size):
    """Parts and wholes of odd shapes, on two data-parallel ranks of two tensor-parallel ones."""
    mesh = build_mesh(MeshSpec(shard=2, tensor=2), timedelta(seconds=30))
    assert (mesh.shard.rank, mesh.tensor.rank, mesh.data.size, mesh.num_shares) == (rank // 2, rank % 2, 2, 4)
    ranks, tensor_mesh = ranks_of(mesh, ()), mesh.device_mesh["tensor_parallel"]
    for shape in ((5,), (7, 3), (3, 5, 2), (4, 6)):
        whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
        for placement in [Replicate(), *(Shard(dim) for dim in range(len(shape)))]:
            placed = distribute_tensor(whole, tensor_mesh, [placement])
            part = local_shard(whole, placed)
            assert torch.equal(part, placed.to_local())
            assert tensor_shape(placed) == tuple(part.shape)
            assert is_cut(placed) == isinstance(placement, Shard)
            assert torch.equal(join_parts(AxisCollectives(mesh.tensor, mesh), part, placed), whole)
            module = nn.Module()
            module.inner = nn.Linear(1, 1, bias=False)
            module.inner.weight = nn.Parameter(placed)
            fully_shard(module, mesh=mesh.device_mesh["data_parallel"])
            both = module.inner.weight
            rows = part[slice(*shard_rows(part.shape[0], mesh.shard.rank, 2))]
            assert torch.equal(local_part(whole, both), rows)
            assert torch.equal(local_of(both), rows)
            assert tensor_shape(both) == tuple(part.shape)
            assert torch.equal(gather_whole(ranks, "weight", both), whole)
            assert torch.equal(gather_whole(ranks, "weight", placed), whole)
            version = both._version
            write_whole(both, 2 * whole)
            assert both._version > version, "an edit that engines can't see"
            assert torch.equal(gather_whole(ranks, "weight", placed_like(local_of(both), both)), 2 * whole)
            assert torch.equal(placed_state(module, {"inner.weight": whole})["inner.weight"].to_local(), rows)


def test_parts_and_wholes_follow_both_cuts():
    run_ranks(4, _cuts, limit_s=60)


def _owed(rank, world_size):
    """A gradient that is a sum over the tensor axis, or cut otherwise than its parameter."""
    mesh = build_mesh(MeshSpec(tensor=2), timedelta(seconds=30)).device_mesh["tensor_parallel"]
    whole = torch.arange(12.0).view(4, 3)
    param = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)])
    owed = placed_like(whole * (rank + 1), distribute_tensor(torch.zeros(4, 3), mesh, [Replicate()]))
    owed = type(owed).from_local(owed.to_local(), mesh, [Partial()], run_check=False)
    other = distribute_tensor(whole, mesh, [Shard(1)])
    plain = torch.ones(2)
    return [local_grad(grad, param) for grad in (owed, other)] + [local_grad(plain, plain)]


def test_a_gradient_is_placed_as_its_parameter():
    whole = torch.arange(12.0).view(4, 3)
    for rank, (owed, other, plain) in enumerate(run_ranks(2, _owed, limit_s=60)):
        assert torch.equal(owed, 3 * whole[2 * rank : 2 * rank + 2])
        assert torch.equal(other, whole[2 * rank : 2 * rank + 2])
        assert torch.equal(plain, torch.ones(2))
