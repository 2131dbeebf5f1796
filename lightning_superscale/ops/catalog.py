"""Every op and its implementations, in one table.

`tests/ops/test_catalog.py` holds the table complete: a compute symbol of csrc/include/lss.h or a public op
function that is missing here, or an implementation without a test, fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lightning_superscale.ops import reference
from lightning_superscale.ops.cpu import adamw, flat
from lightning_superscale.ops.gpu_catalog import CUDA_OPS, TRITON_OPS


@dataclass(frozen=True, slots=True)
class Op:
    """One operation, and the paths that implement it.

    Attributes:
        reference: the oracle, which also runs where no native library was built.
        native: entry point for CPU tensors, synchronous.
        symbol: the function of liblss.so that `native` calls.
        submit: asynchronous entry point for CPU tensors, where there is one.
    """

    name: str
    reference: Callable[..., object]
    native: Callable[..., object] | None
    symbol: str | None
    submit: Callable[..., object] | None = None

    @property
    def cuda(self) -> str | None:
        """The entry point for CUDA tensors in liblss_cuda.so, as "module:function"; None where there is none."""
        return CUDA_OPS.get(self.name)

    @property
    def triton(self) -> str | None:
        """The entry point for CUDA tensors in Triton, as "module:function"; None where there is none."""
        return TRITON_OPS.get(self.name)


_OPS = (
    Op("adamw_commit", reference.adamw_commit, adamw.adamw_commit, "lss_adamw", adamw.submit_adamw_commit),
    Op("adamw_peek", reference.adamw_peek, adamw.adamw_peek, "lss_adamw", adamw.submit_adamw_peek),
    Op(
        "adamw_commit_peek",
        reference.adamw_commit_peek,
        adamw.adamw_commit_peek,
        "lss_adamw",
        adamw.submit_adamw_commit_peek,
    ),
    Op("sumsq", reference.sumsq, flat.sumsq, "lss_sumsq"),
    Op("count_nonfinite", reference.count_nonfinite, flat.count_nonfinite, "lss_count_nonfinite"),
    Op("cast_scale", reference.cast_scale, flat.cast_scale, "lss_cast_scale"),
    Op("accumulate", reference.accumulate, flat.accumulate, "lss_accumulate"),
    Op("rows_gather", reference.rows_gather, flat.rows_gather, "lss_rows_gather"),
    Op("rows_scatter", reference.rows_scatter, flat.rows_scatter, "lss_rows_scatter"),
    Op("cols_gather", reference.cols_gather, flat.cols_gather, "lss_cols_gather"),
    Op("cols_scatter", reference.cols_scatter, flat.cols_scatter, "lss_cols_scatter"),
    Op("colnorm", reference.colnorm, flat.colnorm, "lss_colnorm"),
    Op("copy", reference.copy, None, "lss_copy", flat.submit_copy),
    Op("adamw_low", reference.adamw_low, None, None),
)

OPS: Mapping[str, Op] = MappingProxyType({op.name: op for op in _OPS})
