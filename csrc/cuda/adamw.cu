#include "block_stats.cuh"

namespace lss {
namespace {

constexpr int kMaxHypers = 8;

struct HyperPair {
  lss_cuda_adamw_hyper hyper;
  lss_cuda_adamw_hyper next_hyper;
};

struct LaunchSegment {
  float* param;
  void* exp_avg;
  void* exp_avg_sq;
  const void* grad;
  void* weight_out;
  const void* next_grad;
  int64_t numel;
  uint8_t exp_avg_dtype, exp_avg_sq_dtype, grad_dtype, weight_out_dtype, next_grad_dtype;
  uint8_t hyper;
  uint8_t is_aligned4; /* every tensor starts at a multiple of four elements */
};

/* Travels as the kernel's parameters: no copy to the device, no lifetime, and every thread reads it
 * through the constant cache. */
struct LaunchTable {
  HyperPair hypers[kMaxHypers];
  LaunchSegment segments[kMaxSegments];
  BlockRanges ranges;
  const float* grad_scale;
  const float* next_grad_scale;
  const float* skip;
  float* block_sums;
  uint32_t* block_nonfinite;
};
static_assert(sizeof(LaunchTable) <= 4096, "more than one launch's parameters");

struct Call {
  lss_cuda_adamw_hyper hyper;
  float scale, next_scale;
  bool is_skipped; /* concerns the gradient that statistics are taken of */
};

struct Element {
  uint32_t m, v, weight; /* bits to store */
  float p;
  float seen; /* the scaled gradient that statistics are taken of */
};

/* All of one element's work; the caller loads and stores. */
template <int kMode>
__device__ __forceinline__ Element step_element(float p, uint32_t m_bits, uint32_t v_bits, uint32_t g_bits,
                                                uint32_t next_bits, const LaunchSegment& segment,
                                                const HyperPair& pair, const Call& call) {
  State state = {p, widen(m_bits, segment.exp_avg_dtype), widen(v_bits, segment.exp_avg_sq_dtype)};
  Element out = {m_bits, v_bits, 0u, p, __fmul_rn(widen(g_bits, segment.grad_dtype), call.scale)};
  float ahead = p;
  if (kMode == LSS_CUDA_COMMIT_PEEK || !call.is_skipped) {
    const State next = adamw_update(state, shape_grad(out.seen, pair.hyper), pair.hyper);
    ahead = next.p;
    if (kMode != LSS_CUDA_PEEK) {
      out.p = next.p;
      out.m = narrow(next.m, segment.exp_avg_dtype);
      out.v = narrow(next.v, segment.exp_avg_sq_dtype);
    }
  }
  if (kMode == LSS_CUDA_COMMIT_PEEK) {
    out.seen = __fmul_rn(widen(next_bits, segment.next_grad_dtype), call.next_scale);
    if (!call.is_skipped) {
      /* From the moments as stored, since that is what a later commit will read. */
      state = {out.p, widen(out.m, segment.exp_avg_dtype), widen(out.v, segment.exp_avg_sq_dtype)};
      ahead = adamw_update(state, shape_grad(out.seen, pair.next_hyper), pair.next_hyper).p;
    }
  }
  out.weight = segment.weight_out_dtype == LSS_CUDA_NONE ? 0u : narrow(ahead, segment.weight_out_dtype);
  return out;
}

template <int kMode, bool kStats>
__device__ __forceinline__ void step_one(int64_t i, int slot, const LaunchSegment& segment, const HyperPair& pair,
                                         const Call& call, BlockStats* stats) {
  const uint32_t next = kMode == LSS_CUDA_COMMIT_PEEK ? load_raw(segment.next_grad, i, segment.next_grad_dtype) : 0u;
  const Element out = step_element<kMode>(
      segment.param[i], load_raw(segment.exp_avg, i, segment.exp_avg_dtype),
      load_raw(segment.exp_avg_sq, i, segment.exp_avg_sq_dtype), load_raw(segment.grad, i, segment.grad_dtype), next,
      segment, pair, call);
  if (kMode != LSS_CUDA_PEEK) {
    segment.param[i] = out.p;
    store_raw(segment.exp_avg, i, segment.exp_avg_dtype, out.m);
    store_raw(segment.exp_avg_sq, i, segment.exp_avg_sq_dtype, out.v);
  }
  if (segment.weight_out_dtype != LSS_CUDA_NONE) {
    store_raw(segment.weight_out, i, segment.weight_out_dtype, out.weight);
  }
  if (kStats) put_block_stats(*stats, slot, out.seen);
}

template <int kMode, bool kStats>
__device__ __forceinline__ void step_four(int64_t i, int slot, const LaunchSegment& segment, const HyperPair& pair,
                                          const Call& call, BlockStats* stats) {
  Raw4 p = load_raw4(segment.param, i, LSS_CUDA_F32);
  Raw4 m = load_raw4(segment.exp_avg, i, segment.exp_avg_dtype);
  Raw4 v = load_raw4(segment.exp_avg_sq, i, segment.exp_avg_sq_dtype);
  const Raw4 g = load_raw4(segment.grad, i, segment.grad_dtype);
  Raw4 next = {};
  if (kMode == LSS_CUDA_COMMIT_PEEK) next = load_raw4(segment.next_grad, i, segment.next_grad_dtype);
  Raw4 new_m = {}, new_v = {}, weight = {};
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    const Element out = step_element<kMode>(
        __uint_as_float(p.word[e]), get_raw4(m, e, segment.exp_avg_dtype), get_raw4(v, e, segment.exp_avg_sq_dtype),
        get_raw4(g, e, segment.grad_dtype), get_raw4(next, e, segment.next_grad_dtype), segment, pair, call);
    p.word[e] = __float_as_uint(out.p);
    set_raw4(new_m, e, segment.exp_avg_dtype, out.m);
    set_raw4(new_v, e, segment.exp_avg_sq_dtype, out.v);
    set_raw4(weight, e, segment.weight_out_dtype, out.weight);
    if (kStats) put_block_stats(*stats, slot + e, out.seen);
  }
  if (kMode != LSS_CUDA_PEEK) {
    store_raw4(segment.param, i, LSS_CUDA_F32, p);
    store_raw4(segment.exp_avg, i, segment.exp_avg_dtype, new_m);
    store_raw4(segment.exp_avg_sq, i, segment.exp_avg_sq_dtype, new_v);
  }
  if (segment.weight_out_dtype != LSS_CUDA_NONE) store_raw4(segment.weight_out, i, segment.weight_out_dtype, weight);
}

template <int kMode, bool kStats>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ LaunchTable table) {
  __shared__ BlockStats stats;
  const int s = segment_of_block(table.ranges, blockIdx.x);
  const LaunchSegment& segment = table.segments[s];
  const HyperPair& pair = table.hypers[segment.hyper];
  const int64_t start = static_cast<int64_t>(blockIdx.x - table.ranges.first[s]) * kBlockNumel;
  Call call;
  call.scale = table.grad_scale ? *table.grad_scale : pair.hyper.grad_scale;
  call.next_scale = table.next_grad_scale ? *table.next_grad_scale : pair.next_hyper.grad_scale;
  call.is_skipped = table.skip && !(*table.skip == 0.0f); /* NaN skips */
  if (kStats) begin_block_stats(stats);
  if (segment.is_aligned4 && start + kBlockNumel <= segment.numel) {
#pragma unroll 1
    for (int k = 0; k < kBlockNumel / (kThreads * kVec); ++k) {
      const int slot = (k * kThreads + static_cast<int>(threadIdx.x)) * kVec;
      step_four<kMode, kStats>(start + slot, slot, segment, pair, call, &stats);
    }
  } else {
#pragma unroll 1
    for (int slot = threadIdx.x; slot < kBlockNumel; slot += kThreads) {
      if (start + slot < segment.numel) {
        step_one<kMode, kStats>(start + slot, slot, segment, pair, call, &stats);
      } else if (kStats) {
        put_block_stats(stats, slot, 0.0f);
      }
    }
  }
  if (kStats) end_block_stats(stats, table.block_sums + blockIdx.x, table.block_nonfinite + blockIdx.x);
}

template <int kMode>
int launch_mode(const LaunchTable& table, uint32_t blocks, cudaStream_t stream) {
  if (table.block_sums) {
    LSS_LAUNCH((adamw_kernel<kMode, true>), blocks, kThreads, stream, table);
  } else {
    LSS_LAUNCH((adamw_kernel<kMode, false>), blocks, kThreads, stream, table);
  }
  return cudaGetLastError();
}

int launch(int mode, const LaunchTable& table, uint32_t blocks, cudaStream_t stream) {
  switch (mode) {
    case LSS_CUDA_COMMIT: return launch_mode<LSS_CUDA_COMMIT>(table, blocks, stream);
    case LSS_CUDA_PEEK: return launch_mode<LSS_CUDA_PEEK>(table, blocks, stream);
    case LSS_CUDA_COMMIT_PEEK: return launch_mode<LSS_CUDA_COMMIT_PEEK>(table, blocks, stream);
    default: return cudaErrorInvalidValue;
  }
}

bool is_state_dtype(int dtype) { return dtype == LSS_CUDA_F32 || dtype == LSS_CUDA_BF16; }
bool is_grad_dtype(int dtype) { return dtype >= LSS_CUDA_F32 && dtype <= LSS_CUDA_F16; }
bool is_weight_dtype(int dtype) { return dtype == LSS_CUDA_BF16 || dtype == LSS_CUDA_F16; }

bool is_valid(const lss_cuda_adamw_segment& s, int mode) {
  if (s.numel < 0 || num_blocks_of(s.numel) > INT32_MAX) return false;
  if (!is_state_dtype(s.exp_avg_dtype) || !is_state_dtype(s.exp_avg_sq_dtype) || !is_grad_dtype(s.grad_dtype)) {
    return false;
  }
  if (mode == LSS_CUDA_COMMIT_PEEK && !is_grad_dtype(s.next_grad_dtype)) return false;
  const bool writes_weight = s.weight_out_dtype != LSS_CUDA_NONE;
  if (writes_weight ? !is_weight_dtype(s.weight_out_dtype) : mode != LSS_CUDA_COMMIT) return false;
  if (s.numel == 0) return true;
  if (writes_weight && !s.weight_out) return false;
  return s.param && s.exp_avg && s.exp_avg_sq && s.grad && (mode != LSS_CUDA_COMMIT_PEEK || s.next_grad);
}

bool is_aligned4(const void* data, int dtype) {
  const int bytes = kVec * dtype_bytes(dtype);
  return bytes == 0 || reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

LaunchSegment to_launch_segment(const lss_cuda_adamw_segment& s, int mode) {
  LaunchSegment out = {s.param,      s.exp_avg,       s.exp_avg_sq,       s.grad,       s.weight_out,
                       s.next_grad,  s.numel,         s.exp_avg_dtype,    s.exp_avg_sq_dtype, s.grad_dtype,
                       s.weight_out_dtype, s.next_grad_dtype, 0, 0};
  if (mode != LSS_CUDA_COMMIT_PEEK) out.next_grad = nullptr, out.next_grad_dtype = LSS_CUDA_NONE;
  out.is_aligned4 = is_aligned4(out.param, LSS_CUDA_F32) && is_aligned4(out.exp_avg, out.exp_avg_dtype) &&
                    is_aligned4(out.exp_avg_sq, out.exp_avg_sq_dtype) && is_aligned4(out.grad, out.grad_dtype) &&
                    is_aligned4(out.weight_out, out.weight_out_dtype) &&
                    is_aligned4(out.next_grad, out.next_grad_dtype);
  return out;
}

bool is_same(const lss_cuda_adamw_hyper& a, const lss_cuda_adamw_hyper& b) {
  return a.weight_decay_factor == b.weight_decay_factor && a.l2 == b.l2 && a.lerp_weight == b.lerp_weight &&
         a.beta2 == b.beta2 && a.one_minus_beta2 == b.one_minus_beta2 &&
         a.bias_correction2_sqrt == b.bias_correction2_sqrt && a.eps == b.eps &&
         a.neg_step_size == b.neg_step_size && a.grad_scale == b.grad_scale && a.clip_value == b.clip_value &&
         a.flags == b.flags;
}

/* Index of this segment's coefficients in the table, added if new; -1 where there is no room. */
int find_hyper(LaunchTable& table, int& num_hypers, const lss_cuda_adamw_segment& s, int mode) {
  const HyperPair pair = {s.hyper, mode == LSS_CUDA_COMMIT_PEEK ? s.next_hyper : s.hyper};
  for (int i = 0; i < num_hypers; ++i) {
    if (is_same(table.hypers[i].hyper, pair.hyper) && is_same(table.hypers[i].next_hyper, pair.next_hyper)) return i;
  }
  if (num_hypers == kMaxHypers) return -1;
  table.hypers[num_hypers] = pair;
  return num_hypers++;
}

/* Fill one launch's table from segments[begin...]; returns the first segment that is not in it, or
 * -1 where an argument is invalid. */
int64_t fill_table(LaunchTable& table, const lss_cuda_adamw_call& call, int64_t begin) {
  int64_t blocks = 0;
  int64_t s = begin;
  int count = 0;
  int num_hypers = 0;
  for (; s < call.num_segments && count < kMaxSegments; ++s, ++count) {
    const lss_cuda_adamw_segment& segment = call.segments[s];
    if (!is_valid(segment, call.mode)) return -1;
    const int64_t more = num_blocks_of(segment.numel);
    const int hyper = find_hyper(table, num_hypers, segment, call.mode);
    if (hyper < 0 || blocks + more > INT32_MAX) break;
    table.segments[count] = to_launch_segment(segment, call.mode);
    table.segments[count].hyper = static_cast<uint8_t>(hyper);
    table.ranges.first[count] = static_cast<uint32_t>(blocks);
    blocks += more;
  }
  table.ranges.first[count] = static_cast<uint32_t>(blocks);
  table.ranges.num_segments = static_cast<uint32_t>(count);
  return s;
}

}  // namespace
}  // namespace lss

extern "C" int lss_cuda_adamw(const lss_cuda_adamw_call* call, void* stream) {
  if (!call || call->num_segments < 0 || (call->num_segments > 0 && !call->segments)) return cudaErrorInvalidValue;
  lss::DeviceGuard guard(call->device);
  if (guard.error() != cudaSuccess) return guard.error();
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  lss_cuda_stats_out out = call->stats_out;
  for (int64_t begin = 0; begin < call->num_segments;) {
    lss::LaunchTable table = {};
    const int64_t end = lss::fill_table(table, *call, begin);
    if (end < 0) return cudaErrorInvalidValue;
    const uint32_t blocks = table.ranges.first[table.ranges.num_segments];
    if (out.stats && blocks > out.num_blocks) return cudaErrorInvalidValue;
    table.grad_scale = call->grad_scale;
    table.next_grad_scale = call->next_grad_scale;
    table.skip = call->skip;
    table.block_sums = out.stats ? out.block_sums : nullptr;
    table.block_nonfinite = out.block_nonfinite;
    if (blocks > 0) {
      if (const int error = lss::launch(call->mode, table, blocks, on)) return error;
    }
    if (out.stats) {
      if (const int error = lss::launch_finish_stats(table.ranges, out, on)) return error;
      out.block_sums += blocks, out.block_nonfinite += blocks, out.num_blocks -= blocks, out.stats += end - begin;
    }
    begin = end;
  }
  return cudaSuccess;
}
