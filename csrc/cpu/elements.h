// Where an element of a tensor of any dtype lies.
#pragma once
#include <cstdint>

#include "lss.h"

namespace lss {

inline int64_t item_bytes(int32_t dtype) { return dtype == LSS_F32 ? 4 : 2; }

inline const char *at(const void *base, int32_t dtype, int64_t i) {
    return base ? static_cast<const char *>(base) + i * item_bytes(dtype) : nullptr;
}
inline char *at(void *base, int32_t dtype, int64_t i) {
    return base ? static_cast<char *>(base) + i * item_bytes(dtype) : nullptr;
}

}  // namespace lss
