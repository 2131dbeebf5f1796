"""Memory that ranks of one host map, or that none of them does."""

from __future__ import annotations

import os

import pytest
import torch

from lightning_superscale.comm import shared_memory
from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.shared_memory import map_host_memory
from tests.helpers.checkpoints import mesh_of
from tests.helpers.ranks import run_ranks

NBYTES = 5000


def num_open() -> int:
    """Descriptors of anonymous files; gloo closes some of its own when another rank ends first."""
    links = (os.path.join("/proc/self/fd", each) for each in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith("/memfd:superscale") for link in links if os.path.islink(link))


def see_others(rank: int, world_size: int) -> tuple[list[list[int]], int]:
    """What a rank sees in everybody's memory after all wrote, and how many descriptors that left open."""
    mesh = mesh_of(world_size)
    memory = map_host_memory(mesh, NBYTES)
    assert memory is not None
    assert [(each.dtype, each.shape) for each in memory] == [(torch.uint8, (NBYTES,))] * world_size
    assert not any(each.any() for each in memory)
    gather_objects(mesh, None)
    memory[rank].fill_(rank + 1)
    gather_objects(mesh, None)
    seen = [each.unique().tolist() for each in memory]
    return seen, num_open()


def test_every_rank_sees_what_every_other_wrote_and_no_descriptor_stays():
    # mmap keeps a descriptor of its own for each map.
    assert run_ranks(3, see_others) == [([[1], [2], [3]], 3)] * 3


def fail_on_one(rank: int, world_size: int, how: str) -> tuple[bool, int]:
    mesh = mesh_of(world_size)
    offer = shared_memory._offer

    def refused(*_):
        raise PermissionError(1, "not allowed")

    if rank == 1 and how == "cannot make":
        os.memfd_create = refused
    elif rank == 1 and how == "cannot map":
        shared_memory._map = refused
    elif rank == 1 and how == "other file":  # as where another process has the number in another container
        shared_memory._offer = lambda nbytes: (offer(nbytes)[0], offer(nbytes)[1]._replace(token=b"x" * 64))
    memory = map_host_memory(mesh, NBYTES)
    is_none, memory = memory is None, None
    return is_none, num_open()


@pytest.mark.parametrize("how", ["cannot make", "cannot map", "other file"])
def test_no_rank_maps_where_one_cannot(how):
    answers = run_ranks(2, fail_on_one, how)
    assert [is_none for is_none, _ in answers] == [True, True]
    assert max(left for _, left in answers) <= (2 if how == "other file" else 0)  # the test's own
