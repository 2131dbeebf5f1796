"""One check per Triton op against the oracle, bit for bit, on "cpu" (interpreted) or "cuda".

Run as a module it prints the outcome of every check as JSON: Triton decides at its first import
whether it interprets, so interpreted checks need a process of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import traceback
from collections.abc import Callable

import torch

from lightning_superscale.ops import reference
from lightning_superscale.ops.triton import adamw_low as adamw_low_op
from lightning_superscale.ops.triton import elementwise, index, reductions
from lightning_superscale.ops.types import GRAD_DTYPES, STATE_DTYPES, AdamWHyper, AdamWSegment, Rounding, RowSelection
from tests.ops.gpu.adamw_cases import HYPERS
from tests.ops.gpu.helpers import assert_same_bits

_SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, 3.39e38, -6.5e4, 1.00390625, 1.01171875, 7e-8]


def _draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, special: bool = True) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if special and x.numel() > 40:
        places = torch.arange(len(_SPECIAL)) * (x.numel() // len(_SPECIAL)) + 3
        x.view(-1)[places] = torch.tensor(_SPECIAL)
    return x.to(dtype)


def check_cast_scale(device: str) -> None:
    for numel, src_dtype, dst_dtype, scale in itertools.product(
        (0, 1, 1023, 5001), GRAD_DTYPES, GRAD_DTYPES, (1.0, 0.3, 1 / 65536)
    ):
        src = _draw((numel,), src_dtype)
        found, expected = torch.zeros(numel, dtype=dst_dtype, device=device), torch.zeros(numel, dtype=dst_dtype)
        elementwise.cast_scale(found, src.to(device), scale)
        reference.cast_scale(expected, src, scale)
        assert_same_bits(found, expected, f"{src_dtype} to {dst_dtype} times {scale}, {numel} elements")


def check_accumulate(device: str) -> None:
    for numel, acc_dtype, delta_dtype, scale in itertools.product((1, 3333), GRAD_DTYPES, GRAD_DTYPES, (1.0, 0.3)):
        acc, delta = _draw((numel,), acc_dtype, 1), _draw((numel,), delta_dtype, 2)
        found = acc.to(device, copy=True)
        elementwise.accumulate(found, delta.to(device), scale)
        reference.accumulate(acc, delta, scale)
        assert_same_bits(found, acc, f"{acc_dtype} += {delta_dtype} * {scale}, {numel} elements")


def _check_index(name: str, device: str) -> None:
    is_rows, is_gather = name.startswith("rows"), name.endswith("gather")
    for (rows, cols), dtype, is_transposed in itertools.product(
        ((19, 301), (1, 1), (130, 7)), (torch.float32, torch.bfloat16, torch.int64, torch.uint8), (False, True)
    ):
        large = (torch.randn(rows, cols, generator=torch.Generator().manual_seed(3)) * 50).to(dtype)
        count = (rows if is_rows else cols) * 2 // 3 + 1 if (rows, cols) != (1, 1) else 1
        picked = torch.randperm(rows if is_rows else cols, generator=torch.Generator().manual_seed(4))[:count]
        shape = (count, cols) if is_rows else (rows, count)
        small = torch.full(shape, 7).to(dtype)
        src, dst = (large, small) if is_gather else (small, large)
        if is_transposed:
            src = src.t().contiguous().t()
        moved = dst.to(device, copy=True)
        getattr(index, name)(moved, src.to(device), picked.to(device))
        getattr(reference, name)(dst, src, picked)
        assert torch.equal(moved.cpu(), dst), (name, rows, cols, dtype, is_transposed)


def check_rows_gather(device: str) -> None:
    _check_index("rows_gather", device)


def check_rows_scatter(device: str) -> None:
    _check_index("rows_scatter", device)


def check_cols_gather(device: str) -> None:
    _check_index("cols_gather", device)


def check_cols_scatter(device: str) -> None:
    _check_index("cols_scatter", device)


def check_colnorm(device: str) -> None:
    for shape, dtype in itertools.product(((1, 1), (64, 128), (65, 129), (200, 300), (0, 5)), GRAD_DTYPES):
        x = _draw(shape, dtype)
        assert_same_bits(reductions.colnorm(x.to(device)), reference.colnorm(x), f"{shape} {dtype}")
    x = _draw((33, 50), torch.float32).t()
    assert_same_bits(reductions.colnorm(x.to(device)), reference.colnorm(x), "transposed")


def check_sumsq(device: str) -> None:
    for numel, dtype in itertools.product((0, 1, 4095, 4096, 40961), GRAD_DTYPES):
        x = _draw((numel,), dtype, special=False)
        assert reductions.sumsq(x.to(device)) == reference.sumsq(x), (numel, dtype)


def check_count_nonfinite(device: str) -> None:
    for numel, dtype in itertools.product((0, 1, 4097, 20000), GRAD_DTYPES):
        x = _draw((numel,), dtype)
        assert reductions.count_nonfinite(x.to(device)) == reference.count_nonfinite(x), (numel, dtype)


def _low_segment(
    master: torch.dtype, moments: tuple[torch.dtype, torch.dtype], grad: torch.dtype, rounding: Rounding, kahan: bool
) -> AdamWSegment:
    numel = 1300
    m, v = (_draw((numel,), dtype, seed, special=False) for seed, dtype in zip((2, 3), moments, strict=True))
    return AdamWSegment(
        param=_draw((numel,), master, 1),
        exp_avg=m,
        exp_avg_sq=v.abs() * 0.01,
        grad=_draw((numel,), grad, 4),
        hyper=HYPERS["adamw"],
        weight_out=torch.zeros(numel, dtype=torch.bfloat16),
        rounding=rounding,
        compensation=_draw((numel,), torch.bfloat16, 5, special=False) * 1e-3 if kahan else None,
    )


def _check_low(name: str, hyper: AdamWHyper, expected: AdamWSegment, device: str) -> None:
    fields = ("param", "exp_avg", "exp_avg_sq", "grad", "weight_out", "compensation", "device_scale")
    moved = {key: getattr(expected, key).to(device, copy=True) for key in fields if getattr(expected, key) is not None}
    found = dataclasses.replace(expected, **moved)
    if expected.selection is not None:
        found.selection = dataclasses.replace(expected.selection, rows=expected.selection.rows.to(device))
    for step in (hyper.step, hyper.step + 1):
        found.hyper = expected.hyper = dataclasses.replace(hyper, step=step)
        adamw_low_op.adamw_low(found)
        reference.adamw_low(expected)
    for field in moved:
        assert_same_bits(getattr(found, field), getattr(expected, field), f"{name} {expected.rounding} {field}")


def check_adamw_low(device: str) -> None:
    bf16, far = torch.bfloat16, 2**33 + 5
    for (name, hyper), grad in itertools.product(HYPERS.items(), GRAD_DTYPES):
        _check_low(name, hyper, _low_segment(bf16, (bf16, bf16), grad, Rounding(True, 2**61 + 17, far), False), device)
    scaled = _low_segment(bf16, (bf16, bf16), bf16, Rounding(True, 7, far), False)
    scaled.device_scale = torch.tensor(0.37)
    _check_low("device_scale", dataclasses.replace(HYPERS["adamw"], grad_scale=1.0), scaled, device)
    by_rows = _low_segment(bf16, (bf16, bf16), bf16, Rounding(True, 7, far), False)
    by_rows.selection = RowSelection(torch.arange(13) ** 2, 100, 2**31 + 7, is_compact=True)
    _check_low("by rows", HYPERS["adamw"], by_rows, device)
    for master, m, v, is_stochastic in itertools.product(STATE_DTYPES, STATE_DTYPES, STATE_DTYPES, (False, True)):
        for kahan in (False, True) if master == bf16 else (False,):
            segment = _low_segment(master, (m, v), bf16, Rounding(is_stochastic, 7, far - 1), kahan)
            _check_low(f"{master} {m} {v}", HYPERS["adamw"], segment, device)


CHECKS: dict[str, Callable[[str], None]] = {
    "cast_scale": check_cast_scale,
    "accumulate": check_accumulate,
    "rows_gather": check_rows_gather,
    "rows_scatter": check_rows_scatter,
    "cols_gather": check_cols_gather,
    "cols_scatter": check_cols_scatter,
    "colnorm": check_colnorm,
    "sumsq": check_sumsq,
    "count_nonfinite": check_count_nonfinite,
    "adamw_low": check_adamw_low,
}


def _outcome(check: Callable[[str], None], device: str) -> str | None:
    try:
        check(device)
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    json.dump({name: _outcome(check, sys.argv[1]) for name, check in CHECKS.items()}, sys.stdout)
