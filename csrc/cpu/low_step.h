// An AdamW update of low-precision states ([Note: Low-precision update] in reference.py), in pieces that stay in cache.
#pragma once
#include "kernels.h"
#include "lss.h"

namespace lss {

// Elements [offset, offset + n) of a segment whose `rounding` is not LSS_AS_TORCH. In commit_peek the commit of a piece
// is stored before the peek starts from it, and weight_out is written last: it may be the gradient's memory.
void low_step(const KernelTable &table, const lss_adamw_segment &seg, int32_t mode, int64_t offset, int64_t n);

}  // namespace lss
