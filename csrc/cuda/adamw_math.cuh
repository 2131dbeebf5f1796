/* One element's arithmetic. Every rounding is written out, so that the bits depend on no compiler
 * flag: the explicit __f*_rn operations are never contracted, and the only fused multiply-adds are
 * the __fmaf_rn below, which are those of torch's CPU AdamW. */
#ifndef LSS_ADAMW_MATH_CUH_
#define LSS_ADAMW_MATH_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "lss_cuda.h"

namespace lss {

struct State {
  float p, m, v;
};

__device__ __forceinline__ float widen_bf16(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

/* Nearest even. NaN becomes the quiet NaN that c10::BFloat16 writes. */
__device__ __forceinline__ uint16_t narrow_bf16(float x) {
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ float widen_f16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

__device__ __forceinline__ uint16_t narrow_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }

__device__ __forceinline__ bool is_nonfinite(float x) {
  return (__float_as_uint(x) & 0x7f800000u) == 0x7f800000u;
}

/* Clip and sign; g is already scaled. A NaN compares false twice and stays. */
__device__ __forceinline__ float shape_grad(float g, const lss_cuda_adamw_hyper& h) {
  if (h.flags & LSS_CUDA_CLIP) {
    g = g < -h.clip_value ? -h.clip_value : (g > h.clip_value ? h.clip_value : g);
  }
  return (h.flags & LSS_CUDA_MAXIMIZE) ? -g : g;
}

__device__ __forceinline__ State adamw_update(State s, float g, const lss_cuda_adamw_hyper& h) {
  float p = s.p;
  if (h.flags & LSS_CUDA_DECOUPLED_DECAY) p = __fmul_rn(p, h.weight_decay_factor);
  if (h.flags & LSS_CUDA_L2) g = __fmaf_rn(h.l2, s.p, g);
  /* torch's lerp works from the nearer end; w - 1 is exact there. */
  const bool from_m = fabsf(h.lerp_weight) < 0.5f;
  const float weight = from_m ? h.lerp_weight : __fadd_rn(h.lerp_weight, -1.0f);
  const float m = __fmaf_rn(weight, __fadd_rn(g, -s.m), from_m ? s.m : g);
  const float v = __fmaf_rn(__fmul_rn(h.one_minus_beta2, g), g, __fmul_rn(s.v, h.beta2));
  const float denom = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), h.bias_correction2_sqrt), h.eps);
  return {__fadd_rn(p, __fdiv_rn(__fmul_rn(h.neg_step_size, m), denom)), m, v};
}

}  // namespace lss

#endif  // LSS_ADAMW_MATH_CUH_
