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
#include "wide.h"

#define LSS_CONCAT_(a, b) a##b
#define LSS_CONCAT(a, b) LSS_CONCAT_(a, b)
#define LSS_SIMD _Pragma("omp simd")

namespace lss {
namespace {

struct F32 {
    using Type = float;
    template <class T>
    LSS_INLINE T load(T x) { return x; }
    template <class T>
    LSS_INLINE T store(T x) { return x; }
};

// An fp32 gradient that `prepare` made, for the kernels that also cover what the plain ones leave out.
struct Prepared : F32 {};

struct BF16 {
    using Type = uint16_t;
    template <class H>
    LSS_INLINE auto load(H x) { return float_of(widened(x) << 16); }
    // Nearest even; NaN becomes the canonical quiet NaN, which the carry could otherwise turn into infinity.
    template <class T>
    LSS_INLINE auto store(T x) {
        const auto u = bits_of(x);
        const auto rounded = u + 0x7fffu + ((u >> 16) & 1u);
        return upper_half(x == x ? rounded : decltype(u + 0u){} + 0x7fc00000u);
    }
};

struct F16 {
    using Type = uint16_t;
    // The half's exponent and fraction moved into place read as a float 2^112 too small; the product is
    // exact, also for subnormal halves. Infinity and NaN need the exponent filled.
    template <class H>
    LSS_INLINE auto load(H x) {
        const auto h = widened(x);
        using U = decltype(h + 0u);
        const U magnitude = h & 0x7fffu;
        const U u = bits_of(float_of(magnitude << 13) * 0x1p112f);
        const U special = magnitude >= 0x7c00u ? U{} + 0x7f800000u : U{};
        return float_of(u | special | ((h & 0x8000u) << 16));
    }
    // Nearest even. Below 2^-14, adding 0.5 leaves the fraction's last bit at 2^-24, the subnormal step.
    template <class T>
    LSS_INLINE auto store(T x) {
        const auto u = bits_of(x);
        using U = decltype(u + 0u);
        const U a = u & 0x7fffffffu;
        const U normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
        const U subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
        U h = a < 0x38800000u ? subnormal : normal;
        h = a >= 0x47800000u ? U{} + 0x7c00u : h;
        h = a > 0x7f800000u ? U{} + 0x7e00u : h;
        return lower_half(h | ((u >> 16) & 0x8000u));
    }
};

struct None {
    using Type = uint16_t;
    template <class T>
    LSS_INLINE auto store(T x) { return BF16::store(x); }  // never called
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
// and c is between 2^-40 and 1, so nothing over- or underflows. Infinity and NaN give NaN; a quotient is never below
// x, so the comparison changes nothing but to pass on infinity (and it is one instruction, beside the multipliers).
//
// For most c, q itself is right for every x, and vectors, bound by their multipliers, go without the remainder.
// Let x and c be in [1, 2), x = X 2^-23, c = Y 2^-23. The error of x (y + y_rest) and of its first rounding is below
// 2^-48 + 2^-53, so q is wrong only if x / c is that near to a midpoint u 2^-24 (or u 2^-25, when x < c) with u an
// integer: if X 2^24 - u Y = r with |r| <= 1, or X 2^25 - u Y = r with |r| <= 2. r = 0 cannot be, because a quotient
// of floats is never a midpoint. So X is one of a few residues: +-2^-24 or +-2^-25 modulo Y, for an even Y modulo
// Y / 2 (then only r = +-2), and with Y divisible by 4 there is none. is_product_right() in ops.cpp tries them all
// (compare Brisebarre, Muller and Raina 2004, IEEE TC 53(8)); about one c in a hundred fails.
// tests/ops/cpu/test_adamw.py compares with IEEE division over all fractions, and at those residues.
template <class T>
LSS_INLINE T divided(T x, const Scalars &k) {
#if defined(__FMA__) || defined(__aarch64__)
    T q = fused(x, k.reciprocal, x * k.reciprocal_rest);
    // In a loop that the compiler turns into vectors the branch would cost more than the remainder.
    if (Same<T, float>::value || !k.product_is_right) {
        const T remainder = fused(-q, k.bias_correction2_sqrt, x);
        q = fused(remainder, k.reciprocal, q);
    }
    return q > x ? q : x;
#else
    return x / k.bias_correction2_sqrt;
#endif
}

// The update of m and v and then of p, fp32 in registers; the order is _adamw_math's in reference.py. In two halves,
// since the square root between them may come from elsewhere ([Note: Installed root] in ops.cpp).
// `Select`: lerp_base may be other than zero.
template <bool Select, class T>
LSS_INLINE void update_moments(T &m, T &v, T g, const Scalars &k) {
    const T base = Select ? float_of((bits_of(m) & ~k.lerp_base) | (bits_of(g) & k.lerp_base)) : m;
    m = fused(k.lerp_weight, g - m, base);
    v = fused(k.one_minus_beta2 * g, g, v * k.beta2);
}
enum class Divide { plainly, by_remainder };
template <Divide how, class T>
LSS_INLINE T updated_param(T p, T m, T root, const Scalars &k) {
    const T denom = (how == Divide::plainly ? root / k.bias_correction2_sqrt : divided(root, k)) + k.eps;
    return p * k.weight_decay_factor + (k.neg_step_size * m) / denom;
}

LSS_INLINE uint32_t is_nonfinite(float x) { return (bits_of(x) & 0x7f800000u) == 0x7f800000u ? 1u : 0u; }

// The sixteen lanes of [Note: Sum of squares] in reference.py. A block whose sums are all finite holds no NaN and
// no infinity, so elements are counted only where a lane has left the finite numbers.
struct Lanes {
    float sums[kLanes];
    uint32_t nonfinite;

    LSS_INLINE uint32_t have_left(const Lanes &lanes) {
        uint32_t left = 0;
        for (int j = 0; j < kLanes; ++j) left |= is_nonfinite(lanes.sums[j]);
        return __builtin_expect(left != 0, 0);
    }
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
        if (have_left(lanes)) count(lanes, x, n);
    }
    LSS_INLINE void count(Lanes &lanes, const float *x, int64_t n) {
        for (int64_t i = 0; i < n; ++i) lanes.nonfinite += is_nonfinite(x[i]);
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

// [Note: Sixteen at a time] With AVX-512 the sixteen lanes of the statistics are one register, so no strips are
// needed. What decides, measured on Zen 4 in cycles for sixteen elements (a multiplication of sixteen is one):
//   Divider. A square root takes 10 cycles and a division 6, so a step takes 22, and commit_peek, with constant
//   divisions made of multiplications, 32. Loops left to the compiler took 27 and 47.
//   Window. An element's chain of operations is some 100 cycles long, and the processor's registers hold three or
//   four iterations of it. So the chain is cut behind the square root: an iteration begins sixteen elements and
//   finishes the sixteen before.
//   Pipes. Multiplications, comparisons into masks and the issue of divisions share two of the four pipes; the other
//   two have additions, shifts, minimum and maximum. In commit_peek the former are nearly as busy as the divider, so
//   a square root by Newton's iteration (8 multiplications for 10 cycles of the divider) would make it slower.
//   Memory. The processor's own prefetching stops at every page, and may miss the many streams; kAhead elements are
//   far enough, and with 256 the kernels of four fp32 streams got slower.
constexpr int64_t kAhead = 64;

template <class F, class T>
struct Access;
template <class F>
struct Access<F, float> {
    using Stored = typename F::Type;
    LSS_INLINE Stored read(const Stored *x) { return *x; }
    LSS_INLINE void write(Stored *x, Stored y) { *x = y; }
};
#if defined(LSS_WIDE)
template <class F>
struct Access<F, Sixteen> {
    using Stored = decltype(F::store(Sixteen{}));
    LSS_INLINE Stored read(const typename F::Type *x) {
        Stored y;
        __builtin_memcpy(&y, x, sizeof y);
        return y;
    }
    LSS_INLINE void write(typename F::Type *x, Stored y) { __builtin_memcpy(x, &y, sizeof y); }
};
#endif

template <class F, class T>
LSS_INLINE T get(const typename F::Type *x) {
    return F::load(Access<F, T>::read(x));
}
template <class F, class T>
LSS_INLINE void put(typename F::Type *x, T y) {
    Access<F, T>::write(x, F::store(y));
}
// The value as it will be read again.
template <class F, class T>
LSS_INLINE T put_and_get(typename F::Type *x, T y) {
    const auto stored = F::store(y);
    Access<F, T>::write(x, stored);
    return F::load(stored);
}

// Where new weights go. Past the caches, if they are not a gradient's memory: nobody reads them soon, and a plain
// store would first read the line from memory, which is a fourteenth of a step's traffic.
template <class W>
struct Weights {
    typename W::Type *to;
    bool is_a_gradient, past_caches;

    Weights(void *to_, const void *grad, const void *next_grad)
        : to(static_cast<typename W::Type *>(to_)),
          is_a_gradient(to_ == grad || to_ == next_grad),
          past_caches(!is_a_gradient && reinterpret_cast<uintptr_t>(to_) % (kLanes * sizeof(typename W::Type)) == 0) {}
    LSS_METHOD void put(int64_t i, float y) const { to[i] = W::store(y); }
#if defined(LSS_WIDE)
    LSS_METHOD void put(int64_t i, Sixteen y) const {
        const auto stored = W::store(y);
        if (past_caches) {
            if constexpr (sizeof(typename W::Type) == 4) {
                _mm512_stream_ps(to + i, (__m512)stored);
            } else {
                _mm256_stream_si256(reinterpret_cast<__m256i *>(to + i), (__m256i)stored);
            }
        } else {
            __builtin_memcpy(to + i, &stored, sizeof stored);
        }
    }
    // Such stores are not ordered with others: who learns that the step is done must see them.
    LSS_METHOD void end() const {
        if (past_caches) _mm_sfence();
    }
#endif
};

// A prefetch of each line that starts among the sixteen elements kAhead of x.
template <class E>
LSS_INLINE void prefetch(const E *x, int64_t i) {
    if (sizeof(E) == 4 || i % (2 * kLanes) == 0) __builtin_prefetch(x + i + kAhead);
}

// Runs a body for every element, as a whole or in its two halves, and takes the statistics of what it has seen.
#if defined(LSS_WIDE)
// Not inlined: the compiler would make vector loops of the few elements at the end.
template <class Body>
__attribute__((noinline)) float one(const Body &body, int64_t i) {
    return body.whole(i);
}

template <class Body>
LSS_INLINE void for_blocks(const Body body, int64_t n, BlockStats *out) {
    float kept[kStatsBlock];
    const bool keeps = body.overwrites_seen();
    for (int64_t start = 0; start < n; start += kStatsBlock, ++out) {
        const int64_t numel = n - start < kStatsBlock ? n - start : kStatsBlock;
        Sixteen sums = {};
        int64_t i = 0;
        if (numel >= kLanes) {
            auto begun = body.begin(start);
            const auto finish = [&] {
                if (keeps) put<F32>(kept + i, begun.seen);
                sums += begun.seen * begun.seen;
                body.finish(start + i, begun);
                i += kLanes;
            };
            while (i + 2 * kLanes <= numel) {
                body.prefetch_at(start + i);
                const auto next = body.begin(start + i + kLanes);
                finish();
                begun = next;
            }
            finish();
        }
        Lanes lanes = {};
        __builtin_memcpy(lanes.sums, &sums, sizeof sums);
        for (int j = 0; i < numel; ++i, ++j) {
            kept[i] = one(body, start + i);
            lanes.sums[j] += kept[i] * kept[i];
        }
        if (Lanes::have_left(lanes)) {
            for (int64_t j = 0; !keeps && j < numel; ++j) kept[j] = body.template seen<float>(start + j);
            Lanes::count(lanes, kept, numel);
        }
        Lanes::close(lanes, out);
    }
    body.end();
}
#else
template <class Body>
LSS_INLINE void for_blocks(const Body body, int64_t n, BlockStats *out) {
    for (int64_t start = 0; start < n; start += kStatsBlock, ++out) {
        const int64_t end = n - start < kStatsBlock ? n : start + kStatsBlock;
        Lanes lanes = {};
        for (int64_t i = start; i < end; i += kStrip) {
            const int64_t strip = end - i < kStrip ? end - i : kStrip;
            float seen[kStrip];
            LSS_SIMD for (int64_t j = 0; j < strip; ++j) seen[j] = body.whole(i + j);
            Lanes::see(lanes, seen, strip);
        }
        Lanes::close(lanes, out);
    }
}
#endif

#if defined(LSS_WIDE)
// What the first half of an update hands to the second.
struct Begun {
    Sixteen seen, m, root;
};
struct BegunTwice {
    Sixteen seen, m, root, next_m, next_root;
};
#endif

// weight_out may be grad: element i of it is written after element i of the gradient is read.
template <class G, class M, class V, class W, bool stored>
struct Step {
    float *p;
    typename M::Type *m;
    typename V::Type *v;
    const typename G::Type *g;
    Weights<W> w;
    Scalars k;

    explicit Step(const AdamwArgs &a)
        : p(a.param),
          m(static_cast<typename M::Type *>(a.exp_avg)),
          v(static_cast<typename V::Type *>(a.exp_avg_sq)),
          g(static_cast<const typename G::Type *>(a.grad)),
          w(a.weight_out, a.grad, a.next_grad),
          k(*a.k) {}
    template <class T>
    LSS_METHOD T seen(int64_t i) const {
        return get<G, T>(g + i) * k.grad_scale;
    }
    // In one piece: GCC keeps a struct that is handed on in memory, and leaves the loop of a strip scalar.
    LSS_METHOD float whole(int64_t i) const {
        const float gi = seen<float>(i);
        float mi = get<M, float>(m + i), vi = get<V, float>(v + i);
        update_moments<Same<G, Prepared>::value>(mi, vi, gi, k);
        const float pi = updated_param<Divide::plainly>(get<F32, float>(p + i), mi, square_root(vi), k);
        if constexpr (stored) {
            put<M>(m + i, mi);
            put<V>(v + i, vi);
            put<F32>(p + i, pi);
        }
        if constexpr (!Same<W, None>::value) w.put(i, pi);
        return gi;
    }
#if defined(LSS_WIDE)
    LSS_METHOD void prefetch_at(int64_t i) const {
        prefetch(p, i);
        prefetch(m, i);
        prefetch(v, i);
        prefetch(g, i);
    }
    LSS_METHOD Begun begin(int64_t i) const {
        const Sixteen gi = seen<Sixteen>(i);
        Sixteen mi = get<M, Sixteen>(m + i), vi = get<V, Sixteen>(v + i);
        update_moments<Same<G, Prepared>::value>(mi, vi, gi, k);
        if constexpr (stored) {
            put<M>(m + i, mi);
            put<V>(v + i, vi);
        }
        return {gi, mi, square_root(vi)};
    }
    LSS_METHOD void finish(int64_t i, const Begun &x) const {
        const Sixteen pi = updated_param<Divide::plainly>(get<F32, Sixteen>(p + i), x.m, x.root, k);
        if constexpr (stored) put<F32>(p + i, pi);
        if constexpr (!Same<W, None>::value) w.put(i, pi);
    }
    LSS_METHOD bool overwrites_seen() const { return w.is_a_gradient; }
    LSS_METHOD void end() const { w.end(); }
#endif
};

template <class G, class M, class V, class W>
void commit(const AdamwArgs &a, int64_t n, BlockStats *out) {
    for_blocks(Step<G, M, V, W, true>(a), n, out);
}
template <class G, class M, class V, class W>
void peek(const AdamwArgs &a, int64_t n, BlockStats *out) {
    for_blocks(Step<G, M, V, W, false>(a), n, out);
}

// The peek starts from the moments as stored, so they go through the storage type and back. Statistics are of
// the next gradient. Neither root waits for the parameter, so both are taken in the first half.
template <class G, class M, class V, class W>
struct TwoSteps : Step<G, M, V, W, true> {
    using First = Step<G, M, V, W, true>;
    using First::g, First::k, First::m, First::p, First::v, First::w;
    const typename G::Type *next;
    Scalars next_k;

    explicit TwoSteps(const AdamwArgs &a)
        : First(a), next(static_cast<const typename G::Type *>(a.next_grad)), next_k(*a.next_k) {}
    template <class T>
    LSS_METHOD T seen(int64_t i) const {
        return get<G, T>(next + i) * next_k.grad_scale;
    }
    LSS_METHOD float whole(int64_t i) const {
        const float ahead = seen<float>(i);
        float mi = get<M, float>(m + i), vi = get<V, float>(v + i);
        update_moments<false>(mi, vi, get<G, float>(g + i) * k.grad_scale, k);
        const float pi = updated_param<Divide::by_remainder>(get<F32, float>(p + i), mi, square_root(vi), k);
        put<F32>(p + i, pi);
        float next_m = put_and_get<M>(m + i, mi), next_v = put_and_get<V>(v + i, vi);
        update_moments<false>(next_m, next_v, ahead, next_k);
        w.put(i, updated_param<Divide::by_remainder>(pi, next_m, square_root(next_v), next_k));
        return ahead;
    }
#if defined(LSS_WIDE)
    LSS_METHOD void prefetch_at(int64_t i) const {
        First::prefetch_at(i);
        prefetch(next, i);
    }
    LSS_METHOD BegunTwice begin(int64_t i) const {
        const Sixteen ahead = seen<Sixteen>(i);
        Sixteen mi = get<M, Sixteen>(m + i), vi = get<V, Sixteen>(v + i);
        update_moments<false>(mi, vi, get<G, Sixteen>(g + i) * k.grad_scale, k);
        Sixteen next_m = put_and_get<M>(m + i, mi), next_v = put_and_get<V>(v + i, vi);
        update_moments<false>(next_m, next_v, ahead, next_k);
        return {ahead, mi, square_root(vi), next_m, square_root(next_v)};
    }
    LSS_METHOD void finish(int64_t i, const BegunTwice &x) const {
        Sixteen pi = updated_param<Divide::by_remainder>(get<F32, Sixteen>(p + i), x.m, x.root, k);
        put<F32>(p + i, pi);
        pi = updated_param<Divide::by_remainder>(pi, x.next_m, x.next_root, next_k);
        w.put(i, pi);
    }
#endif
};

template <class G, class M, class V, class W>
void commit_peek(const AdamwArgs &a, int64_t n, BlockStats *out) {
    for_blocks(TwoSteps<G, M, V, W>(a), n, out);
}

template <class G>
struct Sum {
    const typename G::Type *x;
    float scale;

    template <class T>
    LSS_METHOD T seen(int64_t i) const {
        return get<G, T>(x + i) * scale;
    }
    LSS_METHOD float whole(int64_t i) const { return seen<float>(i); }
#if defined(LSS_WIDE)
    LSS_METHOD void prefetch_at(int64_t i) const { prefetch(x, i); }
    struct Seen {
        Sixteen seen;
    };
    LSS_METHOD Seen begin(int64_t i) const { return {seen<Sixteen>(i)}; }
    LSS_METHOD void finish(int64_t, const Seen &) const {}
    LSS_METHOD bool overwrites_seen() const { return false; }
    LSS_METHOD void end() const {}
#endif
};

template <class G>
void sum_blocks(const void *x, int64_t n, float scale, BlockStats *out) {
    for_blocks(Sum<G>{static_cast<const typename G::Type *>(x), scale}, n, out);
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
        update_moments<true>(mi, vi, G::load(g[i]) * k.grad_scale, k);
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
        const float pi = updated_param<Divide::plainly>(p[i], new_m[i], root[i], k);
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

}  // namespace
}  // namespace lss

#include "low_kernels.h"

namespace lss {
namespace {

#define LSS_WEIGHTS(fn, G, M, V) {fn<G, M, V, F32>, fn<G, M, V, BF16>, fn<G, M, V, F16>, nullptr}
#define LSS_WEIGHTS_OR_NONE(fn, G, M, V) {fn<G, M, V, F32>, fn<G, M, V, BF16>, fn<G, M, V, F16>, fn<G, M, V, None>}
#define LSS_MOMENTS(row, fn, G) \
    {{row(fn, G, F32, F32), row(fn, G, F32, BF16)}, {row(fn, G, BF16, F32), row(fn, G, BF16, BF16)}}
#define LSS_GRADS(row, fn) LSS_MOMENTS(row, fn, F32), LSS_MOMENTS(row, fn, BF16), LSS_MOMENTS(row, fn, F16)
#define LSS_HALVES(G, stored) \
    {{moments<G, F32, F32, stored>, moments<G, F32, BF16, stored>}, \
     {moments<G, BF16, F32, stored>, moments<G, BF16, BF16, stored>}}
#define LSS_MOMENTS_OF(stored) {LSS_HALVES(F32, stored), LSS_HALVES(BF16, stored), LSS_HALVES(F16, stored)}
#define LSS_PARAMS_OF(stored) {param<F32, stored>, param<BF16, stored>, param<F16, stored>, param<None, stored>}
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
    low_update,
    random_words,
    round_stochastic,
    compensate,
    roof,
};

}  // namespace lss
