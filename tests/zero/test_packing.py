"""Rows of all ranks in one buffer: the same bits as rank after rank, with as many kernels for 64 ranks as for 4."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_superscale.layout.rows import ParamSpec, shard_rows, unit_layout
from lightning_superscale.ops.cpu.memory import RecycledMemory
from lightning_superscale.optim.grad_dtypes import packed_into
from lightning_superscale.zero.buckets.unit import BucketUnit
from lightning_superscale.zero.fsdp2 import unit as fsdp2_unit
from lightning_superscale.zero.fsdp2.unit import Fsdp2Unit
from lightning_superscale.zero.packing import RankedRows

SHAPES = [(), (1,), (3,), (8, 5), (7, 3), (64,), (5, 13), (2, 4, 3), (0, 3), (12, 0), (33, 2)]
MISSING = 3
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]


def layout(size: int):
    specs = [ParamSpec(f"p{i}", shape) for i, shape in enumerate(SHAPES)]
    return unit_layout(0, specs, 0, size)


def flats(dtype: torch.dtype) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {i: torch.randn(max(1, torch.Size(shape).numel()), generator=generator) for i, shape in enumerate(SHAPES)}
    return {i: flat[: torch.Size(SHAPES[i]).numel()].to(dtype) for i, flat in made.items()}


def places(size: int):
    """Parameter, rank, where its rows are in that rank's buffer, and where in the whole parameter."""
    for i, piece in enumerate(layout(size).slices):
        for rank in range(size):
            start, stop = (row * piece.spec.row_numel for row in shard_rows(piece.spec.num_rows, rank, size))
            yield i, rank, slice(piece.offset, piece.offset + stop - start), slice(start, stop)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("grads_in", "travels_in"), DTYPES)
def test_packing_has_the_bits_of_rank_after_rank(size, grads_in, travels_in):
    ranked, grads = RankedRows(layout(size), size), flats(grads_in)
    del grads[MISSING]
    packed = torch.full((size, layout(size).shard_numel), float("nan"), dtype=travels_in)
    assert ranked.pack(packed, grads, 1 / 3) is packed
    for i, rank, there, here in places(size):
        expected = torch.zeros(here.stop - here.start, dtype=travels_in)
        if i != MISSING:
            packed_into(expected, grads[i][here], 1 / 3)
        assert torch.equal(packed[rank, there], expected), (i, rank)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_blocks_cover_every_element_once(size):
    ranked, shard = RankedRows(layout(size), size), layout(size)
    packed = torch.randn(size, shard.shard_numel)
    columns = ranked.columns(packed)
    for i, piece in enumerate(shard.slices):
        whole = torch.zeros(piece.spec.numel)
        blocks = ranked.blocks(columns[i], whole, i)
        assert len(blocks) <= 2
        for there, here in blocks:
            here.add_(there)
        for k, rank, there, here in places(size):
            if k == i:
                assert torch.equal(whole[here], packed[rank, there])


class Kernels(TorchDispatchMode):
    """Counts what is launched, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func.name():
            self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


def kernels_of(make_unit, size: int, travels_in: torch.dtype) -> Counter[str]:
    """Packing a unit of twenty parameters, one of them without a gradient, whose rows are never dealt evenly."""
    named = [(f"p{i}", nn.Parameter(torch.ones(64 * (21 + i) + 1, 3))) for i in range(20)]
    unit = make_unit(named, size)
    grads = {i: torch.ones(param.numel()) for i, (_, param) in enumerate(named) if i != MISSING}
    with Kernels() as kernels:
        unit.packed(grads, 0.25, travels_in)
    return kernels.seen


def bucket(named, size: int) -> BucketUnit:
    return BucketUnit(0, named, 0, size, RecycledMemory())


@pytest.fixture
def sharded(monkeypatch):
    def make(named, size: int) -> Fsdp2Unit:
        monkeypatch.setattr(fsdp2_unit, "local_rows_of", lambda param: param[: -(-param.shape[0] // size)])
        return Fsdp2Unit(0, 0, named, 0, size)

    return make


@pytest.mark.parametrize("travels_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bucket", "fsdp2"])
def test_kernels_do_not_multiply_with_ranks(kind, travels_in, sharded):
    make = bucket if kind == "bucket" else sharded
    few, many = kernels_of(make, 4, travels_in), kernels_of(make, 64, travels_in)
    assert few == many
    multiplies_and_casts = 1 if travels_in == torch.float32 else 2
    assert sum(few.values()) == 1 + 2 * 19 * multiplies_and_casts
