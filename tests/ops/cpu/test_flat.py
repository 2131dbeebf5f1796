"""The flat ops on every path against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_superscale.ops import reference
from lightning_superscale.ops.cpu import flat
from lightning_superscale.ops.cpu.pool import Pool
from tests.ops.paths import (
    BF16,
    F16,
    F32,
    FALLBACK,
    FLOATS,
    LARGE,
    NATIVE,
    PATHS,
    SIZES,
    THREADS,
    running,
    same,
    values,
)


@pytest.fixture(scope="module", params=THREADS)
def pool(request):
    made = Pool(request.param)
    yield made
    made.close()


def with_specials(x):
    special = torch.tensor(
        [math.nan, math.inf, -math.inf, 65519.0, 65520.0, 65536.0, 6e-8, 3e-8, 2.98e-8, -6.1e-5, 3.4e38]
    )
    if x.numel() > 50:
        x[7 : 7 + special.numel()] = special.to(x.dtype)
    return x


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sumsq_equals_reference(path, dtype, pool):
    with running(path):
        for numel in (*SIZES, LARGE):
            x = values(numel, dtype, scale=3.0)
            assert flat.sumsq(x, pool=pool) == reference.sumsq(x)
            assert flat.sumsq(x) == reference.sumsq(x)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_count_nonfinite_equals_reference(path, dtype):
    with running(path):
        for numel in (*SIZES, LARGE):
            x = with_specials(values(numel, dtype))
            assert flat.count_nonfinite(x) == reference.count_nonfinite(x)
            assert flat.count_nonfinite(x, pool=Pool(2)) == reference.count_nonfinite(x)


@pytest.mark.parametrize("path", PATHS)
def test_sumsq_of_nan_and_infinity_is_not_finite(path):
    with running(path):
        for bad in (math.nan, math.inf, 1e30):
            x = values(5000)
            x[4999] = bad
            assert not math.isfinite(flat.sumsq(x))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("src_dtype", FLOATS)
@pytest.mark.parametrize("dst_dtype", FLOATS)
def test_cast_scale_equals_reference(path, src_dtype, dst_dtype):
    with running(path):
        for numel in (*SIZES, LARGE):
            for scale in (1.0, 0.3):
                src = with_specials(values(numel, src_dtype, scale=100.0))
                ours, oracle = torch.zeros(numel, dtype=dst_dtype), torch.zeros(numel, dtype=dst_dtype)
                flat.cast_scale(ours, src, scale)
                reference.cast_scale(oracle, src, scale)
                assert same(ours, oracle)


@pytest.mark.parametrize("path", NATIVE)
def test_cast_scale_every_16_bit_value_equals_torch(path):
    every = torch.arange(-32768, 32768, dtype=torch.int16)
    with running(path):
        for dtype in (BF16, F16):
            x, out = every.view(dtype), torch.zeros(65536)
            flat.cast_scale(out, x)
            assert same(out, x.float())
            back = torch.zeros(65536, dtype=dtype)
            flat.cast_scale(back, out)
            assert same(back, x)


@pytest.mark.parametrize("path", NATIVE)
def test_cast_scale_near_midpoints_equals_torch(path):
    # Each 16-bit value's fp32 neighbours of the midpoint to the next value: where nearest even is decided.
    every = torch.arange(0, 65536, dtype=torch.int32)
    with running(path):
        for dtype in (BF16, F16):
            lower = every.to(torch.int16).view(dtype).float()
            upper = (every + 1).clamp(max=65535).to(torch.int16).view(dtype).float()
            middle = ((lower.double() + upper.double()) / 2).float()
            x = torch.cat([(middle.view(torch.int32) + d).view(F32) for d in (-1, 0, 1)])
            out = torch.zeros(x.numel(), dtype=dtype)
            flat.cast_scale(out, x)
            assert same(out, x.to(dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("acc_dtype", FLOATS)
@pytest.mark.parametrize("delta_dtype", FLOATS)
def test_accumulate_equals_reference(path, acc_dtype, delta_dtype):
    with running(path):
        for numel in (*SIZES, LARGE):
            for scale in (1.0, 0.7):
                ours = with_specials(values(numel, acc_dtype))
                oracle, delta = ours.clone(), values(numel, delta_dtype, seed=1)
                flat.accumulate(ours, delta, scale)
                reference.accumulate(oracle, delta, scale)
                assert same(ours, oracle)


def test_accumulate_and_cast_scale_in_place():
    for path in PATHS:
        with running(path):
            x = values(1000, BF16)
            twice = x + x
            flat.accumulate(x, x)
            assert same(x, twice)
            y = x.clone()
            flat.cast_scale(y.view(F16), y)
            assert same(y.view(F16), x.to(F16))


SHAPES = ((1, 1), (3, 17), (200, 300), (64, 5), (129, 257), (1000, 1031), (5, 0), (0, 5))


@pytest.mark.parametrize("path", [*NATIVE[:1], FALLBACK])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.int64, torch.uint8])
def test_rows_and_cols_equal_reference(path, dtype, pool):
    generator = torch.Generator().manual_seed(3)
    with running(path):
        for rows, cols in SHAPES:
            x = torch.randint(0, 100, (rows, cols), generator=generator).to(dtype)
            for dim, size in ((0, rows), (1, cols)):
                index = torch.randperm(size, generator=generator)[: (size + 1) // 2]
                names = ("rows_gather", "rows_scatter") if dim == 0 else ("cols_gather", "cols_scatter")
                part = x.index_select(dim, index)
                gathered = torch.zeros_like(part)
                getattr(flat, names[0])(gathered, x, index, pool=pool)
                assert torch.equal(gathered, part)
                ours, oracle = x.clone(), x.clone()
                getattr(flat, names[1])(ours, part + 1, index, pool=pool)
                getattr(reference, names[1])(oracle, part + 1, index)
                assert torch.equal(ours, oracle)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_colnorm_equals_reference(path, dtype):
    with running(path):
        for rows, cols in SHAPES:
            x = values(rows * cols, dtype).view(rows, cols)
            assert same(flat.colnorm(x), reference.colnorm(x))
            assert same(flat.colnorm(x, pool=Pool(2)), reference.colnorm(x))


@pytest.mark.parametrize("path", [*NATIVE[:1], FALLBACK])
def test_submit_copy_equals_source(path, pool):
    with running(path):
        for numel in (*SIZES, LARGE):
            src, dst = values(numel, BF16), torch.zeros(numel, dtype=BF16)
            ticket = flat.submit_copy(dst, src, pool=pool, held=True)
            assert not ticket.is_complete()
            ticket.release()
            ticket.wait()
            assert same(dst, src)


@settings(max_examples=60)
@given(st.lists(st.floats(width=32), max_size=70), st.sampled_from([1.0, 0.5, 3e-5, 1e30]))
def test_flat_arbitrary_numbers_equal_reference(numbers, scale):
    x = torch.tensor(numbers, dtype=F32)
    for path in PATHS:
        with running(path):
            assert flat.count_nonfinite(x) == reference.count_nonfinite(x)
            ours, oracle = flat.sumsq(x), reference.sumsq(x)
            assert ours == oracle or (math.isnan(ours) and math.isnan(oracle))
            for dtype in (BF16, F16):
                a, b = torch.zeros(x.numel(), dtype=dtype), torch.zeros(x.numel(), dtype=dtype)
                flat.cast_scale(a, x, scale)
                reference.cast_scale(b, x, scale)
                assert same(a, b)


def test_flat_wrong_arguments_are_refused():
    x = values(10)
    with pytest.raises(TypeError, match=r"sumsq: x: expected torch.float32"):
        flat.sumsq(x.double())
    with pytest.raises(ValueError, match="contiguous"):
        flat.count_nonfinite(x[::2])
    with pytest.raises(ValueError, match="expected equal numel"):
        flat.cast_scale(x, values(11))
    with pytest.raises(ValueError, match="overlap"):
        flat.accumulate(x[1:], x[:-1])
    with pytest.raises(ValueError, match="expected a CPU tensor"):
        flat.sumsq(torch.zeros(3, device="meta"))
    with pytest.raises(ValueError, match="2D"):
        flat.colnorm(x)
    table, index = values(12).view(3, 4), torch.tensor([0, 3])
    with pytest.raises(IndexError, match="expected indices from 0 to 2, found 0 to 3"):
        flat.rows_gather(torch.zeros(2, 4), table, index)
    with pytest.raises(ValueError, match="the selection of shape"):
        flat.cols_gather(torch.zeros(2, 3), table, index)
    with pytest.raises(TypeError, match="1D int64 index"):
        flat.cols_scatter(table, torch.zeros(3, 2), index.int())
    with pytest.raises(ValueError, match="use cast_scale"):
        flat.submit_copy(x, x.bfloat16())
