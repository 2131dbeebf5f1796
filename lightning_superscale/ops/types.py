"""The values that every op path takes: one optimizer update's numbers and the tensors it touches.

They are kept apart from the implementations, so that the reference, the native kernel and the GPU kernels
share one vocabulary and none imports another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

STATE_DTYPES = (torch.float32, torch.bfloat16)
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (torch.bfloat16, torch.float16)


class AdamWScalars(NamedTuple):
    """The update's coefficients, each computed in double as `torch.optim.AdamW` does.

    The kernels round every one of them to fp32 once; rounding anything earlier would change bits.
    """

    weight_decay_factor: float  # 1 - lr * weight_decay when decoupled, else 1
    l2: float  # weight_decay when not decoupled, else 0
    lerp_weight: float  # 1 - beta1
    beta2: float
    one_minus_beta2: float
    bias_correction2_sqrt: float
    eps: float
    neg_step_size: float  # -(lr / (1 - beta1**step))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWHyper:
    """The hyperparameters of one AdamW or Adam update of one segment.

    Attributes:
        step: the update's own number, counted from 1, or if `absorbed` is more than 1, the number of steps whose
            gradients the states have then absorbed.
        decoupled: True for AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2);
            False adds `weight_decay * p` to the gradient, as `torch.optim.Adam` does.
        grad_scale: multiplied into the gradient in fp32 before anything else (unscaling and
            clipping by norm share it).
        clip_value: the scaled gradient is limited to [-clip_value, clip_value]; NaN stays NaN.
        maximize: the gradient's sign is flipped after scaling and clipping.
        ieee_sqrt: take IEEE 754's square root, the same on every machine and GPU; otherwise torch's own
            on this machine's CPU, which plain AdamW takes there ([Note: Square root] in reference.py).
        absorbed: number of steps whose mean gradient the update applies at once. The moments forget as much as in so
            many steps: the betas are raised to its power.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    decoupled: bool = True
    maximize: bool = False
    grad_scale: float = 1.0
    clip_value: float | None = None
    ieee_sqrt: bool = False
    absorbed: int = 1

    def scalars(self) -> AdamWScalars:
        """The coefficients of this update."""
        beta1, beta2 = self.beta1**self.absorbed, self.beta2**self.absorbed
        bias_correction1 = 1 - self.beta1**self.step
        bias_correction2 = 1 - self.beta2**self.step
        return AdamWScalars(
            weight_decay_factor=1 - self.lr * self.weight_decay if self.decoupled else 1.0,
            l2=0.0 if self.decoupled else self.weight_decay,
            lerp_weight=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            bias_correction2_sqrt=bias_correction2**0.5,
            eps=self.eps,
            neg_step_size=-(self.lr / bias_correction1),
        )


@dataclass(frozen=True, slots=True)
class Rounding:
    """The rounding of an update of low-precision states ([Note: Low-precision update] in reference.py).

    Attributes:
        is_stochastic: bf16 master weights and moments are rounded up or down at random, so that their mean is
            kept; otherwise to nearest even.
        key: key of the random numbers, in [0, 2**63), made from the run's seed and the parameter's name.
        first_element: the number of the segment's first element within its whole parameter.
    """

    is_stochastic: bool
    key: int = 0
    first_element: int = 0


@dataclass(frozen=True, slots=True)
class RowSelection:
    """Some rows of a segment's states, seen as a matrix of as many rows as fit.

    Attributes:
        rows: [num_rows] int64, contiguous, ascending; on the CPU, or where a compact selection's tensors are.
        row_numel: elements of a row, at least 1.
        row_stride: by how much the numbers of random numbers grow from one row to the next, at least `row_numel`.
        is_compact: whether the states have these rows alone, one after the other, so that only random numbers follow
            the numbers of rows.

    Raises:
        ValueError: rows that are not ascending from 0 on, or sizes out of range.
        TypeError: rows of another dtype, shape or device.
    """

    rows: torch.Tensor
    row_numel: int
    row_stride: int
    is_compact: bool = False

    def __post_init__(self) -> None:
        rows = self.rows
        is_elsewhere = rows.device.type != "cpu" and not self.is_compact
        if rows.dtype != torch.int64 or rows.dim() != 1 or is_elsewhere or not rows.is_contiguous():
            raise TypeError(
                f"rows: expected a contiguous 1D int64 tensor on the CPU, found {tuple(rows.shape)} {rows.dtype} on "
                f"{rows.device}"
            )
        if self.row_numel < 1 or self.row_stride < self.row_numel:
            raise ValueError(
                f"expected row_numel >= 1 and row_stride >= row_numel, found {self.row_numel} and {self.row_stride}"
            )
        if len(rows) and (int(rows[0]) < 0 or not bool((rows[1:] > rows[:-1]).all())):
            raise ValueError("rows: expected numbers from 0 on in ascending order, each once")

    @property
    def numel(self) -> int:
        """Elements of these rows."""
        return len(self.rows) * self.row_numel

    @property
    def end(self) -> int:
        """Elements that a state has at least."""
        if self.is_compact:
            return self.numel
        return (int(self.rows[-1]) + 1) * self.row_numel if len(self.rows) else 0


@dataclass(slots=True, kw_only=True)
class AdamWSegment:
    """The tensors of one contiguous run of elements that share one `AdamWHyper`.

    All tensors are 1D, contiguous, of equal numel (but see `selection`), on one device, and do not overlap (except that
    `grad` and `weight_out` may share memory when their elements have one size: the kernel reads
    an element's gradient before it writes its weight).

    Attributes:
        param: fp32 master weights, bf16 only with `rounding`; written by commit and commit_peek.
        exp_avg, exp_avg_sq: fp32 or bf16 moments (each its own dtype); written by commit and
            commit_peek. The parameter update uses the unrounded fp32 moments; storage rounds to
            nearest even, unless `rounding` says otherwise.
        grad: fp32, bf16 or fp16 gradient of the update to commit (or, in peek, to look ahead to).
        hyper: hyperparameters of the update of `grad`.
        weight_out: optional bf16, fp16 or (on a CPU) fp32 output. commit: the rounded new master. peek and
            commit_peek: the rounded master that a commit of the peeked gradient would give.
        next_grad, next_hyper: commit_peek only: the gradient to look ahead to after `grad` is committed, and its
            hyperparameters.
        rounding: the update is one of low-precision states; None for torch's own order of operations. Then
            `weight_out` of a bf16 `param` is bf16, and gets the very value that `param` gets.
        device_scale: one fp32 element on the tensors' device, by which `grad` is multiplied in place of
            `hyper.grad_scale`, which is 1 then: a clip coefficient that the host need not know.
        compensation: with `rounding` and a bf16 `param`: the bf16 rounding error of `param` (Kahan's), which
            the next update adds; written by commit and commit_peek.
        selection: the rows of `param`, `exp_avg`, `exp_avg_sq` and `compensation` that are updated, on the CPU only
            unless it is compact; `grad`, `next_grad` and `weight_out` have these rows one after the other. None for all
            elements.
    """

    param: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    grad: torch.Tensor
    hyper: AdamWHyper
    weight_out: torch.Tensor | None = None
    next_grad: torch.Tensor | None = None
    next_hyper: AdamWHyper | None = None
    rounding: Rounding | None = None
    compensation: torch.Tensor | None = None
    device_scale: torch.Tensor | None = None
    selection: RowSelection | None = None

    @property
    def numel(self) -> int:
        """Elements that the update reads and writes."""
        return self.grad.numel()

    @property
    def grad_scale(self) -> float | torch.Tensor:
        """The factor that `grad` is multiplied by."""
        return self.hyper.grad_scale if self.device_scale is None else self.device_scale


class GradStats(NamedTuple):
    """Statistics of one segment's gradient from the fused pass (of `next_grad` in commit_peek).

    Attributes:
        sumsq: sum of squares of `grad * grad_scale`, before value clipping.
        nonfinite: number of elements that are NaN or infinite after scaling.
    """

    sumsq: float
    nonfinite: int
