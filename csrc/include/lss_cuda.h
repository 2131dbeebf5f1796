/* C ABI of liblss_cuda.so: the GPU ops whose bits must equal the CPU kernel's.
 *
 * Every function returns a cudaError_t as int (0 is success), enqueues on `stream` (a cudaStream_t
 * as void*; NULL is the default stream) of device ordinal `device`, and never synchronises. Structs
 * passed by pointer are read before the call returns; the device memory they name must stay valid
 * until the stream has passed the call.
 */
#ifndef LSS_CUDA_H_
#define LSS_CUDA_H_

#include <stdint.h>

#define LSS_CUDA_ABI_VERSION 1
#define LSS_CUDA_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum lss_cuda_dtype {
  LSS_CUDA_NONE = 0,
  LSS_CUDA_F32 = 1,
  LSS_CUDA_BF16 = 2,
  LSS_CUDA_F16 = 3,
};

/* What a call writes:
 * COMMIT       param, exp_avg, exp_avg_sq, and weight_out if present;
 * PEEK         weight_out only: what COMMIT would write there;
 * COMMIT_PEEK  COMMIT of grad, then PEEK of next_grad from the state as stored. */
enum lss_cuda_adamw_mode {
  LSS_CUDA_COMMIT = 0,
  LSS_CUDA_PEEK = 1,
  LSS_CUDA_COMMIT_PEEK = 2,
};

enum lss_cuda_adamw_flags {
  LSS_CUDA_DECOUPLED_DECAY = 1, /* p *= weight_decay_factor */
  LSS_CUDA_L2 = 2,              /* g += l2 * p */
  LSS_CUDA_CLIP = 4,            /* limit g to [-clip_value, clip_value] */
  LSS_CUDA_MAXIMIZE = 8,        /* g = -g */
};

/* Coefficients are computed in double by the caller and rounded to fp32 once. */
typedef struct lss_cuda_adamw_hyper {
  float weight_decay_factor;
  float l2;
  float lerp_weight;
  float beta2;
  float one_minus_beta2;
  float bias_correction2_sqrt;
  float eps;
  float neg_step_size;
  float grad_scale;
  float clip_value;
  uint32_t flags;
} lss_cuda_adamw_hyper;

/* weight_out and grad may be the same memory when both have two bytes per element. */
typedef struct lss_cuda_adamw_segment {
  float* param;
  void* exp_avg;         /* f32 or bf16 */
  void* exp_avg_sq;      /* f32 or bf16 */
  const void* grad;      /* f32, bf16 or f16 */
  void* weight_out;      /* bf16, f16, or NULL with dtype NONE */
  const void* next_grad; /* COMMIT_PEEK only: f32, bf16 or f16 */
  int64_t numel;
  uint8_t exp_avg_dtype;
  uint8_t exp_avg_sq_dtype;
  uint8_t grad_dtype;
  uint8_t weight_out_dtype;
  uint8_t next_grad_dtype;
  uint8_t reserved[3];
  lss_cuda_adamw_hyper hyper;
  lss_cuda_adamw_hyper next_hyper; /* COMMIT_PEEK only */
} lss_cuda_adamw_segment;

typedef struct lss_cuda_grad_stats {
  double sumsq;
  int64_t nonfinite;
} lss_cuda_grad_stats;

/* Where statistics go. block_sums and block_nonfinite are device scratch of num_blocks entries, the
 * sum over segments of ceil(numel / 4096); stats is a device array, one entry per segment. */
typedef struct lss_cuda_stats_out {
  float* block_sums;
  uint32_t* block_nonfinite;
  lss_cuda_grad_stats* stats;
  int64_t num_blocks;
} lss_cuda_stats_out;

typedef struct lss_cuda_adamw_call {
  const lss_cuda_adamw_segment* segments; /* host array */
  int64_t num_segments;
  int32_t mode;
  int32_t device;
  const float* grad_scale;      /* device scalar in place of hyper.grad_scale, or NULL */
  const float* next_grad_scale; /* device scalar in place of next_hyper.grad_scale, or NULL */
  /* Device scalar or NULL. Unless it is 0, the gradient that statistics are taken of (next_grad in
   * COMMIT_PEEK, else grad) is dropped: its update writes weight_out = round(param), no more. */
  const float* skip;
  lss_cuda_stats_out stats_out; /* all NULL and 0: no statistics */
} lss_cuda_adamw_call;

typedef struct lss_cuda_tensor {
  const void* data;
  int64_t numel;
  int32_t dtype;
  int32_t reserved;
} lss_cuda_tensor;

LSS_CUDA_EXPORT int32_t lss_cuda_abi_version(void);
LSS_CUDA_EXPORT uint64_t lss_cuda_sizeof_adamw_hyper(void);
LSS_CUDA_EXPORT uint64_t lss_cuda_sizeof_adamw_segment(void);
LSS_CUDA_EXPORT uint64_t lss_cuda_sizeof_adamw_call(void);
LSS_CUDA_EXPORT uint64_t lss_cuda_sizeof_grad_stats(void);
LSS_CUDA_EXPORT uint64_t lss_cuda_sizeof_stats_out(void);
LSS_CUDA_EXPORT uint64_t lss_cuda_sizeof_tensor(void);
LSS_CUDA_EXPORT const char* lss_cuda_error_string(int error);

LSS_CUDA_EXPORT int lss_cuda_adamw(const lss_cuda_adamw_call* call, void* stream);

/* Sum of squares and count of NaN and Inf of `data * scale`, per tensor. */
LSS_CUDA_EXPORT int lss_cuda_sumsq(const lss_cuda_tensor* tensors, int64_t num_tensors, float scale,
                                   const lss_cuda_stats_out* stats_out, int32_t device, void* stream);

/* Count of NaN and Inf per tensor, into device `counts`. */
LSS_CUDA_EXPORT int lss_cuda_count_nonfinite(const lss_cuda_tensor* tensors, int64_t num_tensors,
                                             int64_t* counts, int32_t device, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* LSS_CUDA_H_ */
