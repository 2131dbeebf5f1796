// The loops of a low-precision update, compiled once per instruction set as part of kernels.cpp.
//
// [Note: Low-precision update] in reference.py: every operation is rounded by itself, so any vector width gives the same
// bits. The pieces work on fp32 buffers that stay in the L1 cache; conversions from and to storage are cast_scale's.
#pragma once
#include "wide.h"

namespace lss {
namespace {

void low_update(float *__restrict p, float *__restrict m, float *__restrict v, const float *__restrict g_, int64_t n,
                const LowScalars *k_) {
    const LowScalars k = *k_;
    const float l2 = k.has_l2 ? k.l2 : 0.0f;
    const uint32_t with_l2 = k.has_l2 ? 0xffffffffu : 0u;
    LSS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        // Without L2 the gradient stays as it is: adding a zero would lose the sign of zero.
        const float decayed = g_[i] + p[i] * l2;
        const float g = float_of((bits_of(decayed) & with_l2) | (bits_of(g_[i]) & ~with_l2));
        m[i] = m[i] + (g - m[i]) * k.lerp_weight;
        v[i] = v[i] * k.beta2 + (g * k.one_minus_beta2) * g;
        const float denom = square_root(v[i]) / k.bias_correction2_sqrt + k.eps;
        p[i] = p[i] * k.weight_decay_factor + (m[i] * k.neg_step_size) / denom;
    }
}

// Philox4x32-10 ([Note: Stochastic rounding] in reference.py) in 64-bit lanes: a multiplication reads just the low
// halves, so what is left in the upper ones does no harm. A lane's words become those of two neighbouring elements.
#if defined(LSS_WIDE)
using Lanes64 = __m512i;
constexpr int64_t kLanes64 = 8;
LSS_INLINE __m512i lanes_of(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
LSS_INLINE __m512i first_lanes(uint64_t x) {
    return _mm512_add_epi64(lanes_of(x), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
LSS_INLINE __m512i low_product(__m512i a, __m512i b) { return _mm512_maskz_mul_epu32(0xff, a, b); }
LSS_INLINE __m512i upper(__m512i x) { return _mm512_maskz_srli_epi64(0xff, x, 32); }
LSS_INLINE __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// [low half of a, low half of b], which is the order of the two elements.
LSS_INLINE __m512i paired(__m512i a, __m512i b) {
    return _mm512_mask_blend_epi32(0xaaaa, a, _mm512_maskz_slli_epi64(0xff, b, 32));
}
LSS_INLINE void put_lanes(uint32_t *to, __m512i x) { __builtin_memcpy(to, &x, sizeof x); }
#else
using Lanes64 = uint64_t;
constexpr int64_t kLanes64 = 1;
LSS_INLINE uint64_t lanes_of(uint64_t x) { return x; }
LSS_INLINE uint64_t first_lanes(uint64_t x) { return x; }
LSS_INLINE uint64_t low_product(uint64_t a, uint64_t b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
LSS_INLINE uint64_t upper(uint64_t x) { return x >> 32; }
LSS_INLINE uint64_t xor3(uint64_t a, uint64_t b, uint64_t c) { return a ^ b ^ c; }
LSS_INLINE uint64_t paired(uint64_t a, uint64_t b) { return (a & 0xffffffffu) | (b << 32); }
LSS_INLINE void put_lanes(uint32_t *to, uint64_t x) {
    to[0] = static_cast<uint32_t>(x);
    to[1] = static_cast<uint32_t>(x >> 32);
}
#endif

void random_words(RandomWords *out, uint64_t key, int64_t first_element, int64_t step, int64_t n) {
    const uint64_t first = static_cast<uint64_t>(first_element) >> 1;
    out->skip = first_element & 1;
    const Lanes64 times0 = lanes_of(0xD2511F53u), times2 = lanes_of(0xCD9E8D57u);
    LSS_SIMD
    for (int64_t i = 0; i < (n + out->skip + 1) / 2; i += kLanes64) {
        Lanes64 c0 = first_lanes(first + static_cast<uint64_t>(i)), c1 = upper(c0);
        Lanes64 c2 = lanes_of(static_cast<uint64_t>(step)), c3 = lanes_of(0);
        uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
        for (int round = 0; round < 10; ++round) {
            const Lanes64 product0 = low_product(c0, times0), product2 = low_product(c2, times2);
            c0 = xor3(upper(product2), c1, lanes_of(k0));
            c2 = xor3(upper(product0), c3, lanes_of(k1));
            c1 = product2;
            c3 = product0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        put_lanes(out->first + 2 * i, paired(c0, c2));
        put_lanes(out->second + 2 * i, paired(c1, c3));
    }
}

void round_stochastic(void *out_, const float *x, const uint32_t *words, int32_t shift, int64_t n) {
    auto *out = static_cast<uint16_t *>(out_);
    LSS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(x[i]), magnitude = bits & 0x7fffffffu;
        // Adding to an infinity's bits would make a NaN, to a NaN's might make a number.
        uint32_t rounded = magnitude >= 0x7f800000u ? bits : bits + ((words[i] >> shift) & 0xffffu);
        rounded = magnitude > 0x7f800000u ? 0x7fc00000u : rounded;
        out[i] = static_cast<uint16_t>(rounded >> 16);
    }
}

// To nearest, and what that lost, to nearest too.
void compensate(void *out_, void *lost_, const float *x, int64_t n) {
    auto *out = static_cast<uint16_t *>(out_);
    auto *lost = static_cast<uint16_t *>(lost_);
    LSS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const uint16_t rounded = BF16::store(x[i]);
        out[i] = rounded;
        lost[i] = BF16::store(x[i] - BF16::load(rounded));
    }
}

}  // namespace
}  // namespace lss
