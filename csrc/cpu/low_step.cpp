#include "low_step.h"

#include <algorithm>

#include "elements.h"

namespace lss {
namespace {

LowScalars rounded(const lss_adamw_hyper &h) { return {coefficients(h), h.has_l2 != 0}; }

// What `prepare` does to the gradient; L2 is low_update's.
Scalars of_gradient(const lss_adamw_hyper &h) {
    Scalars k = {};
    k.grad_scale = static_cast<float>(h.grad_scale);
    k.clip_value = static_cast<float>(h.clip_value);
    k.has_clip = h.has_clip != 0;
    k.maximize = h.maximize != 0;
    return k;
}

// One piece of a segment in fp32.
struct Piece {
    const KernelTable &table;
    const lss_adamw_segment &seg;
    int64_t offset, n;
    alignas(64) float p[kLow], m[kLow], v[kLow], g[kLow];
    RandomWords random;

    Piece(const KernelTable &table_, const lss_adamw_segment &seg_, int64_t offset_, int64_t n_)
        : table(table_), seg(seg_), offset(offset_), n(n_) {}

    void read(float *to, const void *from, int32_t dtype) const {
        table.cast_scale[LSS_F32][dtype](to, at(from, dtype, offset), n, 1.0f);
    }

    void update(const void *grad, int32_t grad_dtype, const lss_adamw_hyper &hyper) {
        read(p, seg.param, seg.param_dtype);
        read(m, seg.exp_avg, seg.exp_avg_dtype);
        read(v, seg.exp_avg_sq, seg.exp_avg_sq_dtype);
        if (seg.compensation) {
            table.accumulate[LSS_F32][LSS_BF16](p, at(seg.compensation, LSS_BF16, offset), n, 1.0f);
        }
        const Scalars of_grad = of_gradient(hyper);
        const LowScalars k = rounded(hyper);
        table.prepare[grad_dtype](g, at(grad, grad_dtype, offset), p, n, &of_grad);
        table.low_update(p, m, v, g, n, &k);
        if (seg.rounding == LSS_STOCHASTIC) {
            table.random_words(&random, seg.key, seg.first_element + offset, hyper.step, n);
        }
    }

    void write(void *to, int32_t dtype, const float *x, const uint32_t *words, int32_t shift) const {
        if (dtype == LSS_BF16 && seg.rounding == LSS_STOCHASTIC) {
            table.round_stochastic(at(to, dtype, offset), x, words + random.skip, shift, n);
        } else {
            table.cast_scale[dtype][LSS_F32](at(to, dtype, offset), x, n, 1.0f);
        }
    }

    void store() {
        if (seg.compensation) {
            table.compensate(at(seg.param, LSS_BF16, offset), at(seg.compensation, LSS_BF16, offset), p, n);
        } else {
            write(seg.param, seg.param_dtype, p, random.first, 0);
        }
        write(seg.exp_avg, seg.exp_avg_dtype, m, random.first, 16);
        write(seg.exp_avg_sq, seg.exp_avg_sq_dtype, v, random.second, 0);
    }

    // A bf16 master is the weight, however it was rounded; an fp32 one is rounded to nearest.
    void store_weight() const {
        void *const to = at(seg.weight_out, seg.weight_out_dtype, offset);
        if (seg.param_dtype == LSS_BF16 && !seg.compensation && seg.rounding == LSS_STOCHASTIC) {
            table.round_stochastic(to, p, random.first + random.skip, 0, n);
        } else {
            table.cast_scale[seg.weight_out_dtype][LSS_F32](to, p, n, 1.0f);
        }
    }
};

}  // namespace

void low_step(const KernelTable &table, const lss_adamw_segment &seg, int32_t mode, int64_t offset, int64_t n) {
    for (int64_t i = 0; i < n; i += kLow) {
        Piece piece(table, seg, offset + i, std::min(kLow, n - i));
        piece.update(seg.grad, seg.grad_dtype, seg.hyper);
        if (mode != LSS_PEEK) piece.store();
        if (mode == LSS_COMMIT_PEEK) piece.update(seg.next_grad, seg.next_grad_dtype, seg.next_hyper);
        if (seg.weight_out_dtype != LSS_NONE) piece.store_weight();
    }
}

}  // namespace lss
