"""What we rely on in FSDP2, for each torch: a failure here explains the others."""

from __future__ import annotations

import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_superscale.comm.mesh import build_mesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.layout.rows import shard_rows
from lightning_superscale.zero.fsdp2.unit import local_rows_of
from lightning_superscale.zero.fsdp2.unwrap import attributes_of, release_modules
from tests.helpers.fsdp import Case, build
from tests.helpers.ranks import run_ranks


class Recorder:
    """A gather that counts, as `set_custom_all_gather` takes it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.calls: list[tuple[int, torch.dtype, bool]] = []

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        is_in_place = output_tensor.view(group.size(), -1)[self.rank].data_ptr() == input_tensor.data_ptr()
        self.calls.append((output_tensor.numel(), output_tensor.dtype, is_in_place))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            dist.all_gather_into_tensor(output_tensor, input_tensor, group=group)  # noqa: TID251


def sharded_linear(rank: int, rows: int) -> tuple[nn.Module, torch.Tensor, Recorder]:
    torch.manual_seed(0)
    module = nn.Linear(3, rows)
    weight = module.weight.detach().clone()
    fully_shard(module, mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    recorder = Recorder(rank)
    module.set_custom_all_gather(recorder)
    module.set_requires_gradient_sync(False)
    return module, weight, recorder


def _contract(rank: int, world_size: int) -> None:
    for rows in (1, 2, 4, 5, 7):
        module, weight, recorder = sharded_linear(rank, rows)
        start, stop = shard_rows(rows, rank, world_size)
        # Rows are cut as our layout cuts them, also where a rank has none.
        assert isinstance(module.weight, DTensor)
        assert torch.equal(local_rows_of(module.weight), weight[start:stop])
        sharded, memory = module.weight, local_rows_of(module.weight)
        wholes, taken = [], []

        def note(m, _inputs, wholes=wholes):
            wholes.append(m.weight)

        module.register_forward_pre_hook(note)
        for step in range(3):
            if step == 1:
                wholes[0].register_post_accumulate_grad_hook(lambda p, taken=taken: taken.append(p.grad.clone()))
            module(torch.ones(2, 3)).sum().backward()
            # Its reduction is off: gradients stay whole where autograd accumulated them.
            assert sharded.grad is None
            assert wholes[0].grad.shape == weight.shape
            assert torch.equal(wholes[0].grad, torch.full_like(weight, 2.0))
            wholes[0].grad = None
        assert len(taken) == 2
        # One gathered parameter object for the whole run, plain and whole; hooks come after the gather.
        assert all(whole is wholes[0] for whole in wholes)
        assert not isinstance(wholes[0], DTensor)
        # One gather per forward for a root (kept until backward), padded to equal rows, its own rows in place.
        padded = -(-rows // world_size) * world_size * 4
        assert recorder.calls == [(padded, torch.float32, True)] * 3
        # The first forward does not move the rows, and what is written there is what the next gather reads.
        assert module.weight is sharded
        assert local_rows_of(sharded).data_ptr() == memory.data_ptr()
        memory.fill_(rank + 1.0)
        module(torch.ones(1, 3))
        gathered = module.weight.detach().clone()
        for peer in range(world_size):
            begin, end = shard_rows(rows, peer, world_size)
            assert bool((gathered[begin:end] == peer + 1.0).all())
        # An edit through the DTensor is counted: engines look at it.
        module.reshard()
        before = sharded._version
        with torch.no_grad():
            sharded.mul_(2.0)
        assert sharded._version == before + 1
    _inner(rank)


def _inner(rank: int) -> None:
    """An inner group is gathered in forward and again in backward; explicitly gathered, it is not gathered twice."""
    root = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    recorder = Recorder(rank)
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    for module in (root[0], root[1], root):
        fully_shard(module, mesh=mesh)
        module.set_requires_gradient_sync(False)
        module.set_custom_all_gather(recorder)
    root(torch.ones(1, 3)).sum().backward()
    assert len(recorder.calls) == 4
    root[0].unshard(async_op=True)
    root(torch.ones(1, 3)).sum().backward()
    assert len(recorder.calls) == 8
    # Without the inner ones' memory, nothing keeps a gathered weight after backward.
    assert all(isinstance(p, DTensor) for p in root.parameters())


@pytest.mark.parametrize("world_size", [2, 3])
def test_gathers_rows_and_gathered_parameters(world_size):
    run_ranks(world_size, _contract, limit_s=60)


def _tied(rank: int, world_size: int) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    fully_shard(module, mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    assert isinstance(module[0].weight, DTensor)
    assert module[1].weight is module[0].weight


def test_tied_parameters_are_replaced_everywhere():
    run_ranks(2, _tied, limit_s=60)


def _again(rank: int, world_size: int) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    kept = []
    module[0].register_forward_hook(lambda *_: kept.append(1))
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    for _ in range(2):
        before = attributes_of(module.modules())
        fully_shard(module[0], mesh=mesh)
        fully_shard(module, mesh=mesh)
        module(torch.ones(2, 3)).sum().backward()
        assert isinstance(module, FSDPModule)
        wholes = {}
        for name in [n for n, _ in module.named_parameters()]:
            module[int(name[0])].unshard() if isinstance(module[int(name[0])], FSDPModule) else module.unshard()
            wholes[name] = module.get_parameter(name).detach().clone()
        module[0].reshard()
        module.reshard()
        for name, whole in wholes.items():
            module[int(name[0])].register_parameter(name[2:], nn.Parameter(whole))
        release_modules(before)
        assert type(module) is nn.Sequential
        assert type(module[0]) is nn.Linear
        module.load_state_dict(module.state_dict())
        module(torch.ones(2, 3)).sum().backward()
    assert len(kept) == 4  # the user's own hooks stay


def test_released_modules_are_plain_and_can_be_sharded_again():
    run_ranks(2, _again, limit_s=60)


def _one_rank(rank: int, world_size: int) -> str:
    try:
        build(nn.Linear(3, 3), rank, world_size, Case(None, None))
    except SuperScaleError as error:
        return str(error)
    return "no error"


def test_one_rank_is_refused():
    assert "at least two ranks" in run_ranks(1, _one_rank, limit_s=60)[0]


def _axes(rank: int, world_size: int) -> tuple[int, int]:
    mesh = build_mesh(MeshSpec(replicate=2, shard=2), timedelta(seconds=30))
    axis = mesh.gather
    assert axis.group is not mesh.shard.group
    return axis.rank, axis.size


def test_gathers_have_a_process_group_of_their_own():
    assert run_ranks(4, _axes, limit_s=60) == [(0, 2), (1, 2), (0, 2), (1, 2)]
