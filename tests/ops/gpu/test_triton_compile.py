"""Every Triton kernel compiled to machine code for each target, without a GPU."""

# Triton has no type information.
# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lightning_superscale.ops.triton.kernels import adamw_low, elementwise, index, reductions  # noqa: E402
from lightning_superscale.ops.types import AdamWScalars  # noqa: E402

POINTERS = {1: "*fp32", 2: "*i16", 3: "*fp16"}
LOW_FLOATS = (*AdamWScalars._fields, "grad_scale", "clip_value")


def _cases() -> list[tuple[str, Any, dict[str, str], dict[str, int | bool]]]:
    """(label, kernel, types of the run-time arguments, compile-time arguments)."""
    cases: list[tuple[str, Any, dict[str, str], dict[str, int | bool]]] = []
    for a, b in ((1, 2), (2, 1), (3, 1), (2, 2)):
        types = {"dst": POINTERS[a], "src": POINTERS[b], "scale": "fp32", "numel": "i64"}
        cases.append((f"cast_scale-{a}{b}", elementwise.cast_scale_kernel, types, {"DST": a, "SRC": b, "BLOCK": 1024}))
        types = {"acc": POINTERS[a], "delta": POINTERS[b], "scale": "fp32", "numel": "i32"}
        cases.append(
            (f"accumulate-{a}{b}", elementwise.accumulate_kernel, types, {"ACC": a, "DELTA": b, "BLOCK": 1024})
        )
    for is_rows, is_src, kind in itertools.product((True, False), (True, False), ("*i16", "*i32")):
        types = {"dst": kind, "src": kind, "indices": "*i64", "rows": "i32", "cols": "i32"}
        types |= dict.fromkeys(("dst_row", "dst_col", "src_row", "src_col"), "i32")
        constants = {"INDEX_ROWS": is_rows, "INDEX_SRC": is_src, "BLOCK_ROWS": 8, "BLOCK_COLS": 128}
        cases.append((f"copy_indexed-{is_rows}-{is_src}-{kind[1:]}", index.copy_indexed_kernel, types, constants))
    for code, pointer in POINTERS.items():
        types = {"x": pointer, "sums": "*fp32", "rows": "i32", "cols": "i32", "row_stride": "i32", "col_stride": "i32"}
        constants = {"DTYPE": code, "BLOCK_ROWS": 64, "BLOCK_COLS": 128}
        cases.append((f"colnorm_blocks-{code}", reductions.colnorm_blocks_kernel, types, constants))
        types = {"x": pointer, "sums": "*fp32", "numel": "i64", "blocks": "i32"}
        constants = {"DTYPE": code, "BLOCK_NUMEL": 4096, "LANES": 16, "TILE": 8}
        cases.append((f"sumsq_blocks-{code}", reductions.sumsq_blocks_kernel, types, constants))
        types = {"x": pointer, "counts": "*i32", "numel": "i64"}
        cases.append(
            (f"count_nonfinite-{code}", reductions.count_nonfinite_kernel, types, {"DTYPE": code, "BLOCK": 4096})
        )
    for state, code, is_compensated in ((1, 3, False), (2, 1, False), (2, 2, False), (2, 2, True)):
        tensors = ("param", "exp_avg", "exp_avg_sq")
        types = dict.fromkeys(tensors, POINTERS[state]) | {"grad": POINTERS[code]}
        types |= dict.fromkeys(("weight_out", "compensation"), "*i16") | {"numel": "i32"}
        types |= {"rows": "*i64", "row_numel": "i64", "row_stride": "i64"}
        types |= {"key": "i64", "first_element": "i64", "step": "i32"} | dict.fromkeys(LOW_FLOATS, "fp32")
        constants = dict.fromkeys(("PARAM", "EXP_AVG", "EXP_AVG_SQ"), state) | {
            "GRAD": code,
            "WEIGHT_OUT": 2,
            "STOCHASTIC": True,
            "COMPENSATED": is_compensated,
            "BY_ROWS": is_compensated,
            "HAS_DECAY": True,
            "HAS_L2": False,
            "SCALE_ON_DEVICE": False,
            "HAS_CLIP": True,
            "MAXIMIZE": False,
            "BLOCK": 512,
        }
        if state == 2 and code == 1:
            types["grad_scale"], constants["SCALE_ON_DEVICE"] = "*fp32", True
        label = f"adamw_low-{state}{code}{'-compensated' if is_compensated else ''}"
        cases.append((label, adamw_low.adamw_low_kernel, types, constants))
    types = {"sums": "*fp32", "out": "*fp32", "cols": "i32"}
    cases.append(("colnorm_total", reductions.colnorm_total_kernel, types, {"BLOCKS": 9, "BLOCK_COLS": 128}))
    return cases


CASES = _cases()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("label", "kernel", "types", "constants"), CASES, ids=[case[0] for case in CASES])
def test_kernel_compiles_to_machine_code(
    label: str, kernel: Any, types: dict[str, str], constants: dict[str, int | bool], arch: int
) -> None:
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False})
    assert len(compiled.asm["cubin"]) > 1000, label
    ptx = compiled.asm["ptx"]
    assert not re.search(r"\b(fma|mad)\.(rn\.)?(ftz\.)?f32", ptx)
    assert not re.search(r"\b(div|sqrt)\.(approx|full)|\.ftz\b", ptx)


def test_every_kernel_has_a_compile_case() -> None:
    kernels = {
        name
        for module in (adamw_low, elementwise, index, reductions)
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel")
    }
    assert kernels == {case[1].__name__ for case in CASES}
