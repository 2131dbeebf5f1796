"""Kernel of adamw_low: AdamW on low-precision states ([Note: Low-precision update] in reference.py)."""

# Triton has no type information.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from lightning_superscale.ops.triton.kernels.bits import BF16, load_f32, narrow_bf16, store_rounded, widen_bf16


@triton.jit
def narrow_stochastic(x: tl.tensor, random: tl.tensor) -> tl.tensor:
    """fp32 to bf16 bits (int16): up with the probability that the dropped 16 bits tell."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + (random & 0xFFFF)) >> 16
    # Adding to the bits of an infinity would make a NaN, and adding to those of a NaN might make a number.
    rounded = tl.where((bits & 0x7F800000) == 0x7F800000, bits >> 16, rounded)
    rounded = tl.where(x != x, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def store_state(
    pointers: tl.tensor,
    x: tl.tensor,
    random: tl.tensor,
    mask: tl.tensor,
    DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """Store fp32 values into fp32 or (as int16) bf16 memory, the latter with 16 random bits or to nearest."""
    if STOCHASTIC and DTYPE == BF16:
        tl.store(pointers, narrow_stochastic(x, random), mask=mask)
    else:
        store_rounded(pointers, x, mask, DTYPE)


@triton.jit
def clipped(g: tl.tensor, clip_value: tl.tensor, HAS_CLIP: tl.constexpr, MAXIMIZE: tl.constexpr) -> tl.tensor:
    if HAS_CLIP:
        low_clip = clip_value * -1.0
        g = tl.where(g < low_clip, low_clip, tl.where(g > clip_value, clip_value, g))
    if MAXIMIZE:
        g = g * -1.0  # Triton 3.6 compiles -g to 0 - g, which loses the sign of zero
    return g


@triton.jit
def random_words(key: tl.tensor, element: tl.tensor, step: tl.tensor, zero: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The two words of each element ([Note: Stochastic rounding] in reference.py); `zero` is uint32 of their shape."""
    pair = element >> 1
    low = (pair & 0xFFFFFFFF).to(tl.uint32)
    high = (pair >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(key, low, high, zero + step, zero)
    is_odd = (element & 1) == 1
    return tl.where(is_odd, word2, word0), tl.where(is_odd, word3, word1)


@triton.jit
def number_of(
    index: tl.tensor,
    rows: tl.tensor,
    row_numel: tl.tensor,
    row_stride: tl.tensor,
    mask: tl.tensor,
    BY_ROWS: tl.constexpr,
) -> tl.tensor:
    """The numbers of elements; rows of a compact selection have those that they have in the whole parameter."""
    if BY_ROWS:
        index = tl.load(rows + index // row_numel, mask=mask, other=0) * row_stride + index % row_numel
    return index


@triton.jit
def decayed(
    p: tl.tensor,
    g: tl.tensor,
    weight_decay_factor: tl.tensor,
    l2: tl.tensor,
    HAS_DECAY: tl.constexpr,
    HAS_L2: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Master and gradient with weight decay in one of them, or without any."""
    if HAS_L2:
        g = g + l2 * p
    if HAS_DECAY:
        p = p * weight_decay_factor
    return p, g


@triton.jit
def updated_moments(
    m: tl.tensor, v: tl.tensor, g: tl.tensor, lerp_weight: tl.tensor, beta2: tl.tensor, one_minus_beta2: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    return m + lerp_weight * (g - m), v * beta2 + (one_minus_beta2 * g) * g


@triton.jit
def stepped(
    p: tl.tensor, m: tl.tensor, v: tl.tensor, bias_correction2_sqrt: tl.tensor, eps: tl.tensor, neg_step_size: tl.tensor
) -> tl.tensor:
    denom = tl.div_rn(tl.sqrt_rn(v), bias_correction2_sqrt) + eps
    return p + tl.div_rn(neg_step_size * m, denom)


@triton.jit
def store_master(
    param: tl.tensor,
    weight_out: tl.tensor,
    compensation: tl.tensor,
    p: tl.tensor,
    random: tl.tensor,
    mask: tl.tensor,
    PARAM: tl.constexpr,
    WEIGHT_OUT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COMPENSATED: tl.constexpr,
) -> None:
    """Store the new master and, if there is one, the weight that forward gets."""
    if COMPENSATED:
        rounded = narrow_bf16(p)
        tl.store(compensation, narrow_bf16(p - widen_bf16(rounded)), mask=mask)
        tl.store(param, rounded, mask=mask)
        if WEIGHT_OUT != 0:
            tl.store(weight_out, rounded, mask=mask)
    else:
        store_state(param, p, random, mask, PARAM, STOCHASTIC)
        if WEIGHT_OUT != 0:
            # A bf16 master is the weight, however it was rounded; an fp32 one is rounded to nearest.
            store_state(weight_out, p, random, mask, WEIGHT_OUT, STOCHASTIC and PARAM == BF16)


# Step, key and element change from call to call: they must not become compile-time constants.
@triton.jit(do_not_specialize=["key", "first_element", "row_numel", "row_stride", "step"])
def adamw_low_kernel(  # noqa: PLR0913
    param: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    grad: tl.tensor,
    weight_out: tl.tensor,
    compensation: tl.tensor,
    numel: tl.tensor,
    key: tl.tensor,
    first_element: tl.tensor,
    rows: tl.tensor,
    row_numel: tl.tensor,
    row_stride: tl.tensor,
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
    PARAM: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    GRAD: tl.constexpr,
    WEIGHT_OUT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COMPENSATED: tl.constexpr,
    BY_ROWS: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_L2: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    p = load_f32(param + index, mask, PARAM)
    m = load_f32(exp_avg + index, mask, EXP_AVG)
    v = load_f32(exp_avg_sq + index, mask, EXP_AVG_SQ)
    if COMPENSATED:
        p = p + load_f32(compensation + index, mask, BF16)
    scale = tl.load(grad_scale) if SCALE_ON_DEVICE else grad_scale
    g = clipped(load_f32(grad + index, mask, GRAD) * scale, clip_value, HAS_CLIP, MAXIMIZE)
    p, g = decayed(p, g, weight_decay_factor, l2, HAS_DECAY, HAS_L2)
    m, v = updated_moments(m, v, g, lerp_weight, beta2, one_minus_beta2)
    p = stepped(p, m, v, bias_correction2_sqrt, eps, neg_step_size)
    zero = tl.zeros([BLOCK], dtype=tl.uint32)
    first, second = zero, zero
    if STOCHASTIC:
        number = first_element + number_of(index, rows, row_numel, row_stride, mask, BY_ROWS)
        first, second = random_words(key, number, step, zero)
    store_state(exp_avg + index, m, first >> 16, mask, EXP_AVG, STOCHASTIC)
    store_state(exp_avg_sq + index, v, second, mask, EXP_AVG_SQ, STOCHASTIC)
    to_param, to_weight, to_lost = param + index, weight_out + index, compensation + index
    store_master(to_param, to_weight, to_lost, p, first, mask, PARAM, WEIGHT_OUT, STOCHASTIC, COMPENSATED)
