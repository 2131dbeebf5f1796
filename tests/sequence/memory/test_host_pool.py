"""Host buffers are lent, come back, are lent again, and are counted."""

from __future__ import annotations

import weakref
from functools import partial

import torch

from lightning_superscale.ops.cpu.memory import HostBuffer
from lightning_superscale.sequence.memory.host_pool import HostPool


def test_buffers_of_a_size_are_lent_again():
    pool = HostPool(partial(HostBuffer, in_forks=False))
    first, second, other = pool.take(4096), pool.take(4096), pool.take(64)
    assert len({first.address, second.address, other.address}) == 3
    assert (pool.lent_bytes, pool.held_bytes) == (2 * 4096 + 64, 2 * 4096 + 64)
    first.tensor(torch.float32, 1024).fill_(7.0)
    pool.put_back(first)
    assert (pool.lent_bytes, pool.held_bytes) == (4096 + 64, 2 * 4096 + 64)
    assert pool.take(4096) is first
    assert pool.take(128) is not first
    assert pool.held_bytes == 2 * 4096 + 64 + 128


def test_memory_that_is_not_lent_goes_when_the_pool_is_cleared():
    pool = HostPool(partial(HostBuffer, in_forks=False))
    lent, free = pool.take(4096), pool.take(64)
    gone = weakref.ref(free)
    pool.put_back(free)
    del free
    pool.clear()
    assert gone() is None
    assert pool.held_bytes == pool.lent_bytes == lent.nbytes
    pool.put_back(lent)
    assert (pool.held_bytes, pool.lent_bytes) == (4096, 0)
