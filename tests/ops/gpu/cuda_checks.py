"""One check per CUDA op, on a GPU, against the oracle on the CPU, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan

import torch

from lightning_superscale.ops import reference
from lightning_superscale.ops.cuda import kernels
from lightning_superscale.ops.types import GRAD_DTYPES
from tests.ops.gpu.adamw_cases import dtype_segments, hostile_segment
from tests.ops.gpu.helpers import IeeeSqrt, assert_same_segments, move_segment


def _check_adamw(mode: str) -> None:
    for expected in (dtype_segments(mode), [hostile_segment(mode)]):
        segments = [move_segment(seg, "cuda") for seg in expected]
        seen = getattr(kernels, mode)(segments, stats=True)
        with IeeeSqrt():
            wanted = getattr(reference, mode)(expected, stats=True)
        assert_same_segments(segments, expected)
        for found, want in zip(seen.to_host(), wanted, strict=True):
            assert found.nonfinite == want.nonfinite
            assert found.sumsq == want.sumsq or (isnan(want.sumsq) and isnan(found.sumsq)), (found, want)


def check_adamw_commit() -> None:
    _check_adamw("adamw_commit")


def check_adamw_peek() -> None:
    _check_adamw("adamw_peek")


def check_adamw_commit_peek() -> None:
    _check_adamw("adamw_commit_peek")


def check_sumsq() -> None:
    for numel in (0, 1, 4096, 1_000_003):
        for dtype in GRAD_DTYPES:
            x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
            assert kernels.sumsq(x.cuda()) == reference.sumsq(x), (numel, dtype)


def check_count_nonfinite() -> None:
    for dtype in GRAD_DTYPES:
        x = torch.randn(1_000_003, generator=torch.Generator().manual_seed(1)).to(dtype)
        x[::1001] = float("inf")
        x[::777] = float("nan")
        assert kernels.count_nonfinite(x.cuda()) == reference.count_nonfinite(x), dtype


CHECKS: dict[str, Callable[[], None]] = {
    "adamw_commit": check_adamw_commit,
    "adamw_peek": check_adamw_peek,
    "adamw_commit_peek": check_adamw_commit_peek,
    "sumsq": check_sumsq,
    "count_nonfinite": check_count_nonfinite,
}
