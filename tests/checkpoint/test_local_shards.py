"""What a rank holds of tensors of every kind."""

from __future__ import annotations

import torch
from torch.distributed._shard.sharded_tensor import Shard as TorchShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Placement

from lightning_superscale.checkpoint.local_shards import is_tensor_like, local_shards
from lightning_superscale.comm.dtensor import LocalBox
from lightning_superscale.layout.box import Box, whole_box
from tests.helpers.ranks import run_ranks


def test_a_plain_tensor_is_held_whole():
    tensor = torch.arange(6).view(2, 3)
    shape, dtype, [shard] = local_shards(tensor)
    assert (shape, dtype, shard.box) == ((2, 3), torch.int64, whole_box((2, 3)))
    assert shard.tensor.data_ptr() == tensor.data_ptr()


def test_rows_lie_where_they_were_cut():
    rows = LocalBox((5, 3), (2, 0), torch.ones(2, 3))
    assert is_tensor_like(rows)
    shape, dtype, [shard] = local_shards(rows)
    assert (shape, dtype, shard.box) == ((5, 3), torch.float32, Box((2, 0), (2, 3)))
    assert local_shards(LocalBox((5, 3), (5, 0), torch.ones(0, 3)))[2] == ()
    assert local_shards(LocalBox((), (), torch.ones(0)))[2] == ()


def test_other_values_are_no_tensors():
    assert not any(map(is_tensor_like, (1, "x", None, [torch.ones(1)], {"shape": (1,)}, torch.Size((2,)))))


def _placed(rank: int, world_size: int):
    """Boxes of a DTensor and of FSDP's kind of tensor; writing into them writes into the tensor."""
    whole = torch.arange(15.0).view(5, 3)
    mesh = init_device_mesh("cpu", (2, 2))
    found = []
    for placements in ([Placement(0), Placement(1)], [Placement(0), Placement(0)], [Placement(1), Replicate()]):
        placed = distribute_tensor(whole, mesh, placements)
        shape, _, shards = local_shards(placed)
        for shard in shards:
            assert torch.equal(shard.tensor, whole[shard.box.within(whole_box(shape))])
            shard.tensor.zero_()
        assert not placed.to_local().any()
        found.append([shard.box for shard in shards])
    if rank < 2:
        own = TorchShard.from_tensor_and_offsets(whole[3 * rank : 3 * rank + 3], [3 * rank, 0], rank)
    shards = [own] if rank < 2 else []
    sharded = init_from_local_shards(shards, 5, 3)
    found.append([shard.box for shard in local_shards(sharded)[2]])
    return found


def test_placed_tensors_of_all_ranks_make_up_the_whole():
    on_ranks = run_ranks(4, _placed)
    for case in range(4):
        covered = torch.zeros(5, 3)
        for boxes in {tuple(ranks[case]) for ranks in on_ranks}:
            for box in boxes:
                covered[box.within(whole_box((5, 3)))] += 1
        assert torch.equal(covered, torch.ones(5, 3)), case
