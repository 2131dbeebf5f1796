"""Host states: bytes allocated and moved equal the arithmetic, late gradients add up, weights that stay stay."""

from __future__ import annotations

import psutil
import pytest
import torch
from torch import nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.cpu.state import HostState
from lightning_superscale.offload.link.arena import HostArena, check_host_memory
from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.offload.superoffload.state import DeferredState
from lightning_superscale.ops.cpu.memory import RecycledMemory
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.native import loader
from lightning_superscale.zero.buckets.unit import BucketUnit
from tests.helpers.engines import host_bytes, offload_context


def build(dtype, *, has_moments=True):
    torch.manual_seed(0)
    params = [("a", nn.Parameter(torch.randn(64, 3).to(dtype))), ("b", nn.Parameter(torch.randn(64).to(dtype)))]
    unit = BucketUnit(0, params, 0, 1, RecycledMemory())
    link, arena = CpuLink(), HostArena()
    return unit, link, arena, HostState(unit, offload_context(link=link, arena=arena), has_moments=has_moments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_moments", [True, False])
def test_host_bytes_equal_the_arithmetic(dtype, has_moments):
    unit, _, arena, _ = build(dtype, has_moments=has_moments)
    numel = unit.shard.shard_numel
    assert numel == 256  # 64 * 3 and 64, both multiples of the alignment
    expected = {torch.float32: (4 + 4), torch.bfloat16: (4 + 2)}[dtype] + (8 if has_moments else 0)
    assert arena.pageable_bytes + arena.pinned_bytes == numel * expected
    assert host_bytes("cpu", numel, dtype, has_moments=has_moments) == numel * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_deferred", [True, False])
def test_host_bytes_of_weights_that_flow_equal_the_arithmetic(dtype, is_deferred):
    torch.manual_seed(0)
    params = [("a", nn.Parameter(torch.randn(64, 3).to(dtype))), ("b", nn.Parameter(torch.randn(64).to(dtype)))]
    before = [param.detach().clone() for _, param in params]
    unit = BucketUnit(0, params, 0, 1, RecycledMemory(), streams_to=torch.device("cpu"))
    arena = HostArena()
    if is_deferred:
        state = DeferredState(unit, offload_context(arena=arena, pool=Pool(1)), streamed=unit)
        counted, expected = host_bytes("superoffload", 256, dtype, flows=True), 12 + 3 * dtype.itemsize
    else:
        state = HostState(unit, offload_context(arena=arena), has_moments=True, streamed=unit)
        counted = host_bytes("cpu", 256, dtype, flows=True)
        expected = 12 + {torch.float32: 4, torch.bfloat16: 2 + 2}[dtype]  # an fp32 master is what flows
    assert arena.pageable_bytes + arena.pinned_bytes == counted == 256 * expected
    assert unit.weights.untyped_storage().nbytes() == 0
    assert all(torch.equal(param, weight) for (_, param), weight in zip(params, before, strict=True))
    assert torch.equal(state.master[:192].to(dtype), before[0].view(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_moves_each_gradient_and_each_weight_once_in_its_own_dtype(dtype):
    unit, link, _, state = build(dtype)
    link.bytes.d2h = link.bytes.h2d = 0
    state.add_grads([(0, torch.randn(192).to(dtype)), (1, torch.randn(64).to(dtype))])
    state.upload([0, 1]).wait()
    assert link.bytes.d2h == link.bytes.h2d == 256 * dtype.itemsize


def test_late_deltas_add_in_the_gradients_dtype():
    _, _, _, state = build(torch.bfloat16)
    first, second = torch.randn(192).bfloat16(), torch.randn(192).bfloat16()
    state.add_grads([(0, first)])
    state.add_grads([(0, second)])
    assert torch.equal(state.grad(0), first + second)
    assert state.grad(1) is None
    state.clear_grads()
    assert state.grad(0) is None
    state.add_grads([(0, second)])
    assert torch.equal(state.grad(0), second)


def test_upload_of_some_slices_leaves_the_others_weights():
    unit, _, _, state = build(torch.bfloat16)
    before = unit.params[1].detach().clone()
    state.add_grads([(0, torch.zeros(192, dtype=torch.bfloat16))])
    state._grads[:192] = 7.0
    state.upload([0]).wait()
    assert bool((unit.params[0] == 7.0).all())
    assert torch.equal(unit.params[1], before)


def test_masters_keep_lower_bits_where_the_weight_was_not_edited():
    unit, _, _, state = build(torch.bfloat16)
    state.master[:192] += 1e-5  # below bf16's resolution for most elements
    state._grads[:192] = state.master[:192].bfloat16()
    state.upload([0]).wait()
    kept = state.master[1:192].clone()
    with torch.no_grad():
        unit.params[0].view(-1)[0] = 3.0
    state.reload([0])
    assert state.master[0] == 3.0
    assert torch.equal(state.master[1:192], kept)


@pytest.mark.skipif(loader.native() is None, reason="torch allocates without the native library")
def test_the_pool_touches_buffers_first():
    """Resident memory: a mapping that nobody has written to takes none."""
    nbytes, resident = 2**26, psutil.Process().memory_info
    before = resident().rss
    untouched = HostArena().zeros(nbytes, torch.uint8, is_pinned=False)
    between = resident().rss
    touched = HostArena(Pool(1)).zeros(nbytes, torch.uint8, is_pinned=False)
    assert between - before < nbytes // 2 < resident().rss - between
    assert untouched.shape == touched.shape


def test_too_little_host_memory_is_refused_with_both_numbers():
    with pytest.raises(SuperScaleError, match=r"needs 1048576.0 GiB of host memory .* and .* GiB are available"):
        check_host_memory(1 << 50)
