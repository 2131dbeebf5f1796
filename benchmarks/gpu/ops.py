"""Our CUDA and Triton kernels beside torch's: `python -m benchmarks.gpu.ops` prints one JSON object a line.

Rates count every byte that the algorithm must read or write once. The copy roof is torch's own
device-to-device copy of the same run, bytes read plus bytes written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.timing import measure
from lightning_superscale.ops import reference
from lightning_superscale.ops.cuda import kernels
from lightning_superscale.ops.triton import adamw_low, elementwise, index, reductions
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment, Rounding

Row = dict[str, Any]
HYPER = AdamWHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=10)


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal with the oracle in place of the kernels.
        numel: elements of the large cases; many times the L2 cache on a GPU.
        repetitions: of each measurement.
    """

    device: torch.device
    numel: int
    repetitions: int

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type != "cuda"

    def time(self, run: Callable[[], object], moved_bytes: int, roof_gb_s: float | None = None) -> Row:
        return dict(measure(run, self.device, self.repetitions).as_row(moved_bytes, roof_gb_s))

    def op(self, ours: Callable[..., Any], oracle: Callable[..., Any]) -> Callable[..., Any]:
        return oracle if self.is_rehearsal else ours


def copy_roof(setting: Setting) -> Row:
    src = torch.empty(setting.numel * 4, dtype=torch.float32, device=setting.device).normal_()
    dst = torch.empty_like(src)
    return setting.time(lambda: dst.copy_(src), 2 * src.numel() * 4)


def _segment(
    setting: Setting,
    numel: int,
    grad: torch.dtype,
    moments: torch.dtype = torch.float32,
    weight_out: torch.dtype | None = None,
    next_grad: torch.dtype | None = None,
) -> AdamWSegment:
    def draw(dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(numel, device=setting.device).to(dtype)

    return AdamWSegment(
        param=draw(torch.float32),
        exp_avg=draw(moments),
        exp_avg_sq=draw(moments).abs(),
        grad=draw(grad),
        hyper=HYPER,
        weight_out=None if weight_out is None else draw(weight_out),
        next_grad=None if next_grad is None else draw(next_grad),
        next_hyper=None if next_grad is None else replace(HYPER, step=HYPER.step + 1),
    )


def _torch_adamw(setting: Setting, numel: int, variant: str, has_casts: bool) -> Callable[[], None]:
    """torch's optimizer; with casts, the chain bf16 gradient -> fp32 -> step -> bf16 weight."""
    parameter = torch.nn.Parameter(torch.randn(numel, device=setting.device))
    grad = torch.randn(numel, device=setting.device)
    half, out = grad.bfloat16(), grad.bfloat16()
    parameter.grad = grad
    is_fused = variant == "fused"
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=is_fused, foreach=not is_fused)

    def run() -> None:
        if has_casts:
            grad.copy_(half)
        optimizer.step()
        if has_casts:
            out.copy_(parameter.detach())

    return run


def adamw(setting: Setting) -> list[Row]:
    n, roof = setting.numel, copy_roof(setting)
    rows: list[Row] = [{"name": "copy_roof", **roof}]
    bf16, f32 = torch.bfloat16, torch.float32
    commit, peek, commit_peek = (
        setting.op(getattr(kernels, name), getattr(reference, name))
        for name in ("adamw_commit", "adamw_peek", "adamw_commit_peek")
    )
    cases: list[tuple[str, Callable[..., Any], Row, bool, int]] = [
        ("commit f32", commit, {"grad": f32}, False, 28),
        ("commit bf16 in, bf16 out", commit, {"grad": bf16, "weight_out": bf16}, False, 28),
        ("commit bf16 in, bf16 out, stats", commit, {"grad": bf16, "weight_out": bf16}, True, 28),
        (
            "commit bf16 in, bf16 out, bf16 moments",
            commit,
            {"grad": bf16, "weight_out": bf16, "moments": bf16},
            False,
            20,
        ),
        ("peek bf16", peek, {"grad": bf16, "weight_out": bf16}, False, 16),
        ("commit_peek bf16", commit_peek, {"grad": bf16, "weight_out": bf16, "next_grad": bf16}, False, 30),
    ]
    for name, run, options, has_stats, element_bytes in cases:
        segments = [_segment(setting, n, **options)]
        timed = setting.time(partial(run, segments, stats=has_stats), n * element_bytes, roof["gb_s"])
        rows.append({"name": name, "numel": n, **timed})
    for variant in ("fused", "foreach"):
        for has_casts in (False, True):
            name = f"torch {variant}" + (", casts around it" if has_casts else "")
            # Counted as our fused pass: what the task needs, not what the chain moves.
            rows.append(
                {
                    "name": name,
                    "numel": n,
                    **setting.time(_torch_adamw(setting, n, variant, has_casts), n * 28, roof["gb_s"]),
                }
            )
    return rows + _many_segments(setting, commit, roof["gb_s"])


def _many_segments(setting: Setting, commit: Callable[..., Any], roof_gb_s: float) -> list[Row]:
    """Hundreds of small tensors: launches and host work dominate."""
    count, numel = 300, max(setting.numel // 4096, 64)
    segments = [_segment(setting, numel, torch.float32) for _ in range(count)]
    ours = setting.time(lambda: commit(segments), count * numel * 28, roof_gb_s)
    parameters = [torch.nn.Parameter(seg.param.clone()) for seg in segments]
    for parameter, seg in zip(parameters, segments, strict=True):
        parameter.grad = seg.grad
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    theirs = setting.time(optimizer.step, count * numel * 28, roof_gb_s)
    shape = {"segments": count, "numel": numel}
    return [
        {"name": "commit, many segments", **shape, **ours},
        {"name": "torch fused, many tensors", **shape, **theirs},
    ]


def _is_all_finite(x: torch.Tensor) -> torch.Tensor:
    return x.isfinite().all()


def sumsq(setting: Setting) -> list[Row]:
    rows: list[Row] = []
    roof = copy_roof(setting)["gb_s"]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(setting.numel, device=setting.device).to(dtype)
        moved = x.numel() * x.element_size()
        runs: dict[str, Callable[[], Any]] = {
            "cuda grad_stats": partial(setting.op(lambda t: kernels.grad_stats([t]), reference.sumsq), x),
            "cuda count_nonfinite": partial(setting.op(kernels.count_nonfinite, reference.count_nonfinite), x),
            "triton sumsq": partial(setting.op(reductions.sumsq, reference.sumsq), x),
            "triton count_nonfinite": partial(setting.op(reductions.count_nonfinite, reference.count_nonfinite), x),
            "torch linalg.vector_norm": partial(torch.linalg.vector_norm, x, dtype=torch.float32),
            "torch isfinite().all()": partial(_is_all_finite, x),
        }
        for name, run in runs.items():
            rows.append({"name": name, "dtype": str(dtype), "numel": x.numel(), **setting.time(run, moved, roof)})
    return rows


def triton(setting: Setting) -> list[Row]:
    """Each Triton op beside torch's way of doing the same."""
    n, device, roof = setting.numel, setting.device, copy_roof(setting)["gb_s"]
    f32, bf16 = torch.randn(n, device=device), torch.randn(n, device=device).bfloat16()
    cols = 4096 if n >= 1 << 22 else 64
    matrix = torch.randn(n // cols, cols, device=device).bfloat16()
    some_rows = torch.randperm(matrix.shape[0], device=device)[: matrix.shape[0] // 10]
    some_cols = torch.randperm(cols, device=device)[: cols // 10]
    few_rows, few_cols = matrix[some_rows], matrix[:, some_cols].contiguous()
    param, exp_avg, exp_avg_sq = (torch.randn(n, device=device).bfloat16().abs() for _ in range(3))
    low = AdamWSegment(
        param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, grad=bf16, hyper=HYPER, rounding=Rounding(True, 1)
    )

    def pair(
        name: str, ours: str, module: Any, run_torch: Callable[[], Any] | None, moved: int, *arguments: Any
    ) -> list[Row]:
        op = setting.op(getattr(module, ours), getattr(reference, ours))
        rows = [{"name": name, **setting.time(lambda: op(*arguments), moved, roof)}]
        if run_torch is not None:
            rows.append({"name": f"{name}, torch", **setting.time(run_torch, moved, roof)})
        return rows

    torch_colnorm = partial(torch.linalg.vector_norm, matrix, dim=0, dtype=torch.float32)
    row_bytes, col_bytes = 4 * few_rows.numel(), 4 * few_cols.numel()
    return [
        *pair(
            "cast_scale f32 to bf16", "cast_scale", elementwise, lambda: bf16.copy_(f32 * 0.5), 6 * n, bf16, f32, 0.5
        ),
        *pair(
            "accumulate f32 += bf16",
            "accumulate",
            elementwise,
            lambda: f32.add_(bf16, alpha=0.5),
            10 * n,
            f32,
            bf16,
            0.5,
        ),
        *pair("colnorm bf16", "colnorm", reductions, torch_colnorm, 2 * matrix.numel(), matrix),
        *pair(
            "rows_gather",
            "rows_gather",
            index,
            lambda: few_rows.copy_(matrix[some_rows]),
            row_bytes,
            few_rows,
            matrix,
            some_rows,
        ),
        *pair(
            "rows_scatter",
            "rows_scatter",
            index,
            lambda: matrix.index_copy_(0, some_rows, few_rows),
            row_bytes,
            matrix,
            few_rows,
            some_rows,
        ),
        *pair(
            "cols_gather",
            "cols_gather",
            index,
            lambda: few_cols.copy_(matrix[:, some_cols]),
            col_bytes,
            few_cols,
            matrix,
            some_cols,
        ),
        *pair(
            "cols_scatter",
            "cols_scatter",
            index,
            lambda: matrix.index_copy_(1, some_cols, few_cols),
            col_bytes,
            matrix,
            few_cols,
            some_cols,
        ),
        *pair("adamw_low, all bf16", "adamw_low", adamw_low, None, 14 * n, low),
    ]


BENCHMARKS: dict[str, Callable[[Setting], list[Row]]] = {"adamw": adamw, "sumsq": sumsq, "triton": triton}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the oracle on small tensors, on a CPU")
    options = parser.parse_args()
    is_small = options.tiny or options.device == "cpu"
    setting = Setting(torch.device(options.device), 1 << (13 if is_small else 27), repetitions=3 if is_small else 20)
    for group, measure_group in BENCHMARKS.items():
        try:
            rows = measure_group(setting)
        except Exception as error:  # the other groups are still wanted
            print(json.dumps({"row": f"kernels: {group}", "ok": False, "error": f"{type(error).__name__}: {error}"}))
            continue
        for row in rows:
            print(json.dumps({"row": f"kernels: {group}: {row.pop('name')}", "ok": True, **row}), flush=True)
        if not setting.is_rehearsal:
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
