/* Sum of squares in the order of [Note: Sum of squares] of ops/reference.py, and counts of
 * non-finite elements. One thread block owns one block of 4096 elements: all its threads put the
 * squares into shared memory, then half a warp adds them, one lane of the note each. A last kernel
 * adds the block sums of each tensor in index order in double. */
#ifndef LSS_BLOCK_STATS_CUH_
#define LSS_BLOCK_STATS_CUH_

#include "vec.cuh"

namespace lss {

constexpr int kThreads = 256;
constexpr int kBlockNumel = 4096;
constexpr int kLanes = 16;
/* What fits in one launch's 4096 bytes of parameters. */
constexpr int kMaxSegments = 48;

struct BlockStats {
  float square[kBlockNumel];
  unsigned int nonfinite;
};

inline int64_t num_blocks_of(int64_t numel) { return (numel + kBlockNumel - 1) / kBlockNumel; }

__device__ __forceinline__ void begin_block_stats(BlockStats& stats) {
  if (threadIdx.x == 0) stats.nonfinite = 0;
  __syncthreads();
}

/* Slots past the tensor's end must be filled with 0. */
__device__ __forceinline__ void put_block_stats(BlockStats& stats, int slot, float x) {
  stats.square[slot] = __fmul_rn(x, x);
  if (is_nonfinite(x)) atomicAdd(&stats.nonfinite, 1u);
}

__device__ __forceinline__ void end_block_stats(BlockStats& stats, float* block_sum, uint32_t* block_nonfinite) {
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x % kLanes; /* the warp's upper half does the lower half's work again */
  float sum = 0.0f;
#pragma unroll 16
  for (int row = 0; row < kBlockNumel / kLanes; ++row) sum = __fadd_rn(sum, stats.square[row * kLanes + lane]);
#pragma unroll
  for (int width = kLanes / 2; width > 0; width /= 2) {
    sum = __fadd_rn(sum, __shfl_down_sync(0xffffffffu, sum, width, kLanes));
  }
  if (threadIdx.x == 0) {
    *block_sum = sum;
    *block_nonfinite = stats.nonfinite;
  }
}

/* Blocks [first[t], first[t + 1]) belong to tensor t of this launch. */
struct BlockRanges {
  uint32_t first[kMaxSegments + 1];
  uint32_t num_segments;
};

__device__ __forceinline__ int segment_of_block(const BlockRanges& ranges, uint32_t block) {
  int low = 0;
  int high = static_cast<int>(ranges.num_segments);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (ranges.first[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/* Pointers in `out` are already advanced to this launch's first block and segment. */
int launch_finish_stats(const BlockRanges& ranges, const lss_cuda_stats_out& out, cudaStream_t stream);

/* Makes `device` current, and what was current before again at the end of the scope. */
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      switched_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool switched_ = false;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace lss

/* A macro so that the tests can run the same kernels on the CPU. */
#ifndef LSS_LAUNCH
#define LSS_LAUNCH(kernel, grid, threads, stream, ...) kernel<<<(grid), (threads), 0, (stream)>>>(__VA_ARGS__)
#endif

#endif  // LSS_BLOCK_STATS_CUH_
