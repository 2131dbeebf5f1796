// What the kernels compute with: float, and where the compiler targets AVX-512 also sixteen floats in a register.
// A function template over T in {float, Sixteen} gives both the same bits: every operation here is exact, rounds
// correctly or is an integer one.
//
// Internal linkage, for the reason given at the top of kernels.cpp.
#pragma once
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define LSS_WIDE 1
#endif

#define LSS_INLINE static inline __attribute__((always_inline))
#define LSS_METHOD inline __attribute__((always_inline))

namespace lss {
namespace {

typedef float Sixteen __attribute__((vector_size(kLanes * sizeof(float))));

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
LSS_INLINE uint32_t widened(uint16_t x) { return x; }
LSS_INLINE uint16_t lower_half(uint32_t x) { return static_cast<uint16_t>(x); }
LSS_INLINE uint16_t upper_half(uint32_t x) { return static_cast<uint16_t>(x >> 16); }
LSS_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
LSS_INLINE float all(float x, float) { return x; }

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

#if defined(LSS_WIDE)
// The compiler's own vector types do the arithmetic; intrinsics stand where it has no operator, or (conversions
// between 16 and 32 bits) where GCC makes several instructions of one. A mask of all lanes compiles to nothing, but
// keeps GCC 12 from warning of the undefined register in its own header.
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

LSS_INLINE Words bits_of(Sixteen x) { return (Words)x; }
LSS_INLINE Sixteen float_of(Words u) { return (Sixteen)u; }
LSS_INLINE Words widened(Halves x) { return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x); }
LSS_INLINE Halves lower_half(Words x) { return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x); }
// One permutation; a shift and a narrowing conversion would be three operations.
LSS_INLINE Halves upper_half(Words x) {
    const __m512i odd = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512i low = _mm512_maskz_permutexvar_epi16(0xffffffff, odd, (__m512i)x);
    Halves y;
    __builtin_memcpy(&y, &low, sizeof y);
    return y;
}
LSS_INLINE Sixteen square_root(Sixteen x) { return (Sixteen)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }
LSS_INLINE Sixteen all(float x, Sixteen) { return (Sixteen)_mm512_set1_ps(x); }
LSS_INLINE Sixteen fused(Sixteen a, Sixteen b, Sixteen c) {
    return (Sixteen)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#endif

// Scalars beside vectors.
template <class T>
LSS_INLINE T fused(float a, T b, T c) {
    return fused(all(a, b), b, c);
}
template <class T>
LSS_INLINE T fused(T a, float b, T c) {
    return fused(a, all(b, a), c);
}

}  // namespace
}  // namespace lss
