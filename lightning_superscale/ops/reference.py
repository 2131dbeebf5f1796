"""Slow PyTorch version of every op: the oracle that each other path is tested against.

AdamW follows the order of operations of `torch.optim.AdamW`'s single-tensor implementation, so that
on fp32 state and gradients `adamw_commit` is `torch.equal` to it. The ops are written to be read, and
none is tuned. They also run where no native library was built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_superscale.ops.types import AdamWSegment, GradStats, Rounding, RowSelection

# [Note: Sum of squares] A segment is cut into blocks of 4096 elements from its own start. Within a
# block, lane j of 16 adds the squares of elements j, j+16, j+32, ... in that order, in fp32; the 16
# lanes are then added pairwise (8+8, 4+4, 2+2, 1+1); block sums are added in index order in double.
# Every path follows this order, so the result depends neither on the ISA nor on the thread count.
SUMSQ_BLOCK_NUMEL = 4096
SUMSQ_LANES = 16


# [Note: Square root] IEEE 754's correctly rounded root is what SSE2, AVX, NEON and CUDA compute. torch's CPU
# builds with MKL call its vector library, which does not round correctly on every processor: one fp32
# root in six is an ulp off on AMD Zen 4, whatever the tensor's size and alignment. Plain AdamW has those
# bits on a CPU, and IEEE's on a GPU. So an update says which root it takes: `ieee_sqrt=False` equals torch's
# own root on this machine, `True` is the same everywhere (taken in double, whose rounding to fp32 is the
# correct one: 53 >= 2 * 24 + 2 bits).


def _sqrt(x: Tensor, is_ieee: bool) -> Tensor:
    return x.double().sqrt().float() if is_ieee else x.sqrt()


def scaled_grad(seg: AdamWSegment) -> Tensor:
    """The fp32 gradient after scaling, before clipping and the flip of `maximize`."""
    return seg.grad.float() * seg.grad_scale


def _adamw_math(seg: AdamWSegment) -> tuple[Tensor, Tensor, Tensor]:
    """One update, out of place, in fp32: new (param, exp_avg, exp_avg_sq)."""
    param, exp_avg, exp_avg_sq, hyper = seg.param, seg.exp_avg, seg.exp_avg_sq, seg.hyper
    s = hyper.scalars()
    g = scaled_grad(seg)
    if hyper.clip_value is not None:
        g = g.clamp(-hyper.clip_value, hyper.clip_value)
    if hyper.maximize:
        g = -g
    p = param
    if hyper.weight_decay != 0:
        if hyper.decoupled:
            p = p * s.weight_decay_factor
        else:
            g = g.add(p, alpha=s.l2)
    m = exp_avg.float().lerp(g, s.lerp_weight)
    v = exp_avg_sq.float().mul(s.beta2).addcmul(g, g, value=s.one_minus_beta2)
    denom = (_sqrt(v, hyper.ieee_sqrt) / s.bias_correction2_sqrt).add_(s.eps)
    return p.addcdiv(m, denom, value=s.neg_step_size), m, v


def _stats(seg: AdamWSegment) -> GradStats:
    g = scaled_grad(seg)
    return GradStats(sumsq(g), int((~g.isfinite()).sum()))


class _Updated(NamedTuple):
    """The results of an update: new master, moments and compensation."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    compensation: Tensor | None

    def store(self, seg: AdamWSegment) -> None:
        chosen = seg.selection
        states = (seg.param, seg.exp_avg, seg.exp_avg_sq, seg.compensation)
        for state, new in zip(states, self, strict=True):
            if state is None or new is None:
                continue
            if chosen is None or chosen.is_compact:
                state.copy_(new)
            else:
                state.view(-1, chosen.row_numel)[chosen.rows] = new.view(-1, chosen.row_numel).to(state.dtype)


def _of_selection(seg: AdamWSegment) -> AdamWSegment:
    """A segment of copies of the selected rows alone, which it updates whole."""
    chosen = seg.selection
    if chosen is None or chosen.is_compact:
        return seg

    def rows_of(state: Tensor) -> Tensor:
        return state.view(-1, chosen.row_numel)[chosen.rows].view(-1)

    return dataclasses.replace(
        seg,
        param=rows_of(seg.param),
        exp_avg=rows_of(seg.exp_avg),
        exp_avg_sq=rows_of(seg.exp_avg_sq),
        compensation=None if seg.compensation is None else rows_of(seg.compensation),
    )


def _updated(seg: AdamWSegment) -> _Updated:
    seg = _of_selection(seg)
    if seg.rounding is not None:
        return _low_precision_update(seg, seg.rounding)
    return _Updated(*_adamw_math(seg), None)


def adamw_commit(segments: Sequence[AdamWSegment], *, stats: bool = False) -> list[GradStats] | None:
    """Apply `grad` to param, exp_avg, exp_avg_sq in place; write `weight_out` if present.

    Args:
        stats: return the statistics of each segment's scaled gradient; None is returned otherwise.
    """
    seen = [_stats(seg) for seg in segments] if stats else None
    for seg in segments:
        new = _updated(seg)
        new.store(seg)
        if seg.weight_out is not None:
            seg.weight_out.copy_(new.param)
    return seen


def adamw_peek(segments: Sequence[AdamWSegment], *, stats: bool = False) -> list[GradStats] | None:
    """Write to `weight_out` the values that `adamw_commit` would write, and change nothing else."""
    seen = [_stats(seg) for seg in segments] if stats else None
    for seg in segments:
        if seg.weight_out is None:
            raise ValueError("adamw_peek writes only weight_out, and this segment has none")
        seg.weight_out.copy_(_updated(seg).param)
    return seen


def adamw_commit_peek(segments: Sequence[AdamWSegment], *, stats: bool = False) -> list[GradStats] | None:
    """Commit `grad`, then peek `next_grad` from the state as stored; statistics are those of `next_grad`."""
    ahead = []
    for seg in segments:
        if seg.next_grad is None or seg.next_hyper is None:
            raise ValueError("adamw_commit_peek needs next_grad and next_hyper in every segment")
        ahead.append(dataclasses.replace(seg, grad=seg.next_grad, hyper=seg.next_hyper, device_scale=None))
        _updated(seg).store(seg)
    return adamw_peek(ahead, stats=stats)


def sumsq(x: Tensor) -> float:
    """Sum of squares of a 1D tensor, in the fixed order of [Note: Sum of squares]."""
    flat = x.float().reshape(-1)
    pad = -flat.numel() % SUMSQ_BLOCK_NUMEL
    blocks = torch.nn.functional.pad(flat, (0, pad)).view(-1, SUMSQ_BLOCK_NUMEL // SUMSQ_LANES, SUMSQ_LANES)
    lanes = torch.zeros(blocks.shape[0], SUMSQ_LANES, device=flat.device)
    for row in range(blocks.shape[1]):
        lanes = lanes + blocks[:, row] * blocks[:, row]
    width = SUMSQ_LANES
    while width > 1:
        width //= 2
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    total = 0.0
    for block in lanes[:, 0].tolist():
        total += block
    return total


def count_nonfinite(x: Tensor) -> int:
    """Number of NaN and infinite elements."""
    return int((~x.isfinite()).sum())


def cast_scale(dst: Tensor, src: Tensor, scale: float = 1.0) -> None:
    """`dst = (src.float() * scale)`, rounded to nearest even in dst's dtype; any of fp32, bf16, fp16."""
    dst.copy_(src.float() * scale)


def accumulate(acc: Tensor, delta: Tensor, scale: float = 1.0) -> None:
    """`acc += delta.float() * scale` in fp32, rounded once into acc's dtype (fp32, bf16, fp16).

    The product is rounded to fp32 before the sum, as autograd's own accumulation of `delta` does
    when scale is 1.
    """
    acc.copy_(acc.float() + delta.float() * scale)


def rows_gather(dst: Tensor, src: Tensor, rows: Tensor) -> None:
    """`dst[i, :] = src[rows[i], :]`; src [R, C], dst [K, C] of one dtype, rows int64 [K]."""
    dst.copy_(src[rows])


def rows_scatter(dst: Tensor, src: Tensor, rows: Tensor) -> None:
    """`dst[rows[i], :] = src[i, :]`; dst [R, C], src [K, C] of one dtype, rows int64 [K], distinct."""
    dst[rows] = src


def cols_gather(dst: Tensor, src: Tensor, cols: Tensor) -> None:
    """`dst[:, j] = src[:, cols[j]]`; src [R, C], dst [R, K] of one dtype, cols int64 [K]."""
    dst.copy_(src[:, cols])


def cols_scatter(dst: Tensor, src: Tensor, cols: Tensor) -> None:
    """`dst[:, cols[j]] = src[:, j]`; dst [R, C], src [R, K] of one dtype, cols int64 [K], distinct."""
    dst[:, cols] = src


def colnorm(x: Tensor) -> Tensor:
    """Sum of squares of each column of x [R, C], fp32 [C].

    Rows are added in index order within blocks of 64 rows, in fp32; block sums are added in index
    order in fp32, so that the result does not depend on how rows were shared among threads.
    """
    block_rows = 64
    total = torch.zeros(x.shape[1], device=x.device)
    for start in range(0, x.shape[0], block_rows):
        block = torch.zeros(x.shape[1], device=x.device)
        for row in x[start : start + block_rows].float():
            block = block + row * row
        total = total + block
    return total


def copy(dst: Tensor, src: Tensor) -> None:
    """`dst = src`, byte for byte; both of one dtype and numel."""
    dst.copy_(src)


# [Note: Low-precision update] Where master weights or moments are bf16, an update is computed in fp32 from the stored
# values and rounded once for each tensor that it stores. Every operation is rounded by itself (no fused
# multiply-add) and the square root correctly, so that each path can give these bits: AVX-512, a GPU, PyTorch.
# The stored values are rounded
#   - to nearest even; or
#   - stochastically ([Note: Stochastic rounding]); or
#   - with compensation (Kahan 1965): param to nearest, and its rounding error, in bf16 too, is stored beside it.
# A bf16 exp_avg_sq needs stochastic rounding: with beta2 = 0.999 it shrinks by less than half a step of bf16, and
# rounding to nearest keeps it where it is forever.
#
# [Note: Stochastic rounding] A 32-bit float is rounded to bf16 by adding 16 random bits below the bf16
# mantissa and truncating: up with exactly the probability that the dropped bits tell, so that the mean
# is kept. The bits come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
# 1, 2, 3"), whose 128 bits serve two neighbouring elements e: key = that of the parameter, counter =
# (e // 2, step, 0). An even e takes words 0 and 1, an odd one words 2 and 3: param the lower half of the first, exp_avg
# its upper half, exp_avg_sq the lower half of the second. So the bits depend on the parameter, the element and the
# step, and not on the world size, the shard or the chunk in which the update was computed.


def philox(key: int, counter: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four Philox4x32-10 words of each int64 counter, as int64 in [0, 2**32)."""
    mask = 0xFFFFFFFF
    c0, c1 = counter & mask, (counter >> 32) & mask
    c2, c3 = torch.full_like(counter, step), torch.zeros_like(counter)
    k0, k1 = key & mask, (key >> 32) & mask
    for _ in range(10):
        # The 64-bit products wrap into int64's sign, which the mask after the shift removes.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((product2 >> 32) & mask) ^ c1 ^ k0, ((product0 >> 32) & mask) ^ c3 ^ k1
        c1, c3 = product2 & mask, product0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def random_halves(
    rounding: Rounding, numel: int, step: int, device: torch.device, selection: RowSelection | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The 16 random bits of each of `numel` elements, for param, exp_avg and exp_avg_sq, int64."""
    element = torch.arange(numel, device=device)
    if selection is not None:
        row, column = element // selection.row_numel, element % selection.row_numel
        element = selection.rows.to(device)[row] * selection.row_stride + column
    element = element + rounding.first_element
    words = philox(rounding.key, element >> 1, step)
    is_odd = (element & 1).bool()
    first, second = torch.where(is_odd, words[2], words[0]), torch.where(is_odd, words[3], words[1])
    return first & 0xFFFF, first >> 16, second & 0xFFFF


def round_stochastic(x: Tensor, random: Tensor) -> Tensor:
    """fp32 to bf16 with 16 random bits; infinities stay, NaN becomes 0x7fc0."""
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = torch.where(x.isinf(), bits >> 16, (bits + random) >> 16)
    rounded = torch.where(x.isnan(), 0x7FC0, rounded)
    return torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16).view(torch.bfloat16)


def adamw_low(seg: AdamWSegment) -> None:
    """Commit one segment that has a rounding, as `adamw_commit` does; GPUs have a kernel of their own for this op."""
    adamw_commit([seg])


def _low_precision_update(seg: AdamWSegment, rounding: Rounding) -> _Updated:
    hyper, s = seg.hyper, seg.hyper.scalars()
    p, g = seg.param.float(), scaled_grad(seg)
    if seg.compensation is not None:
        p = p + seg.compensation.float()
    if hyper.clip_value is not None:
        g = g.clamp(-hyper.clip_value, hyper.clip_value)
    if hyper.maximize:
        g = -g
    if hyper.weight_decay != 0:
        if hyper.decoupled:
            p = p * s.weight_decay_factor
        else:
            g = g + p * s.l2
    m, v = seg.exp_avg.float(), seg.exp_avg_sq.float()
    m = m + (g - m) * s.lerp_weight
    v = v * s.beta2 + (g * s.one_minus_beta2) * g
    denom = _sqrt(v, is_ieee=True) / s.bias_correction2_sqrt + s.eps
    p = p + (m * s.neg_step_size) / denom
    if seg.compensation is not None:
        rounded = p.to(seg.param.dtype)
        lost = (p - rounded.float()).to(seg.compensation.dtype)
    else:
        rounded, lost = p, None
    if rounding.is_stochastic:
        for_p, for_m, for_v = random_halves(rounding, p.numel(), hyper.step, p.device, seg.selection)
        if lost is None and seg.param.dtype == torch.bfloat16:
            rounded = round_stochastic(p, for_p)
        m = round_stochastic(m, for_m) if seg.exp_avg.dtype == torch.bfloat16 else m
        v = round_stochastic(v, for_v) if seg.exp_avg_sq.dtype == torch.bfloat16 else v
    return _Updated(rounded.to(seg.param.dtype), m, v, lost)
