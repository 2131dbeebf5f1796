"""Kernel of adamw_sr: AdamW on bf16 weights and moments with stochastic rounding."""

# Triton has no type information.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from lightning_superscale.ops.triton.kernels.bits import load_f32, widen_bf16


@triton.jit
def narrow_stochastic(x: tl.tensor, random: tl.tensor) -> tl.tensor:
    """fp32 to bf16 bits (int16): up with the probability that the dropped 16 bits tell."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + (random & 0xFFFF)) >> 16
    # Adding to an infinity's bits would make a NaN, to a NaN's might make a number.
    rounded = tl.where((bits & 0x7F800000) == 0x7F800000, bits >> 16, rounded)
    rounded = tl.where(x != x, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.int16, bitcast=True)


# Step, seed and offset change from call to call: they must not become compile-time constants.
@triton.jit(do_not_specialize=["seed", "offset", "step"])
def adamw_sr_kernel(  # noqa: PLR0913
    param: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    grad: tl.tensor,
    numel: tl.tensor,
    seed: tl.tensor,
    offset: tl.tensor,
    step: tl.tensor,
    weight_decay_factor: tl.tensor,
    l2: tl.tensor,
    lerp_weight: tl.tensor,
    beta2: tl.tensor,
    one_minus_beta2: tl.tensor,
    bias_correction2_sqrt: tl.tensor,
    eps: tl.tensor,
    neg_step_size: tl.tensor,
    grad_scale: tl.tensor,
    clip_value: tl.tensor,
    GRAD: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_L2: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    p = widen_bf16(tl.load(param + index, mask=mask, other=0))
    m = widen_bf16(tl.load(exp_avg + index, mask=mask, other=0))
    v = widen_bf16(tl.load(exp_avg_sq + index, mask=mask, other=0))
    g = load_f32(grad + index, mask, GRAD) * grad_scale
    if HAS_CLIP:
        low_clip = clip_value * -1.0
        g = tl.where(g < low_clip, low_clip, tl.where(g > clip_value, clip_value, g))
    if MAXIMIZE:
        g = g * -1.0  # Triton 3.6 compiles -g to 0 - g, which loses the sign of zero
    if HAS_L2:
        g = g + l2 * p
    if HAS_DECAY:
        p = p * weight_decay_factor
    m = m + lerp_weight * (g - m)
    v = v * beta2 + (one_minus_beta2 * g) * g
    denom = tl.div_rn(tl.sqrt_rn(v), bias_correction2_sqrt) + eps
    p = p + tl.div_rn(neg_step_size * m, denom)

    element = offset + index
    low = (element & 0xFFFFFFFF).to(tl.uint32)
    high = (element >> 32).to(tl.uint32)
    zero = tl.zeros([BLOCK], dtype=tl.uint32)
    random_p, random_m, random_v, _ = tl.philox(seed, low, high, zero + step, zero)
    tl.store(param + index, narrow_stochastic(p, random_p), mask=mask)
    tl.store(exp_avg + index, narrow_stochastic(m, random_m), mask=mask)
    tl.store(exp_avg_sq + index, narrow_stochastic(v, random_v), mask=mask)
