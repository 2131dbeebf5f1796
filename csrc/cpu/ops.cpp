// The compute ops of lss.h: each cuts its tensors into items, runs a kernel on every item, and sums up in
// index order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "elements.h"
#include "error.h"
#include "kernels.h"
#include "low_step.h"
#include "pool.h"
#include "wide.h"

namespace lss {
namespace {

constexpr int64_t kItemBytes = 256 << 10;  // of ops that only move bytes
constexpr int64_t kPrepared = 1024;        // gradient elements prepared at a time: stays in L1
constexpr int64_t kColnormCols = 256;
constexpr int64_t kRooted = 8192;  // elements between two calls of an installed root: their buffers stay in cache

// [Note: Installed root] torch's CPU builds may take square roots from a vector library whose rounding is
// its own. An update that must equal torch's then runs in two halves over cached blocks: moments, the
// library's root of the second one, and the parameter.
struct Root {
    lss_root_fn fn = nullptr;
    int64_t mode = 0;
    int32_t (*set_threads)(int32_t) = nullptr;
};
Root installed_root;

// While alive, the root's library starts no threads of its own: the pool's are the ones that work.
class OneRootThread {
   public:
    OneRootThread() : before_(installed_root.set_threads ? installed_root.set_threads(1) : 0) {}
    ~OneRootThread() {
        if (installed_root.set_threads) installed_root.set_threads(before_);
    }
    OneRootThread(const OneRootThread &) = delete;
    OneRootThread &operator=(const OneRootThread &) = delete;

   private:
    int32_t before_;
};

int64_t num_chunks(int64_t numel, int64_t chunk) { return (numel + chunk - 1) / chunk; }

bool is_dtype(int32_t dtype) { return dtype == LSS_F32 || dtype == LSS_BF16 || dtype == LSS_F16; }

double sum_in_order(const std::vector<BlockStats> &blocks) {
    double total = 0.0;
    for (const BlockStats &block : blocks) total += block.sum;
    return total;
}

// Runs `make`, which builds the work, and turns a refused allocation into a status.
template <class Make>
int32_t submit_made(lss_pool *pool, const lss_submit *how, lss_ticket **ticket, const Make &make) {
    if (!kernels()) return LSS_ERR_ISA;
    try {
        return submit(pool, make(), how, ticket);
    } catch (const std::bad_alloc &) {
        return fail(LSS_ERR_MEMORY, "no memory for the work's bookkeeping");
    }
}

// Whether x * reciprocal, in the two operations of [Note: Division by a constant] in kernels.cpp, is the correctly
// rounded x / c for every x: tries each fraction whose quotient is near enough to a midpoint to be in doubt.
bool is_product_right(const Scalars &k) {
    const float c = k.bias_correction2_sqrt;
    constexpr uint32_t kEnd = 1u << 24;
    uint32_t y = (bits_of(c) & (kEnd / 2 - 1)) | kEnd / 2;  // c's fraction as an integer
    if (y % 2 == 0) y /= 2;
    if (y % 2 == 0) return true;
    uint32_t inverse = 1;  // of 2^i modulo y
    for (int i = 1; i <= 25; ++i) {
        inverse = (inverse + (inverse & 1u) * y) / 2;
        if (i < 24) continue;
        for (const uint32_t residue : {inverse, y - inverse}) {
            for (uint32_t x = residue; x < kEnd; x += y) {
                if (x < kEnd / 2) continue;
                const float xf = static_cast<float>(x);
                if (fused(xf, k.reciprocal, xf * k.reciprocal_rest) != xf / c) return false;
            }
        }
    }
    return true;
}

Scalars rounded(const lss_adamw_hyper &h) {
    Scalars k;
    static_cast<Coefficients &>(k) = coefficients(h);
    k.grad_scale = static_cast<float>(h.grad_scale);
    k.clip_value = static_cast<float>(h.clip_value);
    k.has_l2 = h.has_l2 != 0;
    k.has_clip = h.has_clip != 0;
    k.maximize = h.maximize != 0;
    k.installed_root = h.installed_root != 0 && installed_root.fn != nullptr;
    k.lerp_base = 0;
    if (!(std::fabs(k.lerp_weight) < 0.5f)) {
        // torch.lerp: end - (end - start) * (1 - weight), as one fused operation.
        k.lerp_base = 0xffffffffu;
        k.lerp_weight -= 1.0f;
    }
    const double c = k.bias_correction2_sqrt;
    k.reciprocal = static_cast<float>(1.0 / c);
    k.reciprocal_rest = static_cast<float>(1.0 / c - k.reciprocal);
    const bool usual = c >= 0x1p-40 && c <= 1.0;
    k.product_is_right = usual && is_product_right(k);
    k.plain = usual && !k.has_l2 && !k.has_clip && !k.maximize && k.lerp_base == 0;
    return k;
}

struct AdamW : lss_ticket {
    struct Piece {  // where an item starts; it ends where the next one starts
        int64_t segment, offset;
    };
    struct Plan {
        Scalars k, next_k;
        std::vector<BlockStats> blocks;
    };

    const KernelTable *table = kernels();
    int32_t mode = LSS_COMMIT;
    bool with_stats = false;
    lss_adamw_segment *segments = nullptr;
    std::vector<Plan> plans;
    std::vector<Piece> pieces;

    AdamW(int32_t mode_, lss_adamw_segment *segments_, int64_t num_segments, bool with_stats_)
        : mode(mode_), with_stats(with_stats_), segments(segments_), plans(static_cast<size_t>(num_segments)) {
        int64_t room = 0;  // left in the current item, so that small segments share one
        for (int64_t s = 0; s < num_segments; ++s) {
            const lss_adamw_segment &seg = segments[s];
            Plan &plan = plans[static_cast<size_t>(s)];
            plan.k = rounded(seg.hyper);
            plan.next_k = rounded(seg.next_hyper);
            if (with_stats) plan.blocks.resize(static_cast<size_t>(num_chunks(seg.numel, kStatsBlock)));
            for (int64_t offset = 0; offset < seg.numel; offset += kChunk) {
                const int64_t n = std::min(kChunk, seg.numel - offset);
                if (pieces.empty() || n > room) {
                    pieces.push_back({s, offset});
                    room = kChunk;
                }
                room -= n;
            }
        }
        num_items = static_cast<int64_t>(pieces.size());
        pieces.push_back({num_segments, 0});
    }

    void run(int64_t item) override {
        Piece here = pieces[static_cast<size_t>(item)];
        const Piece end = pieces[static_cast<size_t>(item) + 1];
        while (here.segment < end.segment || (here.segment == end.segment && here.offset < end.offset)) {
            const int64_t numel = segments[here.segment].numel;
            const int64_t stop = here.segment == end.segment ? end.offset : numel;
            if (here.offset < stop) step(here.segment, here.offset, stop - here.offset);
            here = {here.segment + 1, 0};
        }
    }

    // At most a chunk, from a multiple of kStatsBlock on.
    void step(int64_t s, int64_t offset, int64_t n) {
        const lss_adamw_segment &seg = segments[s];
        Plan &plan = plans[static_cast<size_t>(s)];
        BlockStats unused[kChunk / kStatsBlock];
        BlockStats *const out = with_stats ? &plan.blocks[static_cast<size_t>(offset / kStatsBlock)] : unused;
        if (seg.rows == nullptr) {
            step_run(seg, plan, offset, n, out, with_stats);
            return;
        }
        if (with_stats) see(seg, plan, offset, n, out);
        step_rows(seg, plan, offset, n);
    }

    // Each run of rows that follow one another, as a segment of its own whose states begin where the run's offset says.
    void step_rows(const lss_adamw_segment &seg, const Plan &plan, int64_t offset, int64_t n) {
        BlockStats unused[kChunk / kStatsBlock + 1];
        const int64_t end = offset + n, num_rows = seg.numel / seg.row_numel;
        while (offset < end) {
            const int64_t row = offset / seg.row_numel;
            int64_t last = row;
            while (last + 1 < num_rows && (last + 1) * seg.row_numel < end && seg.rows[last + 1] == seg.rows[last] + 1) {
                ++last;
            }
            const int64_t shift = seg.is_compact ? 0 : (seg.rows[row] - row) * seg.row_numel;
            const int64_t numbered = seg.rows[row] * seg.row_stride - row * seg.row_numel;
            // Random numbers of one row only are numbered one after the other, unless rows have no gap between them.
            if (seg.row_stride != seg.row_numel) last = row;
            const int64_t run = std::min(end, (last + 1) * seg.row_numel) - offset;
            lss_adamw_segment moved = seg;
            moved.param = at(seg.param, seg.param_dtype, shift);
            moved.exp_avg = at(seg.exp_avg, seg.exp_avg_dtype, shift);
            moved.exp_avg_sq = at(seg.exp_avg_sq, seg.exp_avg_sq_dtype, shift);
            if (seg.compensation) moved.compensation = at(seg.compensation, LSS_BF16, shift);
            moved.first_element += numbered;
            step_run(moved, plan, offset, run, unused, false);
            offset += run;
        }
    }

    void step_run(const lss_adamw_segment &seg, const Plan &plan, int64_t offset, int64_t n, BlockStats *out,
                  bool counts) {
        if (seg.rounding != LSS_AS_TORCH) {
            if (counts) see(seg, plan, offset, n, out);
            low_step(*table, seg, mode, offset, n);
            return;
        }
        if (plan.k.installed_root || (mode == LSS_COMMIT_PEEK && plan.next_k.installed_root)) {
            if (counts) see(seg, plan, offset, n, out);
            const OneRootThread one;
            for (int64_t i = 0; i < n; i += kRooted) step_rooted(seg, plan, offset + i, std::min(kRooted, n - i));
            return;
        }
        const bool same = mode != LSS_COMMIT_PEEK || (seg.grad_dtype == seg.next_grad_dtype && plan.next_k.plain);
        if (plan.k.plain && same) {
            kernel(seg, mode, seg.grad_dtype, seg.weight_out_dtype)(args(seg, plan, offset), n, out);
            return;
        }
        if (counts) see(seg, plan, offset, n, out);
        for (int64_t i = 0; i < n; i += kPrepared) step_prepared(seg, plan, offset + i, std::min(kPrepared, n - i));
    }

    // Before the step, because weight_out may be the gradient's memory.
    void see(const lss_adamw_segment &seg, const Plan &plan, int64_t offset, int64_t n, BlockStats *out) const {
        const bool ahead = mode == LSS_COMMIT_PEEK;
        const int32_t dtype = ahead ? seg.next_grad_dtype : seg.grad_dtype;
        table->stats[dtype](at(ahead ? seg.next_grad : seg.grad, dtype, offset), n,
                            ahead ? plan.next_k.grad_scale : plan.k.grad_scale, out);
    }

    AdamwFn kernel(const lss_adamw_segment &seg, int32_t which, int32_t grad, int32_t out) const {
        return table->adamw[which][grad][seg.exp_avg_dtype][seg.exp_avg_sq_dtype][out];
    }

    static AdamwArgs args(const lss_adamw_segment &seg, const Plan &plan, int64_t offset) {
        return {static_cast<float *>(seg.param) + offset,
                at(seg.exp_avg, seg.exp_avg_dtype, offset),
                at(seg.exp_avg_sq, seg.exp_avg_sq_dtype, offset),
                at(seg.grad, seg.grad_dtype, offset),
                at(seg.next_grad, seg.next_grad_dtype, offset),
                at(seg.weight_out, seg.weight_out_dtype, offset),
                &plan.k,
                &plan.next_k};
    }

    // The uncommon cases (clipping by value, maximize, L2, beta1 below 0.5, two gradient dtypes): the gradient is first made fp32
    // in a small buffer. In commit_peek the peek's own gradient is prepared after the commit, since L2 reads the
    // new parameter; weight_out is written last.
    void step_prepared(const lss_adamw_segment &seg, const Plan &plan, int64_t offset, int64_t n) {
        alignas(64) float prepared[kPrepared];
        BlockStats unused[1];
        const auto run_mode = [&](int32_t which, const void *grad, int32_t dtype, const Scalars &k, int32_t out) {
            table->prepare[dtype](prepared, grad, static_cast<float *>(seg.param) + offset, n, &k);
            Scalars rest = k;
            rest.grad_scale = 1.0f;
            AdamwArgs with_prepared = args(seg, plan, offset);
            with_prepared.grad = prepared;
            with_prepared.k = &rest;
            kernel(seg, which, kPreparedGrad, out)(with_prepared, n, unused);
        };
        const AdamwArgs raw = args(seg, plan, offset);
        if (mode == LSS_COMMIT_PEEK) {
            run_mode(LSS_COMMIT, raw.grad, seg.grad_dtype, plan.k, LSS_NONE);
            run_mode(LSS_PEEK, raw.next_grad, seg.next_grad_dtype, plan.next_k, seg.weight_out_dtype);
        } else {
            run_mode(mode, raw.grad, seg.grad_dtype, plan.k, seg.weight_out_dtype);
        }
    }

    void step_rooted(const lss_adamw_segment &seg, const Plan &plan, int64_t offset, int64_t n) {
        if (mode == LSS_COMMIT_PEEK) {
            half_steps(seg, offset, n, seg.grad, seg.grad_dtype, plan.k, true, LSS_NONE);
            half_steps(seg, offset, n, seg.next_grad, seg.next_grad_dtype, plan.next_k, false, seg.weight_out_dtype);
        } else {
            half_steps(seg, offset, n, seg.grad, seg.grad_dtype, plan.k, mode == LSS_COMMIT, seg.weight_out_dtype);
        }
    }

    void half_steps(const lss_adamw_segment &seg, int64_t offset, int64_t n, const void *grad, int32_t dtype,
                    const Scalars &k, bool stored, int32_t out) {
        alignas(64) float new_m[kRooted], root[kRooted], prepared[kRooted];
        float *const p = static_cast<float *>(seg.param) + offset;
        const void *g = at(grad, dtype, offset);
        Scalars rest = k;
        if (!k.plain) {
            table->prepare[dtype](prepared, g, p, n, &k);
            g = prepared;
            dtype = LSS_F32;
            rest.grad_scale = 1.0f;
        }
        table->moments[stored][dtype][seg.exp_avg_dtype][seg.exp_avg_sq_dtype](
            at(seg.exp_avg, seg.exp_avg_dtype, offset), at(seg.exp_avg_sq, seg.exp_avg_sq_dtype, offset), g, new_m,
            root, n, &rest);
        if (k.installed_root) {
            installed_root.fn(static_cast<int32_t>(n), root, root, installed_root.mode);
        } else {
            for (int64_t i = 0; i < n; ++i) root[i] = __builtin_sqrtf(root[i]);
        }
        table->param[stored][out](p, new_m, root, at(seg.weight_out, seg.weight_out_dtype, offset), n, &rest);
    }

    void finish() override {
        if (!with_stats) return;
        for (size_t s = 0; s < plans.size(); ++s) {
            segments[s].sumsq = sum_in_order(plans[s].blocks);
            segments[s].nonfinite = 0;
            for (const BlockStats &block : plans[s].blocks) segments[s].nonfinite += block.nonfinite;
        }
    }
};

int32_t check_segment(int32_t mode, const lss_adamw_segment &seg, int64_t s) {
    const bool moments = (seg.exp_avg_dtype == LSS_F32 || seg.exp_avg_dtype == LSS_BF16) &&
                         (seg.exp_avg_sq_dtype == LSS_F32 || seg.exp_avg_sq_dtype == LSS_BF16);
    const bool out = is_dtype(seg.weight_out_dtype) || (mode == LSS_COMMIT && seg.weight_out_dtype == LSS_NONE);
    const bool is_low = seg.rounding == LSS_NEAREST || seg.rounding == LSS_STOCHASTIC;
    const bool is_bf16 = seg.param_dtype == LSS_BF16;
    const bool master =
        is_bf16 ? is_low && (seg.weight_out_dtype == LSS_BF16 || seg.weight_out_dtype == LSS_NONE)
                : seg.param_dtype == LSS_F32 && !seg.compensation && (is_low || seg.rounding == LSS_AS_TORCH);
    const bool grads = is_dtype(seg.grad_dtype) && (mode != LSS_COMMIT_PEEK || is_dtype(seg.next_grad_dtype));
    if (seg.numel < 0 || !moments || !out || !grads || !master) {
        return fail(LSS_ERR_ARGUMENT, "segment %lld has a negative size or a dtype that mode %d does not take",
                    static_cast<long long>(s), mode);
    }
    if (seg.rows && (seg.row_numel < 1 || seg.row_stride < seg.row_numel || seg.numel % seg.row_numel)) {
        return fail(LSS_ERR_ARGUMENT, "segment %lld does not have whole rows of at least one element",
                    static_cast<long long>(s));
    }
    return LSS_OK;
}

struct SumSq : lss_ticket {
    const KernelTable *table = kernels();
    const void *x = nullptr;
    int32_t dtype = 0;
    int64_t numel = 0;
    double *result = nullptr;
    std::vector<BlockStats> blocks;
    void run(int64_t item) override {
        const int64_t i = item * kChunk;
        table->stats[dtype](at(x, dtype, i), std::min(kChunk, numel - i), 1.0f,
                            &blocks[static_cast<size_t>(i / kStatsBlock)]);
    }
    void finish() override { *result = sum_in_order(blocks); }
};

struct CountNonfinite : lss_ticket {
    const KernelTable *table = kernels();
    const void *x = nullptr;
    int32_t dtype = 0;
    int64_t numel = 0;
    int64_t *result = nullptr;
    std::atomic<int64_t> count{0};  // integers: the order of arrival changes nothing
    void run(int64_t item) override {
        const int64_t i = item * kChunk;
        count.fetch_add(table->count_nonfinite[dtype](at(x, dtype, i), std::min(kChunk, numel - i)),
                        std::memory_order_relaxed);
    }
    void finish() override { *result = count.load(); }
};

struct Cast : lss_ticket {
    CastFn kernel = nullptr;
    void *dst = nullptr;
    const void *src = nullptr;
    int32_t dst_dtype = 0, src_dtype = 0;
    int64_t numel = 0;
    float scale = 1.0f;
    void run(int64_t item) override {
        const int64_t i = item * kChunk;
        kernel(at(dst, dst_dtype, i), at(src, src_dtype, i), std::min(kChunk, numel - i), scale);
    }
};

int32_t submit_cast(lss_pool *pool, const CastFn (KernelTable::*table)[3][3], void *dst, int32_t dst_dtype,
                    const void *src, int32_t src_dtype, int64_t numel, double scale, const lss_submit *how,
                    lss_ticket **ticket) {
    if (!is_dtype(dst_dtype) || !is_dtype(src_dtype) || numel < 0) {
        return fail(LSS_ERR_ARGUMENT, "expected dtypes 0 to 2 and a size >= 0, found %d, %d, %lld", dst_dtype,
                    src_dtype, static_cast<long long>(numel));
    }
    return submit_made(pool, how, ticket, [&] {
        auto work = std::make_unique<Cast>();
        work->kernel = (kernels()->*table)[dst_dtype][src_dtype];
        work->dst = dst;
        work->src = src;
        work->dst_dtype = dst_dtype;
        work->src_dtype = src_dtype;
        work->numel = numel;
        work->scale = static_cast<float>(scale);
        work->num_items = num_chunks(numel, kChunk);
        return work;
    });
}

struct Rows : lss_ticket {
    char *dst = nullptr;
    const char *src = nullptr;
    const int64_t *rows = nullptr;
    int64_t num_rows = 0, row_bytes = 0, per_item = 1;
    bool scatter = false;
    void run(int64_t item) override {
        const int64_t end = std::min((item + 1) * per_item, num_rows);
        for (int64_t i = item * per_item; i < end; ++i) {
            const int64_t to = scatter ? rows[i] : i, from = scatter ? i : rows[i];
            std::memcpy(dst + to * row_bytes, src + from * row_bytes, static_cast<size_t>(row_bytes));
        }
    }
};

int32_t submit_rows(lss_pool *pool, bool scatter, void *dst, const void *src, const int64_t *rows, int64_t num_rows,
                    int64_t row_bytes, const lss_submit *how, lss_ticket **ticket) {
    if (num_rows < 0 || row_bytes < 0) return fail(LSS_ERR_ARGUMENT, "sizes must be >= 0");
    return submit_made(pool, how, ticket, [&] {
        auto work = std::make_unique<Rows>();
        work->dst = static_cast<char *>(dst);
        work->src = static_cast<const char *>(src);
        work->rows = rows;
        work->num_rows = num_rows;
        work->row_bytes = row_bytes;
        work->per_item = std::max<int64_t>(1, kItemBytes / std::max<int64_t>(1, row_bytes));
        work->scatter = scatter;
        work->num_items = row_bytes == 0 ? 0 : num_chunks(num_rows, work->per_item);
        return work;
    });
}

struct Cols : lss_ticket {
    void *dst = nullptr;
    const void *src = nullptr;
    const int64_t *cols = nullptr;
    int64_t num_cols = 0, num_rows = 0, wide_cols = 0, per_item = 1;
    int32_t bytes = 0;
    bool scatter = false;
    template <class T>
    void move(int64_t row, int64_t end) {
        for (; row < end; ++row) {
            T *const d = static_cast<T *>(dst) + row * (scatter ? wide_cols : num_cols);
            const T *const s = static_cast<const T *>(src) + row * (scatter ? num_cols : wide_cols);
            if (scatter) {
                for (int64_t j = 0; j < num_cols; ++j) d[cols[j]] = s[j];
            } else {
                for (int64_t j = 0; j < num_cols; ++j) d[j] = s[cols[j]];
            }
        }
    }
    void run(int64_t item) override {
        const int64_t start = item * per_item, end = std::min(start + per_item, num_rows);
        if (bytes == 1) move<uint8_t>(start, end);
        if (bytes == 2) move<uint16_t>(start, end);
        if (bytes == 4) move<uint32_t>(start, end);
        if (bytes == 8) move<uint64_t>(start, end);
    }
};

int32_t submit_cols(lss_pool *pool, bool scatter, void *dst, const void *src, const int64_t *cols, int64_t num_cols,
                    int64_t num_rows, int64_t wide_cols, int32_t bytes, const lss_submit *how, lss_ticket **ticket) {
    if (num_cols < 0 || num_rows < 0 || (bytes != 1 && bytes != 2 && bytes != 4 && bytes != 8)) {
        return fail(LSS_ERR_ARGUMENT, "expected sizes >= 0 and elements of 1, 2, 4 or 8 bytes, found %d bytes", bytes);
    }
    return submit_made(pool, how, ticket, [&] {
        auto work = std::make_unique<Cols>();
        work->dst = dst;
        work->src = src;
        work->cols = cols;
        work->num_cols = num_cols;
        work->num_rows = num_rows;
        work->wide_cols = wide_cols;
        work->bytes = bytes;
        work->per_item = std::max<int64_t>(1, kItemBytes / std::max<int64_t>(1, wide_cols * bytes));
        work->scatter = scatter;
        work->num_items = num_cols == 0 ? 0 : num_chunks(num_rows, work->per_item);
        return work;
    });
}

// Items are strips of columns: a column's rows are added by one thread, in order.
struct Colnorm : lss_ticket {
    const KernelTable *table = kernels();
    const void *x = nullptr;
    int32_t dtype = 0;
    int64_t num_rows = 0, num_cols = 0;
    float *result = nullptr;
    void run(int64_t item) override {
        const int64_t c = item * kColnormCols, cols = std::min(kColnormCols, num_cols - c);
        float block[kColnormCols];
        std::fill(result + c, result + c + cols, 0.0f);
        for (int64_t r = 0; r < num_rows; r += kColnormRows) {
            table->colnorm[dtype](at(x, dtype, r * num_cols + c), std::min(kColnormRows, num_rows - r), num_cols, cols,
                                  block, result + c);
        }
    }
};

struct Copy : lss_ticket {
    char *dst = nullptr;
    const char *src = nullptr;
    int64_t nbytes = 0;
    void run(int64_t item) override {
        const int64_t i = item * kItemBytes;
        std::memcpy(dst + i, src + i, static_cast<size_t>(std::min(kItemBytes, nbytes - i)));
    }
};

}  // namespace
}  // namespace lss

using namespace lss;

extern "C" {

void lss_install_root(lss_root_fn root, int64_t mode, int32_t (*set_threads)(int32_t)) {
    lss::installed_root = {root, mode, set_threads};
}


int32_t lss_adamw(lss_pool *pool, int32_t mode, lss_adamw_segment *segments, int64_t num_segments, int32_t stats,
                  const lss_submit *how, lss_ticket **ticket) {
    if (mode < LSS_COMMIT || mode > LSS_COMMIT_PEEK) return fail(LSS_ERR_ARGUMENT, "unknown mode %d", mode);
    for (int64_t s = 0; s < num_segments; ++s) {
        const int32_t status = check_segment(mode, segments[s], s);
        if (status != LSS_OK) return status;
    }
    return submit_made(pool, how, ticket,
                       [&] { return std::make_unique<AdamW>(mode, segments, num_segments, stats != 0); });
}

int32_t lss_sumsq(lss_pool *pool, const void *x, int32_t dtype, int64_t numel, double *result, const lss_submit *how,
                  lss_ticket **ticket) {
    if (!is_dtype(dtype) || numel < 0) return fail(LSS_ERR_ARGUMENT, "unknown dtype %d or negative size", dtype);
    return submit_made(pool, how, ticket, [&] {
        auto work = std::make_unique<SumSq>();
        work->x = x;
        work->dtype = dtype;
        work->numel = numel;
        work->result = result;
        work->blocks.resize(static_cast<size_t>(num_chunks(numel, kStatsBlock)));
        work->num_items = num_chunks(numel, kChunk);
        return work;
    });
}

int32_t lss_count_nonfinite(lss_pool *pool, const void *x, int32_t dtype, int64_t numel, int64_t *result,
                            const lss_submit *how, lss_ticket **ticket) {
    if (!is_dtype(dtype) || numel < 0) return fail(LSS_ERR_ARGUMENT, "unknown dtype %d or negative size", dtype);
    return submit_made(pool, how, ticket, [&] {
        auto work = std::make_unique<CountNonfinite>();
        work->x = x;
        work->dtype = dtype;
        work->numel = numel;
        work->result = result;
        work->num_items = num_chunks(numel, kChunk);
        return work;
    });
}

int32_t lss_cast_scale(lss_pool *pool, void *dst, int32_t dst_dtype, const void *src, int32_t src_dtype,
                       int64_t numel, double scale, const lss_submit *how, lss_ticket **ticket) {
    return submit_cast(pool, &KernelTable::cast_scale, dst, dst_dtype, src, src_dtype, numel, scale, how, ticket);
}

int32_t lss_accumulate(lss_pool *pool, void *acc, int32_t acc_dtype, const void *delta, int32_t delta_dtype,
                       int64_t numel, double scale, const lss_submit *how, lss_ticket **ticket) {
    return submit_cast(pool, &KernelTable::accumulate, acc, acc_dtype, delta, delta_dtype, numel, scale, how, ticket);
}

int32_t lss_rows_gather(lss_pool *pool, void *dst, const void *src, const int64_t *rows, int64_t num_rows,
                        int64_t row_bytes, const lss_submit *how, lss_ticket **ticket) {
    return submit_rows(pool, false, dst, src, rows, num_rows, row_bytes, how, ticket);
}

int32_t lss_rows_scatter(lss_pool *pool, void *dst, const void *src, const int64_t *rows, int64_t num_rows,
                         int64_t row_bytes, const lss_submit *how, lss_ticket **ticket) {
    return submit_rows(pool, true, dst, src, rows, num_rows, row_bytes, how, ticket);
}

int32_t lss_cols_gather(lss_pool *pool, void *dst, const void *src, const int64_t *cols, int64_t num_cols,
                        int64_t num_rows, int64_t src_cols, int32_t item_bytes, const lss_submit *how,
                        lss_ticket **ticket) {
    return submit_cols(pool, false, dst, src, cols, num_cols, num_rows, src_cols, item_bytes, how, ticket);
}

int32_t lss_cols_scatter(lss_pool *pool, void *dst, const void *src, const int64_t *cols, int64_t num_cols,
                         int64_t num_rows, int64_t dst_cols, int32_t item_bytes, const lss_submit *how,
                         lss_ticket **ticket) {
    return submit_cols(pool, true, dst, src, cols, num_cols, num_rows, dst_cols, item_bytes, how, ticket);
}

int32_t lss_colnorm(lss_pool *pool, const void *x, int32_t dtype, int64_t num_rows, int64_t num_cols, float *result,
                    const lss_submit *how, lss_ticket **ticket) {
    if (!is_dtype(dtype) || num_rows < 0 || num_cols < 0) return fail(LSS_ERR_ARGUMENT, "unknown dtype or negative size");
    return submit_made(pool, how, ticket, [&] {
        auto work = std::make_unique<Colnorm>();
        work->x = x;
        work->dtype = dtype;
        work->num_rows = num_rows;
        work->num_cols = num_cols;
        work->result = result;
        work->num_items = num_chunks(num_cols, kColnormCols);
        return work;
    });
}

int32_t lss_copy(lss_pool *pool, void *dst, const void *src, int64_t nbytes, const lss_submit *how,
                 lss_ticket **ticket) {
    if (nbytes < 0) return fail(LSS_ERR_ARGUMENT, "size must be >= 0");
    return submit_made(pool, how, ticket, [&] {
        auto work = std::make_unique<Copy>();
        work->dst = static_cast<char *>(dst);
        work->src = static_cast<const char *>(src);
        work->nbytes = nbytes;
        work->num_items = num_chunks(nbytes, kItemBytes);
        return work;
    });
}

void lss_bench_roof(float *p, float *m, float *v, const float *g, int64_t numel) {
    if (const KernelTable *table = kernels()) table->roof(p, m, v, g, numel);
}

}  // extern "C"
