/* Four elements of a run-time dtype. The dtype is the same for a whole thread block, so the branches
 * are uniform; loads come raw and are widened later, so that all of a thread's loads are in flight
 * before the first is used. */
#ifndef LSS_VEC_CUH_
#define LSS_VEC_CUH_

#include "adamw_math.cuh"

namespace lss {

constexpr int kVec = 4;

/* F32: one element a word. 16-bit types: two elements a word, in words 0 and 1. */
struct Raw4 {
  uint32_t word[4];
};

__host__ __device__ inline int dtype_bytes(int dtype) {
  return dtype == LSS_CUDA_F32 ? 4 : (dtype == LSS_CUDA_NONE ? 0 : 2);
}

__device__ __forceinline__ Raw4 load_raw4(const void* base, int64_t i, int dtype) {
  Raw4 raw = {};
  if (dtype == LSS_CUDA_F32) {
    const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const uint32_t*>(base) + i);
    raw.word[0] = x.x, raw.word[1] = x.y, raw.word[2] = x.z, raw.word[3] = x.w;
  } else {
    const uint2 x = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(base) + i);
    raw.word[0] = x.x, raw.word[1] = x.y;
  }
  return raw;
}

/* e must be a constant after unrolling, or the array moves to local memory. */
__device__ __forceinline__ uint32_t get_raw4(const Raw4& raw, int e, int dtype) {
  if (dtype == LSS_CUDA_F32) return raw.word[e];
  return (raw.word[e / 2] >> (16 * (e % 2))) & 0xffffu;
}

__device__ __forceinline__ void set_raw4(Raw4& raw, int e, int dtype, uint32_t bits) {
  if (dtype == LSS_CUDA_F32) {
    raw.word[e] = bits;
  } else {
    raw.word[e / 2] |= bits << (16 * (e % 2));
  }
}

__device__ __forceinline__ uint32_t load_raw(const void* base, int64_t i, int dtype) {
  return dtype == LSS_CUDA_F32 ? static_cast<const uint32_t*>(base)[i] : static_cast<const uint16_t*>(base)[i];
}

__device__ __forceinline__ float widen(uint32_t bits, int dtype) {
  if (dtype == LSS_CUDA_F32) return __uint_as_float(bits);
  return dtype == LSS_CUDA_BF16 ? widen_bf16(static_cast<uint16_t>(bits)) : widen_f16(static_cast<uint16_t>(bits));
}

__device__ __forceinline__ uint32_t narrow(float x, int dtype) {
  if (dtype == LSS_CUDA_F32) return __float_as_uint(x);
  return dtype == LSS_CUDA_BF16 ? narrow_bf16(x) : narrow_f16(x);
}

__device__ __forceinline__ void store_raw4(void* base, int64_t i, int dtype, const Raw4& raw) {
  if (dtype == LSS_CUDA_F32) {
    uint4 x;
    x.x = raw.word[0], x.y = raw.word[1], x.z = raw.word[2], x.w = raw.word[3];
    *reinterpret_cast<uint4*>(static_cast<uint32_t*>(base) + i) = x;
  } else {
    uint2 x;
    x.x = raw.word[0], x.y = raw.word[1];
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(base) + i) = x;
  }
}

__device__ __forceinline__ void store_raw(void* base, int64_t i, int dtype, uint32_t bits) {
  if (dtype == LSS_CUDA_F32) {
    static_cast<uint32_t*>(base)[i] = bits;
  } else {
    static_cast<uint16_t*>(base)[i] = static_cast<uint16_t>(bits);
  }
}

}  // namespace lss

#endif  // LSS_VEC_CUH_
