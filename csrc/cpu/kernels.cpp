// Every loop that touches tensor elements, compiled once per instruction set with -DLSS_ISA=<name>.
//
// [Note: One source, equal bits] The file is compiled with -ffp-contract=off: a multiplication and an
// addition are fused exactly where fused() stands, which are the places where torch's own kernels
// fuse, and nowhere else. Loops carry no order that a vector width could change, except the sixteen
// fixed lanes of struct Lanes. So every instruction set gives the same bits, and on fp32 they are those
// of torch.optim.AdamW.
//
// Everything here has internal linkage and nothing comes from the C++ library: an inline function
// compiled for AVX-512 must not be the copy that the linker keeps for every processor.
#include "kernels.h"

#define LSS_CONCAT_(a, b) a##b
#define LSS_CONCAT(a, b) LSS_CONCAT_(a, b)
#define LSS_SIMD _Pragma("omp simd")
#define LSS_INLINE static inline __attribute__((always_inline))

namespace lss {
namespace {

LSS_INLINE uint32_t bits_of(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return u;
}
LSS_INLINE float float_of(uint32_t u) {
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
}

// a * b + c with one rounding.
#if defined(__FMA__) || defined(__aarch64__)
LSS_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// [Note: Fused multiply-add without the instruction] The product of two floats is exact in double.
// The sum is rounded to double, and e is its exact error (Knuth's two-sum). Where e is not zero the
// sum is moved to the neighbour with an odd last bit ("round to odd"); 53 bits rounded to odd and then
// to 24 bits equal one rounding, subnormal results included (Boldo and Melquiond 2008, IEEE TC 57(4),
// theorem 3: needs at least 24 + 2 bits). Double neither overflows nor underflows here. With NaN or
// infinity e is NaN, both comparisons fail, and the sum is passed on.
LSS_INLINE float fused(float a, float b, float c) {
    const double x = static_cast<double>(a) * static_cast<double>(b);
    const double y = c;
    const double s = x + y;
    const double t = s - x;
    const double e = (x - (s - t)) + (y - t);
    // SSE2 has no 64-bit integer comparison, so the two facts needed are taken from bits: 1.0 has an odd
    // exponent field and 0.0 an even one; signs that agree move s away from zero.
    const double is_inexact = __builtin_fabs(e) > 0.0 ? 1.0 : 0.0;
    uint64_t u, v, w;
    __builtin_memcpy(&u, &s, 8);
    __builtin_memcpy(&v, &e, 8);
    __builtin_memcpy(&w, &is_inexact, 8);
    const uint64_t move = (w >> 52) & 1 & ~u;
    const uint64_t down = (u ^ v) >> 63;
    u += move - ((move & down) << 1);
    double r;
    __builtin_memcpy(&r, &u, 8);
    return static_cast<float>(r);
}
#endif

struct F32 {
    using Type = float;
    static constexpr bool wide = true;
    LSS_INLINE float load(float x) { return x; }
    LSS_INLINE float store(float x) { return x; }
};

// An fp32 gradient that `prepare` made, for the kernels that also cover what the plain ones leave out.
struct Prepared : F32 {};

struct BF16 {
    using Type = uint16_t;
    LSS_INLINE float load(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
    // Nearest even; NaN becomes the canonical quiet NaN, which the carry could otherwise turn into infinity.
    LSS_INLINE uint16_t store(float x) {
        const uint32_t u = bits_of(x);
        const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        return static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
    }
};

struct F16 {
    using Type = uint16_t;
    // The half's exponent and fraction moved into place read as a float 2^112 too small; the product is
    // exact, also for subnormal halves. Infinity and NaN need the exponent filled.
    LSS_INLINE float load(uint16_t x) {
        const uint32_t magnitude = x & 0x7fffu;
        const uint32_t u = bits_of(float_of(magnitude << 13) * 0x1p112f);
        const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
        return float_of(u | special | (static_cast<uint32_t>(x & 0x8000u) << 16));
    }
    // Nearest even. Below 2^-14, adding 0.5 leaves the fraction's last bit at 2^-24, the subnormal step.
    LSS_INLINE uint16_t store(float x) {
        const uint32_t u = bits_of(x);
        const uint32_t a = u & 0x7fffffffu;
        const uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
        const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
        uint32_t h = a < 0x38800000u ? subnormal : normal;
        h = a >= 0x47800000u ? 0x7c00u : h;
        h = a > 0x7f800000u ? 0x7e00u : h;
        return static_cast<uint16_t>(h | ((u >> 16) & 0x8000u));
    }
};

struct None {
    using Type = uint16_t;
    LSS_INLINE uint16_t store(float) { return 0; }
};

template <class A, class B>
struct Same {
    static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
    static constexpr bool value = true;
};

// [Note: Division by a constant] With two updates in one loop the divider is the bottleneck, so both
// take x / c without it where the processor fuses (in a single update that was measured to cost more than it
// saves). y + y_rest is 1 / c to twice fp32's precision, so q is off by barely more than half an ulp, the
// remainder x - q c is exact, and y is the correctly rounded 1 / c: then q + remainder * y, fused, is the correctly
// rounded quotient (Markstein 1990, IBM J. Res. Dev. 34(1), theorem 8.1). x is a square root of a float or zero
// and c is between 2^-40 and 1, so nothing over- or underflows; infinity is passed on, NaN stays NaN.
// tests/ops/test_adamw.py compares it with IEEE division over all fractions.
LSS_INLINE float divided(float x, const Scalars &k) {
#if defined(__FMA__) || defined(__aarch64__)
    const float q = fused(x, k.reciprocal, x * k.reciprocal_rest);
    const float remainder = fused(-q, k.bias_correction2_sqrt, x);
    const float quotient = fused(remainder, k.reciprocal, q);
    return x == __builtin_inff() ? x : quotient;
#else
    return x / k.bias_correction2_sqrt;
#endif
}

// Updates p, m, v (fp32, in registers) with an fp32 gradient; the order is _adamw_math's in reference.py.
// `Select`: lerp_base may be other than zero.
enum class Divide { plainly, by_remainder };
template <bool Select, Divide how>
LSS_INLINE void update(float &p, float &m, float &v, float g, const Scalars &k) {
    p = p * k.weight_decay_factor;
    const float base = Select ? float_of((bits_of(m) & ~k.lerp_base) | (bits_of(g) & k.lerp_base)) : m;
    m = fused(k.lerp_weight, g - m, base);
    v = fused(k.one_minus_beta2 * g, g, v * k.beta2);
    const float root = __builtin_sqrtf(v);
    const float denom = (how == Divide::plainly ? root / k.bias_correction2_sqrt : divided(root, k)) + k.eps;
    p = p + (k.neg_step_size * m) / denom;
}

// The same in two halves, for a root taken between them ([Note: Installed root] in ops.cpp).
LSS_INLINE void update_moments(float &m, float &v, float g, const Scalars &k) {
    m = fused(k.lerp_weight, g - m, float_of((bits_of(m) & ~k.lerp_base) | (bits_of(g) & k.lerp_base)));
    v = fused(k.one_minus_beta2 * g, g, v * k.beta2);
}
LSS_INLINE float updated_param(float p, float m, float root, const Scalars &k) {
    const float denom = root / k.bias_correction2_sqrt + k.eps;
    return p * k.weight_decay_factor + (k.neg_step_size * m) / denom;
}

LSS_INLINE uint32_t is_nonfinite(float x) { return (bits_of(x) & 0x7f800000u) == 0x7f800000u ? 1u : 0u; }

// The sixteen lanes of [Note: Sum of squares] in reference.py. A block whose sums are all finite holds no NaN and
// no infinity, so elements are counted only where a lane has left the finite numbers.
typedef float Sixteen __attribute__((vector_size(kLanes * sizeof(float))));

struct Lanes {
    float sums[kLanes];
    uint32_t nonfinite;

    LSS_INLINE void see(Lanes &lanes, const float *x, int64_t n) {
        int64_t i = 0;
        // A vector variable stays in registers; an array would pass through memory at every sixteenth element.
        Sixteen sums;
        __builtin_memcpy(&sums, lanes.sums, sizeof sums);
        for (; i + kLanes <= n; i += kLanes) {
            Sixteen y;
            __builtin_memcpy(&y, x + i, sizeof y);
            sums += y * y;
        }
        __builtin_memcpy(lanes.sums, &sums, sizeof sums);
        for (int j = 0; i + j < n; ++j) lanes.sums[j] += x[i + j] * x[i + j];
        uint32_t left = 0;
        for (int j = 0; j < kLanes; ++j) left |= is_nonfinite(lanes.sums[j]);
        if (__builtin_expect(left != 0, 0)) {
            for (i = 0; i < n; ++i) lanes.nonfinite += is_nonfinite(x[i]);
        }
    }
    LSS_INLINE void close(Lanes &lanes, BlockStats *out) {
        for (int width = kLanes / 2; width >= 1; width /= 2) {
            for (int j = 0; j < width; ++j) lanes.sums[j] += lanes.sums[j + width];
        }
        out->sum = lanes.sums[0];
        out->nonfinite = lanes.nonfinite;
    }
};

// [Note: Strips] Kernels walk blocks of kStatsBlock elements in strips. A strip's main loop leaves the scaled
// gradient in a small buffer, from which its statistics are then taken; they are always taken, since they hide
// behind the divisions of the next strip. Measured alternatives: statistics block by block before the step cost
// a third of it (they stop the memory streams), and inside the main loop they halve the vector width, because
// sixteen lanes of 16-bit elements fill only half a register.
constexpr int64_t kStrip = 256;

// Runs `body` for every j of each strip starting at element i; it must set seen[j].
#define LSS_FOR_STRIPS(...)                                                         \
    for (int64_t start = 0; start < n; start += kStatsBlock, ++out) {               \
        const int64_t end = n - start < kStatsBlock ? n : start + kStatsBlock;      \
        Lanes lanes = {};                                                           \
        for (int64_t i = start; i < end; i += kStrip) {                             \
            const int64_t strip = end - i < kStrip ? end - i : kStrip;              \
            float seen[kStrip];                                                     \
            LSS_SIMD for (int64_t j = 0; j < strip; ++j) __VA_ARGS__                \
            Lanes::see(lanes, seen, strip);                                         \
        }                                                                           \
        Lanes::close(lanes, out);                                                   \
    }

// weight_out may be grad: element i of both is touched in iteration i only, gradient first.
template <class G, class M, class V, class W>
void commit(const AdamwArgs &a, int64_t n, BlockStats *out) {
    float *const p = a.param;
    auto *const m = static_cast<typename M::Type *>(a.exp_avg);
    auto *const v = static_cast<typename V::Type *>(a.exp_avg_sq);
    auto *const g = static_cast<const typename G::Type *>(a.grad);
    auto *const w = static_cast<typename W::Type *>(a.weight_out);
    const Scalars k = *a.k;
    LSS_FOR_STRIPS({
        const float gi = G::load(g[i + j]) * k.grad_scale;
        seen[j] = gi;
        float pi = p[i + j], mi = M::load(m[i + j]), vi = V::load(v[i + j]);
        update<Same<G, Prepared>::value, Divide::plainly>(pi, mi, vi, gi, k);
        p[i + j] = pi;
        m[i + j] = M::store(mi);
        v[i + j] = V::store(vi);
        if constexpr (!Same<W, None>::value) w[i + j] = W::store(pi);
    })
}

template <class G, class M, class V, class W>
void peek(const AdamwArgs &a, int64_t n, BlockStats *out) {
    const float *const p = a.param;
    auto *const m = static_cast<const typename M::Type *>(a.exp_avg);
    auto *const v = static_cast<const typename V::Type *>(a.exp_avg_sq);
    auto *const g = static_cast<const typename G::Type *>(a.grad);
    auto *const w = static_cast<typename W::Type *>(a.weight_out);
    const Scalars k = *a.k;
    LSS_FOR_STRIPS({
        const float gi = G::load(g[i + j]) * k.grad_scale;
        seen[j] = gi;
        float pi = p[i + j], mi = M::load(m[i + j]), vi = V::load(v[i + j]);
        update<Same<G, Prepared>::value, Divide::plainly>(pi, mi, vi, gi, k);
        w[i + j] = W::store(pi);
    })
}

// The peek starts from the moments as stored, so they go through the storage type and back. Statistics are of
// the next gradient.
template <class G, class M, class V, class W>
void commit_peek(const AdamwArgs &a, int64_t n, BlockStats *out) {
    float *const p = a.param;
    auto *const m = static_cast<typename M::Type *>(a.exp_avg);
    auto *const v = static_cast<typename V::Type *>(a.exp_avg_sq);
    auto *const g = static_cast<const typename G::Type *>(a.grad);
    auto *const next = static_cast<const typename G::Type *>(a.next_grad);
    auto *const w = static_cast<typename W::Type *>(a.weight_out);
    const Scalars k = *a.k, next_k = *a.next_k;
    LSS_FOR_STRIPS({
        const float ahead = G::load(next[i + j]) * next_k.grad_scale;
        seen[j] = ahead;
        float pi = p[i + j], mi = M::load(m[i + j]), vi = V::load(v[i + j]);
        update<false, Divide::by_remainder>(pi, mi, vi, G::load(g[i + j]) * k.grad_scale, k);
        const auto ms = M::store(mi);
        const auto vs = V::store(vi);
        p[i + j] = pi;
        m[i + j] = ms;
        v[i + j] = vs;
        mi = M::load(ms);
        vi = V::load(vs);
        update<false, Divide::by_remainder>(pi, mi, vi, ahead, next_k);
        w[i + j] = W::store(pi);
    })
}

// Sixteen elements as fp32. Written with vector types, because GCC puts the conversion of an inner loop of sixteen
// through memory.
LSS_INLINE Sixteen load_sixteen(const float *x, F32) {
    Sixteen y;
    __builtin_memcpy(&y, x, sizeof y);
    return y;
}
LSS_INLINE Sixteen load_sixteen(const uint16_t *x, BF16) {
    typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
    typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
    Halves halves;
    __builtin_memcpy(&halves, x, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    Sixteen y;
    __builtin_memcpy(&y, &words, sizeof y);
    return y;
}
LSS_INLINE Sixteen load_sixteen(const uint16_t *x, F16) {
    float y[kLanes];
    LSS_SIMD for (int j = 0; j < kLanes; ++j) y[j] = F16::load(x[j]);
    return load_sixteen(y, F32{});
}

// Four blocks side by side: their sums depend on nothing of one another, so the additions overlap.
template <class G>
void sum_blocks(const void *x_, int64_t n, float scale, BlockStats *out) {
    constexpr int kTogether = 4;
    auto *x = static_cast<const typename G::Type *>(x_);
    for (; n >= kTogether * kStatsBlock; n -= kTogether * kStatsBlock, x += kTogether * kStatsBlock) {
        Sixteen sums[kTogether] = {};
        for (int64_t i = 0; i < kStatsBlock; i += kLanes) {
#pragma GCC unroll 4
            for (int b = 0; b < kTogether; ++b) {
                const Sixteen y = load_sixteen(x + b * kStatsBlock + i, G{}) * scale;
                sums[b] += y * y;
            }
        }
        for (int b = 0; b < kTogether; ++b, ++out) {
            Lanes lanes = {};
            __builtin_memcpy(lanes.sums, &sums[b], sizeof sums[b]);
            uint32_t left = 0;
            for (int j = 0; j < kLanes; ++j) left |= is_nonfinite(lanes.sums[j]);
            if (__builtin_expect(left != 0, 0)) {
                for (int64_t i = 0; i < kStatsBlock; ++i) {
                    lanes.nonfinite += is_nonfinite(G::load(x[b * kStatsBlock + i]) * scale);
                }
            }
            Lanes::close(lanes, out);
        }
    }
    LSS_FOR_STRIPS({ seen[j] = G::load(x[i + j]) * scale; })
}

template <class G, class M, class V, bool stored>
void moments(void *m_, void *v_, const void *g_, float *new_m, float *new_v, int64_t n, const Scalars *k_) {
    auto *m = static_cast<typename M::Type *>(m_);
    auto *v = static_cast<typename V::Type *>(v_);
    auto *g = static_cast<const typename G::Type *>(g_);
    const Scalars k = *k_;
    LSS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        float mi = M::load(m[i]), vi = V::load(v[i]);
        update_moments(mi, vi, G::load(g[i]) * k.grad_scale, k);
        new_m[i] = mi;
        new_v[i] = vi;
        if constexpr (stored) {
            m[i] = M::store(mi);
            v[i] = V::store(vi);
        }
    }
}

template <class W, bool stored>
void param(float *p, const float *new_m, const float *root, void *w_, int64_t n, const Scalars *k_) {
    auto *w = static_cast<typename W::Type *>(w_);
    const Scalars k = *k_;
    LSS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const float pi = updated_param(p[i], new_m[i], root[i], k);
        if constexpr (stored) p[i] = pi;
        if constexpr (!Same<W, None>::value) w[i] = W::store(pi);
    }
}

template <class G>
void prepare(float *out, const void *g_, const float *p, int64_t n, const Scalars *k_) {
    auto *g = static_cast<const typename G::Type *>(g_);
    const Scalars k = *k_;
    const float limit = k.has_clip ? k.clip_value : __builtin_inff();
    const uint32_t sign = k.maximize ? 0x80000000u : 0u;
    LSS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        float x = G::load(g[i]) * k.grad_scale;
        x = x > limit ? limit : x;  // false for NaN, which stays
        x = x < -limit ? -limit : x;
        out[i] = float_of(bits_of(x) ^ sign);
    }
    if (k.has_l2) {
        LSS_SIMD
        for (int64_t i = 0; i < n; ++i) out[i] = fused(k.l2, p[i], out[i]);
    }
}

template <class G>
int64_t count_nonfinite(const void *x_, int64_t n) {
    auto *x = static_cast<const typename G::Type *>(x_);
    uint32_t count = 0;  // n is at most a chunk
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; ++i) count += is_nonfinite(G::load(x[i]));
    return count;
}

template <class D, class S>
void cast_scale(void *dst_, const void *src_, int64_t n, float scale) {
    auto *dst = static_cast<typename D::Type *>(dst_);
    auto *src = static_cast<const typename S::Type *>(src_);
    LSS_SIMD
    for (int64_t i = 0; i < n; ++i) dst[i] = D::store(S::load(src[i]) * scale);
}

template <class A, class D>
void accumulate(void *acc_, const void *delta_, int64_t n, float scale) {
    auto *acc = static_cast<typename A::Type *>(acc_);
    auto *delta = static_cast<const typename D::Type *>(delta_);
    LSS_SIMD
    for (int64_t i = 0; i < n; ++i) acc[i] = A::store(A::load(acc[i]) + D::load(delta[i]) * scale);
}

// At most kColnormRows rows of a strip of columns: adds their squares to `block` (zeroed here) row by
// row, and `block` to `total`.
template <class G>
void colnorm(const void *x_, int64_t rows, int64_t stride, int64_t cols, float *block, float *total) {
    for (int64_t c = 0; c < cols; ++c) block[c] = 0.0f;
    for (int64_t r = 0; r < rows; ++r) {
        auto *x = static_cast<const typename G::Type *>(x_) + r * stride;
        LSS_SIMD
        for (int64_t c = 0; c < cols; ++c) {
            const float y = G::load(x[c]);
            block[c] += y * y;
        }
    }
    LSS_SIMD
    for (int64_t c = 0; c < cols; ++c) total[c] += block[c];
}

void roof(float *p, float *m, float *v, const float *g, int64_t n) {
    LSS_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const float gi = g[i];
        m[i] = m[i] * 0.9f + gi;
        v[i] = v[i] * 0.9f + gi;
        p[i] = p[i] * 0.9f + gi;
    }
}

#define LSS_WEIGHTS(fn, G, M, V) {nullptr, fn<G, M, V, BF16>, fn<G, M, V, F16>, nullptr}
#define LSS_WEIGHTS_OR_NONE(fn, G, M, V) {nullptr, fn<G, M, V, BF16>, fn<G, M, V, F16>, fn<G, M, V, None>}
#define LSS_MOMENTS(row, fn, G) \
    {{row(fn, G, F32, F32), row(fn, G, F32, BF16)}, {row(fn, G, BF16, F32), row(fn, G, BF16, BF16)}}
#define LSS_GRADS(row, fn) LSS_MOMENTS(row, fn, F32), LSS_MOMENTS(row, fn, BF16), LSS_MOMENTS(row, fn, F16)
#define LSS_HALVES(G, stored) \
    {{moments<G, F32, F32, stored>, moments<G, F32, BF16, stored>}, \
     {moments<G, BF16, F32, stored>, moments<G, BF16, BF16, stored>}}
#define LSS_MOMENTS_OF(stored) {LSS_HALVES(F32, stored), LSS_HALVES(BF16, stored), LSS_HALVES(F16, stored)}
#define LSS_PARAMS_OF(stored) {nullptr, param<BF16, stored>, param<F16, stored>, param<None, stored>}
#define LSS_BY_TYPE(fn) {fn<F32>, fn<BF16>, fn<F16>}
#define LSS_BY_TYPES(fn) \
    {{fn<F32, F32>, fn<F32, BF16>, fn<F32, F16>}, \
     {fn<BF16, F32>, fn<BF16, BF16>, fn<BF16, F16>}, \
     {fn<F16, F32>, fn<F16, BF16>, fn<F16, F16>}}

}  // namespace

extern const KernelTable LSS_CONCAT(table_, LSS_ISA);
const KernelTable LSS_CONCAT(table_, LSS_ISA) = {
    {{LSS_GRADS(LSS_WEIGHTS_OR_NONE, commit), LSS_MOMENTS(LSS_WEIGHTS_OR_NONE, commit, Prepared)},
     {LSS_GRADS(LSS_WEIGHTS, peek), LSS_MOMENTS(LSS_WEIGHTS, peek, Prepared)},
     {LSS_GRADS(LSS_WEIGHTS, commit_peek)}},
    {LSS_MOMENTS_OF(false), LSS_MOMENTS_OF(true)},
    {LSS_PARAMS_OF(false), LSS_PARAMS_OF(true)},
    LSS_BY_TYPE(prepare),
    LSS_BY_TYPE(sum_blocks),
    LSS_BY_TYPE(count_nonfinite),
    LSS_BY_TYPES(cast_scale),
    LSS_BY_TYPES(accumulate),
    LSS_BY_TYPE(colnorm),
    roof,
};

}  // namespace lss
