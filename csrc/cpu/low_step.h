// An AdamW update of low-precision states ([Note: Low-precision update] in reference.py), in pieces that stay in cache.
#pragma once
#include "kernels.h"
#include "lss.h"

namespace lss {

inline Coefficients coefficients(const lss_adamw_hyper &h) {
    return {static_cast<float>(h.weight_decay_factor),   static_cast<float>(h.l2),
            static_cast<float>(h.lerp_weight),           static_cast<float>(h.beta2),
            static_cast<float>(h.one_minus_beta2),       static_cast<float>(h.bias_correction2_sqrt),
            static_cast<float>(h.eps),                   static_cast<float>(h.neg_step_size)};
}

// Elements [offset, offset + n) of a segment whose `rounding` is not LSS_AS_TORCH. In commit_peek the commit of a piece
// is stored before the peek starts from it, and weight_out is written last: it may be the gradient's memory.
void low_step(const KernelTable &table, const lss_adamw_segment &seg, int32_t mode, int64_t offset, int64_t n);

}  // namespace lss
