/* lightning-superscale: the whole C ABI of the native CPU library.
 *
 * Rules that hold for every function:
 *  - No torch, no Python: plain pointers, sizes and POD structs. The caller checks shapes, dtypes and
 *    overlap, and keeps memory alive until the call returns or, for submitted work, until the ticket
 *    is done.
 *  - int32_t results are a status: 0 is success, negative is one of LSS_ERR_*. The text of the
 *    calling thread's last failure is lss_last_error().
 *  - Results depend neither on the ISA, nor on the number of threads, nor on how work was cut:
 *    lightning_superscale/ops/reference.py defines every bit (a NaN's payload excepted).
 *  - `pool` may be NULL: the work then runs in the calling thread.
 *  - Work functions take `lss_ticket **ticket`: NULL waits for the result and returns its status; otherwise
 *    the work is submitted and *ticket must later be given to lss_ticket_free.
 *
 * A function with the comment "op" is a compute op: it must have an entry in
 * lightning_superscale/ops/catalog.py, a reference and tests.
 */
#ifndef LSS_H
#define LSS_H

#include <stddef.h>
#include <stdint.h>

#define LSS_ABI_VERSION 5

#if defined(__GNUC__)
#define LSS_API __attribute__((visibility("default")))
#else
#define LSS_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status codes ---- */
enum {
    LSS_OK = 0,
    LSS_ERR_ARGUMENT = -1,    /* a value outside its documented range */
    LSS_ERR_MEMORY = -2,      /* the system refused memory */
    LSS_ERR_ISA = -3,         /* unknown instruction set, or one this processor lacks */
    LSS_ERR_THREAD = -4,      /* the system refused a thread */
    LSS_ERR_FORKED = -5,      /* the work was pending in the parent of a fork; it does not run here */
    LSS_ERR_CANCELLED = -6,   /* a held ticket was cancelled before its release */
    LSS_ERR_NO_CUDA = -7,     /* libcuda.so.1 is missing, too old, or reports no device */
    LSS_ERR_CUDA = -8,        /* a CUDA driver call failed; lss_last_error names it */
    LSS_ERR_INTERNAL = -9
};

/* ---- element types ---- */
enum { LSS_F32 = 0, LSS_BF16 = 1, LSS_F16 = 2, LSS_NONE = 3 };

/* ---- AdamW modes: see adamw_commit, adamw_peek, adamw_commit_peek in reference.py ---- */
enum { LSS_COMMIT = 0, LSS_PEEK = 1, LSS_COMMIT_PEEK = 2 };

/* AdamWScalars of types.py, and what is done to the gradient first. Doubles: the library rounds each
 * to fp32 once. */
typedef struct {
    double weight_decay_factor;
    double l2;
    double lerp_weight;
    double beta2;
    double one_minus_beta2;
    double bias_correction2_sqrt;
    double eps;
    double neg_step_size;
    double grad_scale;
    double clip_value;  /* read when has_clip */
    int32_t has_l2;
    int32_t has_clip;
    int32_t maximize;
    int32_t installed_root; /* non-zero: take the root that lss_install_root gave, if any; else IEEE's */
    int64_t step;           /* of the update, from 1; read by stochastic rounding */
} lss_adamw_hyper;

/* ---- how an update of low-precision states rounds: [Note: Low-precision update] in reference.py ---- */
enum { LSS_AS_TORCH = 0, LSS_NEAREST = 1, LSS_STOCHASTIC = 2 };

/* One AdamWSegment of types.py. sumsq and nonfinite are results, valid when the work is done. */
typedef struct {
    void *param;
    void *exp_avg;
    void *exp_avg_sq;
    const void *grad;
    const void *next_grad; /* commit_peek */
    void *weight_out;      /* may be `grad` itself when their elements have one size */
    int64_t numel;
    int32_t exp_avg_dtype;
    int32_t exp_avg_sq_dtype;
    int32_t grad_dtype;
    int32_t next_grad_dtype;
    int32_t weight_out_dtype; /* LSS_NONE: no output */
    int32_t param_dtype;      /* LSS_F32, or with a rounding LSS_BF16; weight_out is then LSS_BF16 or none */
    void *compensation;       /* bf16, or NULL; of a bf16 param */
    uint64_t key;             /* of stochastic rounding's random numbers */
    int64_t first_element;    /* number of the first element among them */
    int32_t rounding;         /* LSS_AS_TORCH: an update of fp32 masters in torch's order of operations */
    int32_t is_compact;       /* with `rows`: param, exp_avg, exp_avg_sq and compensation too have these rows alone */
    /* NULL, or which rows of param, exp_avg, exp_avg_sq and compensation the gradient's rows belong to, ascending;
     * grad, next_grad and weight_out have these rows one after the other, and numel counts their elements. */
    const int64_t *rows;
    int64_t row_numel;  /* elements of a row, more than 0 */
    int64_t row_stride; /* of the numbers of random numbers, from one row to the next */
    lss_adamw_hyper hyper;
    lss_adamw_hyper next_hyper;
    double sumsq;
    int64_t nonfinite;
} lss_adamw_segment;

/* r[i] = sqrt(x[i]) for i < n; r may be x. The signature of MKL's vmsSqrt. */
typedef void (*lss_root_fn)(int32_t n, const float *x, float *r, int64_t mode);

typedef struct lss_pool lss_pool;
typedef struct lss_ticket lss_ticket;

/* ---- the library itself ---- */
LSS_API int32_t lss_abi_version(void);
LSS_API size_t lss_sizeof_adamw_hyper(void);
LSS_API size_t lss_sizeof_adamw_segment(void);
LSS_API const char *lss_last_error(void); /* of the calling thread; never NULL */

/* Square root for updates with installed_root set: torch's own, where that is not IEEE's ([Note: Square
 * root] in reference.py). NULL takes it back. Not while work is in flight. set_threads, which may be NULL,
 * sets how many threads the root's library may use in the calling thread, and returns the number before. */
LSS_API void lss_install_root(lss_root_fn root, int64_t mode, int32_t (*set_threads)(int32_t));

/* ---- instruction sets: "generic" (SSE2 on x86-64), "avx2", "avx512", "neon" ----
 * The best one is chosen at first use, or the one named by the environment variable LSS_ISA. */
LSS_API const char *lss_isa_name(void);      /* NULL when LSS_ISA names one that cannot be used */
LSS_API const char *lss_isa_supported(void); /* comma-separated, best first */
LSS_API int32_t lss_isa_set(const char *name);

/* ---- pool: parked threads, started by the first submission ----
 * num_threads < 1: LSS_CPU_THREADS, else the process's CPUs less one, never below 1.
 * cpus, num_cpus: CPUs the workers may run on (num_cpus 0: those of the process).
 * After fork() the child's pools are empty and start their threads anew. */
LSS_API int32_t lss_pool_create(int32_t num_threads, const int32_t *cpus, int32_t num_cpus, lss_pool **pool);
LSS_API int32_t lss_pool_num_threads(const lss_pool *pool);
LSS_API int32_t lss_pool_drain(lss_pool *pool); /* waits for all work that was released so far */
LSS_API int32_t lss_pool_destroy(lss_pool *pool); /* finishes released work first; held work is cancelled */

/* ---- tickets ----
 * priority: larger runs first; equal priorities in order of submission. Running work yields to a
 * higher priority at its next chunk.
 * held: the work waits for lss_ticket_release (or lss_notify). */
LSS_API int32_t lss_ticket_create(lss_pool *pool, lss_ticket **ticket); /* held, without work: a flag to wait on */
LSS_API int32_t lss_ticket_release(lss_ticket *ticket);
LSS_API int32_t lss_ticket_cancel(lss_ticket *ticket); /* has an effect only while held */
LSS_API int32_t lss_ticket_done(const lss_ticket *ticket); /* 1 done, 0 not */
LSS_API int32_t lss_ticket_wait(lss_ticket *ticket);       /* status of the work */
LSS_API void lss_ticket_free(lss_ticket *ticket);          /* does not wait */
/* Releases and drops one reference taken by lss_ticket_ref. Has the signature of CUhostFn. */
LSS_API void lss_notify(void *ticket);
LSS_API void lss_ticket_ref(lss_ticket *ticket);

typedef struct {
    int32_t priority;
    int32_t held;
} lss_submit;

/* ---- compute ops; `how` may be NULL (priority 0, not held) ---- */

/* op. `stats` non-zero fills sumsq and nonfinite of each segment: of next_grad in commit_peek, else of
 * grad. `segments` must live until the work is done. */
LSS_API int32_t lss_adamw(lss_pool *pool, int32_t mode, lss_adamw_segment *segments, int64_t num_segments,
                          int32_t stats, const lss_submit *how, lss_ticket **ticket);
/* op */
LSS_API int32_t lss_sumsq(lss_pool *pool, const void *x, int32_t dtype, int64_t numel, double *result,
                          const lss_submit *how, lss_ticket **ticket);
/* op */
LSS_API int32_t lss_count_nonfinite(lss_pool *pool, const void *x, int32_t dtype, int64_t numel, int64_t *result,
                                    const lss_submit *how, lss_ticket **ticket);
/* op. dst may be src when both have the same element size. */
LSS_API int32_t lss_cast_scale(lss_pool *pool, void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype,
                               int64_t numel, double scale, const lss_submit *how, lss_ticket **ticket);
/* op */
LSS_API int32_t lss_accumulate(lss_pool *pool, void *acc, int32_t acc_dtype, const void *delta, int32_t delta_dtype,
                               int64_t numel, double scale, const lss_submit *how, lss_ticket **ticket);
/* op. dst[i] = src[rows[i]]; each row is row_bytes long. Every index must be in range. */
LSS_API int32_t lss_rows_gather(lss_pool *pool, void *dst, const void *src, const int64_t *rows, int64_t num_rows,
                                int64_t row_bytes, const lss_submit *how, lss_ticket **ticket);
/* op. dst[rows[i]] = src[i]; rows distinct. */
LSS_API int32_t lss_rows_scatter(lss_pool *pool, void *dst, const void *src, const int64_t *rows, int64_t num_rows,
                                 int64_t row_bytes, const lss_submit *how, lss_ticket **ticket);
/* op. dst[r, j] = src[r, cols[j]]; src has src_cols columns, elements item_bytes of 1, 2, 4 or 8. */
LSS_API int32_t lss_cols_gather(lss_pool *pool, void *dst, const void *src, const int64_t *cols, int64_t num_cols,
                                int64_t num_rows, int64_t src_cols, int32_t item_bytes, const lss_submit *how,
                                lss_ticket **ticket);
/* op. dst[r, cols[j]] = src[r, j]; dst has dst_cols columns; cols distinct. */
LSS_API int32_t lss_cols_scatter(lss_pool *pool, void *dst, const void *src, const int64_t *cols, int64_t num_cols,
                                 int64_t num_rows, int64_t dst_cols, int32_t item_bytes, const lss_submit *how,
                                 lss_ticket **ticket);
/* op. result[c] = sum over rows of x[r, c]^2, fp32. */
LSS_API int32_t lss_colnorm(lss_pool *pool, const void *x, int32_t dtype, int64_t num_rows, int64_t num_cols,
                            float *result, const lss_submit *how, lss_ticket **ticket);
/* op. memcpy. */
LSS_API int32_t lss_copy(lss_pool *pool, void *dst, const void *src, int64_t nbytes, const lss_submit *how,
                         lss_ticket **ticket);

/* The memory roof of an AdamW step: reads and writes p, m, v and reads g as lss_adamw does, without
 * its divisions and square root. For benchmarks; the results mean nothing. */
LSS_API void lss_bench_roof(float *p, float *m, float *v, const float *g, int64_t numel);

/* ---- host memory ----
 * Zeroed pages from mmap, page aligned. huge non-zero advises huge pages. in_forks zero leaves them out of
 * processes that this one forks: there they would be copied as soon as this process writes them. pool non-NULL:
 * the pool's threads touch the pages first, so that they lie on the workers' NUMA node. */
LSS_API int32_t lss_mem_alloc(size_t nbytes, int32_t huge, int32_t in_forks, lss_pool *pool, void **memory);
LSS_API int32_t lss_mem_free(void *memory, size_t nbytes);

/* ---- CUDA driver API, found by dlopen("libcuda.so.1") ----
 * stream and event are CUstream and CUevent handles. `device` is the ordinal whose primary context is
 * current during the call. Without CUDA: LSS_ERR_NO_CUDA, never a crash. */
LSS_API int32_t lss_cu_device_count(int32_t *count); /* count is 0 on LSS_ERR_NO_CUDA */
LSS_API int32_t lss_cu_pin(int32_t device, void *memory, size_t nbytes); /* cuMemHostRegister, portable */
/* Waits until the device is idle, because copies may still use the memory, and then unregisters it. */
LSS_API int32_t lss_cu_unpin(int32_t device, void *memory);
LSS_API int32_t lss_cu_d2h_batch(int32_t device, void *stream, void *const *dst, const uint64_t *src,
                                 const size_t *nbytes, int64_t num_copies);
LSS_API int32_t lss_cu_h2d_batch(int32_t device, void *stream, const uint64_t *dst, const void *const *src,
                                 const size_t *nbytes, int64_t num_copies);
LSS_API int32_t lss_cu_event_record(int32_t device, void *event, void *stream);
LSS_API int32_t lss_cu_stream_wait_event(int32_t device, void *stream, void *event);
/* When the stream reaches this point, a driver thread calls lss_notify(ticket): no GIL, no Python. */
LSS_API int32_t lss_cu_launch_notify(int32_t device, void *stream, lss_ticket *ticket);

#ifdef __cplusplus
}
#endif
#endif
