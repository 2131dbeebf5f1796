// The per-ISA kernels as a table of function pointers, and the numbers they take.
//
// kernels.cpp is compiled once per instruction set into one table each; dispatch.cpp picks one.
#pragma once
#include <cstdint>

namespace lss {

constexpr int64_t kStatsBlock = 4096;  // [Note: Sum of squares] in reference.py
constexpr int kLanes = 16;
constexpr int64_t kChunk = 65536;      // elements per pool item; a multiple of kStatsBlock
constexpr int64_t kColnormRows = 64;
constexpr int64_t kLow = 512;          // elements that a low-precision update works on at a time; even
constexpr int32_t kPreparedGrad = 3;   // index into KernelTable::adamw: a gradient that `prepare` made

// Coefficients of lss_adamw_hyper rounded to fp32.
struct Coefficients {
    float weight_decay_factor, l2, lerp_weight, beta2, one_minus_beta2, bias_correction2_sqrt, eps, neg_step_size;
};

// The same for torch's order of operations, with the lerp branch decided.
struct Scalars : Coefficients {
    float reciprocal, reciprocal_rest;  // of bias_correction2_sqrt: see [Note: Division by a constant]
    float grad_scale, clip_value;
    // All ones when |1 - beta1| >= 0.5 (torch then interpolates from the other end), else zero: a mask,
    // because a bool in the loop keeps some compilers from vectorising it.
    uint32_t lerp_base;
    bool product_is_right;  // also in that Note
    bool plain;  // no l2, clip, sign, lerp_base or odd bias correction: the kernel needs no prepared gradient
    bool has_l2, has_clip, maximize, installed_root;
};

// The same for low-precision states.
struct LowScalars : Coefficients {
    bool has_l2;
};

// The two 32-bit words of each element of at most kLow, from `skip` on: [Note: Stochastic rounding] in reference.py.
struct RandomWords {
    int64_t skip;
    alignas(64) uint32_t first[kLow + 2 * kLanes], second[kLow + 2 * kLanes];
};

struct BlockStats {
    float sum;
    uint32_t nonfinite;
};

struct AdamwArgs {
    float *param;
    void *exp_avg, *exp_avg_sq;
    const void *grad, *next_grad;
    void *weight_out;
    const Scalars *k, *next_k;
};

// Kernels that take statistics start at a multiple of kStatsBlock of their segment and write one BlockStats per
// block: of next_grad in commit_peek, else of grad.
using AdamwFn = void (*)(const AdamwArgs &args, int64_t n, BlockStats *out);
using StatsFn = void (*)(const void *x, int64_t n, float scale, BlockStats *out);
// An update in two halves, for a square root that is taken between them ([Note: Installed root] in ops.cpp).
using MomentsFn = void (*)(void *m, void *v, const void *g, float *new_m, float *new_v, int64_t n, const Scalars *k);
using ParamFn = void (*)(float *p, const float *new_m, const float *root, void *w, int64_t n, const Scalars *k);
using PrepareFn = void (*)(float *out, const void *g, const float *p, int64_t n, const Scalars *k);
using CountFn = int64_t (*)(const void *x, int64_t n);
using CastFn = void (*)(void *dst, const void *src, int64_t n, float scale);
using ColnormFn = void (*)(const void *x, int64_t rows, int64_t stride, int64_t cols, float *block, float *total);
// [Note: Low-precision update] in reference.py, in pieces over buffers of at most kLow elements.
using LowUpdateFn = void (*)(float *p, float *m, float *v, const float *g, int64_t n, const LowScalars *k);
using RandomFn = void (*)(RandomWords *out, uint64_t key, int64_t first_element, int64_t step, int64_t n);
using RoundFn = void (*)(void *bf16, const float *x, const uint32_t *words, int32_t shift, int64_t n);
using CompensateFn = void (*)(void *bf16, void *lost, const float *x, int64_t n);
using RoofFn = void (*)(float *p, float *m, float *v, const float *g, int64_t n);

struct KernelTable {
    AdamwFn adamw[3][4][2][2][4];  // mode, grad (and next_grad) or kPreparedGrad, exp_avg, exp_avg_sq, weight_out
    MomentsFn moments[2][3][2][2];  // stored or not, grad, exp_avg, exp_avg_sq
    ParamFn param[2][4];            // stored or not, weight_out
    PrepareFn prepare[3];
    StatsFn stats[3];
    CountFn count_nonfinite[3];
    CastFn cast_scale[3][3];  // dst, src
    CastFn accumulate[3][3];  // acc, delta
    ColnormFn colnorm[3];
    LowUpdateFn low_update;
    RandomFn random_words;
    RoundFn round_stochastic;
    CompensateFn compensate;
    RoofFn roof;
};

#if defined(__x86_64__)
extern const KernelTable table_generic, table_avx2, table_avx512;
#elif defined(__aarch64__)
extern const KernelTable table_neon;
#else
extern const KernelTable table_generic;
#endif

// The active table; nullptr (and the thread's error text set) when LSS_ISA cannot be honoured.
const KernelTable *kernels();

}  // namespace lss
