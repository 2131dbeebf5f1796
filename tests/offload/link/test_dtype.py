"""fp32 on the link: the bits of the weights' dtype, more bytes, both counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_superscale.offload.cpu.state import HostState
from lightning_superscale.offload.link.arena import HostArena
from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.offload.superoffload.state import DeferredState
from lightning_superscale.ops.cpu.memory import RecycledMemory
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.types import AdamWHyper
from lightning_superscale.optim.clipping import ClipByNorm
from lightning_superscale.zero.buckets.unit import BucketUnit
from tests.helpers.engines import build_engine, host_bytes, offload_context
from tests.helpers.plain import PlainMasterAdamW, assert_equal_states
from tests.helpers.programs import Programs, extra_backward_of_a_part, plain_backward

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
HALVES = [torch.bfloat16, torch.float16]
NUMEL = 256


def build(dtype, link_dtype="fp32", *, is_deferred):
    """A unit of 192 and 64 elements, its link, arena and state."""
    torch.manual_seed(0)
    params = [("a", nn.Parameter(torch.randn(64, 3).to(dtype))), ("b", nn.Parameter(torch.randn(64).to(dtype)))]
    unit = BucketUnit(0, params, 0, 1, RecycledMemory())
    link, arena = CpuLink(), HostArena()
    context = offload_context(link=link, arena=arena, pool=Pool(1), link_dtype=link_dtype)
    state = DeferredState(unit, context) if is_deferred else HostState(unit, context, has_moments=True)
    return unit, link, arena, state


@pytest.mark.parametrize("is_deferred", [False, True])
@pytest.mark.parametrize(
    ("dtype", "link_dtype", "width"),
    [
        (torch.bfloat16, "fp32", 4),
        (torch.float16, "fp32", 4),
        (torch.float32, "fp32", 4),
        (torch.float32, "weights", 4),
        (torch.bfloat16, "weights", 2),
    ],
)
def test_bytes_on_the_link_and_the_host_equal_the_arithmetic(dtype, link_dtype, width, is_deferred):
    _, link, arena, state = build(dtype, link_dtype, is_deferred=is_deferred)
    num_buffers = 2 if is_deferred else 1
    predicted = host_bytes("superoffload" if is_deferred else "cpu", NUMEL, dtype, link_dtype=link_dtype)
    assert arena.pageable_bytes + arena.pinned_bytes == predicted == NUMEL * (12 + num_buffers * width)
    assert (state.num_transfer_buffers, state.transfer_dtype.itemsize) == (num_buffers, width)
    link.bytes.d2h = link.bytes.h2d = 0
    state.add_grads([(0, torch.randn(192).to(dtype)), (1, torch.randn(64).to(dtype))])
    state.upload([0, 1]).wait()
    assert link.bytes.d2h == link.bytes.h2d == NUMEL * width


@pytest.mark.parametrize("is_deferred", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_those_of_the_weights_dtype(dtype, is_deferred):
    """Sums in a wider dtype are rounded before they leave, and sums of late gradients too, to infinity where they
    overflow."""
    wide, late = torch.randn(192), torch.randn(192).to(dtype)
    wide[0], late[0] = torch.finfo(dtype).max, torch.finfo(dtype).max
    seen = []
    for link_dtype in ("weights", "fp32"):
        _, _, _, state = build(dtype, link_dtype, is_deferred=is_deferred)
        state.add_grads([(0, wide)])
        first = state.grad(0).clone()
        state.add_grads([(0, late)])
        seen.append((first, state.grad(0)))
    for narrow, on_fp32 in zip(*seen, strict=True):
        assert (narrow.dtype, on_fp32.dtype) == (dtype, torch.float32)
        assert torch.equal(narrow.float(), on_fp32)
    assert torch.isinf(seen[1][1][0])


@pytest.mark.parametrize("is_deferred", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_uploads_of_some_slices_round_and_leave_the_others(dtype, is_deferred):
    unit, _, _, state = build(dtype, is_deferred=is_deferred)
    before = [param.detach().clone() for param in unit.params]
    values = torch.randn(192) * 1e3
    source = state._buffers[0] if is_deferred else state.master
    source[:192], source[192:] = values, 7.0
    state.upload([0]).wait()
    assert torch.equal(unit.params[0].view(-1), values.to(dtype))
    assert torch.equal(unit.params[1], before[1])


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_beyond_the_dtype_overflow_alike(dtype):
    """A step that leads beyond fp16, by either rounding."""
    weights = []
    for link_dtype in ("weights", "fp32"):
        unit, _, _, state = build(dtype, link_dtype, is_deferred=True)
        hyper = AdamWHyper(lr=4e4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, step=1)
        torch.manual_seed(1)
        state.master.normal_(std=4e4)
        state.add_grads([(0, torch.randn(192).to(dtype)), (1, torch.randn(64).to(dtype))])
        state.settle({0: hyper, 1: hyper})
        state.upload([0, 1]).wait()
        weights.append(unit.weights)
    assert torch.equal(*weights)
    assert bool(weights[0].isinf().any()) == (dtype == torch.float16)
    assert bool(weights[0].isfinite().any())


@pytest.mark.parametrize("is_deferred", [False, True])
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_states_and_weights_are_plain_adamws(is_deferred, is_streamed, dtype):
    """Clipped and unclipped steps, late gradients, an interrupted backward, an edit."""
    plain, model = Programs(dtype), Programs(dtype)
    oracle = PlainMasterAdamW(plain.parameters(), **ADAMW)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    ways = {"is_offloaded": True, "is_deferred": is_deferred, "is_streamed": is_streamed}
    link = CpuLink()
    engine = build_engine(model, optimizer, **ways, unit_bytes=300, link=link, link_dtype="fp32")
    assert all(state.transfer_dtype == torch.float32 for state in engine.states)
    for step in range(8):
        program = extra_backward_of_a_part if step in (2, 5) else plain_backward
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(dtype)
        if step == 4:
            plain_backward(model, x)
            engine.discard_gradients()
        optimizer.zero_grad()
        oracle.zero_grad()
        program(plain, x)
        program(model, x)
        oracle.max_norm = 1e-3 if step % 2 else 1e6
        oracle.step()
        engine.request_clip(ClipByNorm(oracle.max_norm))
        engine.step()
        engine.transport.wait_all_published()
    numel = sum(unit.shard.shard_numel for unit in engine.transport.units)
    assert link.bytes.h2d >= 8 * 4 * sum(p.numel() for p in model.parameters() if p.grad is not None)
    assert link.bytes.h2d <= 8 * 4 * numel
    engine.close()
    states = [oracle.optimizer.state.get(master, {}) for master in oracle.masters]
    assert_equal_states(list(model.parameters()), optimizer, list(plain.parameters()), states)
