"""The ops of `ops/reference.py` that have a GPU path, each as "module:function"; this module imports none of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_CUDA = "lightning_superscale.ops.cuda.kernels"
_TRITON = "lightning_superscale.ops.triton"

# The bits of these ops equal the CPU kernel's.
CUDA_OPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        name: f"{_CUDA}:{name}"
        for name in ("adamw_commit", "adamw_peek", "adamw_commit_peek", "sumsq", "count_nonfinite")
    }
)

TRITON_OPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cast_scale": f"{_TRITON}.elementwise:cast_scale",
        "accumulate": f"{_TRITON}.elementwise:accumulate",
        "rows_gather": f"{_TRITON}.index:rows_gather",
        "rows_scatter": f"{_TRITON}.index:rows_scatter",
        "cols_gather": f"{_TRITON}.index:cols_gather",
        "cols_scatter": f"{_TRITON}.index:cols_scatter",
        "colnorm": f"{_TRITON}.reductions:colnorm",
        "sumsq": f"{_TRITON}.reductions:sumsq",
        "count_nonfinite": f"{_TRITON}.reductions:count_nonfinite",
        "adamw_low": f"{_TRITON}.adamw_low:adamw_low",
    }
)
