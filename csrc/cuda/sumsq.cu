#include "block_stats.cuh"

namespace lss {
namespace {

struct TensorTable {
  BlockRanges ranges;
  lss_cuda_tensor tensors[kMaxSegments];
};
static_assert(sizeof(TensorTable) + 64 <= 4096, "more than one launch's parameters");

__device__ __forceinline__ bool is_aligned4(const lss_cuda_tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) % (kVec * dtype_bytes(tensor.dtype)) == 0;
}

__global__ void __launch_bounds__(kThreads)
    sumsq_kernel(const __grid_constant__ TensorTable table, float scale, float* block_sums, uint32_t* block_nonfinite) {
  __shared__ BlockStats stats;
  const int t = segment_of_block(table.ranges, blockIdx.x);
  const lss_cuda_tensor& tensor = table.tensors[t];
  const int64_t start = static_cast<int64_t>(blockIdx.x - table.ranges.first[t]) * kBlockNumel;
  const int dtype = tensor.dtype;
  begin_block_stats(stats);
  if (start + kBlockNumel <= tensor.numel && is_aligned4(tensor)) {
    Raw4 raw[kBlockNumel / (kThreads * kVec)];
#pragma unroll
    for (int k = 0; k < kBlockNumel / (kThreads * kVec); ++k) {
      raw[k] = load_raw4(tensor.data, start + (k * kThreads + threadIdx.x) * kVec, dtype);
    }
#pragma unroll
    for (int k = 0; k < kBlockNumel / (kThreads * kVec); ++k) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const int slot = (k * kThreads + threadIdx.x) * kVec + e;
        put_block_stats(stats, slot, __fmul_rn(widen(get_raw4(raw[k], e, dtype), dtype), scale));
      }
    }
  } else {
    for (int slot = threadIdx.x; slot < kBlockNumel; slot += kThreads) {
      const bool inside = start + slot < tensor.numel;
      const float x = inside ? widen(load_raw(tensor.data, start + slot, dtype), dtype) : 0.0f;
      put_block_stats(stats, slot, inside ? __fmul_rn(x, scale) : 0.0f);
    }
  }
  end_block_stats(stats, block_sums + blockIdx.x, block_nonfinite + blockIdx.x);
}

/* One warp per tensor. Sums are loaded 32 at a time and every thread adds them in index order. */
__global__ void finish_stats_kernel(const __grid_constant__ BlockRanges ranges, const float* block_sums,
                                    const uint32_t* block_nonfinite, lss_cuda_grad_stats* stats) {
  const uint32_t end = ranges.first[blockIdx.x + 1];
  double sumsq = 0.0;
  long long nonfinite = 0;
  for (uint32_t base = ranges.first[blockIdx.x]; base < end; base += 32) {
    const uint32_t mine = base + threadIdx.x;
    const float sum = mine < end ? block_sums[mine] : 0.0f;
    nonfinite += mine < end ? block_nonfinite[mine] : 0u;
#pragma unroll
    for (int i = 0; i < 32; ++i) sumsq = __dadd_rn(sumsq, static_cast<double>(__shfl_sync(0xffffffffu, sum, i, 32)));
  }
#pragma unroll
  for (int width = 16; width > 0; width /= 2) nonfinite += __shfl_down_sync(0xffffffffu, nonfinite, width, 32);
  if (threadIdx.x == 0) stats[blockIdx.x] = {sumsq, nonfinite};
}

__global__ void __launch_bounds__(kThreads)
    count_nonfinite_kernel(const __grid_constant__ TensorTable table, unsigned long long* counts) {
  const int t = segment_of_block(table.ranges, blockIdx.x);
  const lss_cuda_tensor& tensor = table.tensors[t];
  const int64_t start = static_cast<int64_t>(blockIdx.x - table.ranges.first[t]) * kBlockNumel;
  const int64_t left = tensor.numel - start;
  const int count = left < kBlockNumel ? static_cast<int>(left) : kBlockNumel;
  unsigned int found = 0;
  if (count == kBlockNumel && is_aligned4(tensor)) {
#pragma unroll
    for (int k = 0; k < kBlockNumel / (kThreads * kVec); ++k) {
      const Raw4 raw = load_raw4(tensor.data, start + (k * kThreads + threadIdx.x) * kVec, tensor.dtype);
#pragma unroll
      for (int e = 0; e < kVec; ++e) found += is_nonfinite(widen(get_raw4(raw, e, tensor.dtype), tensor.dtype));
    }
  } else {
    for (int i = threadIdx.x; i < count; i += kThreads) {
      found += is_nonfinite(widen(load_raw(tensor.data, start + i, tensor.dtype), tensor.dtype));
    }
  }
  /* Integers, and rarely any: the order of these additions does not matter. */
  if (found) atomicAdd(counts + t, static_cast<unsigned long long>(found));
}

/* Fill one launch's table from tensors[begin...]; returns the first tensor that is not in it, or -1
 * where an argument is invalid. */
int64_t fill_table(TensorTable& table, const lss_cuda_tensor* tensors, int64_t begin, int64_t num_tensors) {
  int64_t blocks = 0;
  int count = 0;
  int64_t t = begin;
  for (; t < num_tensors && count < kMaxSegments; ++t, ++count) {
    const lss_cuda_tensor& tensor = tensors[t];
    const int64_t more = num_blocks_of(tensor.numel);
    const bool is_known = tensor.dtype >= LSS_CUDA_F32 && tensor.dtype <= LSS_CUDA_F16;
    if (tensor.numel < 0 || !is_known || (tensor.numel > 0 && !tensor.data) || more > INT32_MAX) return -1;
    if (blocks + more > INT32_MAX) break;
    table.tensors[count] = tensor;
    table.ranges.first[count] = static_cast<uint32_t>(blocks);
    blocks += more;
  }
  table.ranges.first[count] = static_cast<uint32_t>(blocks);
  table.ranges.num_segments = static_cast<uint32_t>(count);
  return t;
}

}  // namespace

int launch_finish_stats(const BlockRanges& ranges, const lss_cuda_stats_out& out, cudaStream_t stream) {
  LSS_LAUNCH(finish_stats_kernel, ranges.num_segments, 32, stream, ranges, out.block_sums, out.block_nonfinite,
             out.stats);
  return cudaGetLastError();
}

}  // namespace lss

extern "C" {

int32_t lss_cuda_abi_version(void) { return LSS_CUDA_ABI_VERSION; }
uint64_t lss_cuda_sizeof_adamw_hyper(void) { return sizeof(lss_cuda_adamw_hyper); }
uint64_t lss_cuda_sizeof_adamw_segment(void) { return sizeof(lss_cuda_adamw_segment); }
uint64_t lss_cuda_sizeof_adamw_call(void) { return sizeof(lss_cuda_adamw_call); }
uint64_t lss_cuda_sizeof_grad_stats(void) { return sizeof(lss_cuda_grad_stats); }
uint64_t lss_cuda_sizeof_stats_out(void) { return sizeof(lss_cuda_stats_out); }
uint64_t lss_cuda_sizeof_tensor(void) { return sizeof(lss_cuda_tensor); }

const char* lss_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int lss_cuda_sumsq(const lss_cuda_tensor* tensors, int64_t num_tensors, float scale,
                   const lss_cuda_stats_out* stats_out, int32_t device, void* stream) {
  if (!stats_out || num_tensors < 0 || (num_tensors > 0 && !stats_out->stats)) return cudaErrorInvalidValue;
  lss::DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  lss_cuda_stats_out out = *stats_out;
  for (int64_t begin = 0; begin < num_tensors;) {
    lss::TensorTable table;
    const int64_t end = lss::fill_table(table, tensors, begin, num_tensors);
    if (end < 0) return cudaErrorInvalidValue;
    const uint32_t blocks = table.ranges.first[table.ranges.num_segments];
    if (blocks > out.num_blocks) return cudaErrorInvalidValue;
    if (blocks > 0) {
      LSS_LAUNCH(lss::sumsq_kernel, blocks, lss::kThreads, on, table, scale, out.block_sums, out.block_nonfinite);
      if (const cudaError_t error = cudaGetLastError()) return error;
    }
    if (const int error = lss::launch_finish_stats(table.ranges, out, on)) return error;
    out.block_sums += blocks, out.block_nonfinite += blocks, out.num_blocks -= blocks, out.stats += end - begin;
    begin = end;
  }
  return cudaSuccess;
}

int lss_cuda_count_nonfinite(const lss_cuda_tensor* tensors, int64_t num_tensors, int64_t* counts, int32_t device,
                             void* stream) {
  if (num_tensors < 0 || (num_tensors > 0 && !counts)) return cudaErrorInvalidValue;
  lss::DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (const cudaError_t error = cudaMemsetAsync(counts, 0, num_tensors * sizeof(int64_t), on)) return error;
  for (int64_t begin = 0; begin < num_tensors;) {
    lss::TensorTable table;
    const int64_t end = lss::fill_table(table, tensors, begin, num_tensors);
    if (end < 0) return cudaErrorInvalidValue;
    const uint32_t blocks = table.ranges.first[table.ranges.num_segments];
    if (blocks > 0) {
      LSS_LAUNCH(lss::count_nonfinite_kernel, blocks, lss::kThreads, on, table,
                 reinterpret_cast<unsigned long long*>(counts + begin));
      if (const cudaError_t error = cudaGetLastError()) return error;
    }
    begin = end;
  }
  return cudaSuccess;
}

}  // extern "C"
