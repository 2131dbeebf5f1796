// Stands in for CUDA's header so that csrc/cuda/*.cu runs on the CPU: the same kernels, launch code
// and C ABI, one thread block at a time, each CUDA thread a coroutine that hands over at barriers and
// shuffles. It proves arithmetic, indexing and packing; it says nothing about races or speed.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid argument" : "no error"; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  memset(data, value, bytes);
  return cudaSuccess;
}

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
// Compiled with -ffp-contract=off: each of these rounds once.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }

namespace host_cuda {

struct Index {
  unsigned x;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int arrivals[2];  // block barriers and warp exchanges passed so far
  bool is_done;
  char slot[8];
};

inline constexpr size_t kStackBytes = 64 * 1024;
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int current = 0;

inline void hand_over() { swapcontext(&threads[current].context, &scheduler); }

// Wait until every thread of [first, last) that is still running has arrived as often as this one.
inline void arrive(int kind, int first, int last) {
  const int mine = ++threads[current].arrivals[kind];
  for (;;) {
    bool is_complete = true;
    for (int t = first; t < last; ++t) is_complete &= threads[t].is_done || threads[t].arrivals[kind] >= mine;
    if (is_complete) return;
    hand_over();
  }
}

inline void run_thread() {
  body();
  threads[current].is_done = true;
}

}  // namespace host_cuda

inline host_cuda::Index threadIdx, blockIdx;

namespace host_cuda {

inline void run_block(int num_threads) {
  if (threads.size() < static_cast<size_t>(num_threads)) threads.resize(num_threads);
  for (int t = 0; t < num_threads; ++t) {
    Thread& thread = threads[t];
    if (!thread.stack) thread.stack.reset(new char[kStackBytes]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = &scheduler;
    thread.arrivals[0] = thread.arrivals[1] = 0;
    thread.is_done = false;
    makecontext(&thread.context, run_thread, 0);
  }
  for (bool is_running = true; is_running;) {
    is_running = false;
    for (int t = 0; t < num_threads; ++t) {
      if (threads[t].is_done) continue;
      is_running = true;
      current = t;
      threadIdx.x = static_cast<unsigned>(t);
      swapcontext(&scheduler, &threads[t].context);
    }
  }
}

template <class T>
T exchange(T value, int source, int num_threads) {
  static_assert(sizeof(T) <= 8, "slot too small");
  const int warp = current / 32 * 32;
  memcpy(threads[current].slot, &value, sizeof(T));
  arrive(1, warp, warp + num_threads);
  T out;
  memcpy(&out, threads[warp + source].slot, sizeof(T));
  arrive(1, warp, warp + num_threads);  // nobody may overwrite a slot that is still to be read
  return out;
}

inline int block_threads = 0;

template <class Kernel>
void launch(unsigned grid, int num_threads, const Kernel& kernel) {
  block_threads = num_threads;
  body = kernel;
  for (unsigned b = 0; b < grid; ++b) {
    blockIdx.x = b;
    run_block(num_threads);
  }
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::arrive(0, 0, host_cuda::block_threads); }

template <class T>
T __shfl_down_sync(uint32_t, T value, int delta, int width) {
  const int lane = host_cuda::current % 32;
  const int source = lane % width + delta < width ? lane + delta : lane;
  return host_cuda::exchange(value, source, 32);
}
template <class T>
T __shfl_sync(uint32_t, T value, int source, int) {
  return host_cuda::exchange(value, source, 32);
}
template <class T>
T atomicAdd(T* target, T value) {
  const T old = *target;
  *target += value;
  return old;
}

#define LSS_LAUNCH(kernel, grid, num_threads, stream, ...) \
  ((void)(stream), host_cuda::launch((grid), (num_threads), [&] { kernel(__VA_ARGS__); }))
